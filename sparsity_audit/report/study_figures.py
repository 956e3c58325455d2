"""The figures of a study, one a claim; functions of its facts. Draw in `house_style`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from sparsity_audit.report.lab_critical import critical_caption, draw_critical, error_bars
from sparsity_audit.report.lab_track import draw_share_panel, label_steps, place_of_step
from sparsity_audit.report.study_tokens import draw_study_tokens
from sparsity_audit.report.style import COLOURS, INK, MARKERS, PALE, WIDTHS
from sparsity_audit.stats.overlap import NULL_ORDER

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sparsity_audit.report.study import PairFacts, RunFacts, StudyFacts, StudyReport

__all__ = ["study_captions", "study_figures"]

_ROLES = {"seed": 0, "shuffled": 1, "algorithm": 2, "masked": 3}
_ROLE_LABELS = {
    "seed": "GRPO",
    "shuffled": "GRPO, shuffled rewards",
    "algorithm": "another algorithm",
    "masked": "GRPO within a mask",
}
_NULL_LABELS = {
    "uniform": "uniform",
    "per-tensor": "tensor\ndensities",
    "magnitude": "magnitude",
    "row-column": "rows and\ncolumns",
    "row-column-magnitude": "rows, cols,\nmagnitude",
    "phantom": "phantom",
}


def study_figures(report: StudyReport) -> dict[str, Figure]:
    """Figure by key of its claim, in the order of the claims; a claim that was not measured has none."""
    facts = report.facts
    drawers: dict[str, Callable[[StudyFacts], Figure]] = {
        "learning": _draw_learning,
        "format": _draw_format,
        "critical": _draw_critical,
        "tokens": draw_study_tokens,
        "sparsity": _draw_sparsity,
        "overlap": _draw_overlap,
        "cosines": _draw_cosines,
        "largest": _draw_largest,
        "first-step": _draw_first_step,
        "pruning": _draw_pruning,
        "retraining": _draw_retraining,
    }
    captions = study_captions(report)
    return {key: draw(facts) for key, draw in drawers.items() if captions[key]}


def study_captions(report: StudyReport) -> dict[str, str]:
    """Caption by key of the claim; empty where there is no figure."""
    found = report.facts.critical
    captions = {claim.key: claim.caption for claim in report.claims}
    return captions | {"critical": "" if found is None else critical_caption(found)}


def _new(height: float, panels: int = 1, *, share_y: bool = False) -> tuple[Figure, Sequence[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTHS[2], height))
    return figure, list(figure.subplots(1, panels, squeeze=False, sharey=share_y).flat)


def _draw_learning(facts: StudyFacts) -> Figure:
    runs = [run for run in facts.runs if run.role != "masked"]
    figure, (axes,) = _new(0.22 * len(runs) + 0.9)
    bases: dict[str, float] = {}
    for place, run in enumerate(runs):
        number = _ROLES[run.role]
        axes.errorbar(
            [run.accuracy.value],
            [place],
            xerr=error_bars([run.accuracy]),
            color=COLOURS[number],
            marker=MARKERS[number],
            linestyle="none",
            label=_ROLE_LABELS[run.role],
        )
        bases[run.base] = run.base_accuracy.value
    for number, (base, value) in enumerate(bases.items()):
        axes.axvline(value, color=INK, linewidth=0.8, linestyle=("--", ":")[number % 2], label=f"base {base}")
    axes.set_yticks(range(len(runs)), [run.name for run in runs])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("accuracy, pass@1")
    axes.grid(axis="x")
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)
    return figure


def _draw_format(facts: StudyFacts) -> Figure:
    tracks = list(facts.tracks.values())
    figure, panels = _new(2.4, len(tracks) + 1, share_y=True)
    for axes, track in zip(panels, tracks, strict=False):
        draw_share_panel(axes, track)
        axes.set_title("shuffled rewards" if "shuffled" in track.run else "true rewards")
        axes.set_ylabel("")
    panels[0].set_ylabel("share of completions")
    last, track = panels[-1], tracks[0]
    places = [place_of_step(point.step) for point in track.points]
    for number, name in enumerate(row.format for row in track.points[0].evaluation.formats):
        values = [
            next(row.accuracy for row in point.evaluation.formats if row.format == name)
            for point in track.points
        ]
        if name != "other":
            shown = [float("nan") if value is None else value for value in values]
            last.plot(places, shown, marker=MARKERS[number], color=COLOURS[number])
    last.set_title("accuracy within the format")
    last.grid(axis="y")
    label_steps(last, [point.step for point in track.points])
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _draw_critical(facts: StudyFacts) -> Figure:
    assert facts.critical is not None, "drawn only where it was measured"
    return draw_critical(facts.critical, width=WIDTHS[2])


def _draw_sparsity(facts: StudyFacts) -> Figure:
    runs = [run for run in facts.runs if run.role in ("seed", "shuffled") and run.base == "mix"]
    figure, (axes,) = _new(0.3 * len(runs) + 0.8)
    for place, run in enumerate(runs):
        if run.half_ulp is not None:
            low, at, high = run.half_ulp
            axes.barh(place, high - low, left=low, height=0.8, color=PALE, label="half-ULP interval")
            axes.plot([at, at], [place - 0.4, place + 0.4], color=INK, linewidth=0.8, label="half-ULP law")
        for number, (name, value) in enumerate(
            (("as stored", run.sparsity), ("served in bf16", run.served_sparsity))
        ):
            axes.plot(
                value,
                place + 0.12 * (2 * number - 1),
                color=COLOURS[number],
                marker=MARKERS[number],
                linestyle="none",
                label=name,
            )
    axes.set_yticks(range(len(runs)), [f"{run.name}, lr {_power_of_ten(run.lr)}" for run in runs])
    axes.invert_yaxis()
    axes.set_xlim(-0.02, 1)
    axes.set_xlabel("update sparsity (value)")
    axes.grid(axis="x")
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    return figure


def _power_of_ten(value: float) -> str:
    """`3e-4`, as learning rates are written."""
    return f"{value:.0e}".replace("e-0", "e-")


def _draw_overlap(facts: StudyFacts) -> Figure:
    figure, (axes,) = _new(2.3)
    pairs = _shown_pairs(facts, "value", "bf16")
    _draw_nulls(axes, pairs)
    axes.set_ylim(0, 1.03)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def _draw_largest(facts: StudyFacts) -> Figure:
    criteria = [c for c in ("top:1%", "top:5%") if facts.overlap(c, "grpo-fp32-seed0", "grpo-fp32-seed1")]
    figure, panels = _new(2.5, len(criteria), share_y=True)
    for axes, criterion in zip(panels, criteria, strict=True):
        _draw_nulls(axes, _shown_pairs(facts, criterion, "fp32"))
        axes.set_yscale("log")
        axes.set_title(criterion)
        axes.set_ylim(top=1.3)
    for axes in panels[1:]:
        axes.set_ylabel("")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def _shown_pairs(facts: StudyFacts, criterion: str, arm: str) -> list[tuple[str, PairFacts]]:
    others = {
        "two seeds": f"grpo-{arm}-seed1",
        "a seed and shuffled rewards": f"shuffled-{arm}-seed2",
    }
    found = {text: facts.overlap(criterion, f"grpo-{arm}-seed0", run) for text, run in others.items()}
    return [(text, pair) for text, pair in found.items() if pair is not None]


def _draw_nulls(axes: Axes, pairs: Sequence[tuple[str, PairFacts]]) -> None:
    """Chance by null and what was observed, for each pair."""
    names = [null for null in NULL_ORDER if any(pair.chance(null) for _, pair in pairs)]
    for number, (text, pair) in enumerate(pairs):
        nulls = [pair.chance(name) for name in names]
        values = [None if null is None else null.jaccard for null in nulls]
        offset = 0.12 * (2 * number - 1)
        axes.plot(
            [place + offset for place in range(len(names))],
            [float("nan") if value is None else value for value in values],
            color=COLOURS[number],
            marker=MARKERS[number],
            markerfacecolor="white",
            linestyle="none",
            label=f"chance, {text}",
        )
        if pair.jaccard is not None:
            axes.axhline(
                pair.jaccard,
                color=COLOURS[number],
                linewidth=1.0,
                linestyle=("-", "--")[number],
                label=f"observed, {text}",
            )
    axes.set_xticks(range(len(names)), [_NULL_LABELS.get(name, name) for name in names])
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_ylabel("Jaccard")
    axes.grid(axis="y")


def _draw_cosines(facts: StudyFacts) -> Figure:
    figure, (axes,) = _new(2.0)
    for number, (text, pair) in enumerate(_shown_pairs(facts, "value", "bf16")):
        values = [pair.jaccard, pair.sign_agreement, pair.cosine]
        places = [place + 0.2 * (2 * number - 1) for place in range(3)]
        shown = [value or 0.0 for value in values]
        hatch = ("", "////")[number]
        axes.bar(places, shown, 0.36, color=COLOURS[number], hatch=hatch, edgecolor="white", label=text)
        for place, value in zip(places, shown, strict=True):
            text = f"{value:.3f}".replace("-", "−")
            axes.text(place, max(value, 0) + 0.02, text, ha="center", fontsize=7, color=INK)
    axes.axhline(0, color=INK, linewidth=0.6)
    axes.set_ylim(top=1.12)
    axes.set_xticks(range(3), ["Jaccard of the masks", "equal signs in both masks", "cosine of the updates"])
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def _draw_first_step(facts: StudyFacts) -> Figure:
    figure, (axes,) = _new(2.2)
    for number, part in enumerate(facts.series):
        axes.plot(
            [place_of_step(point.step) for point in part.points],
            [float("nan") if point.coverage is None else point.coverage for point in part.points],
            color=COLOURS[number],
            marker=MARKERS[number],
            linestyle=("-", "-", "--")[number % 3],
            label=part.run,
        )
    axes.set_ylim(0, 1.03)
    axes.set_ylabel("coverage of the final mask")
    axes.grid(axis="y")
    label_steps(axes, [point.step for point in max(facts.series, key=lambda p: p.points[-1].step).points])
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def _draw_pruning(facts: StudyFacts) -> Figure:
    figure, panels = _new(2.5, len(facts.prunings), share_y=True)
    for axes, part in zip(panels, facts.prunings, strict=True):
        for number, kind in enumerate(("top", "random", "bottom")):
            points = sorted((p for p in part.points if p.kind == kind), key=lambda p: p.fraction)
            axes.errorbar(
                [100 * point.fraction for point in points],
                [point.accuracy.value for point in points],
                yerr=error_bars([point.accuracy for point in points]),
                color=COLOURS[number],
                marker=MARKERS[number],
                linestyle=("-", "--", ":")[number],
                label={"top": "largest |Δ|", "random": "at random", "bottom": "smallest |Δ|"}[kind],
            )
        for value, style in ((part.base_accuracy.value, ":"), (part.accuracy.value, "--")):
            axes.axhline(value, color=INK, linewidth=0.7, linestyle=style)
        axes.set_xscale("log")
        axes.set_xticks([0.5, 1, 2, 5, 20, 50, 100], ["0.5", "1", "2", "5", "20", "50", "100"])
        axes.minorticks_off()
        axes.set_xlim(0.4, 120)
        axes.set_ylim(0, 1)
        axes.set_xlabel("entries of the update kept, %")
        axes.set_title(part.run)
        axes.grid(axis="y")
    panels[0].set_ylabel("accuracy")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _draw_retraining(facts: StudyFacts) -> Figure:
    runs = [run for run in facts.runs if run.role == "masked"]
    full = facts.run("grpo-fp32-seed0")
    assert full is not None, "every study trains this run"
    figure, (axes,) = _new(0.3 * len(runs) + 0.8)
    axes.errorbar(
        [run.accuracy.value for run in runs],
        range(len(runs)),
        xerr=error_bars([run.accuracy for run in runs]),
        color=COLOURS[0],
        marker=MARKERS[0],
        linestyle="none",
    )
    for value, style, text in (
        (full.base_accuracy.value, ":", "base"),
        (full.accuracy.value, "--", "all entries, seed 0"),
    ):
        axes.axvline(value, color=INK, linewidth=0.8, linestyle=style, label=text)
    axes.set_yticks(range(len(runs)), [_masked_label(run) for run in runs])
    axes.set_ylim(len(runs) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.set_xlabel("accuracy, pass@1")
    axes.grid(axis="x")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def _masked_label(run: RunFacts) -> str:
    names = {"top-5pct": "5 % largest", "random-5pct": "5 % at random", "complement": "the other 95 %"}
    return names[run.name.removeprefix("masked-")]
