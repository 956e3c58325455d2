"""Part c of a full study, first question: does RL on easy problems carry over to harder ones?

Contract: a gain that the choice of format alone would give is not taken for a skill: with a base's accuracies
within each format, the shares at the end say what choosing would have given, and that is printed beside the
transfer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sparsity_audit.report.lab_critical import error_bars
from sparsity_audit.report.study_full import FullClaim, Table
from sparsity_audit.report.study_full_facts import FullFacts, FullRun
from sparsity_audit.report.study_full_judging import (
    RULE,
    decided,
    difference,
    not_measured,
    percent,
    shown_estimate,
    shown_interval,
    signed,
)
from sparsity_audit.report.style import COLOURS, INK, MARKERS, WIDTHS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sparsity_audit.lab.estimators import Interval

__all__ = ["draw_transfer", "transfer_claim"]

_SOURCE = "2504.07912"
_TITLE = "RL on easy problems carries over to harder ones"
_CHOICE = 0.8
"""Share of a transferred gain that the choice of format must give to explain it."""


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


def transfer_claim(facts: FullFacts) -> FullClaim:
    """The claim; `not measured` without the runs."""
    if not facts.of("transfer"):
        return not_measured("transfer", part="c", title=_TITLE, source=_SOURCE)
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
        title=_TITLE,
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
