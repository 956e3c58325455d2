"""Critical tokens as a record: positions, groups, intervals over prompts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sparsity_audit import __version__
from sparsity_audit.api.tokens_cross_records import by_prompt
from sparsity_audit.api.tokens_diverge import model_records
from sparsity_audit.models.score import Scored
from sparsity_audit.report.critical import CriticalGroup, CriticalPosition, TokensCritical
from sparsity_audit.report.tokens import FailedPrompt
from sparsity_audit.stats.paired import mean_interval
from sparsity_audit.tokens.critical import Place, Reading

if TYPE_CHECKING:
    from sparsity_audit.api.tokens_diverge import Question

__all__ = ["CriticalFound", "critical_report"]

_BEFORE = 12
"""Tokens of context that a position is shown with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticalFound:
    """What was measured.

    Args:
        keys: (prompt, sample) of each sequence.
        sequences: Prompts with completions.
        reading: What the model says along them.
        groups: Name → places.
        scores: (place, is it the kept token) → scores of the continuations, NaN without one.
        chosen_by: Where the places came from.
        completions: Whose completions they are.
        failed: What is not in the figures.
    """

    keys: tuple[tuple[int, int], ...]
    sequences: tuple[Scored, ...]
    reading: Reading
    groups: Mapping[str, tuple[Place, ...]]
    scores: Mapping[tuple[Place, bool], tuple[float, ...]]
    chosen_by: str
    completions: str
    failed: tuple[FailedPrompt, ...]


def critical_report(
    question: Question,
    found: CriticalFound,
    *,
    verifier: str,
    num_continuations: int,
    temperature: float,
    min_drop: float,
    seed: int,
) -> TokensCritical:
    """The record; arguments as of `tokens_critical`."""
    rows = [
        _position(question, found, name, place) for name, group in found.groups.items() for place in group
    ]
    stakes, groups = {}, []
    for name in found.groups:
        mine = [row for row in rows if row.group == name]
        groups.append(_group(question, name, mine, min_drop=min_drop, seed=seed))
        stakes[name] = _by_prompt(question, mine, "at_stake")
    known = [math.isnan(score) for each in found.scores.values() for score in each]
    return TokensCritical(
        tool=f"sparsity-audit {__version__}",
        model=model_records(question)[0],
        source=question.source,
        verifier=verifier,
        chosen_by=found.chosen_by,
        completions=found.completions,
        num_prompts=len({number for number, _ in found.keys}),
        num_completions=len(found.keys),
        continuations=num_continuations,
        temperature=temperature,
        min_drop=min_drop,
        seed=seed,
        mean_certainty=float(np.concatenate(found.reading.certainty).mean()),
        groups=tuple(groups),
        lead=mean_interval(stakes["chosen"] - stakes["random"], seed=seed),
        positions=tuple(rows),
        unjudged=sum(known),
        failed=found.failed,
        notes=question.notes,
    )


def _position(question: Question, found: CriticalFound, group: str, place: Place) -> CriticalPosition:
    number, which = found.keys[place.sequence]
    completion = found.sequences[place.sequence].completion
    values, decode = found.reading.certainty[place.sequence], question.tokenizer.decode
    kept, other = (_mean(found.scores[place, is_kept]) for is_kept in (True, False))
    probability = float(found.reading.kept_probability[place.sequence][place.position])
    drop = None if kept is None or other is None else kept - other
    return CriticalPosition(
        group=group,
        prompt=number,
        name={p.number: p.line.name for p in question.prompts}[number],
        sample=which,
        position=place.position,
        before=decode(completion[max(0, place.position - _BEFORE) : place.position]),
        token=decode([completion[place.position]]),
        substitute=decode([int(found.reading.substitute[place.sequence][place.position])]),
        certainty=float(values[place.position]),
        delta_certainty=float(values[place.position] - values.mean()),
        kept_probability=probability,
        score_kept=kept,
        score_substituted=other,
        drop=drop,
        at_stake=None if drop is None else (1 - probability) * drop,
    )


def _by_prompt(question: Question, rows: Sequence[CriticalPosition], name: str) -> np.ndarray:
    """Mean of each prompt of the run; NaN where it has no such position."""
    order = [prompt.number for prompt in question.prompts]
    values = [np.nan if (v := getattr(row, name)) is None else v for row in rows]
    found = by_prompt(np.array([*values, *[np.nan] * len(order)]), [*(r.prompt for r in rows), *order])
    first = list(dict.fromkeys([*(row.prompt for row in rows), *order]))
    return found[[first.index(number) for number in order]]


def _group(
    question: Question, name: str, rows: Sequence[CriticalPosition], *, min_drop: float, seed: int
) -> CriticalGroup:
    figures = ("delta_certainty", "kept_probability", "score_kept", "score_substituted", "drop", "at_stake")
    means = {figure: mean_interval(_by_prompt(question, rows, figure), seed=seed) for figure in figures}
    delta, drop = means["delta_certainty"], means["drop"]
    critical = delta.high is not None and drop.low is not None and delta.high < 0 and drop.low > min_drop
    return CriticalGroup(name=name, positions=len(rows), critical=critical, **means)


def _mean(scores: Sequence[float]) -> float | None:
    known = [score for score in scores if not math.isnan(score)]
    return math.fsum(known) / len(known) if known else None
