"""Part c of a full study, further questions: which format wins, by mixture and by scale.

Contract: formats are read from a completion's first character. What a format is worth is its accuracy in the
base, and the format that wins is the one with the largest share at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sparsity_audit.report.study_full import FullClaim, FullVerdict, Table
from sparsity_audit.report.study_full_facts import FullFacts, FullRun
from sparsity_audit.report.study_full_judging import (
    by_seed,
    not_measured,
    shown_estimate,
)
from sparsity_audit.report.style import COLOURS, HATCHES, INK, WIDTHS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


__all__ = ["draw_mixtures", "draw_scale", "format_claims"]

_SOURCE = "2504.07912"
_TITLES = {
    "collapse": "Whatever the mixture, RL collapses the outputs to one format",
    "winner": "The format that wins is the one the base is best in, not the most frequent one",
    "scale": "Which format wins depends on the size of the model",
}
_COLLAPSED = 0.8
_LETTERS = ("S", "C", "R")


def format_claims(facts: FullFacts) -> tuple[FullClaim, ...]:
    """Three claims; `not measured` without their runs."""
    made = {
        "collapse": (_collapse, "mixtures"),
        "winner": (_winner, "mixtures"),
        "scale": (_scale, "scale"),
    }
    return tuple(
        make(facts) if facts.of(sweep) else not_measured(key, part="c", title=_TITLES[key], source=_SOURCE)
        for key, (make, sweep) in made.items()
    )


def _collapse(facts: FullFacts) -> FullClaim:
    runs = facts.of("mixtures")
    shares = [run.tests[0].winner.share for run in runs]
    spread = [run for run in runs if run.tests[0].winner.share < _COLLAPSED]
    verdict: FullVerdict = "undecided"
    if min(shares) >= _COLLAPSED:
        verdict = "reproduces"
    elif max(shares) < _COLLAPSED:
        verdict = "does not reproduce"
    return FullClaim(
        key="collapse",
        part="c",
        title=_TITLES["collapse"],
        source=_SOURCE,
        goal=f"one format has a share of at least {_COLLAPSED:g} at the end in every run of every "
        "mixture; it does not reproduce where none has",
        verdict=verdict,
        reading=f"{sum(share >= _COLLAPSED for share in shares)} of {len(runs)} runs end with a format above "
        f"{_COLLAPSED:g}; the winner's share is {min(shares):.2f} to {max(shares):.2f}."
        + _not_collapsed(facts, spread),
        tables=(_format_table(facts, "mixtures"),),
        caption="Format shares before (left bar) and after RL (right bar) by mixture and seed; numbers: "
        "accuracy within the format, where it has a share of at least .05.",
    )


def _not_collapsed(facts: FullFacts, runs: Sequence[FullRun]) -> str:
    """Which runs kept several formats, and whether their bases left anything to learn from."""
    if not runs:
        return ""
    named = ", ".join(
        f"{run.arm} seed {run.seed} (its base solves {facts.start_of(run).accuracy.value:.3f})"
        for run in runs
    )
    return f" The others: {named}. A base that solves next to nothing gives RL nothing to choose by."


def _winner(facts: FullFacts) -> FullClaim:
    told = []
    for run in facts.of("mixtures"):
        start = facts.start_of(run)
        best = max(start.formats, key=lambda row: row.accuracy or 0.0)
        told.append((f"{run.arm} seed {run.seed}", start.winner, best, run.tests[0].winner.format))
    apart = [row for row in told if row[1].format != row[2].format]
    won = [end == best.format for *_, best, end in apart]
    verdict: FullVerdict = "undecided"
    if won and all(won):
        verdict = "reproduces"
    elif won and not any(won):
        verdict = "does not reproduce"
    return FullClaim(
        key="winner",
        part="c",
        title=_TITLES["winner"],
        source=_SOURCE,
        goal="in every run whose base is best in another format than its most frequent one, the best one "
        "has the largest share at the end; it does not reproduce where that happens in none",
        verdict=verdict,
        reading=f"In {len(apart)} of {len(told)} runs the base's best and most frequent formats differ; "
        f"the best one wins in {sum(won)} of them, the most frequent one in "
        f"{sum(end == most.format for _, most, _, end in apart)}."
        + "".join(
            f" {name}: most frequent {most.format} (share {most.share:.2f}), best {best.format} (accuracy "
            f"{best.accuracy or 0.0:.2f}), {end} wins."
            for name, most, best, end in apart
        ),
        tables=(),
        caption="",
    )


def _scale(facts: FullFacts) -> FullClaim:
    winners = {
        size: [run.tests[0].winner.format for run in runs.values()]
        for size in ("tiny", "small")
        if (runs := by_seed(facts.of("scale", size)))
    }
    kinds = {size: set(found) for size, found in winners.items()}
    verdict: FullVerdict = "undecided"
    if all(len(found) == 1 for found in kinds.values()):
        verdict = "does not reproduce" if kinds["tiny"] == kinds["small"] else "reproduces"
    sizes = {size: facts.base_of(facts.of("scale", size)[0]).parameters for size in winners}
    return FullClaim(
        key="scale",
        part="c",
        title=_TITLES["scale"],
        source=_SOURCE,
        goal="all seeds of a size select one format, and another one than the other size's; it does not "
        "reproduce where it is the same one",
        verdict=verdict,
        reading="; ".join(
            f"{size} ({sizes[size]:,} parameters): {', '.join(found)}" for size, found in winners.items()
        )
        + ". Two sizes a factor of five apart, with one base each, are no law of scale.",
        tables=(_format_table(facts, "scale"),),
        caption="Format shares before (left bar) and after RL (right bar) by size and seed; numbers: "
        "accuracy within the format, where it has a share of at least .05.",
    )


def _format_table(facts: FullFacts, sweep: str) -> Table:
    rows = []
    for run in facts.of(sweep):
        start, end = facts.start_of(run), run.tests[0]
        for name, test in (("base", start), ("after RL", end)):
            cells = []
            for letter in _LETTERS:
                within = test.accuracy_in(letter)
                cells.append(f"{test.share(letter):.2f} ({'–' if within is None else f'{within:.2f}'})")
            rows.append((run.arm, str(run.seed), name, shown_estimate(test.accuracy), *cells))
    return Table(
        title="Share of each format (accuracy within it)",
        head=("arm", "seed", "", "accuracy", *_LETTERS),
        rows=tuple(rows),
    )


def draw_mixtures(facts: FullFacts) -> Figure:
    """Format shares before and after; draw in `house_style`."""
    return _draw_formats(facts, "mixtures")


def draw_scale(facts: FullFacts) -> Figure:
    """Format shares before and after; draw in `house_style`."""
    return _draw_formats(facts, "scale")


def _draw_formats(facts: FullFacts, sweep: str) -> Figure:
    from matplotlib.figure import Figure

    runs = facts.of(sweep)
    figure = Figure(figsize=(WIDTHS[2], 2.5))
    axes = figure.subplots()
    for place, run in enumerate(runs):
        for side, test in ((-0.2, facts.start_of(run)), (0.2, run.tests[0])):
            bottom = 0.0
            for number, letter in enumerate(_LETTERS):
                share, within = test.share(letter), test.accuracy_in(letter)
                axes.bar(
                    place + side,
                    share,
                    0.36,
                    bottom=bottom,
                    color=COLOURS[number],
                    hatch=HATCHES[number],
                    edgecolor="white",
                    label=f"format {letter}" if not place and side < 0 else None,
                )
                if share >= 0.05 and within is not None:
                    _write_number(axes, place + side, bottom + share / 2, within)
                bottom += share
    axes.set_xticks(range(len(runs)), [f"{run.arm}\nseed {run.seed}" for run in runs], fontsize=6)
    axes.set_ylabel("share of completions")
    axes.set_ylim(0, 1)
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def _write_number(axes: Axes, x: float, y: float, value: float) -> None:
    axes.text(
        x,
        y,
        f"{value:.2f}".removeprefix("0"),
        ha="center",
        va="center",
        fontsize=5.5,
        color=INK,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
    )
