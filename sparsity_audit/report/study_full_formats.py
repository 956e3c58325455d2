"""Part c of a full study: from easy to hard, and which format wins by mixture and by scale.

Contract: a gain that the choice of format alone would give is not taken for a skill: with a base's accuracies
within each format, the shares at the end say what choosing would have given, and that is printed beside
every transfer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sparsity_audit.report.lab_critical import error_bars
from sparsity_audit.report.study_full import FullClaim, FullFacts, FullRun, FullVerdict, Table
from sparsity_audit.report.study_full_judging import (
    RULE,
    by_seed,
    decided,
    difference,
    not_measured,
    percent,
    shown_estimate,
    shown_interval,
    signed,
)
from sparsity_audit.report.style import COLOURS, HATCHES, INK, MARKERS, WIDTHS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sparsity_audit.lab.estimators import Interval

__all__ = ["draw_mixtures", "draw_scale", "draw_transfer", "format_claims"]

_SOURCE = "2504.07912"
_TITLES = {
    "transfer": "RL on easy problems carries over to harder ones",
    "collapse": "Whatever the mixture, RL collapses the outputs to one format",
    "winner": "The format that wins is the one the base is best in, not the most frequent one",
    "scale": "Which format wins depends on the size of the model",
}
_COLLAPSED = 0.8
_CHOICE = 0.8
"""Share of a transferred gain that the choice of format must give to explain it."""

_LETTERS = ("S", "C", "R")


def format_claims(facts: FullFacts) -> tuple[FullClaim, ...]:
    """Four claims; `not measured` without their runs."""
    made = {
        "transfer": (_transfer, "transfer"),
        "collapse": (_collapse, "mixtures"),
        "winner": (_winner, "mixtures"),
        "scale": (_scale, "scale"),
    }
    return tuple(
        make(facts) if facts.of(sweep) else not_measured(key, part="c", title=_TITLES[key], source=_SOURCE)
        for key, (make, sweep) in made.items()
    )


# Easy to hard


def _gains(facts: FullFacts, arm: str, digits: int = 4) -> list[Interval]:
    return [
        difference(
            run.test(digits=digits).accuracy,
            facts.start_of(run, digits).accuracy,
        )
        for run in facts.of("transfer", arm)
    ]


def _by_choice(facts: FullFacts, run: FullRun) -> float:
    """The gain at four digits that the shares at the end would give with the base's accuracies."""
    end, start = run.test(digits=4), facts.start_of(run, 4)
    return (
        sum((start.accuracy_in(row.format) or 0.0) * row.share for row in end.formats) - start.accuracy.value
    )


def _transfer(facts: FullFacts) -> FullClaim:
    gains = {base: _gains(facts, f"{base}-n3") for base in ("mix", "single")}
    chosen = [_by_choice(facts, run) for run in facts.of("transfer", "mix-n3")]
    share = _ratio(chosen, [gain.value for gain in gains["mix"]])
    verdict = decided([*gains["mix"], *gains["single"]])
    on_mix = decided(gains["mix"])
    if on_mix == "reproduces" and verdict != "reproduces" and share is not None and share >= _CHOICE:
        verdict = "is explained"
    direct = {base: _gains(facts, f"{base}-n4") for base in gains}
    shares = {base: _ratio([g.value for g in gains[base]], [g.value for g in direct[base]]) for base in gains}
    return FullClaim(
        key="transfer",
        part="c",
        title=_TITLES["transfer"],
        source=_SOURCE,
        goal=f"gain at four digits after RL on three, on bases mix and single: {RULE}. It is explained by "
        f"the choice of format where it holds on mix alone, and choosing gives ≥ {_CHOICE:.0%} of the gain "
        "there",
        verdict=verdict,
        explained_by="the choice of format" if verdict == "is explained" else "",
        reading="Gain at four digits after RL on three: "
        + "; ".join(
            f"{base} {', '.join(shown_interval(gain) for gain in found)}"
            + ("" if (part := shares[base]) is None else f", {percent(part)} of what RL on four digits gains")
            for base, found in gains.items()
        )
        + f". On mix the choice of format alone would give {', '.join(map(signed, chosen))}"
        + ("" if share is None else f", {percent(share)} of it")
        + ".",
        tables=(_transfer_table(facts),),
        caption="Accuracy with four digits (rare in pretraining) and with three, before and after RL on "
        "either length and with shuffled rewards; a mark a seed, 95 % intervals over problems. Lines: the "
        "base.",
    )


