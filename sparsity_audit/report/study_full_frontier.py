"""Part e of a full study: accuracy against KL for standard and prioritised penalties.

Contract: penalties are compared at equal KL, never at equal coefficients: a prioritised penalty is smaller at
the same coefficient and lets the policy go further. Each penalty and seed has a frontier, its runs joined by
straight lines over log KL with the run without a penalty as its end; two frontiers are compared by their mean
gap over the KL that the penalised runs of both reach.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparsity_audit.lab.estimators import Interval
from sparsity_audit.report.lab_critical import error_bars
from sparsity_audit.report.study_full import FullClaim, Table
from sparsity_audit.report.study_full_facts import FullFacts, FullRun
from sparsity_audit.report.study_full_judging import (
    RULE,
    by_seed,
    decided,
    not_measured,
    shown_estimate,
    shown_interval,
    signed,
)
from sparsity_audit.report.style import COLOURS, INK, MARKERS, WIDTHS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_frontier", "frontier_claims", "frontier_gap"]

_SWEEP, _NONE, _STANDARD = "frontier", "no-penalty", "standard"
_KINDS = {"shannon": "Shannon's certainty (eq. 1–2)", "max-prob": "the largest probability (authors' code)"}
_GRID = 41
_Z = 1.959964


@dataclass(frozen=True, slots=True, kw_only=True)
class _Point:
    """One run on a frontier: log KL, accuracy, its standard error."""

    log_kl: float
    accuracy: float
    error: float


def frontier_claims(facts: FullFacts) -> tuple[FullClaim, ...]:
    """A claim for either certainty."""
    if not facts.of(_SWEEP):
        return tuple(
            not_measured(f"frontier-{kind}", part="e", title=_title(what), source="2502.06533")
            for kind, what in _KINDS.items()
        )
    return tuple(
        _claim(facts, kind, what, is_first=not place) for place, (kind, what) in enumerate(_KINDS.items())
    )


def _title(what: str) -> str:
    return f"A KL penalty weighted by {what} buys more accuracy at equal KL"


def _claim(facts: FullFacts, kind: str, what: str, *, is_first: bool) -> FullClaim:
    gaps = {seed: frontier_gap(facts, kind, seed) for seed in facts.seeds(_SWEEP)}
    known = [gap for gap in gaps.values() if gap is not None]
    return FullClaim(
        key=f"frontier-{kind}",
        part="e",
        title=_title(what),
        source="2502.06533",
        goal=f"mean gap of accuracy to the standard penalty over the KL that both reach: {RULE}",
        verdict=decided(known),
        reading="At equal KL the gap is "
        + " and ".join("undefined" if gap is None else shown_interval(gap) for gap in gaps.values())
        + " (one a seed), frontiers interpolated between their coefficients. "
        + _at_equal_coefficients(facts, kind),
        tables=(_table(facts),) if is_first else (),
        caption="Accuracy against KL(policy‖base), one panel a seed: runs with each kind of penalty, "
        "coefficients rising to the left, and the run without one; 95 % intervals over problems."
        if is_first
        else "",
    )


def _at_equal_coefficients(facts: FullFacts, kind: str) -> str:
    parts = []
    for coefficient, arm in _arms(facts, kind).items():
        standard = _arms(facts, _STANDARD).get(coefficient)
        if standard is None:
            continue
        ones, others = (by_seed(facts.of(_SWEEP, name)) for name in (arm, standard))
        gaps = [ones[s].tests[0].accuracy.value - others[s].tests[0].accuracy.value for s in ones]
        ratios = [(ones[s].tests[0].kl or 0.0) / kl for s in ones if (kl := others[s].tests[0].kl)]
        mean_ratio = f"{sum(ratios) / len(ratios):.1f}" if ratios else "–"
        parts.append(
            f"at coefficient {coefficient:g} {signed(sum(gaps) / len(gaps))} with {mean_ratio} × the KL"
        )
    return f"At equal coefficients it would have read: {'; '.join(parts)}." if parts else ""


def _arms(facts: FullFacts, kind: str) -> dict[float, str]:
    """Coefficient → arm."""
    names = dict.fromkeys(run.arm for run in facts.of(_SWEEP) if run.arm.startswith(f"{kind}-"))
    return {float(name.removeprefix(f"{kind}-")): name for name in names}


def frontier_gap(facts: FullFacts, kind: str, seed: int) -> Interval | None:
    """Mean of accuracy(kind) − accuracy(standard) over the shared KL; None where they share none.

    The interval propagates each run's error through the interpolation, runs taken as independent. That the
    problems are the same for all adds an error that both frontiers share, and that the difference loses.
    """
    ours, standard = (_frontier(facts, name, seed) for name in (kind, _STANDARD))
    if ours is None or standard is None:
        return None
    low = max(min(p.log_kl for p in part[:-1]) for part in (ours, standard))
    high = min(max(p.log_kl for p in part[:-1]) for part in (ours, standard))
    if low >= high:
        return None
    places = [low + (high - low) * i / (_GRID - 1) for i in range(_GRID)]
    weights = [_mean_weights(part, places) for part in (ours, standard)]
    means = [
        sum(w * p.accuracy for w, p in zip(weight, part, strict=True))
        for weight, part in zip(weights, (ours, standard), strict=True)
    ]
    # The run without a penalty ends both frontiers: its error counts with the difference of its weights.
    shared = (weights[0][-1] - weights[1][-1]) * ours[-1].error
    variance = shared**2 + sum(
        (w * p.error) ** 2
        for weight, part in zip(weights, (ours, standard), strict=True)
        for w, p in zip(weight[:-1], part[:-1], strict=True)
    )
    value, half = means[0] - means[1], _Z * math.sqrt(variance)
    prompts = facts.of(_SWEEP)[0].tests[0].accuracy.num_prompts
    return Interval(value=value, low=value - half, high=value + half, num_prompts=prompts)


def _frontier(facts: FullFacts, kind: str, seed: int) -> list[_Point] | None:
    """By rising KL, the run without a penalty last; None where a run did not move at all."""
    runs = [by_seed(facts.of(_SWEEP, arm))[seed] for arm in _arms(facts, kind).values()]
    end = by_seed(facts.of(_SWEEP, _NONE))[seed]
    if not runs or any(not run.tests[0].kl or run.tests[0].kl <= 0 for run in (*runs, end)):
        return None
    points = sorted((_point(run) for run in runs), key=lambda point: point.log_kl)
    return [*points, _point(end)]


def _point(run: FullRun) -> _Point:
    test = run.tests[0]
    assert test.kl is not None, "a run is judged against its base"
    return _Point(
        log_kl=math.log(test.kl), accuracy=test.accuracy.value, error=test.accuracy.standard_error or 0.0
    )


def _mean_weights(points: Sequence[_Point], places: Sequence[float]) -> list[float]:
    """Weight of each point in the mean of the interpolation over places inside the points' range."""
    order = sorted(range(len(points)), key=lambda i: points[i].log_kl)
    weights = [0.0] * len(points)
    for place in places:
        after = next((k for k in range(1, len(order)) if points[order[k]].log_kl >= place), len(order) - 1)
        left, right = order[after - 1], order[after]
        width = points[right].log_kl - points[left].log_kl
        share = 0.5 if width <= 0 else min(1.0, max(0.0, (place - points[left].log_kl) / width))
        weights[left] += (1 - share) / len(places)
        weights[right] += share / len(places)
    return weights


