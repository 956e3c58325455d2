"""Figure `headline`: update sparsity by criterion, native beside served, one panel a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sparsity_audit.report.runs import Run, short_percent
from sparsity_audit.report.style import COLOURS, HATCHES, add_legend, new_panels
from sparsity_audit.types import View

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["caption_headline", "draw_headline"]

_BAR = 0.38


def draw_headline(runs: Sequence[Run], *, width: float) -> Figure | None:
    """Bars of update sparsity in %, each with its number."""
    shown = [run for run in runs if any(row.compared for row in run.report.headlines)]
    if not shown:
        return None
    num_bars = max(len(run.report.criteria) for run in shown)
    figure, panels = new_panels(len(shown), width=width, panel_height=1.9, min_panel=0.6 + 0.5 * num_bars)
    for axes, run in zip(panels, shown, strict=True):
        _draw_run(axes, run)
    panels[0].set_ylabel("update sparsity (%)")
    add_legend(figure, panels, width=width)
    return figure


def caption_headline(_runs: Sequence[Run]) -> str:
    """What the bars are."""
    return "Update sparsity: the share of compared entries that did not change, by criterion."


def _draw_run(axes: Axes, run: Run) -> None:
    report = run.report
    views = [view for view in View if any(row.view is view for row in report.headlines)]
    for number, view in enumerate(views):
        found = {row.criterion: row for row in report.headlines if row.view is view and row.compared}
        places = [x for x, key in enumerate(report.criteria) if key in found]
        rows = [found[report.criteria[x]] for x in places]
        bars = axes.bar(
            [x + (number - (len(views) - 1) / 2) * _BAR for x in places],
            [100 * (row.compared - row.changed) / row.compared for row in rows],
            width=_BAR,
            color=COLOURS[list(View).index(view)],
            hatch=HATCHES[list(View).index(view)],
            edgecolor="white",
            linewidth=0.4,
            label=view.value,
        )
        texts = [short_percent(row.compared - row.changed, row.compared) for row in rows]
        axes.bar_label(bars, labels=texts, fontsize=6, padding=1.5)
    axes.set_xticks(range(len(report.criteria)), report.criteria)
    axes.set_ylim(0, 109)
    axes.set_yticks(range(0, 101, 20))
    axes.grid(axis="y")
    axes.set_title(run.label)
