"""The strip figure of many pairs: update sparsity by algorithm, RL against SFT, expected beside measured."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sparsity_audit.report.pairs import PairRow, PairsReport
from sparsity_audit.report.style import COLOURS, FORMATS, INK, MARKERS, PALE, WIDTHS, house_style, to_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_strip", "render_strip"]

_ROW_IN = 0.19
_MARGIN_IN = 1.0
_NO_KIND = "unlabelled"


def render_strip(report: PairsReport) -> dict[str, bytes]:
    """`pairs.pdf`, `.svg` and `.png`; nothing where no pair has a number, measured or expected."""
    if not _shown(report):
        return {}
    with house_style():
        figure = strip_figure(report)
        return {f"pairs.{name}": to_bytes(figure, name) for name in FORMATS}


def strip_figure(report: PairsReport) -> Figure:
    """The strip with its caption line below; draw and render inside of `house_style`."""
    from matplotlib.figure import Figure

    lines = textwrap.wrap(_caption(report), width=150)
    height = _ROW_IN * (len(_shown(report)) + 1) + _MARGIN_IN + 0.12 * len(lines)
    figure = Figure(figsize=(WIDTHS[2], height))
    draw_strip(figure.subplots(), report)
    figure.supxlabel("\n".join(lines), fontsize=6, color=INK, x=0.01, ha="left")
    return figure


def draw_strip(axes: Axes, report: PairsReport) -> None:
    """One line a pair, grouped by algorithm: filled marks measured, open diamonds expected ± tolerance."""
    rows = _shown(report)
    kinds = list(dict.fromkeys(row.kind or _NO_KIND for row in report.rows))
    for place, row in enumerate(rows):
        if row.expected is not None:
            axes.errorbar(
                row.expected.sparsity_percent,
                place,
                xerr=row.expected.tolerance_points,
                fmt="D",
                markersize=5,
                markerfacecolor="none",
                markeredgecolor=INK,
                markeredgewidth=0.8,
                ecolor=INK,
                elinewidth=0.8,
                zorder=2,
            )
        if row.measured is not None and row.measured.percent is not None:
            kind = kinds.index(row.kind or _NO_KIND)
            axes.plot(
                row.measured.percent,
                place,
                MARKERS[kind % len(MARKERS)],
                color=COLOURS[kind % len(COLOURS)],
                zorder=3,
            )
    _separate(axes, rows)
    axes.set_yticks(range(len(rows)), [_label(row) for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(-2, 102)
    axes.set_xlabel("update sparsity: compared entries that did not change (%)")
    axes.grid(axis="x")
    _legend(axes, rows, kinds)


def _shown(report: PairsReport) -> list[PairRow]:
    """Pairs with a number, algorithms together in the order of their first pair."""
    rows = [row for row in report.rows if row.measured is not None or row.expected is not None]
    order = list(dict.fromkeys(row.algorithm for row in rows))
    return sorted(rows, key=lambda row: order.index(row.algorithm))


def _label(row: PairRow) -> str:
    name = f"{row.name} ({row.algorithm})" if row.algorithm else row.name
    return name if row.measured is not None else f"{name}, {row.status}"


def _separate(axes: Axes, rows: Sequence[PairRow]) -> None:
    for place in range(1, len(rows)):
        if rows[place].algorithm != rows[place - 1].algorithm:
            axes.axhline(place - 0.5, color=PALE, linewidth=0.6, zorder=1)


def _legend(axes: Axes, rows: Sequence[PairRow], kinds: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    used = {row.kind or _NO_KIND for row in rows if row.measured is not None}
    handles = [
        Line2D(
            [],
            [],
            linestyle="",
            marker=MARKERS[i % len(MARKERS)],
            color=COLOURS[i % len(COLOURS)],
            label=kind,
        )
        for i, kind in enumerate(kinds)
        if kind in used
    ]
    if any(row.expected is not None for row in rows):
        handles.append(
            Line2D(
                [],
                [],
                linestyle="",
                label="expected ± tolerance",
                marker="D",
                markerfacecolor="none",
                markeredgecolor=INK,
            )
        )
    axes.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=max(1, len(handles)))


def _caption(report: PairsReport) -> str:
    """Rule, view, dtypes: what the numbers mean."""
    shown = [row for row in _shown(report) if row.measured is not None]
    rules = dict.fromkeys(f"{row.measured.rule}, {row.measured.view} view" for row in shown if row.measured)
    dtypes = dict.fromkeys(f"{'+'.join(row.base_dtypes)}→{'+'.join(row.tuned_dtypes)}" for row in shown)
    presets = dict.fromkeys(f"{row.preset.preset}: {row.preset.rule}" for row in shown if row.preset)
    parts = [f"{report.title or report.label}", f"{report.tool}"]
    parts += [f"rule {'; '.join(rules)}"] if rules else []
    parts += list(presets)
    parts += [f"stored as {', '.join(dtypes)}"] if dtypes else []
    parts += [f"expected values: {report.source}"] if report.source else []
    return ". ".join(parts) + ". Revisions stand in pairs.json."
