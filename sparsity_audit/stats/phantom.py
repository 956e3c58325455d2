"""The phantom null: updates that know nothing but a size, added to the real base and rounded once to 16 bits.

Contract: pure. Each entry of a tensor is displaced by an independent N(0, σ²); it changes when it leaves its
rounding cell. σ is fitted, per tensor and run, so that the expected number of changes is the observed one;
both are in the result. Mean and variance are sums over kinds of rooms; `walks.redraw` draws all the same, for
figures and to check the sums. Zeros of the base stay, and are a stratum of their own in `phantom_of_table`.

*Variance*: the mean follows the fitted σ, which follows the observed density. To first order
Σ p(1−p) q(1−q) + Σ p(1−p)(q − c)² + Σ q(1−q)(p − d)², c = Σ p'q/Σ p', d = Σ q'p/Σ q', ' = d/d log σ.

Source: ours. It models fp32 master weights that are cast at the end; it need not equal `magnitude`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from sparsity_audit.stats.chance import Expectation, hypergeometric
from sparsity_audit.stats.overlap import StratumTable
from sparsity_audit.stats.rooms import Rooms, change_rates, rate_slopes, rooms_of_strata
from sparsity_audit.types import DType

__all__ = ["Phantom", "PhantomDensity", "fit_sigma", "phantom_of_table", "phantom_overlap"]

_LOG_SIGMA = (-160.0, 140.0)
_BISECTIONS = 48


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
        return sigma, change_rates(rooms, sigma), rate_slopes(rooms, sigma)
    rates = np.isfinite(rooms.up).astype(np.float64) * (changed > 0)
    return None, rates, np.zeros(len(rates))


def _mean(values: np.ndarray, weights: np.ndarray) -> float:
    total = float(weights.sum())
    return float(weights @ values) / total if total > 0 else 0.0
