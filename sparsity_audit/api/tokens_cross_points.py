"""The points of a cross-sampling: which rules are tried, and the controls that belong to each.

Contract: a direction begins with the primary model alone, whose signals calibrate what is asked for as a
share or a budget. Each control makes as many interventions as its point: *random* the same number in every
completion, at positions drawn beforehand from the primary model's own completion of that row; *entropy* by a
threshold on the primary model's entropy, adjusted up to six times until the total is within 5 %, and for a
budget the one that spends it in as many completions; *first* the first k positions.
Every point draws with the same noise, row by row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sparsity_audit.api.tokens_cross_store import CrossStore, StoredPoint
from sparsity_audit.errors import UsageError
from sparsity_audit.models.noise import row_seed
from sparsity_audit.report.cross import Direction, Selector
from sparsity_audit.tokens.calibration import budget_threshold, random_positions, share_threshold
from sparsity_audit.tokens.intervention import CrossSamples
from sparsity_audit.tokens.rules import Above, At, First, Rule

__all__ = ["CONTROLS", "Control", "DonePoint", "Setting", "run_direction", "settings_of"]

Control = Literal["random", "entropy", "first"]
CONTROLS: tuple[Control, ...] = ("random", "entropy", "first")

_WORDS = {"random": "as many random positions", "entropy": "as many by entropy", "first": "first positions"}
_ROUNDS = 6
_NEAR = 0.05
_NEVER = Above(signal="js", threshold=math.inf)

Sampler = Callable[[str, Direction, Rule], CrossSamples]
"""(the point's name, direction, rule) → completions of all rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How much is asked for: a `threshold` in nats, a `share` of positions, or a `budget` of tokens."""

    kind: Literal["threshold", "share", "budget"]
    amount: float

    @property
    def key(self) -> str:
        """The setting as part of a name."""
        return f"{self.kind}-{self.amount:g}"

    @property
    def words(self) -> str:
        """The setting for readers."""
        if self.kind == "threshold":
            return f"js > {self.amount:g}"
        if self.kind == "share":
            return f"{100 * self.amount:g} % of positions"
        return f"{self.amount:g} token{'s' * (self.amount != 1)} a completion"


def settings_of(
    thresholds: Sequence[float], shares: Sequence[float], budgets: Sequence[int]
) -> tuple[Setting, ...]:
    """All that was asked for, once each. Raises UsageError where a number cannot be, or nothing is asked."""
    for name, values, fits, expected in (
        ("thresholds", thresholds, lambda v: v >= 0, "numbers ≥ 0 in nats"),
        ("shares", shares, lambda v: 0 < v <= 1, "above 0, at most 1"),
        ("budgets", budgets, lambda v: v >= 1 and v == int(v), "whole numbers ≥ 1"),
    ):
        for value in values:
            if not fits(value):
                raise UsageError(name, str(value), expected=expected)
    found = [Setting(kind="threshold", amount=float(v)) for v in thresholds]
    found += [Setting(kind="share", amount=float(v)) for v in shares]
    found += [Setting(kind="budget", amount=float(v)) for v in budgets]
    if not found:
        raise UsageError(
            "cross-sampling", "nothing is asked for", remedy="--thresholds, --shares or --budgets"
        )
    return tuple(dict.fromkeys(found))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DonePoint:
    """A point with what belongs to its name; fields as of `report.cross.CrossPoint`."""

    key: str
    direction: Direction
    selector: Selector
    asked: str
    matches: str | None
    budget: int | None
    point: StoredPoint


@dataclass(frozen=True, slots=True, kw_only=True)
class _Direction:
    """What the points of one direction share."""

    name: Direction
    rows: Sequence[tuple[int, int]]
    seed: int
    store: CrossStore
    sample: Sampler
    judge: Callable[[str, CrossSamples], tuple[np.ndarray, dict[int, str]]]


def run_direction(
    name: Direction,
    settings: Sequence[Setting],
    controls: Sequence[Control],
    *,
    rows: Sequence[tuple[int, int]],
    seed: int,
    store: CrossStore,
    sample: Sampler,
    judge: Callable[[str, CrossSamples], tuple[np.ndarray, dict[int, str]]],
) -> list[DonePoint]:
    """All points of a direction; those in the store are not made again.

    Args:
        name: Who writes and who takes over.
        settings: What is asked for.
        controls: Which controls each rule gets; `first` is for budgets alone.
        rows: (prompt, sample) of each row.
        seed: Of random positions.
        store: Finished points.
        sample: Makes completions.
        judge: Scores of completions, and why some have none.
    """
    side = _Direction(name=name, rows=rows, seed=seed, store=store, sample=sample, judge=judge)
    alone = _done(side, f"{name}-alone", lambda key: (_NEVER, sample(key, name, _NEVER)))
    made = [_named(side, f"{name}-alone", "none", "", None, None, alone)]
    for setting in settings:
        budget = int(setting.amount) if setting.kind == "budget" else None
        key = f"{name}-js-{setting.key}"
        rule = Above(signal="js", threshold=_threshold(setting, alone.samples), budget=budget)
        point = _done(side, key, lambda key, rule=rule: (rule, sample(key, name, rule)))
        made.append(_named(side, key, "js", setting.words, None, budget, point))
        for control in controls:
            if control == "first" and budget is None:
                continue
            made.append(_control(side, control, setting, alone=alone, to=(key, point)))
    return made


def _control(
    side: _Direction,
    control: Control,
    setting: Setting,
    *,
    alone: StoredPoint,
    to: tuple[str, StoredPoint],
) -> DonePoint:
    """One control of a point."""
    matches, point = to
    key = f"{side.name}-{control}-{setting.key}"
    budget = int(setting.amount) if setting.kind == "budget" else None

    def make(key: str) -> tuple[Rule, CrossSamples]:
        if control == "entropy":
            return _entropy_matched(side, key, budget=budget, alone=alone, point=point)
        rule = First(num=budget or 1) if control == "first" else _random_rule(side, key, alone, point)
        return rule, side.sample(key, side.name, rule)

    done = _done(side, key, make)
    return _named(side, key, control, f"{setting.words}: {_WORDS[control]}", matches, budget, done)


def _random_rule(side: _Direction, key: str, alone: StoredPoint, point: StoredPoint) -> At:
    return At(
        positions=random_positions(
            point.samples.switched.sum(dim=1),
            alone.samples.lengths,
            seeds=[row_seed(side.seed, "random positions", key, *row) for row in side.rows],
        )
    )


def _entropy_matched(
    side: _Direction,
    key: str,
    *,
    budget: int | None,
    alone: StoredPoint,
    point: StoredPoint,
) -> tuple[Rule, CrossSamples]:
    """Entropy above a threshold, in as many positions as the point switched."""
    if budget is not None:
        spent = float((point.samples.switched.sum(dim=1) >= budget).double().mean())
        threshold = math.inf
        if spent > 0:
            entropy, written = alone.samples.entropy, alone.samples.written
            threshold = budget_threshold(entropy, written, budget=budget, spent_frac=spent)
        rule = Above(signal="entropy", threshold=threshold, budget=budget)
        return rule, side.sample(key, side.name, rule)
    return _nearest_rule(side, key, wanted=int(point.samples.switched.sum()), seen=point.samples)


def _nearest_rule(
    side: _Direction, key: str, *, wanted: int, seen: CrossSamples
) -> tuple[Rule, CrossSamples]:
    """The entropy threshold, of those tried, whose number of interventions is nearest to `wanted`.

    An intervention changes the entropies behind it, so the quantile of one round is only a guess for the
    next; once one threshold made too many and another too few, the next lies between them.
    """
    best: tuple[Above, CrossSamples] | None = None
    too_few, too_many = math.inf, 0.0
    for _ in range(_ROUNDS):
        share = min(1.0, wanted / max(1, int(seen.lengths.sum())))
        threshold = share_threshold(seen.entropy, seen.written, share=share)
        if not too_many < threshold < too_few and too_many < too_few < math.inf:
            threshold = (too_many + too_few) / 2
        rule = Above(signal="entropy", threshold=threshold)
        seen = side.sample(key, side.name, rule)
        found = int(seen.switched.sum())
        if best is None or abs(found - wanted) < abs(int(best[1].switched.sum()) - wanted):
            best = rule, seen
        if abs(found - wanted) <= _NEAR * wanted:
            break
        if found < wanted:
            too_few = min(too_few, threshold)
        else:
            too_many = max(too_many, threshold)
    assert best is not None, "there is a first round"
    return best


def _threshold(setting: Setting, alone: CrossSamples) -> float:
    """The JS above which the other model takes over."""
    if setting.kind == "threshold":
        return setting.amount
    if setting.kind == "share":
        return share_threshold(alone.js, alone.written, share=setting.amount)
    return budget_threshold(alone.js, alone.written, budget=int(setting.amount))


def _done(side: _Direction, key: str, make: Callable[[str], tuple[Rule, CrossSamples]]) -> StoredPoint:
    """The point from the store, or made, judged and stored."""
    found = side.store.load(key)
    if found is not None:
        return found
    rule, samples = make(key)
    scores, reasons = side.judge(key, samples)
    threshold = rule.threshold if isinstance(rule, Above) and math.isfinite(rule.threshold) else None
    point = StoredPoint(samples=samples, scores=scores, threshold=threshold, reasons=reasons)
    side.store.save(key, point)
    return point


def _named(
    side: _Direction,
    key: str,
    selector: Selector,
    asked: str,
    matches: str | None,
    budget: int | None,
    point: StoredPoint,
) -> DonePoint:
    return DonePoint(
        key=key,
        direction=side.name,
        selector=selector,
        asked=asked,
        matches=matches,
        budget=budget,
        point=point,
    )