def _table(facts: FullFacts) -> Table:
    rows = []
    for arm in dict.fromkeys(run.arm for run in facts.of(_SWEEP)):
        runs = facts.of(_SWEEP, arm)
        rows.append(
            (
                arm,
                " / ".join(f"{run.tests[0].kl or 0:.3f}" for run in runs),
                " / ".join(shown_estimate(run.tests[0].accuracy) for run in runs),
            )
        )
    return Table(
        title="Runs: kind and coefficient; one figure a seed",
        head=("penalty", "KL(policy‖base), nats a completion", "accuracy"),
        rows=tuple(rows),
    )


def draw_frontier(facts: FullFacts) -> Figure:
    """Accuracy against KL, a panel a seed; draw in `house_style`."""
    from matplotlib.figure import Figure

    seeds = facts.seeds(_SWEEP)
    figure = Figure(figsize=(WIDTHS[2], 2.7))
    panels = figure.subplots(1, len(seeds), sharey=True, squeeze=False)[0]
    names = {_STANDARD: "standard", "shannon": "prioritised, Shannon", "max-prob": "prioritised, max-prob"}
    for axes, seed in zip(panels, seeds, strict=True):
        end = by_seed(facts.of(_SWEEP, _NONE))[seed]
        for number, (kind, label) in enumerate(names.items()):
            runs = [by_seed(facts.of(_SWEEP, arm))[seed] for arm in _arms(facts, kind).values()]
            runs = sorted([*runs, end], key=lambda run: run.tests[0].kl or 0.0)
            _draw_line(axes, runs, number, label)
        _draw_line(axes, [end], 4, "no penalty")
        base = facts.start_of(end).accuracy.value
        axes.axhline(base, color=INK, linewidth=0.7, linestyle=":", label="base")
        axes.set_xscale("log")
        axes.set_title(f"seed {seed}")
        axes.set_xlabel("KL(policy‖base), nats a completion")
        axes.grid(axis="both")
    panels[0].set_ylabel("accuracy, pass@1")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def _draw_line(axes: Axes, runs: Sequence[FullRun], number: int, label: str) -> None:
    accuracies = [run.tests[0].accuracy for run in runs]
    axes.errorbar(
        [run.tests[0].kl or 0.0 for run in runs],
        [figure.value for figure in accuracies],
        yerr=error_bars(accuracies),
        color=COLOURS[number],
        marker=MARKERS[number],
        linestyle=("-", "--", "-.", ":", "none")[number],
        label=label,
    )
