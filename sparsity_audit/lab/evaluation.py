"""What an evaluation says, as values.

Contract: shares and accuracies are fractions in [0, 1]; entropy and KL are in nats; a figure that is not
defined is None, never NaN, so that the record is plain JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sparsity_audit.lab.estimators import Estimate

__all__ = ["Drift", "Evaluation", "FormatRecord", "Optimum"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatRecord:
    """How often a format was chosen and how often it was right.

    Args:
        format: Its letter, or `other`.
        share: Share of all completions.
        accuracy: Share of right ones among its completions; None where there are none.
    """

    format: str
    share: float
    accuracy: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimum:
    """Distance to the policy that maximises E r − β KL(π‖reference); see `optimum`.

    Args:
        beta: β.
        kl: KL(policy‖optimum), nats a completion, mean over prompts.
        shares: The optimum's format shares, in the order of `Evaluation.formats`.
        share_distance: Total variation between those and the policy's.
    """

    beta: float
    kl: float
    shares: tuple[float, ...]
    share_distance: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """Where a policy stands against a reference.

    Args:
        kl_per_token: Mean of the exact KL(policy‖reference) over the positions of the policy's completions,
            nats.
        kl_per_completion: The same summed over a completion: KL of the two distributions of completions.
        reference_accuracy: The reference's own accuracy on the same prompts.
        optima: Distance to the KL-optimal policy, for each β.
    """

    kl_per_token: float
    kl_per_completion: float
    reference_accuracy: Estimate
    optima: tuple[Optimum, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The behaviour of one policy on one task.

    Args:
        task: The task's name.
        lengths: Weight by length of the problems.
        num_prompts: Prompts.
        num_samples: Samples of each.
        accuracy: pass@1 at temperature 1.
        greedy_accuracy: pass@1 of the most probable token at each step.
        pass_at: pass@k by k.
        majority_at: maj@k by k, over the answers behind the last `#`.
        formats: Share and accuracy by format.
        entropy_per_token: Mean entropy of the next token over the positions of the samples, nats.
        tokens_per_completion: Mean length, `<eos>` included.
        truncated_frac: Share of samples without `<eos>` within the limit.
        drift: Against the reference; None without one.
    """

    task: str
    lengths: Mapping[int, float]
    num_prompts: int
    num_samples: int
    accuracy: Estimate
    greedy_accuracy: Estimate
    pass_at: Mapping[int, Estimate]
    majority_at: Mapping[int, Estimate]
    formats: tuple[FormatRecord, ...]
    entropy_per_token: float
    tokens_per_completion: float
    truncated_frac: float
    drift: Drift | None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)
