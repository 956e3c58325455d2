"""Part d of a full study: critical tokens by degree of pretraining and by kind of operands.

Contract: a base is judged before RL (its critical positions and its certainty) and followed along a run from
it. Intervals are over problems; every base and seed is shown.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from sparsity_audit.report.lab_critical import error_bars
from sparsity_audit.report.study_full import FullClaim, FullVerdict, Table
from sparsity_audit.report.study_full_facts import CriticalFacts, FullFacts, FullRun
from sparsity_audit.report.study_full_judging import (
    RULE,
    by_seed,
    decided,
    difference,
    not_measured,
    shown_estimate,
    shown_interval,
)
from sparsity_audit.report.style import COLOURS, MARKERS, PALE, WIDTHS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sparsity_audit.lab.estimators import Interval

__all__ = ["critical_claims", "draw_degrees", "draw_operands"]

_SWEEP = "degree"
_SOURCE = "2502.06533"
_OPERANDS = ("identical", "varying")
_TITLES = {
    "degree": "How long a base was pretrained decides what RL makes of it",
    "operands": "Operands of different lengths make other tokens critical: where the familiar pattern breaks",
    "critical-rise": "RL raises the right token's probability at critical tokens more than elsewhere",
}


def critical_claims(facts: FullFacts) -> tuple[FullClaim, ...]:
    """Three claims; `not measured` without the runs."""
    if not facts.criticals:
        return tuple(
            not_measured(key, part="d", title=title, source=_SOURCE) for key, title in _TITLES.items()
        )
    return _degree(facts), _operands(facts), _rise(facts)


def _degrees(facts: FullFacts) -> list[int]:
    return sorted({found.degree for found in facts.criticals})


def _runs(facts: FullFacts, degree: int, operands: str) -> dict[int, FullRun]:
    return by_seed(facts.of(_SWEEP, f"{degree}-{operands}"))


def _degree(facts: FullFacts) -> FullClaim:
    degrees = _degrees(facts)
    rises: dict[str, list[Interval]] = {}
    for operands in _OPERANDS:
        for fewer, more in pairwise(degrees):
            ones, others = _runs(facts, more, operands), _runs(facts, fewer, operands)
            rises[f"{operands}, {fewer} → {more} steps"] = [
                difference(ones[seed].tests[0].accuracy, others[seed].tests[0].accuracy) for seed in ones
            ]
    return FullClaim(
        key="degree",
        part="d",
        title=_TITLES["degree"],
        source=_SOURCE,
        goal=f"accuracy after RL rises with every degree, for either kind of operands: {RULE}",
        verdict=decided([part for found in rises.values() for part in found]),
        reading="After RL a longer pretrained base is ahead by "
        + "; ".join(f"{name}: {', '.join(map(shown_interval, found))}" for name, found in rises.items())
        + ".",
        tables=(_table(facts),),
        caption="Accuracy before and after RL by steps of pretraining, for operands of identical and of "
        "varying lengths (bases have seen identical ones alone); a line a seed, 95 % intervals over "
        "problems. Right: number of critical positions of the base, seed 0 solid, seed 1 dashed.",
    )


def _table(facts: FullFacts) -> Table:
    rows = []
    for found in sorted(facts.criticals, key=lambda f: (f.operands, f.degree, f.seed)):
        run = _runs(facts, found.degree, found.operands)[found.seed]
        base = facts.start_of(run).accuracy
        last = found.found.steps[-1].gain
        rows.append(
            (
                *(found.operands, str(found.degree), str(found.seed), shown_estimate(base)),
                shown_estimate(run.tests[0].accuracy),
                f"{found.found.mean_certainty:.3f}",
                _places(found),
                "–" if last is None else shown_interval(last),
            )
        )
    return Table(
        title="Bases, and a run from each",
        head=(
            *("operands", "steps", "seed", "accuracy, base", "after RL", "mean J"),
            *("critical positions", "rise of p(right), critical − others"),
        ),
        rows=tuple(rows),
    )


def _places(found: CriticalFacts) -> str:
    return ", ".join(map(str, found.found.critical)) or "none"


def _operands(facts: FullFacts) -> FullClaim:
    pairs = _pairs(facts)
    fresh = [
        sorted(set(varying.found.critical) - set(identical.found.critical)) for identical, varying in pairs
    ]
    lost = [
        sorted(set(identical.found.critical) - set(varying.found.critical)) for identical, varying in pairs
    ]
    verdict: FullVerdict = "undecided"
    if all(fresh):
        verdict = "reproduces"
    elif not any(fresh):
        verdict = "does not reproduce"
    less = sum(v.found.mean_certainty < i.found.mean_certainty for i, v in pairs)
    return FullClaim(
        key="operands",
        part="d",
        title=_TITLES["operands"],
        source=_SOURCE,
        goal="for every base some position is critical with varying lengths that is not with identical "
        "ones; it does not reproduce where that is so for none",
        verdict=verdict,
        reading=f"With varying lengths {sum(map(bool, fresh))} of {len(pairs)} bases have critical "
        f"positions that they do not have with identical ones, {sum(map(bool, lost))} lose some, and {less} "
        "are less certain on average. A position is decisive only where the solution can still be "
        "finished: bases that hardly solve varying lengths have few decisive positions, however much they "
        "hesitate.",
        tables=(
            Table(
                title="Critical positions of each base (the letter is 0, each digit has five characters)",
                head=("steps", "seed", "identical", "varying", "new", "gone"),
                rows=tuple(
                    (
                        *(str(identical.degree), str(identical.seed), _places(identical), _places(varying)),
                        *(", ".join(map(str, part)) or "none" for part in (new, gone)),
                    )
                    for (identical, varying), new, gone in zip(pairs, fresh, lost, strict=True)
                ),
            ),
        ),
        caption="ΔJ by position of the written solution (format S) for each base of seed "
        f"{facts.criticals[0].seed}: below 0 the base hesitates more than on average; filled marks are "
        f"critical. {facts.criticals[0].found.num_prompts} problems.",
    )


def _pairs(facts: FullFacts) -> list[tuple[CriticalFacts, CriticalFacts]]:
    """Identical and varying lengths of each base."""
    found = {(f.degree, f.seed, f.operands): f for f in facts.criticals}
    keys = sorted({(f.degree, f.seed) for f in facts.criticals})
    return [(found[*key, "identical"], found[*key, "varying"]) for key in keys]


def _rise(facts: FullFacts) -> FullClaim:
    rises = {
        operands: [
            gain
            for found in sorted(facts.criticals, key=lambda f: (f.degree, f.seed))
            if found.operands == operands and (gain := found.found.steps[-1].gain) is not None
        ]
        for operands in _OPERANDS
    }
    return FullClaim(
        key="critical-rise",
        part="d",
        title=_TITLES["critical-rise"],
        source=_SOURCE,
        goal="rise of p(right token) at critical positions less that at the others, for every base that has "
        f"critical positions: {RULE}",
        verdict=decided([part for found in rises.values() for part in found]),
        reading="; ".join(
            f"{operands} lengths, by steps and seed: "
            + (", ".join(map(shown_interval, found)) or "no base with critical positions")
            for operands, found in rises.items()
        )
        + ".",
        tables=(),
        caption="",
    )


def draw_degrees(facts: FullFacts) -> Figure:
    """Accuracy and number of critical positions by degree; draw in `house_style`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTHS[2], 2.6))
    panels = figure.subplots(1, 3)
    degrees = _degrees(facts)
    for axes, operands in zip(panels, _OPERANDS, strict=False):
        for seed in facts.seeds(_SWEEP):
            runs = [_runs(facts, degree, operands)[seed] for degree in degrees]
            bases = [facts.start_of(r).accuracy for r in runs]
            _draw_line(axes, degrees, bases, number=2 * (seed % 2), label=f"base, seed {seed}", style=":")
            after = [run.tests[0].accuracy for run in runs]
            _draw_line(
                axes, degrees, after, number=2 * (seed % 2) + 1, label=f"after RL, seed {seed}", style="-"
            )
        axes.set_title(f"{operands} lengths")
        axes.set_ylim(-0.03, 1.03)
    panels[0].set_ylabel("accuracy, pass@1")
    for number, operands in enumerate(_OPERANDS):
        for seed in facts.seeds(_SWEEP):
            chosen = [f for f in facts.criticals if (f.operands, f.seed) == (operands, seed)]
            chosen.sort(key=lambda f: f.degree)
            panels[2].plot(
                [f.degree for f in chosen],
                [len(f.found.critical) for f in chosen],
                color=COLOURS[4 + number],
                marker=MARKERS[4 + number],
                linestyle=("-", "--")[seed % 2],
                label=operands if not seed else None,
            )
    panels[2].set_title("critical positions")
    panels[2].set_ylim(bottom=0)
    panels[2].legend()
    for axes in panels:
        axes.set_xticks(degrees)
        axes.set_xlabel("steps of pretraining")
        axes.grid(axis="y")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _draw_line(
    axes: Axes, degrees: Sequence[int], figures: Sequence, *, number: int, label: str, style: str
) -> None:
    axes.errorbar(
        degrees,
        [part.value for part in figures],
        yerr=error_bars(figures),
        color=COLOURS[number],
        marker=MARKERS[number],
        linestyle=style,
        label=label,
    )


