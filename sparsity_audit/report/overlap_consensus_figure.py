"""The consensus histogram: in how many runs an entry changed, beside what independent runs would give."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsity_audit.report.overlap import OverlapReport
from sparsity_audit.report.overlap_tables import run_lines
from sparsity_audit.report.overlap_text import expected_entries
from sparsity_audit.report.style import (
    COLOURS,
    FORMATS,
    MARKERS,
    PALE,
    WIDTHS,
    house_style,
    to_bytes,
)
from sparsity_audit.stats.consensus import Consensus

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["caption_consensus", "draw_consensus", "render_consensus"]

_HEIGHT_IN = 2.7
_MIN_RATIO = 30.0
_LEAST = 0.5
_APART = 0.2


def render_consensus(report: OverlapReport) -> dict[str, bytes]:
    """`consensus.pdf`, `.svg`, `.png` and the caption; nothing below three runs, or where nothing changed."""
    found = report.consensus
    if found is None or not any(found.observed[1:]):
        return {}
    with house_style():
        figure = draw_consensus(report, found, width=WIDTHS[1])
        files = {f"consensus.{name}": to_bytes(figure, name) for name in FORMATS}
    return files | {"consensus.txt": (caption_consensus(report, found) + "\n").encode()}


def caption_consensus(report: OverlapReport, found: Consensus) -> str:
    """What bars and marks are, and the core in words."""
    runs, core = len(found.cores), found.cores[-1]
    apart = [run.label for run in report.runs if run.is_reference]
    of = f"{runs} runs" + (f" (without the reference {apart[0]})" if apart else "")
    chances = ", ".join(f"{null} {expected_entries(value)}" for null, value in core.expected.items())
    parts = [
        f"Consensus of {of}: entries that changed in exactly k of them",
        "Bars: observed. Marks: expected of independent runs (Poisson-binomial) under each named null",
        f"Expectations below {_LEAST} entries are left out",
        f"Changed in all {runs} runs: {core.observed:,} entries, expected {chances}",
        "; ".join(run_lines(report)),
    ]
    return ". ".join(parts) + "."


def draw_consensus(report: OverlapReport, found: Consensus, *, width: float) -> Figure:
    """Bars beside marks; logarithmic where the bars differ by more than a factor of thirty."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(width, _HEIGHT_IN))
    axes = figure.subplots()
    places = range(len(found.observed))
    axes.bar(places, found.observed, width=0.8, color=PALE, label="observed", zorder=2)
    for number, (null, expected) in enumerate(found.expected.items()):
        offset = (number - (len(found.expected) - 1) / 2) * _APART
        shown = [(k + offset, value) for k, value in enumerate(expected) if value >= _LEAST]
        axes.plot(
            [place for place, _ in shown],
            [value for _, value in shown],
            MARKERS[number % len(MARKERS)],
            color=COLOURS[number % len(COLOURS)],
            markersize=4,
            linestyle=":",
            linewidth=0.7,
            label=f"{null} expects",
            zorder=3,
        )
    present = [count for count in found.observed if count]
    if max(present) > _MIN_RATIO * min(present):
        axes.set_yscale("log")
        axes.set_ylim(bottom=_LEAST)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(
        f"changed in exactly k of {len(found.cores)} runs ({report.criterion}, {report.view} view)"
    )
    axes.set_ylabel("entries")
    axes.grid(axis="y")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[-1:] + handles[:-1], labels[-1:] + labels[:-1], loc="outside lower center", ncols=4)
    return figure
