"""How many entries any tolerance would call changed, bounded from a tally that never counted it.

Contract: for every criterion but `top`, the count a kernel would have made lies in [lower, upper]; the
two are equal (`is_exact`) when every cell is decided. A cell fixes the stratum of the base, the direction
and the ordered-code distance d (a range beyond 8), so |Δ| has a smallest and a largest value over the
cell; a cell that cannot be decided adds 0 below and all its entries above. Say "between", never "equals",
unless `is_exact`.

Why the extremes are right: magnitudes are a convex function v of the magnitude code (gaps never shrink
outwards), so |Δ| never falls as d grows, nor outwards or inwards as the base grows; across zero
v(m) + v(d − m) is convex in m with its minimum at d/2. Float64 rounding is monotone, hence keeps order.
For `rel` the ratio |Δ|/max rises with d; where it must be compared away from a single code, a margin far
above float64 rounding keeps the bound a bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from sparsity_audit.errors import UsageError
from sparsity_audit.stats.grid import Stratum, describe, last_finite, magnitude, magnitudes
from sparsity_audit.stats.strata import (
    CROSS,
    IN,
    NAN_PAYLOAD,
    NUM_BUCKETS,
    OUT,
    SPECIAL,
    ZERO_SIGN,
    bucket_bounds,
)
from sparsity_audit.stats.tally import ViewTally
from sparsity_audit.types import Criterion, DType, FloatLayout

__all__ = ["CountBounds", "delta_range", "tolerance_bounds"]

_PIECES = 1024
_MARGIN = 1e-12
_TINY = 1e-323


@dataclass(frozen=True, slots=True, kw_only=True)
class CountBounds:
    """A count known to lie in [lower, upper]."""

    lower: int
    upper: int
    is_exact: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Verdict:
    """Whether a criterion calls every entry (`always`) or at least one (`possible`) of a cell changed."""

    always: bool
    possible: bool


def tolerance_bounds(view: ViewTally, dtype: DType, criterion: Criterion) -> CountBounds:
    """Bounds of the entries changed under `criterion`, from the cells of a `full` tally.

    Args:
        view: A tally with cells.
        dtype: The dtype of that view's codes.
        criterion: Any criterion but `top`; it need not have been counted.

    Raises:
        UsageError: For `top`, which needs the values, or when a tally has changes but no cells.
    """
    if criterion.kind == "top":
        raise UsageError(
            f"criterion {criterion}", "cannot be bounded from counts", remedy="run the diff with it"
        )
    if criterion.key in view.changed:
        exact = view.changed[criterion.key]
        return CountBounds(lower=exact, upper=exact, is_exact=True)
    if not view.strata and view.entries:
        raise UsageError(
            f"criterion {criterion}", "was not counted, and the tally has no cells", expected="level `full`"
        )
    lower = upper = 0
    for (stratum, column), count in view.cells.items():
        verdict = _judge_cell(stratum, column, dtype, criterion)
        lower += count if verdict.always else 0
        upper += count if verdict.possible else 0
    return CountBounds(lower=lower, upper=upper, is_exact=lower == upper)


def delta_range(stratum: int, column: int, dtype: DType) -> tuple[float, float]:
    """Smallest and largest |Δ| in a cell of finite float entries; float64, infinity where it overflows.

    Args:
        stratum: A stratum of finite base values.
        column: A column in OUT, IN or CROSS.
        dtype: A float dtype.
    """
    side, low, high = _side_and_distance(column)
    place, layout = describe(stratum, dtype), dtype.layout
    top = last_finite(layout)
    if side == OUT:
        first, last = place.first, min(place.last, top - low)
        return _gap(first, first + low, layout), max(
            _gap(m, min(m + high, top), layout) for m in {last, min(max(top - high, first), last)}
        )
    if side == IN:
        first, last = max(place.first, low), place.last
        return _gap(first - low, first, layout), _gap(last - min(high, last), last, layout)
    return _cross_range(place, low, high, layout)


def _cross_range(place: Stratum, low: int, high: int, layout: FloatLayout) -> tuple[float, float]:
    top = last_finite(layout)
    last = min(place.last, high - 1)
    nearest = min(max(low // 2, place.first), last)
    smallest = magnitude(nearest, layout) + magnitude(max(low - nearest, 1), layout)
    # Beyond `knee` the other side would pass the largest number; the maximum is there or at an end.
    knee = min(max(high - top, place.first), last)
    largest = max(
        magnitude(m, layout) + magnitude(max(min(high - m, top), 1), layout)
        for m in (place.first, knee, last)
    )
    return smallest, largest


def _gap(small: int, large: int, layout: FloatLayout) -> float:
    return magnitude(large, layout) - magnitude(small, layout)


def _side_and_distance(column: int) -> tuple[int, int, int]:
    assert 0 <= column < ZERO_SIGN, column
    side = column // NUM_BUCKETS * NUM_BUCKETS
    low, high = bucket_bounds(column - side)
    return side, low, high


def _judge_cell(stratum: int, column: int, dtype: DType, criterion: Criterion) -> _Verdict:
    if criterion.kind == "bitwise" or dtype.kind == "opaque" or column == SPECIAL:
        return _Verdict(always=True, possible=True)
    if column in (ZERO_SIGN, NAN_PAYLOAD):
        return _Verdict(always=False, possible=False)
    if criterion.kind == "value":
        return _Verdict(always=True, possible=True)
    _, low, high = _side_and_distance(column)
    if criterion.kind == "ulp":
        return _Verdict(always=low > criterion.parameter, possible=high > criterion.parameter)
    if dtype.kind != "float":
        return _judge_integers(low, high, dtype, criterion)
    if criterion.kind == "atol":
        smallest, largest = delta_range(stratum, column, dtype)
        return _Verdict(always=smallest > criterion.parameter, possible=largest > criterion.parameter)
    return _judge_relative(stratum, column, dtype, criterion.parameter)


def _judge_integers(low: int, high: int, dtype: DType, criterion: Criterion) -> _Verdict:
    if criterion.kind == "atol":
        limit = math.floor(criterion.parameter)
        return _Verdict(always=low > limit, possible=high > limit)
    # |Δ| is at most the larger magnitude without signs, twice that with them.
    ratio_limit = 2.0 if dtype.kind == "int" else 1.0
    bits = 8 * dtype.itemsize
    largest = 1 if dtype.kind == "bool" else (1 << (bits - 1) if dtype.kind == "int" else (1 << bits) - 1)
    return _Verdict(
        always=float(low) > criterion.parameter * float(largest), possible=criterion.parameter < ratio_limit
    )


def _judge_relative(stratum: int, column: int, dtype: DType, eta: float) -> _Verdict:
    side, low, high = _side_and_distance(column)
    if side == CROSS:
        # |Δ| = larger + smaller magnitude: more than once the larger, at most twice.
        return _Verdict(always=eta <= 1 - _MARGIN, possible=eta < 2)
    place, layout = describe(stratum, dtype), dtype.layout
    top = last_finite(layout)
    if side == OUT:
        small_first, small_last = _pieces(place.first, min(place.last, top - low))
        tight = bool(low == high and np.array_equal(small_first, small_last))
        near_low, near_high = small_first + low, small_last + low
        far_low, far_high = (
            np.minimum(small_first, top - high) + high,
            np.minimum(small_last, top - high) + high,
        )
        smallest = magnitudes(near_low, layout) - magnitudes(small_first, layout)
        largest = magnitudes(far_high, layout) - magnitudes(small_first, layout)
        if np.array_equal(small_first, small_last) or int(small_last[-1]) + high <= top:
            largest = magnitudes(far_high, layout) - magnitudes(small_last, layout)
        return _compare(
            smallest, magnitudes(near_high, layout), largest, magnitudes(far_low, layout), eta, tight=tight
        )
    large_first, large_last = _pieces(max(place.first, low), place.last)
    tight = bool(low == high and np.array_equal(large_first, large_last))
    big_first, big_last = magnitudes(large_first, layout), magnitudes(large_last, layout)
    smallest = big_first - magnitudes(large_first - low, layout)
    largest = big_last - magnitudes(np.maximum(large_last, high) - high, layout)
    return _compare(smallest, big_last, largest, big_first, eta, tight=tight)


def _compare(
    smallest: np.ndarray,
    largest_size: np.ndarray,
    largest: np.ndarray,
    smallest_size: np.ndarray,
    eta: float,
    *,
    tight: bool,
) -> _Verdict:
    """Judge |Δ| > η·size over pieces; `tight` pieces are single entries, judged as a kernel does."""
    with np.errstate(over="ignore", invalid="ignore"):
        limit_low, limit_high = eta * largest_size, eta * smallest_size
        if not tight:
            limit_low = limit_low * (1 + _MARGIN) + _TINY
            limit_high = limit_high * (1 - _MARGIN) - _TINY
        return _Verdict(
            always=bool(np.all(smallest > limit_low)), possible=bool(np.any(largest > limit_high))
        )


def _pieces(first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    """At most `_PIECES` consecutive ranges [start, stop] of codes, single codes where there are few."""
    assert first <= last, (first, last)
    size = last - first + 1
    if size <= _PIECES:
        codes = np.arange(first, last + 1, dtype=np.int64)
        return codes, codes
    edges = np.array([first + size * i // _PIECES for i in range(_PIECES + 1)], dtype=np.int64)
    return edges[:-1], edges[1:] - 1
