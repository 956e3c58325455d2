"""Figures `tolerance` (density by absolute tolerance) and `delta` (distribution of |Δ|), as bounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from sparsity_audit.report.figures_precision import precision_label, series_label, titled
from sparsity_audit.report.runs import Run
from sparsity_audit.report.schema import PrecisionRecord
from sparsity_audit.report.style import COLOURS, MARKERS, add_legend, new_panels, power
from sparsity_audit.types import Criterion, View

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "DeltaBin",
    "OutlinePoint",
    "caption_delta",
    "caption_tolerance",
    "curve_outline",
    "delta_bins",
    "draw_delta",
    "draw_tolerance",
]


_TAIL_SHARE = 0.001


def draw_tolerance(runs: Sequence[Run], *, width: float) -> Figure | None:
    """Share of entries that moved by at least 2^k; a band where the counts only bound it."""
    shown = [run for run in runs if any(_has_movement(record) for record in run.report.precision)]
    if not shown:
        return None
    figure, panels = new_panels(len(shown), width=width, panel_height=2.0, min_panel=2.2)
    limits = _shown_octaves(shown)
    for axes, run in zip(panels, shown, strict=True):
        for record in run.report.precision:
            if _has_movement(record):
                _draw_curve(axes, run, record)
        _name_powers(axes, *limits)
        axes.set_ylim(0, 105)
        axes.set_xlabel("tolerance")
        axes.set_title(titled(run))
    panels[0].set_ylabel("update density (%)")
    add_legend(figure, panels, width=width)
    return figure


def caption_tolerance(_runs: Sequence[Run]) -> str:
    """What the band and the markers are."""
    return (
        "Share of compared entries that moved by at least the tolerance. The truth lies within the band, "
        "which follows from the bins of |w_base| and ULP distance and has a step at each power of two. The "
        "markers are exact: atol criteria that were counted."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaBin:
    """Entries with 2^exponent ≤ |Δ| < 2^(exponent+1): between `lower` and `upper`."""

    exponent: int
    lower: int
    upper: int


def delta_bins(record: PrecisionRecord) -> list[DeltaBin]:
    """The distribution of |Δ| by octave, from the differences of the curve's neighbours; none where empty."""
    bins = []
    for above, point in pairwise(record.tolerance):
        # Points left out between two have the counts of the upper one, which are those of the lower one.
        for exponent in range(above.exponent - 1, point.exponent - 1, -1):
            lower, upper = max(0, point.lower - above.upper), point.upper - above.lower
            if upper:
                bins.append(DeltaBin(exponent=exponent, lower=lower, upper=upper))
    return bins


def draw_delta(runs: Sequence[Run], *, width: float) -> Figure | None:
    """Share of entries per octave of |Δ|: solid is certain, pale is possible."""
    shown = [(run, record) for run in runs for record in run.report.precision if _has_movement(record)]
    if not shown:
        return None
    figure, panels = new_panels(len(shown), width=width, panel_height=1.9, min_panel=2.2)
    limits = _shown_octaves([run for run, _ in shown])
    for axes, (run, record) in zip(panels, shown, strict=True):
        colour = COLOURS[list(View).index(record.view)]
        for name, alpha, heights in (
            ("possible", 0.3, [(b.exponent, b.upper) for b in delta_bins(record)]),
            ("certain", 1.0, [(b.exponent, b.lower) for b in delta_bins(record)]),
        ):
            axes.bar(
                [exponent for exponent, _ in heights],
                [100 * count / record.entries for _, count in heights],
                width=0.92,
                align="edge",
                color=colour,
                alpha=alpha,
                label=f"{name}, {record.view.value}",
            )
        _name_powers(axes, *limits)
        axes.set_xlabel("|Δ|")
        axes.set_title(f"{run.label}\n{precision_label(record)}")
    panels[0].set_ylabel("share of entries (%)")
    add_legend(figure, panels, width=width)
    return figure


def caption_delta(_runs: Sequence[Run]) -> str:
    """What solid and pale bars are."""
    return (
        "Distribution of |Δ| over the compared entries, by octave; unchanged entries and those beyond a "
        "half or below 2^-40 are not shown. Solid: certain from the bins of |w_base| and ULP distance. "
        "Pale: possible at most."
    )


def _has_movement(record: PrecisionRecord) -> bool:
    return bool(delta_bins(record))


@dataclass(frozen=True, slots=True, kw_only=True)
class OutlinePoint:
    """A corner of the band: at log2 tolerance `exponent` the count lies between `lower` and `upper`."""

    exponent: int
    lower: int
    upper: int


def curve_outline(record: PrecisionRecord) -> list[OutlinePoint]:
    """The corners of a band that holds the count at *every* tolerance, also between the points.

    Counts fall as the tolerance rises: between 2^k and 2^(k+1) there are at most as many as at 2^k and at
    least as many as at 2^(k+1), so the band is a staircase; straight lines between the points bound nothing.
    """
    corners = []
    for above, point in pairwise(record.tolerance):
        corners += [
            OutlinePoint(exponent=exponent, lower=above.lower, upper=point.upper)
            for exponent in (above.exponent, point.exponent)
        ]
    return corners


def _draw_curve(axes: Axes, run: Run, record: PrecisionRecord) -> None:
    number = list(View).index(record.view)
    outline = curve_outline(record)
    colour = COLOURS[number]
    exponents = [point.exponent for point in outline]
    lower, upper = ([100 * getattr(p, side) / record.entries for p in outline] for side in ("lower", "upper"))
    axes.fill_between(exponents, lower, upper, color=colour, alpha=0.3, linewidth=0)
    axes.plot(exponents, lower, color=colour, linewidth=0.8, label=series_label(run, record))
    axes.plot(exponents, upper, color=colour, linewidth=0.8)
    points = _counted(run, record)
    if points:
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            color=colour,
            marker=MARKERS[number],
            linestyle="none",
            label="counted exactly",
        )


def _counted(run: Run, record: PrecisionRecord) -> list[tuple[float, float]]:
    """Log2 of the tolerance and density in % of the absolute tolerances that were counted.

    Headlines are over all dtypes of a view: where it has several, their sum is no point of one curve.
    """
    if sum(other.view is record.view for other in run.report.precision) > 1:
        return []
    points = []
    for row in run.report.headlines:
        criterion = Criterion.parse(row.criterion)
        is_of_curve = row.view is record.view and row.compared == record.entries
        if is_of_curve and criterion.kind == "atol" and criterion.parameter > 0:
            points.append((math.log2(criterion.parameter), 100 * row.changed / row.compared))
    return points


def _shown_octaves(runs: Sequence[Run]) -> tuple[int, int]:
    """First and last exponent to show: bins that may hold 0.1 % of a view's entries, and what was counted."""
    exponents = []
    for run in runs:
        for record in run.report.precision:
            bins = delta_bins(record)
            wide = [item for item in bins if item.upper >= _TAIL_SHARE * record.entries] or bins
            exponents += [edge for item in wide for edge in (item.exponent, item.exponent + 1)]
            exponents += [math.floor(x) for x, _ in _counted(run, record)]
    return min(exponents) - 1, max(exponents) + 1


def _name_powers(axes: Axes, low: int, high: int) -> None:
    """Ticks at powers of ten on an axis of octaves."""
    axes.set_xlim(low, high)
    ticks = range(math.ceil(low * math.log10(2)), math.floor(high * math.log10(2)) + 1)
    step = max(1, math.ceil(len(ticks) / 6))
    axes.set_xticks(
        [tick / math.log10(2) for tick in ticks[::step]], [power(10, tick) for tick in ticks[::step]]
    )
    axes.grid(axis="y")
