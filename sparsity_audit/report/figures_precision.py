"""Figures `change-rate` (by exponent of |w_base|) and `ulps` (distances in ULP)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from sparsity_audit.report.runs import Run
from sparsity_audit.report.schema import PrecisionRecord
from sparsity_audit.report.style import COLOURS, HATCHES, INK, MARKERS, PALE, add_legend, new_panels, power
from sparsity_audit.stats.precision import ExponentRate
from sparsity_audit.stats.strata import bucket_bounds, bucket_of
from sparsity_audit.types import DType, View

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "caption_change_rate",
    "caption_ulps",
    "draw_change_rate",
    "draw_ulps",
    "law_edges",
    "precision_label",
    "series_label",
    "shown_rates",
    "titled",
]

_TAIL_SHARE = 0.001
_DIRECTIONS = ("outward", "inward", "crossing")


def precision_label(record: PrecisionRecord) -> str:
    """View and dtype, as `served (bf16)`."""
    return f"{record.view.value} ({record.dtype.label})"


def series_label(run: Run, record: PrecisionRecord) -> str:
    """`native`, `served (bf16)`, and with the dtype where a run compares several in one view."""
    several = sum(other.view is record.view for other in run.report.precision) > 1
    return precision_label(record) if several or record.view is View.SERVED else record.view.value


def titled(run: Run) -> str:
    """The run's label over the dtypes that its native view compares."""
    dtypes = [record.dtype.label for record in run.report.precision if record.view is View.NATIVE]
    return f"{run.label}\n{' + '.join(dtypes)}"


def shown_rates(record: PrecisionRecord) -> list[ExponentRate]:
    """The exponents without the thin tails, which together hold less than 0.1 % of entries at each end."""
    rates = [rate for rate in record.rates if rate.exponent is not None and rate.entries]
    limit = _TAIL_SHARE * sum(rate.entries for rate in rates)
    low, high = 0, len(rates)
    while sum(rate.entries for rate in rates[: low + 1]) < limit:
        low += 1
    while sum(rate.entries for rate in rates[high - 1 :]) < limit:
        high -= 1
    return rates[low:high]


def law_edges(record: PrecisionRecord) -> tuple[int, int, int] | None:
    """Lowest exponents that a step of 2·lr, lr and lr/2 cannot move; None without a learning rate.

    ½ ULP of a weight with exponent e is 2^(e − mantissa bits − 1), and the step must reach it.
    """
    law = record.half_ulp
    if law is None or law.at_lr is None:
        return None
    bits = record.dtype.layout.mantissa_bits + 1
    at_lr = math.floor(math.log2(law.lr)) + bits + 1
    return at_lr + 1, at_lr, at_lr - 1


_RATE_CAPTION = (
    "Share of entries changed under value, by the exponent of the base weight, in each view; grey: how the "
    "entries are distributed. A fall from all to none within an octave or two is what rounding to a narrow "
    "dtype leaves. Exponents that together hold less than 0.1 % of the entries at each end are cut off."
)


def draw_change_rate(runs: Sequence[Run], *, width: float) -> Figure | None:
    """Share of entries changed under `value`, per exponent, over the distribution of the entries."""
    shown = [run for run in runs if any(shown_rates(record) for record in run.report.precision)]
    if not shown:
        return None
    figure, panels = new_panels(len(shown), width=width, panel_height=2.0, min_panel=2.2)
    exponents = [_exponent(rate) for run in shown for r in run.report.precision for rate in shown_rates(r)]
    for axes, run in zip(panels, shown, strict=True):
        _draw_rates(axes, run)
        _name_exponents(axes, min(exponents), max(exponents) + 1)
        axes.set_title(titled(run))
    panels[0].set_ylabel("share of entries (%)")
    add_legend(figure, panels, width=width)
    return figure


def caption_change_rate(runs: Sequence[Run]) -> str:
    """What the lines, the grey steps and the dashed line are, and what is not on the axis."""
    lines = [_RATE_CAPTION]
    for run in runs:
        for record in run.report.precision:
            rest = [rate for rate in record.rates if rate.exponent is None and rate.entries]
            if rest:
                parts = (f"{r.kind} {r.entries:,} ({r.changed:,} changed)" for r in rest)
                name = f"{run.label}, {precision_label(record)}"
                lines.append(f"Not on the axis, {name}: {', '.join(parts)}.")
            law = record.half_ulp
            if law is not None and law.at_lr is not None:
                lines.append(
                    f"Dashed, {run.label}: above it half a ULP exceeds the learning rate {_number(law.lr)} "
                    f"(band: an octave either way); the law leaves {100 * law.at_lr:.1f} % frozen."
                )
    return " ".join(lines)