def _ratio(parts: Sequence[float], wholes: Sequence[float]) -> float | None:
    whole = sum(wholes)
    return sum(parts) / whole if whole > 0 else None


def _transfer_table(facts: FullFacts) -> Table:
    rows = []
    for arm in dict.fromkeys(run.arm for run in facts.of("transfer")):
        runs = facts.of("transfer", arm)
        rows.append(
            (
                arm,
                *(
                    " / ".join(shown_estimate(run.test(digits=digits).accuracy) for run in runs)
                    for digits in (4, 3)
                ),
                " / ".join(f"{run.test(digits=4).share('S'):.2f}" for run in runs),
            )
        )
    for run in (facts.of("transfer", "mix-n3")[0], facts.of("transfer", "single-n3")[0]):
        tests = [facts.start_of(run, digits) for digits in (4, 3)]
        shown = [shown_estimate(test.accuracy) for test in tests]
        rows.append((f"base {run.base}", *shown, f"{tests[0].share('S'):.2f}"))
    return Table(
        title="Trained on three (n3) or four (n4) digits; one figure a seed",
        head=("arm", "accuracy, four digits", "accuracy, three digits", "share of S"),
        rows=tuple(rows),
    )


def draw_transfer(facts: FullFacts) -> Figure:
    """Accuracy at both lengths; draw in `house_style`."""
    from matplotlib.figure import Figure

    arms = list(dict.fromkeys(run.arm for run in facts.of("transfer")))
    figure = Figure(figsize=(WIDTHS[2], 0.3 * len(arms) + 1.0))
    panels = figure.subplots(1, 2, sharey=True)
    for axes, digits in zip(panels, (4, 3), strict=True):
        for seed in facts.seeds("transfer"):
            runs = [run for run in facts.of("transfer") if run.seed == seed]
            accuracies = [run.test(digits=digits).accuracy for run in runs]
            axes.errorbar(
                [part.value for part in accuracies],
                [arms.index(run.arm) + 0.2 * (seed - 0.5) for run in runs],
                xerr=error_bars(accuracies),
                color=COLOURS[seed % len(COLOURS)],
                marker=MARKERS[seed % len(MARKERS)],
                linestyle="none",
                label=f"seed {seed}",
            )
        for number, base in enumerate(("mix", "single")):
            run = facts.of("transfer", f"{base}-n3")[0]
            value = facts.start_of(run, digits).accuracy.value
            axes.axvline(value, color=INK, linewidth=0.8, linestyle=("--", ":")[number], label=f"base {base}")
        axes.set_title(f"tested on {digits} digits")
        axes.set_xlim(0, 1)
        axes.set_xlabel("accuracy, pass@1")
        axes.grid(axis="x")
    panels[0].set_yticks(range(len(arms)), [_arm_label(arm) for arm in arms])
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _arm_label(arm: str) -> str:
    base, length, *shuffled = arm.split("-")
    return f"{base}, RL on {length[1:]} digits{', shuffled' * bool(shuffled)}"


# Mixtures and scale


def _collapse(facts: FullFacts) -> FullClaim:
    runs = facts.of("mixtures")
    shares = [run.tests[0].winner.share for run in runs]
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
        f"{_COLLAPSED:g}; the winner's share is {min(shares):.2f} to {max(shares):.2f}.",
        tables=(_format_table(facts, "mixtures"),),
        caption="Format shares before (left bar) and after RL (right bar) by mixture and seed; numbers: "
        "accuracy within the format, where it has a share of at least .05.",
    )


def _winner(facts: FullFacts) -> FullClaim:
    told = []
    for run in facts.of("mixtures"):
        start = facts.start_of(run)
        best = max(start.formats, key=lambda row: row.accuracy or 0.0).format
        told.append((start.winner.format, best, run.tests[0].winner.format))
    apart = [row for row in told if row[0] != row[1]]
    won = [end == best for _, best, end in apart]
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
        f"{sum(end == most for most, _, end in apart)}.",
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
