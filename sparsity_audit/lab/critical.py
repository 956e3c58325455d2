"""Which positions decide the outcome, and whether the policy hesitates there.

Contract: prompts come with their written solution in one format; positions are counted in it, so position t
means the same place for every prompt. At each position three things are measured on the solution's prefix:

- *certainty* J, Shannon's (`losses.shannon_certainty`), and ΔJ = J(position) − the mean of J over the
  solution's positions;
- *decisiveness*: the accuracy when the token there is forced to be right, and when it is forced to be a wrong
  one, drawn from the policy's own distribution without the right token; the policy goes on from there;
- the probability of the right token.

A position is *critical* when the policy is less certain there than elsewhere (the interval of ΔJ lies
below 0) and when the drop in accuracy is decisive (its interval lies above `min_drop`). Intervals are over
prompts, paired within a prompt.

Source: 2502.06533 §4, which finds such positions by looking at errors of a digit adder. Departures: the
substitution is made rather than observed, so that a position's effect is not confounded with how hard
the prompt is; and prefixes are the written solution, so a position is judged before any other error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparsity_audit.lab.estimators import Estimate, Interval, estimate, interval
from sparsity_audit.lab.generate import generate
from sparsity_audit.lab.losses import shannon_certainty
from sparsity_audit.lab.model import Llama
from sparsity_audit.lab.rollout import Rollouts, as_rollouts, pad_prompts, teacher_forced
from sparsity_audit.lab.tasks import Problem, Task
from sparsity_audit.lab.vocabulary import EOS, PAD, TOKENS, decode
from sparsity_audit.tokens.critical import substitutes

__all__ = [
    "CRITICAL_FORMAT",
    "CRITICAL_VERSION",
    "Critical",
    "Position",
    "StepProbabilities",
    "find_critical",
    "right_probabilities",
]

CRITICAL_FORMAT = "sparsity-audit/lab-critical"
CRITICAL_VERSION = 1
_ROWS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """One place of the solution.

    Args:
        index: Counted from 0; the format's letter is 0.
        example: The token there in the first prompt's solution.
        num_tokens: How many different tokens the solutions have there; 1 is punctuation.
        certainty: Mean J, in [0, 1].
        delta_certainty: ΔJ.
        right_probability: Mean probability of the right token.
        accuracy_right: Accuracy after the right token.
        accuracy_wrong: Accuracy after a wrong one.
        drop: accuracy_right − accuracy_wrong.
        critical: Whether the policy hesitates here and the outcome hangs on it.
    """

    index: int
    example: str
    num_tokens: int
    certainty: float
    delta_certainty: Interval
    right_probability: float
    accuracy_right: Estimate
    accuracy_wrong: Estimate
    drop: Interval
    critical: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class StepProbabilities:
    """One saved step of a run.

    Args:
        step: Its number.
        by_position: Mean probability of the right token, in the order of `Critical.positions`.
        critical: Mean over the critical positions; None where there is none.
        others: Mean over the others; None where there is none.
        gain: Mean over prompts of (critical − others) now minus the same at the first step; None as above.
    """

    step: int
    by_position: tuple[float, ...]
    critical: Interval | None
    others: Interval | None
    gain: Interval | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Critical:
    """Critical positions of one policy.

    Args:
        format: `sparsity-audit/lab-critical`.
        version: Version of this record.
        checkpoint: The policy.
        task: The task's name.
        length: Digits of the problems.
        solution_format: Format of the written solutions.
        num_prompts: Prompts.
        min_drop: Least drop of accuracy that is called decisive.
        example: The first prompt and its solution.
        mean_certainty: Mean of J over positions and prompts.
        positions: All positions that every solution has.
        run: The run whose saved steps follow, in words; None without one.
        steps: Probability of the right token at its saved steps.
    """

    format: str = CRITICAL_FORMAT
    version: int = CRITICAL_VERSION
    checkpoint: str
    task: str
    length: int
    solution_format: str
    num_prompts: int
    min_drop: float
    example: str
    mean_certainty: float
    positions: tuple[Position, ...]
    run: str | None = None
    steps: tuple[StepProbabilities, ...] = ()

    @property
    def critical(self) -> tuple[int, ...]:
        """Indices of the critical positions."""
        return tuple(position.index for position in self.positions if position.critical)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def find_critical(
    model: Llama,
    problems: Sequence[Problem],
    *,
    task: Task,
    fmt: str,
    checkpoint: str,
    min_drop: float,
    generator: torch.Generator,
    on_position: Callable[[int, int], None],
) -> Critical:
    """Measure every position that all solutions share.

    Args:
        model: The policy.
        problems: Prompts of one length.
        task: Writes the solutions and verifies.
        fmt: Format of the solutions.
        checkpoint: What the record calls the policy.
        min_drop: Least drop of accuracy that is called decisive.
        generator: Of wrong tokens and continuations.
        on_position: Called with positions done and in all.
    """
    written = as_rollouts(problems, [task.write(problem, fmt) for problem in problems], task=task)
    logits = _logits(model, written)
    mask = written.completion_mask
    certainty = shannon_certainty(logits).double()
    inside = torch.where(mask, certainty, 0.0)
    mean = inside.sum(dim=1) / mask.sum(dim=1)
    right = _probabilities(logits, written)
    shared = range(int(mask.all(dim=0).sum()))
    positions = []
    for index in shared:
        tokens = written.completions[:, index]
        wrong = _wrong_tokens(logits[:, index], tokens, generator)
        after_right, after_wrong = (
            _accuracies(model, problems, written, index, forced, task=task, generator=generator)
            for forced in (tokens, wrong)
        )
        delta = interval((certainty[:, index] - mean).tolist())
        drop = interval((after_right - after_wrong).tolist())
        positions.append(
            Position(
                index=index,
                example=TOKENS[int(tokens[0])],
                num_tokens=len(tokens.unique()),
                certainty=float(certainty[:, index].mean()),
                delta_certainty=delta,
                right_probability=float(right[:, index].mean()),
                accuracy_right=estimate(after_right.tolist()),
                accuracy_wrong=estimate(after_wrong.tolist()),
                drop=drop,
                critical=delta.high < 0 and drop.low > min_drop,
            )
        )
        on_position(index + 1, len(shared))
    return Critical(
        checkpoint=checkpoint,
        task=task.name,
        length=max(problem.length for problem in problems),
        solution_format=fmt,
        num_prompts=len(problems),
        min_drop=min_drop,
        example=problems[0].prompt + written.texts()[0],
        mean_certainty=float(mean.mean()),
        positions=tuple(positions),
    )


def right_probabilities(
    found: Critical, models: Sequence[tuple[int, Llama]], problems: Sequence[Problem], *, task: Task
) -> tuple[StepProbabilities, ...]:
    """The probability of the right token at each position, at saved steps.

    Args:
        found: Positions, with those that are critical.
        models: (step, policy); the first one is what the others are compared with.
        problems: Prompts, as for `find_critical`.
        task: As there.
    """
    fmt = found.solution_format
    written = as_rollouts(problems, [task.write(problem, fmt) for problem in problems], task=task)
    critical = torch.tensor([position.critical for position in found.positions])
    steps: list[StepProbabilities] = []
    first: Tensor | None = None
    for step, model in models:
        right = _probabilities(_logits(model, written), written)[:, : len(critical)]
        row = StepProbabilities(
            step=step,
            by_position=tuple(right.mean(dim=0).tolist()),
            critical=interval(right[:, critical].mean(dim=1).tolist()) if critical.any() else None,
            others=interval(right[:, ~critical].mean(dim=1).tolist()) if not critical.all() else None,
            gain=None,
        )
        if row.critical is not None and row.others is not None:
            ahead = right[:, critical].mean(dim=1) - right[:, ~critical].mean(dim=1)
            first = ahead if first is None else first
            row = replace(row, gain=interval((ahead - first).tolist()))
        steps.append(row)
    return tuple(steps)


@torch.no_grad()
def _logits(model: Llama, written: Rollouts) -> Tensor:
    return teacher_forced(model, written)


def _probabilities(logits: Tensor, written: Rollouts) -> Tensor:
    """float64[prompts, seq]: of the solution's own tokens."""
    distribution = torch.softmax(logits.double(), dim=-1)
    return distribution.gather(-1, written.completions.unsqueeze(-1)).squeeze(-1)


