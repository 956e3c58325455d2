"""Sums of float64 values that are exact, so that they do not depend on order, blocks or threads.

Contract: a sum is a Python int in units of 2⁻¹⁰⁷⁴ (the smallest float64). Kernels add into
*slots*: int64[2, 2048], where slot E collects the significands of the values with exponent field E,
split into the high 26 and the low 27 bits; 2³⁶ additions fit. `slots_to_int` turns slots into the
int, ints add, and `to_float` rounds once, correctly. So `to_float` equals `math.fsum` of the values.
"""

from __future__ import annotations

import math

import numpy as np

__all__ = ["LOW_BITS", "NUM_SLOTS", "add_to_slots", "empty_slots", "slots_to_int", "to_float", "to_sqrt"]

NUM_SLOTS = 2048
LOW_BITS = 27
_UNIT_SHIFT = 1074


def empty_slots() -> np.ndarray:
    """Zeroed slots, int64[2, 2048]: row 0 the high parts, row 1 the low parts."""
    return np.zeros((2, NUM_SLOTS), dtype=np.int64)


def add_to_slots(slots: np.ndarray, values: np.ndarray, counts: np.ndarray | None = None) -> None:
    """Add non-negative finite float64 `values` (each `counts` times) into `slots`, in place."""
    codes = values.astype(np.float64, copy=False).view(np.uint64)
    field = (codes >> np.uint64(52)).astype(np.int64)
    significand = (codes & np.uint64((1 << 52) - 1)) | (np.uint64(1 << 52) * (field > 0).astype(np.uint64))
    high = (significand >> np.uint64(LOW_BITS)).astype(np.int64)
    low = (significand & np.uint64((1 << LOW_BITS) - 1)).astype(np.int64)
    if counts is not None:
        high, low = high * counts, low * counts
    np.add.at(slots[0], field, high)
    np.add.at(slots[1], field, low)


def slots_to_int(slots: np.ndarray) -> int:
    """The exact sum in units of 2⁻¹⁰⁷⁴."""
    total = 0
    for field in np.flatnonzero(slots.any(axis=0)).tolist():
        total += ((int(slots[0, field]) << LOW_BITS) + int(slots[1, field])) << max(field - 1, 0)
    return total


def to_float(total: int) -> float:
    """The sum, correctly rounded to float64; infinity when it is too large."""
    try:
        return total / (1 << _UNIT_SHIFT)
    except OverflowError:
        return math.inf


def to_sqrt(total: int) -> float:
    """The square root of a sum of squares; no overflow on the way, correct to the last place or one."""
    if total == 0:
        return 0.0
    shift = max(0, 256 - total.bit_length())
    shift += (shift + _UNIT_SHIFT) % 2
    root = math.isqrt(total << shift)
    drop = max(0, root.bit_length() - 128)
    return math.ldexp(float(root >> drop), drop - (shift + _UNIT_SHIFT) // 2)
