"""Finished points as a record: counts, accuracies with intervals, shares of the gap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from sparsity_audit.api.tokens_cross_points import DonePoint
from sparsity_audit.api.tokens_diverge import model_records
from sparsity_audit.report.cross import CrossPoint, CrossReport, Direction, Unjudged
from sparsity_audit.stats.paired import gap_share, mean_interval
from sparsity_audit.tokens.calibration import SPENT_FRAC

if TYPE_CHECKING:
    from sparsity_audit.api.tokens_diverge import Question

__all__ = ["by_prompt", "cross_report"]

_MAX_LISTED = 100


def by_prompt(scores: np.ndarray, prompts: Sequence[int]) -> np.ndarray:
    """float64[prompts]: mean score of each prompt's completions that have one; NaN where none has."""
    order = {number: place for place, number in enumerate(dict.fromkeys(prompts))}
    places = np.array([order[number] for number in prompts])
    known = ~np.isnan(scores)
    sums = np.bincount(places[known], scores[known], minlength=len(order))
    counts = np.bincount(places[known], minlength=len(order))
    return np.divide(sums, counts, out=np.full(len(order), np.nan), where=counts > 0)


def cross_report(
    question: Question,
    points: Sequence[DonePoint],
    *,
    rows: Sequence[tuple[int, int]],
    verifier: str,
    num_samples: int,
    temperature: float,
    seed: int,
    tool: str,
) -> CrossReport:
    """The record; arguments as of `tokens_cross_sample`."""
    prompts = [prompt for prompt, _ in rows]
    scores = {p.key: by_prompt(p.point.scores, prompts) for p in points}
    ends: dict[Direction, np.ndarray] = {p.direction: scores[p.key] for p in points if p.selector == "none"}
    base, tuned = ends["forward"], ends["reverse"]
    goals = {"forward": tuned, "reverse": base}
    records = tuple(
        _record(p, scores[p.key], start=ends[p.direction], goal=goals[p.direction], seed=seed) for p in points
    )
    names = {prompt.number: prompt.line.name for prompt in question.prompts}
    unjudged = [
        Unjudged(point=p.key, prompt=rows[row][0], name=names[rows[row][0]], sample=rows[row][1], reason=text)
        for p in points
        for row, text in p.point.reasons.items()
    ]
    return CrossReport(
        tool=tool,
        **dict(zip(("base", "tuned"), model_records(question), strict=True)),
        source=question.source,
        verifier=verifier,
        num_prompts=len(question.prompts),
        num_samples=num_samples,
        temperature=temperature,
        max_new_tokens=question.max_new_tokens,
        vocab_size=question.vocabulary.size,
        seed=seed,
        base_accuracy=mean_interval(base, seed=seed),
        tuned_accuracy=mean_interval(tuned, seed=seed),
        gap=mean_interval(tuned - base, seed=seed),
        points=records,
        failed=question.failed,
        unjudged=tuple(unjudged[:_MAX_LISTED]),
        notes=(*question.notes, *_notes(records, len(unjudged))),
    )


def _record(
    done: DonePoint, scores: np.ndarray, *, start: np.ndarray, goal: np.ndarray, seed: int
) -> CrossPoint:
    samples = done.point.samples
    completions, tokens = len(samples.lengths), int(samples.lengths.sum())
    switched, changed = int(samples.switched.sum()), int(samples.changed.sum())
    spent = None
    if done.budget is not None:
        spent = float((samples.switched.sum(dim=1) >= done.budget).double().mean())
    return CrossPoint(
        key=done.key,
        direction=done.direction,
        selector=done.selector,
        asked=done.asked,
        matches=done.matches,
        threshold=done.point.threshold,
        budget=done.budget,
        completions=completions,
        tokens=tokens,
        switched=switched,
        changed=changed,
        switched_frac=switched / max(1, tokens),
        changed_frac=changed / max(1, tokens),
        switched_per_completion=switched / max(1, completions),
        spent_frac=spent,
        truncated=int((samples.truncated & ~samples.failed).sum()),
        broken=int(samples.failed.sum()),
        unjudged=len(done.point.reasons),
        accuracy=mean_interval(scores, seed=seed),
        difference=mean_interval(scores - start, seed=seed),
        recovered=gap_share(start, goal, scores),
    )


def _notes(records: Sequence[CrossPoint], num_unjudged: int) -> list[str]:
    notes = []
    by_key = {point.key: point for point in records}
    for point in records:
        if point.matches is None or point.selector == "first":
            continue
        wanted = by_key[point.matches].switched
        if abs(point.switched - wanted) > 0.1 * wanted:
            notes.append(f"{point.key} switched {point.switched:,} tokens, {point.matches} {wanted:,}")
    unspent = [p for p in records if p.selector == "js" and (p.spent_frac or 1) < SPENT_FRAC - 0.05]
    notes += [f"{p.key} spent its budget in {p.spent_frac:.0%} of the completions" for p in unspent]
    if num_unjudged:
        notes.append(
            f"{num_unjudged:,} completions have no score; accuracies and differences are over the others"
        )
    return notes
