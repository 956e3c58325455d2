"""The phantom null: updates that know nothing but a size, added to the real base and rounded once to bf16.

Contract: pure, bf16 grid. Each entry of a tensor is displaced by an independent N(0, σ²); it changes when it
leaves its rounding cell. σ is fitted, per tensor and run, so that the expected number of changes is the
observed one; both are in the result. *Room* of an entry: the distances to the two ends of its cell. Entries
with equal room are alike, so that mean and variance are sums over kinds of rooms and nothing need be drawn;
`redraw` draws all the same, for figures and to check the sums.

| base | room |
|---|---|
| on the bf16 grid | half a ULP; below a power of two a quarter |
| zero | none: stays; zeros are padding and unseen tokens, a stratum of its own in `phantom_of_table` |
| ±Inf, NaN | none: stays |
| wider than bf16 | by the position in the cell, in 64 steps |

*Variance*: the mean follows the fitted σ, which follows the observed density. To first order
Σ p(1−p) q(1−q) + Σ p(1−p)(q − c)² + Σ q(1−q)(p − d)², c = Σ p'q/Σ p', d = Σ q'p/Σ q', ' = d/d log σ.

*Walk*: for weights stored in bf16 and rounded after every step, `steps` steps of ±lr with independent signs.
It is not fitted: its density is its own, and is to be printed beside the observed one.

Source: the threshold of half a ULP, 2602.03839 and 2511.08567 Cor. 3.6. The null is ours. It models fp32
master weights that are cast at the end; it need not equal `magnitude`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from sparsity_audit.stats.chance import Expectation, hypergeometric
from sparsity_audit.stats.grid import describe
from sparsity_audit.stats.overlap import StratumTable
from sparsity_audit.types import DType

__all__ = [
    "NUM_ROOM_KEYS",
    "Phantom",
    "PhantomDensity",
    "Rooms",
    "Walk",
    "change_rates",
    "fit_sigma",
    "phantom_of_table",
    "phantom_overlap",
    "redraw",
    "room_keys",
    "rooms_of_keys",
    "rooms_of_strata",
    "rooms_of_values",
    "walk",
    "walk_overlap",
]

_POSITIONS = 64
NUM_ROOM_KEYS = 512 * (_POSITIONS + 1)
"""Kinds of rooms of a base wider than bf16: stratum of the rounded number × position in its cell."""
_LOG_SIGMA = (-160.0, 140.0)
_BISECTIONS = 48
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Phantom:
    """Two runs of one tensor against phantoms of their densities.

    Args:
        sigma_a: Fitted σ of the first run; None where nothing or everything changed.
        sigma_b: Of the second.
        expected_a: The phantom's own expected number of changes, beside the observed one.
        expected_b: Of the second.
        expectation: Of the intersection.
    """

    sigma_a: float | None
    sigma_b: float | None
    expected_a: float
    expected_b: float
    expectation: Expectation


@dataclass(frozen=True, slots=True, kw_only=True)
class PhantomDensity:
    """A pair's phantoms over all tensors: their own densities, to be read beside the observed ones.

    Args:
        expected_a: Entries the first run's phantoms are expected to change; |A| where every fit is exact.
        expected_b: Of the second.
        sigma_a: Smallest and largest fitted σ of the first run's tensors; None where none was fitted.
        sigma_b: Of the second.
    """

    expected_a: float
    expected_b: float
    sigma_a: tuple[float, float] | None
    sigma_b: tuple[float, float] | None

    @classmethod
    def total(cls, parts: Sequence[Phantom]) -> PhantomDensity:
        """Of the phantoms of single tensors."""

        def span(sigmas: list[float]) -> tuple[float, float] | None:
            return (min(sigmas), max(sigmas)) if sigmas else None

        return cls(
            expected_a=math.fsum(part.expected_a for part in parts),
            expected_b=math.fsum(part.expected_b for part in parts),
            sigma_a=span([part.sigma_a for part in parts if part.sigma_a is not None]),
            sigma_b=span([part.sigma_b for part in parts if part.sigma_b is not None]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Walk:
    """Two independent walks over one tensor.

    Args:
        expected_each: Expected number of entries that one walk leaves changed; its density is its own.
        expected_both: Expected intersection of two walks.
    """

    expected_each: float
    expected_both: float

    @property
    def jaccard(self) -> float | None:
        """Of two walks, from their own densities."""
        either = 2 * self.expected_each - self.expected_both
        return self.expected_both / either if either > 0 else None


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
    codes = _to_bf16(flat)
    kinds = 2 * (codes >> 7).astype(np.int64) + ((codes & 127) == 0)
    with np.errstate(invalid="ignore"):
        above = flat.astype(np.float64) - _from_bf16(codes)
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


def _slopes(rooms: Rooms, sigma: float) -> np.ndarray:
    """Derivative of the rates by log σ."""
    with np.errstate(over="ignore", invalid="ignore"):
        up, down = rooms.up / sigma, rooms.down / sigma
        slopes = (up * np.exp(-up * up / 2) + down * np.exp(-down * down / 2)) / math.sqrt(2 * math.pi)
    return np.nan_to_num(slopes)


def fit_sigma(rooms: Rooms, changed: int) -> float | None:
    """The σ under which the expected number of changes is `changed`; by bisection of log σ.

    None where nothing changed, or everything that can. σ stays within 2⁻¹⁶⁰ and 2¹⁴⁰.
    """
    movable = int(rooms.entries[np.isfinite(rooms.up)].sum())
    if changed <= 0 or changed >= movable:
        return None
    low, high = _LOG_SIGMA
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if float(rooms.entries @ change_rates(rooms, 2.0**middle)) < changed:
            low = middle
        else:
            high = middle
    return 2.0 ** ((low + high) / 2)


def phantom_overlap(rooms: Rooms, a: int, b: int) -> Phantom:
    """Two runs of one tensor against phantoms.

    Args:
        rooms: Of the tensor's base.
        a: Changed entries of the first run, among those that can change.
        b: Of the second.
    """
    (sigma_a, p, p_slope), (sigma_b, q, q_slope) = _fitted(rooms, a), _fitted(rooms, b)
    n = rooms.entries.astype(np.float64)
    c, d = _mean(q, n * p_slope), _mean(p, n * q_slope)
    v, w = p * (1 - p), q * (1 - q)
    variance = n * (v * w + v * (q - c) ** 2 + w * (p - d) ** 2)
    return Phantom(
        sigma_a=sigma_a,
        sigma_b=sigma_b,
        expected_a=math.fsum((n * p).tolist()),
        expected_b=math.fsum((n * q).tolist()),
        expectation=Expectation(mean=math.fsum((n * p * q).tolist()), variance=math.fsum(variance.tolist())),
    )


def phantom_of_table(
    table: StratumTable, r: int, q: int, *, dtype: DType = DType.BF16, rooms: Rooms | None = None
) -> Phantom:
    """Runs r and q of a tensor against phantoms; entries that cannot move are exchangeable in their strata.

    Args:
        table: With the strata of `strata.py`.
        r: The first run.
        q: The second.
        dtype: The grid of the strata.
        rooms: Of the same entries where the base is wider than that grid; else they follow from the strata.
    """
    of_strata = rooms_of_strata(table.strata, table.entries, dtype)
    stays = np.isinf(of_strata.up)
    if rooms is None:
        rooms = of_strata
    moves = np.isfinite(rooms.up)
    rooms = Rooms(up=rooms.up[moves], down=rooms.down[moves], entries=rooms.entries[moves])
    assert rooms.num_entries == int(table.entries[~stays].sum()), (table.tensor, rooms.num_entries)
    a, b = table.changed[r], table.changed[q]
    moving = phantom_overlap(rooms, int(a[~stays].sum()), int(b[~stays].sum()))
    rest = hypergeometric(table.entries[stays], a[stays], b[stays])
    return replace(
        moving,
        expected_a=moving.expected_a + int(a[stays].sum()),
        expected_b=moving.expected_b + int(b[stays].sum()),
        expectation=Expectation.total([moving.expectation, rest]),
    )


def _fitted(rooms: Rooms, changed: int) -> tuple[float | None, np.ndarray, np.ndarray]:
    sigma = fit_sigma(rooms, changed)
    if sigma is not None:
        return sigma, change_rates(rooms, sigma), _slopes(rooms, sigma)
    rates = np.isfinite(rooms.up).astype(np.float64) * (changed > 0)
    return None, rates, np.zeros(len(rates))


def _mean(values: np.ndarray, weights: np.ndarray) -> float:
    total = float(weights.sum())
    return float(weights @ values) / total if total > 0 else 0.0


def redraw(values: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """One phantom mask: which non-zero entries differ in bf16 after an fp32 displacement N(0, σ²).

    Args:
        values: The base, float32.
        sigma: Standard deviation of the displacement.
        rng: Source of randomness.
    """
    base = values.astype(np.float32, copy=False)
    with np.errstate(over="ignore"):
        moved = base + np.float32(sigma) * rng.standard_normal(base.shape, dtype=np.float32)
    return (base != 0) & _differs(moved, base)


def walk(values: np.ndarray, *, steps: int, lr: float, rng: np.random.Generator) -> np.ndarray:
    """One walk of weights stored in bf16: which entries end elsewhere than they began.

    Args:
        values: The base, on the bf16 grid, float32.
        steps: Number of steps.
        lr: Size of each; its sign is a fair coin.
        rng: Source of randomness.
    """
    base = values.astype(np.float32, copy=False)
    place = base
    for _ in range(steps):
        signs = np.where(rng.random(base.shape, dtype=np.float32) < 0.5, np.float32(-lr), np.float32(lr))
        place = _from_bf16(_to_bf16(place + signs))
    return _differs(place, base)


def walk_overlap(
    values: np.ndarray,
    entries: np.ndarray,
    *,
    steps: int,
    lr: float,
    walkers: int,
    rng: np.random.Generator,
) -> Walk:
    """Two walks over a tensor, estimated with so many walkers from each distinct value.

    Two independent sets of walkers make the estimate of the intersection unbiased.

    Args:
        values: Distinct values of the base, float32[K].
        entries: How often each occurs, int64[K].
        steps: Number of steps.
        lr: Size of each.
        walkers: Walkers of each set from each value.
        rng: Source of randomness.
    """
    first, second = (
        walk(np.repeat(values[:, np.newaxis], walkers, axis=1), steps=steps, lr=lr, rng=rng).mean(axis=1)
        for _ in range(2)
    )
    return Walk(
        expected_each=math.fsum((entries * (first + second) / 2).tolist()),
        expected_both=math.fsum((entries * first * second).tolist()),
    )


def _erfc(x: np.ndarray) -> np.ndarray:
    return np.interp(x, _ERFC_AT, _ERFC)


def _to_bf16(values: np.ndarray) -> np.ndarray:
    """Codes of float32 values, to nearest even; NaN is not expected."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)


def _from_bf16(codes: np.ndarray) -> np.ndarray:
    return (codes.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _differs(moved: np.ndarray, base: np.ndarray) -> np.ndarray:
    """Where two float32 arrays are different numbers in bf16; never where the base is not finite."""
    return np.isfinite(base) & (_from_bf16(_to_bf16(moved)) != _from_bf16(_to_bf16(base)))