def draw_operands(facts: FullFacts) -> Figure:
    """ΔJ by position for both kinds of operands; draw in `house_style`."""
    from matplotlib.figure import Figure

    degrees, seed = _degrees(facts), facts.criticals[0].seed
    figure = Figure(figsize=(WIDTHS[2], 1.35 * len(degrees) + 0.5))
    panels = figure.subplots(len(degrees), 1, sharex=True, squeeze=False)[:, 0]
    for axes, degree in zip(panels, degrees, strict=True):
        by_operands = {f.operands: f.found for f in facts.criticals if (f.degree, f.seed) == (degree, seed)}
        for number, operands in enumerate(_OPERANDS):
            found = by_operands[operands]
            for position in found.positions:
                axes.plot(
                    position.index + 0.3 * (number - 0.5),
                    position.delta_certainty.value,
                    color=COLOURS[number],
                    marker=MARKERS[number],
                    fillstyle="full" if position.critical else "none",
                    linestyle="none",
                    label=f"{operands} lengths" if not position.index else None,
                )
            if not number:
                axes.set_xticks(
                    [position.index for position in found.positions],
                    [{"<eos>": "⏎"}.get(p.example, p.example) for p in found.positions],
                )
        for start in range(1, len(by_operands[_OPERANDS[0]].positions), 10):
            axes.axvspan(start - 0.5, start + 4.5, color=PALE, alpha=0.4, linewidth=0)
        axes.axhline(0, color=PALE, linewidth=0.8, zorder=0)
        axes.set_ylabel("ΔJ")
        axes.set_title(f"{degree} steps of pretraining")
    panels[-1].set_xlabel("solution of the first problem")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure
