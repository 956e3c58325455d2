"""The ladder: Jaccard under each null and observed, of the headline pair and of its reference pair."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sparsity_audit.report.overlap import OverlapReport, PairRecord
from sparsity_audit.report.overlap_tables import run_lines
from sparsity_audit.report.style import COLOURS, FORMATS, INK, MARKERS, PALE, WIDTHS, house_style, to_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["caption_ladder", "draw_ladder", "render_ladder"]

_ROW_IN = 0.36
_MARGIN_IN = 0.75
_SERIES_APART = 0.26


def render_ladder(report: OverlapReport) -> dict[str, bytes]:
    """`ladder.pdf`, `.svg`, `.png` and the caption; nothing where both masks are empty."""
    if report.headline.ladder.observed is None:
        return {}
    with house_style():
        figure = draw_ladder(report, width=WIDTHS[1])
        files = {f"ladder.{name}": to_bytes(figure, name) for name in FORMATS}
    return files | {"ladder.txt": (caption_ladder(report) + "\n").encode()}


def caption_ladder(report: OverlapReport) -> str:
    """What the figure shows, as a start for the caption."""
    pairs = [pair for pair in (report.headline, report.reference_pair) if pair is not None]
    parts = [
        "Jaccard overlap of the changed entries: expected under each named null, and observed",
        *[f"{pair.name}: {pair.ladder.sentence}" for pair in pairs],
        "; ".join(run_lines(report)),
    ]
    return ". ".join(parts) + "."


def draw_ladder(report: OverlapReport, *, width: float) -> Figure:
    """The rungs, the observed overlap, the nulls beside the ladder; draw inside of `house_style`."""
    from matplotlib.figure import Figure

    pairs = [pair for pair in (report.headline, report.reference_pair) if pair is not None]
    series = [_lines(report, pair) for pair in pairs]
    names = [line.label for line in series[0]]
    figure = Figure(figsize=(width, _ROW_IN * len(names) + _MARGIN_IN + 0.18 * len(pairs)))
    axes = figure.subplots()
    for place, line in enumerate(series[0][:-1]):
        is_end = line.kind == "observed"
        axes.axhline(place + 0.5, color=INK if is_end else PALE, linewidth=0.6 if is_end else 0.4, zorder=1)
    for number, lines in enumerate(series):
        offset = (number - (len(pairs) - 1) / 2) * _SERIES_APART
        _draw_lines(axes, lines, number, offset=offset, label=pairs[number].name)
    axes.set_yticks(range(len(names)), [textwrap.fill(name, 26) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(0, 1.08)
    axes.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    axes.set_xlabel(f"Jaccard overlap of the changed entries ({report.criterion}, {report.view} view)")
    axes.grid(axis="x")
    figure.legend(loc="outside lower center", ncols=1)
    return figure


@dataclass(frozen=True, slots=True, kw_only=True)
class _Line:
    label: str
    value: float | None
    kind: Literal["rung", "observed", "beside"]


def _lines(report: OverlapReport, pair: PairRecord) -> list[_Line]:
    ladder = pair.ladder
    rungs = [_Line(label=s.label, value=s.jaccard, kind="rung") for s in ladder.steps if s.is_rung]
    beside = [
        _Line(label=f"beside: {s.label}", value=s.jaccard, kind="beside")
        for s in ladder.steps
        if not s.is_rung
    ]
    if report.walk is not None:
        walk = report.walk
        label = f"beside: walk of {walk.steps:,} steps of {walk.lr:g}, density {walk.density or 0:.3f}"
        beside.append(_Line(label=label, value=walk.jaccard, kind="beside"))
    return [*rungs, _Line(label="observed", value=ladder.observed, kind="observed"), *beside]


def _draw_lines(axes: Axes, lines: Sequence[_Line], number: int, *, offset: float, label: str) -> None:
    """Bars from 0; the observed one is filled, those of chance are open, those beside the ladder dotted."""
    colour = COLOURS[number % len(COLOURS)]
    for place, line in enumerate(lines):
        if line.value is None:
            continue
        is_observed, at = line.kind == "observed", place + offset
        style = ":" if line.kind == "beside" else "-"
        axes.hlines(
            at, 0, line.value, color=colour, linewidth=1.6 if is_observed else 0.8, linestyle=style, zorder=2
        )
        axes.plot(
            line.value,
            at,
            MARKERS[number % len(MARKERS)],
            color=colour,
            markerfacecolor=colour if is_observed else "white",
            markersize=4.5,
            zorder=3,
            label=label if is_observed else None,
        )
        axes.annotate(
            f"{line.value:.3f}",
            (line.value, at),
            textcoords="offset points",
            xytext=(5, 0),
            va="center",
            fontsize=6,
            color=INK,
        )
