"""The ladder: Jaccard under each null and observed, of the headline pair and of its reference pair."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

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
    """One line a null, the observed overlap last; draw inside of `house_style`."""
    from matplotlib.figure import Figure

    pairs = [pair for pair in (report.headline, report.reference_pair) if pair is not None]
    names = [*[step.label for step in report.headline.ladder.steps], "observed"]
    figure = Figure(figsize=(width, _ROW_IN * len(names) + _MARGIN_IN + 0.18 * len(pairs)))
    axes = figure.subplots()
    for place in range(len(names) - 1):
        axes.axhline(place + 0.5, color=PALE, linewidth=0.4, zorder=1)
    for number, pair in enumerate(pairs):
        _draw_pair(axes, pair, number, offset=(number - (len(pairs) - 1) / 2) * _SERIES_APART)
    axes.set_yticks(range(len(names)), [textwrap.fill(name, 24) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(0, 1.08)
    axes.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    axes.set_xlabel(f"Jaccard overlap of the changed entries ({report.criterion}, {report.view} view)")
    axes.grid(axis="x")
    figure.legend(loc="outside lower center", ncols=1)
    return figure


def _draw_pair(axes: Axes, pair: PairRecord, number: int, *, offset: float) -> None:
    """Bars from 0; the observed one is filled, those of chance are open."""
    ladder, colour = pair.ladder, COLOURS[number % len(COLOURS)]
    values = [*[step.jaccard for step in ladder.steps], ladder.observed]
    for place, value in enumerate(values):
        if value is None:
            continue
        is_observed = place == len(values) - 1
        axes.hlines(place + offset, 0, value, color=colour, linewidth=1.6 if is_observed else 0.8, zorder=2)
        axes.plot(
            value,
            place + offset,
            MARKERS[number % len(MARKERS)],
            color=colour,
            markerfacecolor=colour if is_observed else "white",
            markersize=4.5,
            zorder=3,
            label=pair.name if is_observed else None,
        )
        axes.annotate(
            f"{value:.3f}",
            (value, place + offset),
            textcoords="offset points",
            xytext=(5, 0),
            va="center",
            fontsize=6,
            color=INK,
        )
