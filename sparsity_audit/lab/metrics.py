"""What a training step says about itself.

Contract: figures of rollouts describe the policy *before* the step's first update, over completion tokens; a
step that made no rollouts has None there, never a repeated figure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from sparsity_audit.lab.batches import Batch, Scored, entropies
from sparsity_audit.lab.losses import exact_kl
from sparsity_audit.lab.tasks import OTHER_FORMAT, Task

__all__ = ["StepMetrics", "describe"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics:
    """One step. What describes rollouts was measured before the step's first update, over completion tokens.

    Args:
        step: From 1.
        updates: Updates that moved weights; 0 where nothing had a gradient.
        loss: Mean over the minibatches that had one; None without.
        grad_norm: Mean norm before clipping; None without an update.
        clip_frac: Share of tokens silenced by the ratio clip, mean over minibatches; None without a clip.
        weight_mean: Mean divergence weight; None without them.
        rows: Rows trained on, or dropped because they had no gradient.
        dropped_rows: Those dropped, of all epochs' first one.
        rollouts: Completions made in this step; 0 inside a round of expert iteration.
        groups: Their groups.
        zero_signal_groups: Groups that contributed no gradient.
        reward: Mean of the rewards the algorithm saw.
        accuracy: Mean verdict: `reward` but for shuffled rewards, where it stays what it was.
        truncated_frac: Share of completions cut by the length limit (reward 0).
        tokens_per_completion: Mean length.
        entropy: Of the policy, nats.
        kl_reference: Exact KL(policy‖base), nats a token.
        format_shares: Share of completions by format letter.
    """

    step: int
    updates: int
    loss: float | None
    grad_norm: float | None
    clip_frac: float | None
    weight_mean: float | None
    rows: int
    dropped_rows: int
    rollouts: int
    groups: int
    zero_signal_groups: int
    reward: float | None
    accuracy: float | None
    truncated_frac: float | None
    tokens_per_completion: float | None
    entropy: float | None
    kl_reference: float | None
    format_shares: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def describe(scored: Scored | None, batch: Batch, *, task: Task) -> dict[str, Any]:
    """The fields of `StepMetrics` that speak of rollouts.

    Args:
        scored: The step's rollouts; None where it made none.
        batch: What was made of them.
        task: Whose formats are counted.
    """
    if scored is None:
        names = ("reward", "accuracy", "truncated_frac", "tokens_per_completion", "entropy", "kl_reference")
        counts = ("rollouts", "groups", "zero_signal_groups")
        return {**dict.fromkeys(names), **dict.fromkeys(counts, 0), "format_shares": {}}
    rollouts, mask = scored.rollouts, scored.rollouts.completion_mask
    has_signal = (
        torch.ones(len(batch.rollouts), dtype=torch.bool)
        if batch.advantages is None
        else batch.advantages.any(dim=1)
    )
    groups = len(rollouts.group.unique())
    labels = Counter(task.format_of(text) for text in rollouts.texts())
    return {
        "rollouts": len(rollouts),
        "groups": groups,
        "zero_signal_groups": groups - len(batch.rollouts.group[has_signal].unique()),
        "reward": float(rollouts.rewards.mean()),
        "accuracy": float(rollouts.rewards.mean()),
        "truncated_frac": float(rollouts.truncated.float().mean()),
        "tokens_per_completion": float(mask.sum(dim=1).float().mean()),
        "entropy": float(entropies(scored.policy.logits)[mask].mean()),
        "kl_reference": float(exact_kl(scored.policy.logits, scored.reference.logits)[mask].mean()),
        "format_shares": {name: labels[name] / len(rollouts) for name in (*task.formats, OTHER_FORMAT)},
    }
