from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsity_audit.stats.exact_sum import (
    add_to_slots,
    empty_slots,
    slots_to_int,
    to_float,
    to_sqrt,
)

values = st.lists(st.floats(min_value=0, allow_nan=False, allow_infinity=False), max_size=60)


def slots_of(numbers) -> np.ndarray:
    slots = empty_slots()
    add_to_slots(slots, np.array(numbers, dtype=np.float64))
    return slots


def fsum(numbers) -> float:
    try:
        return math.fsum(numbers)
    except OverflowError:
        return math.inf


@settings(deadline=None)
@given(values)
def test_a_sum_is_the_correctly_rounded_one(numbers):
    assert to_float(slots_to_int(slots_of(numbers))) == fsum(numbers)


@settings(deadline=None)
@given(values, st.randoms(use_true_random=False), st.integers(0, 60))
def test_a_sum_depends_neither_on_order_nor_on_parts(numbers, random, cut):
    shuffled = list(numbers)
    random.shuffle(shuffled)
    parts = slots_to_int(slots_of(shuffled[:cut])) + slots_to_int(slots_of(shuffled[cut:]))
    assert parts == slots_to_int(slots_of(numbers))


@settings(deadline=None)
@given(values.filter(len), st.integers(1, 2**32 - 1))
def test_a_count_stands_for_that_many_additions(numbers, count):
    slots = empty_slots()
    add_to_slots(slots, np.array(numbers), np.full(len(numbers), count, dtype=np.int64))
    assert slots_to_int(slots) == count * slots_to_int(slots_of(numbers))


@pytest.mark.parametrize(
    "value", [0.0, 5e-324, 2.0**-1022, 2.2250738585072011e-308, 1.0, 1.7976931348623157e308]
)
def test_one_value_comes_back_unchanged(value):
    total = slots_to_int(slots_of([value]))
    assert to_float(total) == value
    assert Fraction(total, 2**1074) == Fraction(value)


def test_a_sum_beyond_float64_is_infinite_and_still_exact():
    total = slots_to_int(slots_of([1.7976931348623157e308] * 3))
    assert to_float(total) == math.inf
    assert total == 3 * slots_to_int(slots_of([1.7976931348623157e308]))


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e150), min_size=1, max_size=20))
def test_a_root_is_correct_to_the_last_places(numbers):
    total = slots_to_int(slots_of(numbers))
    root = to_sqrt(total)
    if total == 0:
        assert root == 0.0
    elif root >= 2.0**-500:
        assert abs(Fraction(root) ** 2 / Fraction(total, 2**1074) - 1) < Fraction(1, 2**51)


def test_roots_of_tiny_and_of_overflowing_sums_stay_finite():
    assert to_sqrt(1) == math.ldexp(1.0, -537)
    largest = slots_to_int(slots_of([1.7976931348623157e308] * 4))
    assert to_sqrt(largest) == pytest.approx(2 * math.sqrt(1.7976931348623157e308), rel=1e-15)
