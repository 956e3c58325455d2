"""Charts of a precision record as inline SVG for the page.

Contract: pure functions from records to markup; colours are classes that the style sheet resolves for light
and dark, and no series is told by colour alone (markers, dashes, hatching). Every mark carries its exact
numbers in a `<title>`. Lengths are user units of a 520-wide view box; the page scales it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from sparsity_audit.report.schema import PrecisionRecord, TolerancePoint
from sparsity_audit.report.tables import share_text
from sparsity_audit.stats.precision import ExponentRate, UlpBin
from sparsity_audit.stats.strata import bucket_bounds, bucket_of
from sparsity_audit.types import Criterion

__all__ = [
    "DeltaBin",
    "delta_bins",
    "delta_chart",
    "power_of_two",
    "rate_chart",
    "tolerance_chart",
    "tolerance_steps",
    "ulp_chart",
]

_WIDTH = 520
_LEFT, _RIGHT, _TOP = 62, 12, 14
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_MAX_X_LABELS = 9
_TAIL = 1e-4
_LAST_EXACT = 7


def power_of_two(exponent: int) -> str:
    """2 with the exponent raised: 2⁻⁷."""
    return "2" + str(exponent).translate(_SUPERSCRIPTS)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Axes:
    """A plotting area: positions 0 … slots − 1 across, 0 … top upwards."""

    slots: int
    top: float
    upper: float
    lower: float

    def x(self, slot: float) -> float:
        """Middle of a slot."""
        return _LEFT + (slot + 0.5) * (_WIDTH - _LEFT - _RIGHT) / self.slots

    def y(self, value: float) -> float:
        """Height of a value."""
        return self.lower - (self.lower - self.upper) * value / self.top

    @property
    def bar(self) -> float:
        """Width of a bar."""
        return 0.76 * (_WIDTH - _LEFT - _RIGHT) / self.slots


def rate_chart(records: Sequence[PrecisionRecord]) -> str:
    """Change rate per exponent of |w_base|, one line a record, above the share of entries per exponent."""
    ends = [found for record in records if (found := _without_tails(record))]
    if not ends:
        return ""
    first, last = min(low for low, _ in ends), max(high for _, high in ends)
    slots = last - first + 1
    rows = {
        (r, exponent): rate
        for r, record in enumerate(records)
        for exponent, rate in _normal(record.rates)
        if first <= exponent <= last
    }
    rates = _Axes(slots=slots, top=1.0, upper=_TOP, lower=196)
    counts = [rate.entries / records[r].entries for (r, _), rate in rows.items() if r == 0]
    heights = _Axes(slots=slots, top=_nice(max(counts, default=1.0)), upper=214, lower=262)
    parts = [*_grid(rates, _ticks(1.0)), *_grid(heights, [0, heights.top])]
    for (r, exponent), rate in rows.items():
        if r == 0:
            text = (
                f"{power_of_two(exponent)}: {rate.entries:,} entries, "
                f"{share_text(rate.entries, records[0].entries)}"
            )
            parts.append(_bar(heights, exponent - first, 0, rate.entries / records[0].entries, "quiet", text))
    for r, record in enumerate(records):
        found = [(exponent - first, rate) for (n, exponent), rate in rows.items() if n == r]
        line = " ".join(f"{rates.x(slot):.1f},{rates.y(rate.rate or 0):.1f}" for slot, rate in found)
        parts.append(f'<polyline class="line s{r % 4}" points="{line}"/>')
        for slot, rate in found:
            text = (
                f"{power_of_two(slot + first)} ≤ |w| < {power_of_two(slot + first + 1)}, "
                f"{record.dtype.label} {record.view}: "
                f"{rate.changed:,} of {rate.entries:,} changed ({share_text(rate.changed, rate.entries)})"
            )
            parts.append(_marker(rates.x(slot), rates.y(rate.rate or 0), r % 4, text))
    parts += _x_labels(heights, {slot: power_of_two(first + slot) for slot in range(slots)}, base=first)
    parts.append(_x_title(heights, "|w_base|, from"))
    parts.append(_text(_LEFT, 208, "share of entries", "tick start"))
    return _svg(parts, height=302, title="Change rate (value) by magnitude of the base weight")


def ulp_chart(record: PrecisionRecord, *, number: int) -> str:
    """Changed entries by ULP distance, split into outward, inward and crossing zero.

    Args:
        record: What to draw.
        number: Makes the ids of its patterns unique on the page.
    """
    bins = {bucket_of(b.low): b for b in record.ulps.bins}
    if not bins:
        return ""
    total = sum(_bin_total(b) for b in bins.values())
    first, last = min(bins), max(bins)
    top = _nice(max(_bin_total(b) for b in bins.values()) / total)
    axes = _Axes(slots=last - first + 1, top=top, upper=_TOP, lower=228)
    parts = [_patterns(number), *_grid(axes, _ticks(top))]
    for bucket, found in bins.items():
        base = 0.0
        counts = (found.outward, found.inward, found.crossing)
        for what, count in zip(("outward", "inward", "crossing"), counts, strict=True):
            if count:
                text = f"{ulp_label(found)} ULP {what}: {count:,} ({share_text(count, total)})"
                parts.append(_bar(axes, bucket - first, base, base + count / total, what, text, number))
                base += count / total
    if first <= _LAST_EXACT < last:
        x = (axes.x(_LAST_EXACT - first) + axes.x(_LAST_EXACT + 1 - first)) / 2
        parts.append(f'<path class="cut" d="M{x:.1f} {axes.upper}V{axes.lower}"/>')
        parts.append(_text(x + 5, axes.upper + 10, "bins double", "tick start"))
    labels = {b - first: _short_ulp_label(b) for b in range(first, last + 1)}
    parts += _x_labels(axes, labels, base=0)
    parts.append(_x_title(axes, f"distance in ULP of {record.dtype.label}"))
    return _svg(parts, height=268, title=f"ULP distance of the changed entries ({record.dtype.label})")


def ulp_label(found: UlpBin) -> str:
    """`5`, or `9–15`."""
    return f"{found.low:,}" if found.low == found.high else f"{found.low:,}–{found.high:,}"


def _short_ulp_label(bucket: int) -> str:
    low, _ = bucket_bounds(bucket)
    return str(low) if low < 32 else power_of_two(low.bit_length() - 1)


def _bin_total(found: UlpBin) -> int:
    return found.outward + found.inward + found.crossing


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaBin:
    """Entries with 2^exponent ≤ |Δ| < 2^(exponent + 1): between `lower` and `upper`."""

    exponent: int
    lower: int
    upper: int


def tolerance_steps(record: PrecisionRecord) -> tuple[TolerancePoint, ...]:
    """The tolerance curve with the points put back that the record leaves out because they repeat."""
    known = {point.exponent: point for point in record.tolerance}
    if not known:
        return ()
    steps: list[TolerancePoint] = []
    for exponent in range(max(known), min(known) - 1, -1):
        last = steps[-1] if steps else known[exponent]
        steps.append(
            known.get(exponent)
            or TolerancePoint(
                criterion=Criterion(kind="atol", parameter=math.nextafter(2.0**exponent, 0)).key,
                exponent=exponent,
                lower=last.lower,
                upper=last.upper,
                is_exact=last.is_exact,
            )
        )
    return tuple(steps)


def delta_bins(record: PrecisionRecord) -> tuple[DeltaBin, ...]:
    """The distribution of |Δ| by octave, as bounds: differences of neighbours on the tolerance curve."""
    steps = tolerance_steps(record)
    return tuple(
        DeltaBin(
            exponent=low.exponent,
            lower=max(0, low.lower - high.upper),
            upper=low.upper - high.lower,
        )
        for high, low in itertools.pairwise(steps)
    )


def delta_chart(record: PrecisionRecord, *, number: int) -> str:
    """The distribution of |Δ|: solid up to the lower bound, hatched from there to the upper one."""
    bins = [b for b in delta_bins(record) if b.upper]
    if not bins:
        return ""
    first, last = min(b.exponent for b in bins), max(b.exponent for b in bins)
    top = _nice(max(b.upper for b in bins) / record.entries)
    axes = _Axes(slots=last - first + 1, top=top, upper=_TOP, lower=228)
    parts = [_patterns(number), *_grid(axes, _ticks(top))]
    for found in bins:
        slot = found.exponent - first
        text = (
            f"{power_of_two(found.exponent)} ≤ |Δ| < {power_of_two(found.exponent + 1)}: "
            f"{between(found.lower, found.upper)} entries"
        )
        low, high = found.lower / record.entries, found.upper / record.entries
        parts.append(_bar(axes, slot, 0, low, "outward", text))
        if high > low:
            parts.append(_bar(axes, slot, low, high, "unsure", text, number))
    parts += _x_labels(axes, {e - first: power_of_two(e) for e in range(first, last + 1)}, base=first)
    parts.append(_x_title(axes, "|Δ|, from"))
    return _svg(parts, height=268, title=f"Distribution of |Δ| ({record.dtype.label})")


def tolerance_chart(record: PrecisionRecord) -> str:
    """Share of entries that moved by at least x: a line where exact, a band where the table only bounds."""
    steps = tolerance_steps(record)
    steps = steps[_first_move(steps) : _last_move(steps) + 1]
    if not steps:
        return ""
    ordered = sorted(steps, key=lambda point: point.exponent)
    first = ordered[0].exponent
    top = _nice(max(point.upper for point in ordered) / record.entries)
    axes = _Axes(slots=len(ordered), top=top, upper=_TOP, lower=228)
    uppers = [(axes.x(n), axes.y(p.upper / record.entries)) for n, p in enumerate(ordered)]
    lowers = [(axes.x(n), axes.y(p.lower / record.entries)) for n, p in enumerate(ordered)]
    parts = _grid(axes, _ticks(top))
    parts.append(f'<polygon class="band" points="{_points([*uppers, *reversed(lowers)])}"/>')
    parts.append(f'<polyline class="line s0" points="{_points(lowers)}"/>')
    parts.append(f'<polyline class="line s0 dashed" points="{_points(uppers)}"/>')
    for n, point in enumerate(ordered):
        text = f"|Δ| ≥ {power_of_two(point.exponent)}: {between(point.lower, point.upper)} entries"
        middle = (point.lower + point.upper) / 2 / record.entries
        parts.append(
            f'<rect class="hover" x="{axes.x(n - 0.5):.1f}" y="{axes.upper}" '
            f'width="{axes.x(1) - axes.x(0):.1f}" '
            f'height="{axes.lower - axes.upper:.1f}"><title>{escape(text)}</title></rect>'
        )
        if point.is_exact:
            parts.append(_marker(axes.x(n), axes.y(middle), 0, text))
    for hidden in record.hidden:
        criterion = Criterion.parse(hidden.criterion)
        if criterion.kind != "atol" or not criterion.parameter:
            continue
        slot = math.log2(criterion.parameter) - first
        if -0.5 <= slot <= len(ordered) - 0.5:
            changed = hidden.value_changed - hidden.hidden
            text = f"{criterion}: {changed:,} of {record.entries:,} changed, counted"
            parts.append(_marker(axes.x(slot), axes.y(min(top, changed / record.entries)), 1, text))
    parts += _x_labels(axes, {n: power_of_two(p.exponent) for n, p in enumerate(ordered)}, base=first)
    parts.append(_x_title(axes, "x"))
    return _svg(parts, height=268, title=f"Share of entries with |Δ| ≥ x ({record.dtype.label})")


def between(lower: int, upper: int) -> str:
    """`12`, or `between 10 and 12`: never one number for a bound."""
    return f"{lower:,}" if lower == upper else f"between {lower:,} and {upper:,}"


def _first_move(steps: Sequence[TolerancePoint]) -> int:
    """The last point at which nothing has moved yet."""
    moved = [n for n, point in enumerate(steps) if point.upper]
    return max(0, moved[0] - 1) if moved else len(steps)


def _last_move(steps: Sequence[TolerancePoint]) -> int:
    """The first point after which nothing more moves."""
    ends = [n for n, point in enumerate(steps) if _bounds(point) == _bounds(steps[-1])]
    return ends[0] if ends else 0


def _bounds(point: TolerancePoint) -> tuple[int, int]:
    return point.lower, point.upper


def _normal(rates: Sequence[ExponentRate]) -> list[tuple[int, ExponentRate]]:
    return [(rate.exponent, rate) for rate in rates if rate.exponent is not None and rate.entries]


def _without_tails(record: PrecisionRecord) -> tuple[int, int] | None:
    """Smallest and largest exponent but for tails that hold less than 1e-4 of the entries each."""
    rows = _normal(record.rates)
    low, high, limit = 0, len(rows) - 1, _TAIL * record.entries
    while low < high and sum(rate.entries for _, rate in rows[: low + 1]) < limit:
        low += 1
    while high > low and sum(rate.entries for _, rate in rows[high:]) < limit:
        high -= 1
    return (rows[low][0], rows[high][0]) if rows else None


def _nice(value: float) -> float:
    """The next of 1, 2, 4, 6, 8, 10 times a power of ten, at most 1: tops that divide into round ticks."""
    if value <= 0:
        return 1.0
    scale = 10.0 ** math.floor(math.log10(value))
    return min(1.0, next(step * scale for step in (1, 2, 4, 6, 8, 10) if step * scale >= value * 0.999999))


def _ticks(top: float) -> list[float]:
    parts = 3 if f"{top:.0e}".startswith("6") else 4
    return [top * part / parts for part in range(parts + 1)]


def _percent_tick(value: float) -> str:
    return f"{100 * value:.3g} %"


def _grid(axes: _Axes, values: Sequence[float]) -> list[str]:
    parts = []
    for value in values:
        y = axes.y(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(_LEFT - 6, y + 4, _percent_tick(value), "tick end"))
    return parts


def _x_labels(axes: _Axes, labels: dict[int, str], *, base: int) -> list[str]:
    """Labels under the slots, thinned so that neighbours cannot touch; `base` anchors them to multiples."""
    steps = (1, 2, 3, 4, 5, 8, 10, 16, 20, 40, 80, 160, 320)
    step = next((s for s in steps if len(labels) <= s * _MAX_X_LABELS), 640)
    return [
        _text(axes.x(slot), axes.lower + 16, label, "tick")
        for slot, label in labels.items()
        if (slot + base) % step == 0
    ]


def _x_title(axes: _Axes, text: str) -> str:
    return _text((_LEFT + _WIDTH - _RIGHT) / 2, axes.lower + 34, text, "axis")


def _bar(
    axes: _Axes, slot: int, low: float, high: float, css: str, text: str, number: int | None = None
) -> str:
    y, height = axes.y(high), axes.y(low) - axes.y(high)
    x = axes.x(slot) - axes.bar / 2
    place = f'x="{x:.1f}" y="{y:.2f}" width="{axes.bar:.1f}" height="{height:.2f}"'
    hatch = ""
    if number is not None and css in ("inward", "crossing", "unsure"):
        hatch = f'<rect {place} fill="url(#{css}-{number})"/>'
    return f'<g><title>{escape(text)}</title><rect class="bar {css}" {place}/>{hatch}</g>'


def _patterns(number: int) -> str:
    """Hatching per series, so that a copy without colour still reads."""
    lines = {
        "inward": '<path class="hatch" d="M0 6L6 0"/>',
        "crossing": '<circle class="dot" cx="3" cy="3" r="1.3"/>',
        "unsure": '<path class="hatch" d="M0 0L6 6"/>',
    }
    return (
        "<defs>"
        + "".join(
            f'<pattern id="{name}-{number}" width="6" height="6" patternUnits="userSpaceOnUse">'
            f"{mark}</pattern>"
            for name, mark in lines.items()
        )
        + "</defs>"
    )


def _marker(x: float, y: float, series: int, text: str) -> str:
    shapes = (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.4"/>',
        f'<path d="M{x:.1f} {y - 5:.1f}l5 5l-5 5l-5 -5z"/>',
        f'<rect x="{x - 3.4:.1f}" y="{y - 3.4:.1f}" width="6.8" height="6.8"/>',
        f'<path d="M{x:.1f} {y - 4.6:.1f}l4.4 8l-8.8 0z"/>',
    )
    return f'<g class="mark s{series}"><title>{escape(text)}</title>{shapes[series]}</g>'


def _text(x: float, y: float, text: str, css: str) -> str:
    return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _svg(parts: Sequence[str], *, height: int, title: str) -> str:
    body = "".join(parts)
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(title)}">'
        f"{body}</svg>"
    )