def _wrong_tokens(logits: Tensor, right: Tensor, generator: torch.Generator) -> Tensor:
    """int64[prompts]: one token each from softmax(logits) without the right one and without `<pad>`."""
    noise = torch.empty_like(logits).exponential_(generator=generator)
    return substitutes(logits, right, never=(PAD,), noise=noise)


def _accuracies(
    model: Llama,
    problems: Sequence[Problem],
    written: Rollouts,
    index: int,
    forced: Tensor,
    *,
    task: Task,
    generator: torch.Generator,
) -> Tensor:
    """float64[prompts]: 1 where the policy ends right after the solution's prefix and the forced token."""
    prefixes = torch.cat((written.completions[:, :index], forced[:, None]), dim=1)
    limit = task.max_new_tokens(max(problem.length for problem in problems)) - index - 1
    verdicts: list[float] = []
    for start in range(0, len(problems), _ROWS):
        part = slice(start, start + _ROWS)
        texts = _continued(model, problems[part], prefixes[part], limit=limit, generator=generator)
        verdicts += [float(task.verify(p, text)) for p, text in zip(problems[part], texts, strict=True)]
    return torch.tensor(verdicts, dtype=torch.float64)


def _continued(
    model: Llama, problems: Sequence[Problem], prefixes: Tensor, *, limit: int, generator: torch.Generator
) -> list[str]:
    """Prefix and sampled continuation of each prompt, at temperature 1; a forced `<eos>` ends at once."""
    prompts, prompt_mask = pad_prompts(problems)
    going = torch.cat((prompts, prefixes), dim=1)
    attention = torch.cat((prompt_mask, torch.ones_like(prefixes, dtype=torch.bool)), dim=1)
    made = generate(model, going, attention, max_new_tokens=limit, temperature=1.0, generator=generator)
    texts = []
    for prefix, tokens, mask in zip(prefixes.tolist(), made.tokens, made.mask, strict=True):
        ended = prefix[-1] == EOS
        texts.append(decode(prefix + ([] if ended else tokens[mask].tolist())))
    return texts
