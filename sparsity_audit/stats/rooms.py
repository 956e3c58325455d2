"""Rooms: how far a weight can be displaced before bf16 rounds it to another number.

Contract: pure. *Room* of an entry: the distances to the two ends of its rounding cell. Entries with equal
room are alike, so that change rates are sums over kinds of rooms and nothing need be drawn.

| base | room |
|---|---|
| on the 16-bit grid | half a ULP; below a power of two a quarter |
| zero | none: stays; zeros are padding and unseen tokens |
| ±Inf, NaN | none: stays |
| wider than bf16 | by the position in the cell, in 64 steps |

Source: the threshold of half a ULP, 2602.03839 and 2511.08567 Cor. 3.6.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from sparsity_audit.stats.grid import describe
from sparsity_audit.types import DType

__all__ = [
    "NUM_ROOM_KEYS",
    "Rooms",
    "bf16_codes",
    "bf16_values",
    "change_rates",
    "rate_slopes",
    "room_keys",
    "rooms_of_keys",
    "rooms_of_strata",
    "rooms_of_values",
]

_POSITIONS = 64
NUM_ROOM_KEYS = 512 * (_POSITIONS + 1)
"""Kinds of rooms of a base wider than bf16: stratum of the rounded number × position in its cell."""
_ERFC_END, _ERFC_STEPS = 6.0, 1 << 15
_ERFC_AT = np.linspace(0.0, _ERFC_END, _ERFC_STEPS + 1)
_ERFC = np.array([*(math.erfc(x) for x in _ERFC_AT[:-1]), 0.0])
"""Linear interpolation errs by less than 4e-9; beyond 6 the function is below 3e-17."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rooms:
    """Kinds of rooms in a tensor.

    Args:
        up: Distance to the end of the rounding cell away from zero, float64[K].
        down: To the end towards zero, float64[K].
        entries: Entries of each kind, int64[K].
    """

    up: np.ndarray
    down: np.ndarray
    entries: np.ndarray

    @property
    def num_entries(self) -> int:
        """Entries in all."""
        return int(self.entries.sum())


def rooms_of_strata(strata: np.ndarray, entries: np.ndarray, dtype: DType = DType.BF16) -> Rooms:
    """Rooms of a base on its own grid from its strata (2·exponent + (mantissa = 0)) alone.

    Args:
        strata: Stratum numbers, int64[S].
        entries: Entries of each, int64[S].
        dtype: The grid.
    """
    places = [describe(int(stratum), dtype) for stratum in strata]
    finite = [place.kind in ("normal", "subnormal") for place in places]
    return Rooms(
        up=np.array([p.gap_out / 2 if f else math.inf for p, f in zip(places, finite, strict=True)]),
        down=np.array([p.gap_in / 2 if f else math.inf for p, f in zip(places, finite, strict=True)]),
        entries=np.asarray(entries, dtype=np.int64),
    )


_CELLS = rooms_of_strata(np.arange(512), np.ones(512))


def room_keys(values: np.ndarray) -> np.ndarray:
    """Number of the kind of room of each entry of a base wider than bf16, below `NUM_ROOM_KEYS`.

    Args:
        values: float32 values of a tensor, or of a part of it.
    """
    flat = np.abs(values.astype(np.float32, copy=False).reshape(-1))
    flat = np.where(np.isfinite(flat), flat, np.float32(np.inf))
    codes = bf16_codes(flat)
    kinds = 2 * (codes >> 7).astype(np.int64) + ((codes & 127) == 0)
    with np.errstate(invalid="ignore"):
        above = flat.astype(np.float64) - bf16_values(codes)
        part = (above + _CELLS.down[kinds]) / (_CELLS.up + _CELLS.down)[kinds]
    step = np.rint(np.nan_to_num(part) * _POSITIONS).astype(np.int64)
    return kinds * (_POSITIONS + 1) + step


def rooms_of_keys(counts: np.ndarray) -> Rooms:
    """Rooms of a base that is wider than bf16, in the cells of the bf16 numbers it rounds to.

    Args:
        counts: Entries of each kind of room, int64[NUM_ROOM_KEYS].
    """
    keys = np.flatnonzero(counts)
    kind, place = keys // (_POSITIONS + 1), (keys % (_POSITIONS + 1)) / _POSITIONS
    size = (_CELLS.up + _CELLS.down)[kind]
    with np.errstate(invalid="ignore"):
        up, down = size * (1 - place), size * place
    return Rooms(
        up=np.where(np.isfinite(size), up, math.inf),
        down=np.where(np.isfinite(size), down, math.inf),
        entries=counts[keys].astype(np.int64),
    )


def rooms_of_values(values: np.ndarray) -> Rooms:
    """`rooms_of_keys` of the float32 values of a whole tensor."""
    return rooms_of_keys(np.bincount(room_keys(values), minlength=NUM_ROOM_KEYS))


def change_rates(rooms: Rooms, sigma: float) -> np.ndarray:
    """Probability that a displacement N(0, σ²) leaves the cell, for each kind of room."""
    scale = 1 / (sigma * math.sqrt(2))
    with np.errstate(over="ignore"):
        return 0.5 * (_erfc(rooms.up * scale) + _erfc(rooms.down * scale))


def rate_slopes(rooms: Rooms, sigma: float) -> np.ndarray:
    """Derivative of the rates by log σ."""
    with np.errstate(over="ignore", invalid="ignore"):
        up, down = rooms.up / sigma, rooms.down / sigma
        slopes = (up * np.exp(-up * up / 2) + down * np.exp(-down * down / 2)) / math.sqrt(2 * math.pi)
    return np.nan_to_num(slopes)


def bf16_codes(values: np.ndarray) -> np.ndarray:
    """Codes of float32 values, to nearest even; NaN is not expected."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)


def bf16_values(codes: np.ndarray) -> np.ndarray:
    """Numbers of bf16 codes, float32."""
    return (codes.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _erfc(x: np.ndarray) -> np.ndarray:
    return np.interp(x, _ERFC_AT, _ERFC)
