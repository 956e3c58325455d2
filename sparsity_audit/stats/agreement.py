"""Do two runs move the same entries the same way? Signs and cosine of their Δ, from sums.

Contract: pure. *Intersection* is the entries in both masks, *overall* every compared entry. A sign agrees
when both Δ are non-zero and of one sign; entries of the intersection with a Δ of 0 (a zero that only changed
its sign) count as neither. Under the null `independent-signs`, which keeps how many of each run's moves are
upwards, agreement is expected at p q + (1 − p)(1 − q). What is undefined is None.

Source: 2606.18521 reports nearly orthogonal updates whose masks overlap.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from sparsity_audit.stats.chance import share_of

__all__ = ["DeltaAgreement", "DeltaSums", "cosine_of", "delta_agreement"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DeltaSums:
    """Sums over the entries of a part of the model, for K runs.

    Args:
        entries: Entries compared.
        not_finite: Entries of each run whose Δ is no finite number, left out of all sums, int64[K].
        dot: Σ Δ_r Δ_q, float64[K, K].
        both: Entries in the masks of r and q, int64[K, K].
        moving: Of these, entries where both Δ are non-zero, int64[K, K].
        same_sign: Of these, entries where both Δ have one sign, int64[K, K].
        upwards: Of the moving ones, entries where Δ_r > 0, int64[K, K] (row r, beside q).
        dot_both: Σ Δ_r Δ_q over the intersection, float64[K, K].
        square_both: Σ Δ_r² over the intersection with q, float64[K, K].
    """

    entries: int
    not_finite: np.ndarray
    dot: np.ndarray
    both: np.ndarray
    moving: np.ndarray
    same_sign: np.ndarray
    upwards: np.ndarray
    dot_both: np.ndarray
    square_both: np.ndarray

    @classmethod
    def of_blocks(cls, blocks: list[DeltaSums], runs: int) -> DeltaSums:
        """The sum over blocks; floats by `math.fsum`, so that their order does not matter."""

        def counts(name: str, shape: tuple[int, ...]) -> np.ndarray:
            return sum((getattr(b, name) for b in blocks), np.zeros(shape, dtype=np.int64))

        def floats(name: str) -> np.ndarray:
            parts = np.array([getattr(block, name) for block in blocks]).reshape(-1, runs, runs)
            return np.array([[math.fsum(parts[:, r, q].tolist()) for q in range(runs)] for r in range(runs)])

        square = (runs, runs)
        return cls(
            entries=sum(block.entries for block in blocks),
            not_finite=counts("not_finite", (runs,)),
            dot=floats("dot"),
            both=counts("both", square),
            moving=counts("moving", square),
            same_sign=counts("same_sign", square),
            upwards=counts("upwards", square),
            dot_both=floats("dot_both"),
            square_both=floats("square_both"),
        )

    @classmethod
    def from_deltas(cls, deltas: np.ndarray, masks: np.ndarray) -> DeltaSums:
        """Sums of one block.

        Args:
            deltas: Δ of each run, float64[K, n]; entries that are not finite are set to 0 and counted.
            masks: Which entries each run's mask holds, bool[K, n].
        """
        finite = np.isfinite(deltas)
        deltas = np.where(finite, deltas, 0.0)
        runs = len(deltas)
        shape = (runs, runs)
        dot, dot_both, square_both = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        both, moving, same_sign, upwards = (np.zeros(shape, dtype=np.int64) for _ in range(4))
        for r in range(runs):
            for q in range(r, runs):
                product = deltas[r] * deltas[q]
                dot[r, q] = dot[q, r] = product.sum()
                inside = masks[r] & masks[q]
                x, y, product = deltas[r][inside], deltas[q][inside], product[inside]
                moves = (x != 0) & (y != 0)
                both[r, q] = both[q, r] = len(x)
                moving[r, q] = moving[q, r] = np.count_nonzero(moves)
                same_sign[r, q] = same_sign[q, r] = np.count_nonzero(moves & ((x > 0) == (y > 0)))
                upwards[r, q] = np.count_nonzero(moves & (x > 0))
                upwards[q, r] = np.count_nonzero(moves & (y > 0))
                dot_both[r, q] = dot_both[q, r] = product.sum()
                square_both[r, q], square_both[q, r] = (x * x).sum(), (y * y).sum()
        return cls(
            entries=deltas.shape[1],
            not_finite=(~finite).sum(axis=1, dtype=np.int64),
            dot=dot,
            both=both,
            moving=moving,
            same_sign=same_sign,
            upwards=upwards,
            dot_both=dot_both,
            square_both=square_both,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaAgreement:
    """How far two runs move alike.

    Args:
        both: Entries in both masks.
        moving: Of these, entries with a non-zero Δ in both runs.
        sign_agreement: Share of `moving` whose Δ have one sign.
        independent_signs: The same expected under the null `independent-signs`.
        cosine_intersection: Cosine of the two Δ on the intersection.
        cosine_overall: Over all compared entries.
        not_finite: Entries left out because a Δ is no finite number, both runs together.
    """

    both: int
    moving: int
    sign_agreement: float | None
    independent_signs: float | None
    cosine_intersection: float | None
    cosine_overall: float | None
    not_finite: int


def delta_agreement(sums: DeltaSums, r: int, q: int) -> DeltaAgreement:
    """Signs and cosines of runs r and q."""
    moving = int(sums.moving[r, q])
    p, up = share_of(int(sums.upwards[r, q]), moving), share_of(int(sums.upwards[q, r]), moving)
    return DeltaAgreement(
        both=int(sums.both[r, q]),
        moving=moving,
        sign_agreement=share_of(int(sums.same_sign[r, q]), moving),
        independent_signs=None if p is None or up is None else p * up + (1 - p) * (1 - up),
        cosine_intersection=cosine_of(sums.dot_both[r, q], sums.square_both[r, q], sums.square_both[q, r]),
        cosine_overall=cosine_of(sums.dot[r, q], sums.dot[r, r], sums.dot[q, q]),
        not_finite=int(sums.not_finite[r] + sums.not_finite[q]),
    )


def cosine_of(dot: float, square_a: float, square_b: float) -> float | None:
    """The cosine of two vectors from their product and squares; None where one is 0."""
    length = math.sqrt(square_a) * math.sqrt(square_b)
    return max(-1.0, min(1.0, float(dot) / length)) if length > 0 else None
