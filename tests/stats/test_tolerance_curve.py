"""The tolerance curve against one call of `tolerance_bounds` per point."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsity_audit.compare.accumulate import CODE_DTYPE, Accumulator, KernelSpec
from sparsity_audit.compare.numpy_kernel import NumpyKernel
from sparsity_audit.stats.bounds import tolerance_bounds
from sparsity_audit.stats.tally import ViewTally
from sparsity_audit.stats.tolerance import TOLERANCE_EXPONENTS, tolerance_curve
from sparsity_audit.types import Criterion, DType


def _tally(base: np.ndarray, tuned: np.ndarray, dtype: DType, criteria: tuple[str, ...]) -> ViewTally:
    asked = tuple(Criterion.parse(key) for key in criteria)
    spec = KernelSpec(dtype=dtype, criteria=asked, mask=1, level="full")
    found = Accumulator(spec, rows=1, cols=base.size)
    NumpyKernel().compare(
        base.reshape(1, -1), tuned.reshape(1, -1), found, first_row=0, first_col=0, bits=None
    )
    return found.view_tally()


def _filled(view: ViewTally, dtype: DType) -> dict[int, tuple[int, int]]:
    """Counts at every power, points that were left out taken from the point before."""
    points = {point.exponent: point for point in tolerance_curve(view, dtype)}
    filled, last = {}, None
    for exponent in TOLERANCE_EXPONENTS:
        last = points.get(exponent, last)
        assert last is not None
        filled[exponent] = (last.lower, last.upper)
    return filled


@pytest.mark.parametrize("dtype", [DType.BF16, DType.F16, DType.F32, DType.F8_E4M3])
@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**32 - 1))
def test_every_point_holds_the_true_count_and_is_at_least_as_narrow_as_tolerance_bounds(dtype, seed):
    rng = np.random.default_rng(seed)
    codes = CODE_DTYPE[dtype.itemsize]
    base = rng.integers(0, np.iinfo(codes).max, size=60, dtype=codes, endpoint=True)
    near = base + rng.integers(0, 40, size=60).astype(codes)
    tuned = np.where(rng.random(60) < 0.7, near, rng.permutation(base)).astype(codes)
    view = _tally(base, tuned, dtype, ("bitwise", "value"))
    for exponent, counts in _filled(view, dtype).items():
        criterion = Criterion(kind="atol", parameter=math.nextafter(2.0**exponent, 0))
        bounds = tolerance_bounds(view, dtype, criterion)
        true = _tally(base, tuned, dtype, ("bitwise", "value", criterion.key)).changed[criterion.key]
        assert bounds.lower == counts[0] <= true <= counts[1] <= bounds.upper, exponent


def test_bf16_steps_of_one_ulp_are_counted_exactly_where_they_reach_the_power():
    base = np.full(3, 0x3F80, dtype=np.uint16)  # 1.0, whose gap outwards is 2^-7 and inwards 2^-8
    tuned = np.array([0x3F80, 0x3F81, 0x3F7F], dtype=np.uint16)
    curve = tolerance_curve(_tally(base, tuned, DType.BF16, ("bitwise", "value")), DType.BF16)
    counts = {point.exponent: (point.lower, point.upper, point.is_exact) for point in curve}
    assert counts[-6] == (0, 0, True)
    assert counts[-7] == (1, 1, True)
    assert counts[-8] == (2, 2, True)


def test_the_largest_movement_ends_the_curve():
    base, tuned = np.array([0x3F80], dtype=np.uint16), np.array([0xBF80], dtype=np.uint16)  # 1 against -1
    wide = _tally(base, tuned, DType.BF16, ("bitwise", "value"))
    narrow = dataclasses.replace(wide, max_abs=2.0**-5)
    assert tolerance_bounds(narrow, DType.BF16, Criterion.parse("atol:0.25")).upper == 1
    upper = {point.exponent: point.upper for point in tolerance_curve(narrow, DType.BF16)}
    assert (upper[-4], upper[-5]) == (0, 1)


def test_a_cell_of_a_wide_dtype_that_starts_at_a_power_of_two_is_decided():
    base = np.full(1, 0x3F800000, dtype=np.uint32)  # 1.0 in fp32: distances 16 … 31 are 2^-19 … 31·2^-23
    tuned = base + np.uint32(20)
    curve = tolerance_curve(_tally(base, tuned, DType.F32, ("bitwise", "value")), DType.F32)
    counts = {point.exponent: (point.lower, point.upper) for point in curve}
    assert (counts[-18], counts[-19]) == ((0, 0), (1, 1))


def test_points_between_equal_neighbours_are_left_out():
    base, tuned = np.array([0x3F80], dtype=np.uint16), np.array([0x3F81], dtype=np.uint16)
    curve = tolerance_curve(_tally(base, tuned, DType.BF16, ("bitwise", "value")), DType.BF16)
    assert [(p.exponent, p.lower) for p in curve] == [(-1, 0), (-6, 0), (-7, 1), (-40, 1)]


def test_special_changes_pass_every_tolerance_and_signs_of_zero_pass_none():
    base = np.array([0x0000, 0x7FC0, 0x7F80], dtype=np.uint16)
    tuned = np.array([0x8000, 0x7FC1, 0x3F80], dtype=np.uint16)  # ±0, NaN payload, Inf against 1
    curve = tolerance_curve(_tally(base, tuned, DType.BF16, ("bitwise", "value")), DType.BF16)
    assert {(point.lower, point.upper) for point in curve} == {(1, 1)}