def _draw_rates(axes: Axes, run: Run) -> None:
    drawn = [(record, shown_rates(record)) for record in run.report.precision]
    drawn = [(record, rates) for record, rates in drawn if rates]
    background, rates = drawn[0]
    total = sum(rate.entries for rate in background.rates)
    axes.bar(
        [_exponent(rate) for rate in rates],
        [100 * rate.entries / total for rate in rates],
        width=1,
        align="edge",
        color=PALE,
        label="distribution of entries",
    )
    for record, members in drawn:
        number = list(View).index(record.view) + 2 * _dtype_rank(record, run)
        axes.plot(
            [_exponent(rate) + 0.5 for rate in members],
            [100 * rate.changed / rate.entries for rate in members],
            color=COLOURS[number],
            marker=MARKERS[number],
            label=f"changed, {series_label(run, record)}",
        )
        edges = law_edges(record)
        if edges is not None and record.half_ulp is not None:
            axes.axvspan(edges[2], edges[0], color=COLOURS[4], alpha=0.18, linewidth=0)
            axes.axvline(
                edges[1],
                color=INK,
                linestyle="--",
                linewidth=1,
                label=f"½ ULP > lr {_number(record.half_ulp.lr)}",
            )


def _name_exponents(axes: Axes, lowest: int, highest: int) -> None:
    axes.set_xlim(lowest, highest)
    step = max(1, math.ceil((highest - lowest) / 6))
    ticks = range(highest - highest % step, lowest - 1, -step)
    axes.set_xticks(list(ticks), [power(2, tick) for tick in ticks])
    axes.set_ylim(0, 105)
    axes.set_yticks(range(0, 101, 20))
    axes.set_xlabel("|base weight|")
    axes.grid(axis="y")


def _number(value: float) -> str:
    """`1e-4`, `5e-7`."""
    return np.format_float_scientific(value, trim="-", exp_digits=1)


def _dtype_rank(record: PrecisionRecord, run: Run) -> int:
    """0 for the first dtype of a view, 1 for the next: pairs stored in several dtypes need several lines."""
    dtypes: list[DType] = [r.dtype for r in run.report.precision if r.view is record.view]
    return min(dtypes.index(record.dtype), 2)


def _exponent(rate: ExponentRate) -> int:
    assert rate.exponent is not None
    return rate.exponent


_ULPS_CAPTION = (
    "Distance between base and tuned weight in ULP (ordered codes of the view's dtype; exact to 8, right of "
    "the dotted line in bins that double): entries that grew in magnitude, shrank, or changed sign, as "
    "shares of those changed under value."
)


def draw_ulps(runs: Sequence[Run], *, width: float) -> Figure | None:
    """Changed entries by distance, stacked by direction; one panel a run, view and dtype."""
    shown = [(run, record) for run in runs for record in run.report.precision if record.ulps.bins]
    if not shown:
        return None
    figure, panels = new_panels(len(shown), width=width, panel_height=1.9, min_panel=2.2)
    for axes, (run, record) in zip(panels, shown, strict=True):
        _draw_distances(axes, record)
        axes.set_title(f"{run.label}\n{precision_label(record)}")
    panels[0].set_ylabel("share of changed entries (%)")
    add_legend(figure, panels, width=width)
    return figure


def caption_ulps(runs: Sequence[Run]) -> str:
    """What the bars are, and what changed without a distance."""
    lost = [
        f"NaN or infinity on one side, {run.label}, {precision_label(record)}: {record.ulps.special:,} "
        f"entries without a distance."
        for run in runs
        for record in run.report.precision
        if record.ulps.special
    ]
    return " ".join([_ULPS_CAPTION, *lost])


def _draw_distances(axes: Axes, record: PrecisionRecord) -> None:
    found = {bucket_of(item.low): item for item in record.ulps.bins}
    last = max(found)
    total = record.ulps.special + sum(b.outward + b.inward + b.crossing for b in found.values())
    places = range(last + 1)
    floor = [0.0] * (last + 1)
    for number, direction in enumerate(_DIRECTIONS):
        heights = [100 * getattr(found[p], direction) / total if p in found else 0.0 for p in places]
        axes.bar(
            [*places],
            heights,
            bottom=floor,
            width=0.85,
            color=COLOURS[number],
            hatch=HATCHES[number],
            edgecolor="white",
            linewidth=0.3,
            label={"outward": "grew", "inward": "shrank", "crossing": "changed sign"}[direction],
        )
        floor = [a + b for a, b in zip(floor, heights, strict=True)]
    axes.set_xlim(-0.7, max(last, 3) + 0.7)
    if last > 7:
        axes.axvline(7.5, color=INK, linestyle=":", linewidth=0.7)
    ticks = [0, 3, 7, *range(11, last + 1, 4)] if last > 11 else [*places]
    axes.set_xticks(ticks, [_distance_text(tick, is_sparse=last > 11) for tick in ticks])
    axes.set_xlabel(f"distance (ULP of {record.dtype.label})")
    axes.grid(axis="y")


def _distance_text(bucket: int, *, is_sparse: bool) -> str:
    low, high = bucket_bounds(bucket)
    if low == high:
        return str(low)
    return power(2, low.bit_length() - 1) if is_sparse else f"{low}–\n{high}"
