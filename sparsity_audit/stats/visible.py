"""How much of a wide pair's update is left when both sides are rounded to bf16.

Contract: the overall share is exact, from the served and the native view. Everything else is a bound,
because tallies hold no joint counts: per exponent of the *stored* base (the served view knows only the
exponent of the rounded base), and the predictions, because |Δ| is binned.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from sparsity_audit.stats.bounds import CountBounds, delta_range
from sparsity_audit.stats.grid import Stratum, describe, ulp_of_exponent
from sparsity_audit.stats.precision import change_rates, share
from sparsity_audit.stats.strata import NAN_PAYLOAD, NUM_BUCKETS, OUT, SPECIAL, ZERO_SIGN
from sparsity_audit.stats.tally import ViewTally
from sparsity_audit.types import DType

__all__ = ["VisibleExponent", "VisibleShare", "visible_share"]


@dataclass(frozen=True, slots=True, kw_only=True)
class VisibleExponent:
    """Visible changes among entries whose *stored* base has this exponent, as bounds.

    Rounding to bf16 can lift a base to the next power of two, and the served view knows only the rounded
    exponent; so the share per exponent lies between the two numbers, overall it is exact.

    Args:
        exponent: e with 2^e ≤ |w_base| < 2^(e+1), of the base as stored.
        native_changed: Entries changed under `value` as stored.
        lower: Smallest possible number of those that also differ in bf16.
        upper: Largest possible number.
    """

    exponent: int
    native_changed: int
    lower: int
    upper: int


@dataclass(frozen=True, slots=True, kw_only=True)
class VisibleShare:
    """How much of a wide pair's update survives rounding both sides to bf16.

    Args:
        native_changed: Entries changed under `value` as stored.
        served_changed: Entries with bf16(base) ≠ bf16(tuned); all of them changed natively as well.
        share: served_changed ÷ native_changed.
        by_exponent: The same per exponent of the stored base.
        predicted_off_grid: Visible entries expected when the position of the base between two bf16
            numbers is uniform: Σ min(1, |Δ|/ULP_bf16). Bounds, since |Δ| is binned; rounded outwards.
        predicted_on_grid: Visible entries when every base is a bf16 number: |Δ| beyond half the gap.
    """

    native_changed: int
    served_changed: int
    share: float | None
    by_exponent: tuple[VisibleExponent, ...]
    predicted_off_grid: CountBounds
    predicted_on_grid: CountBounds


def visible_share(native: ViewTally, served: ViewTally, dtype: DType) -> VisibleShare:
    """The bf16-visible share of a pair whose native view is `dtype` (wider than bf16).

    Source: threshold at half a ULP, 2602.03839. Off the grid that threshold does not hold: a step of |Δ|
    crosses one of the rounding boundaries, which lie a ULP apart, with probability min(1, |Δ|/ULP). That
    predictor takes the ULP of the base for the whole step, and so ignores the change of gap at powers of
    two.
    """
    return VisibleShare(
        native_changed=native.changed["value"],
        served_changed=served.changed["value"],
        share=share(served.changed["value"], native.changed["value"]),
        by_exponent=_visible_by_exponent(native, served, dtype),
        predicted_off_grid=_predict(native, dtype, on_grid=False),
        predicted_on_grid=_predict(native, dtype, on_grid=True),
    )


def _visible_by_exponent(native: ViewTally, served: ViewTally, dtype: DType) -> tuple[VisibleExponent, ...]:
    bf16 = DType.BF16.layout
    visible: Counter[int] = Counter()
    for (stratum, column), count in served.cells.items():
        if column not in (ZERO_SIGN, NAN_PAYLOAD):
            visible[stratum] += count
    rows = []
    for row in change_rates(native, dtype):
        if row.kind != "normal" or row.exponent is None or not -bf16.bias < row.exponent <= bf16.bias:
            continue
        inside = 2 * (row.exponent + bf16.bias)
        # A mantissa of zero is reached from below as well; other codes only from their own exponent.
        lower = visible[inside]
        upper = lower + visible[inside + 1] + visible[inside + 3]
        rows.append(
            VisibleExponent(
                exponent=row.exponent,
                native_changed=row.changed,
                lower=lower,
                upper=min(upper, row.changed),
            )
        )
    return tuple(rows)


def _predict(native: ViewTally, dtype: DType, *, on_grid: bool) -> CountBounds:
    low = high = 0.0
    for (stratum, column), count in sorted(native.cells.items()):
        if column in (ZERO_SIGN, NAN_PAYLOAD):
            continue
        place = describe(stratum, dtype)
        if column == SPECIAL or place.last < place.first:
            high += count
            low += count if place.kind == "nan" else 0
            continue
        smallest, largest = delta_range(stratum, column, dtype)
        finest, coarsest = _ulps_in_bf16(place, dtype)
        if not on_grid:
            low += count * min(1.0, smallest / coarsest)
            high += count * min(1.0, largest / finest)
            continue
        gap = 0.5 if place.is_power_of_two and column // NUM_BUCKETS != OUT // NUM_BUCKETS else 1.0
        low += count if smallest > 0.5 * gap * coarsest else 0
        high += count if largest >= 0.5 * gap * finest else 0
    lower, upper = math.floor(low), min(math.ceil(high), native.changed["value"])
    return CountBounds(lower=lower, upper=upper, is_exact=lower == upper)


def _ulps_in_bf16(place: Stratum, dtype: DType) -> tuple[float, float]:
    """Smallest and largest bf16 ULP that a base in this stratum can have."""
    bf16 = DType.BF16.layout
    if place.exponent is not None:
        ulp = ulp_of_exponent(place.exponent, bf16)
        return ulp, ulp
    if place.kind == "zero":
        ulp = ulp_of_exponent(-bf16.bias, bf16)
        return ulp, ulp
    layout = dtype.layout
    lowest = 1 - layout.bias - layout.mantissa_bits
    return ulp_of_exponent(lowest, bf16), ulp_of_exponent(-layout.bias, bf16)
