"""Simulated updates of bf16 weights that know nothing: rounded once at the end, or after each step.

Contract: pure; randomness comes from a generator that is passed in. `redraw` is the process whose sums
`phantom` has in closed form. A *walk* is for weights stored in bf16 and rounded after every step: `steps`
steps of ±lr with independent signs. It is not fitted: its density is its own, and is to be printed beside
the observed one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from sparsity_audit.stats.rooms import bf16_codes, bf16_values

__all__ = ["Walk", "redraw", "walk", "walk_overlap"]


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
        place = bf16_values(bf16_codes(place + signs))
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


def _differs(moved: np.ndarray, base: np.ndarray) -> np.ndarray:
    """Where two float32 arrays are different numbers in bf16; never where the base is not finite."""
    return np.isfinite(base) & (bf16_values(bf16_codes(moved)) != bf16_values(bf16_codes(base)))
