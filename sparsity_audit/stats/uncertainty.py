"""Uncertainty of overlaps over units that can vary: runs, and blocks of tensors.

Contract: pure and deterministic given the seed. z over entries says only that a null is not exact; at 8e9
entries it is in the ten thousands. What a reader can generalise to is a new run (*jackknife over runs*), and
how unlike the parts of the model are (*block bootstrap*, named heterogeneity: blocks of one model are no
sample of models, so it is no confidence interval). Below `MIN_RUNS` runs or `MIN_BLOCKS` blocks there is no
interval, but a reason.

Pairs share runs, so that they are not independent: the jackknife leaves out a run with all its pairs.
Source: jackknife of U-statistics, Arvesen, Ann. Math. Stat. 40 (1969) 2076.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sparsity_audit.stats.overlap import PairOverlap

__all__ = [
    "MIN_BLOCKS",
    "MIN_RUNS",
    "Heterogeneity",
    "RunInterval",
    "block_heterogeneity",
    "jackknife_over_runs",
]

MIN_RUNS = 4
MIN_BLOCKS = 20
_Z = 1.959963984540054


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInterval:
    """Mean of a figure over pairs of runs, with the uncertainty that a new run would see.

    Args:
        runs: Number of runs.
        mean: Over all pairs; None without pairs, or where a pair has no figure.
        standard_error: By the jackknife; None below `MIN_RUNS` runs.
        low: Lower end of the 95 % interval, Student's t with runs − 1 degrees of freedom.
        high: Upper end.
        reason: Why there is no interval; None when there is one.
    """

    runs: int
    mean: float | None
    standard_error: float | None
    low: float | None
    high: float | None
    reason: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Heterogeneity:
    """How a pair's excess share varies over blocks of the model; not a confidence interval.

    Args:
        null: The null whose excess share it is.
        blocks: Number of blocks with changes in either run.
        excess_share: Of all blocks together.
        low: 2.5 % quantile over resampled blocks; None below `MIN_BLOCKS`.
        high: 97.5 % quantile.
        reason: Why there is no interval; None when there is one.
    """

    null: str
    blocks: int
    excess_share: float | None
    low: float | None
    high: float | None
    reason: str | None


def jackknife_over_runs(figures: Sequence[Sequence[float | None]]) -> RunInterval:
    """Mean of a figure over pairs and its jackknife interval over runs.

    Args:
        figures: figures[r][q] of runs r ≠ q, R × R; only r < q are read.
    """
    runs = len(figures)
    pairs = {(r, q): figures[r][q] for r in range(runs) for q in range(r + 1, runs)}
    values = {pair: value for pair, value in pairs.items() if value is not None}
    if not pairs or len(values) < len(pairs):
        reason = "a pair has no such figure" if pairs else "there are no pairs"
        return RunInterval(runs=runs, mean=None, standard_error=None, low=None, high=None, reason=reason)
    mean = math.fsum(values.values()) / len(values)
    if runs < MIN_RUNS:
        reason = f"{runs} runs: an interval over runs needs at least {MIN_RUNS}"
        return RunInterval(runs=runs, mean=mean, standard_error=None, low=None, high=None, reason=reason)
    without = []
    for left_out in range(runs):
        kept = [value for pair, value in values.items() if left_out not in pair]
        without.append(math.fsum(kept) / len(kept))
    centre = math.fsum(without) / runs
    error = math.sqrt((runs - 1) / runs * math.fsum((value - centre) ** 2 for value in without))
    reach = _student(runs - 1) * error
    return RunInterval(
        runs=runs, mean=mean, standard_error=error, low=mean - reach, high=mean + reach, reason=None
    )


def _student(freedom: int) -> float:
    """97.5 % quantile of Student's t, within 1 % from 3 degrees of freedom on (Cornish and Fisher)."""
    z = _Z
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )


def block_heterogeneity(blocks: Sequence[PairOverlap], null: str, *, draws: int, seed: int) -> Heterogeneity:
    """Excess share over resampled blocks.

    Args:
        blocks: The pair within each tensor or layer; blocks without changes in either run are left out.
        null: A null that is a sum over blocks: any but `uniform`.
        draws: Resamples.
        seed: Of the resamples.
    """
    assert null != "uniform", "uniform chance is not a sum over blocks"
    used = [block for block in blocks if block.a or block.b]
    parts = np.array([[b.both, b.a, b.b, b.nulls[null].expected] for b in used], dtype=np.float64)
    parts = parts.reshape(-1, 4)
    overall = _excess(np.array([math.fsum(column.tolist()) for column in parts.T])[np.newaxis])[0]
    share = float(overall) if np.isfinite(overall) else None
    if len(used) < MIN_BLOCKS or share is None:
        reason = "chance leaves no room for an excess"
        if len(used) < MIN_BLOCKS:
            reason = f"{len(used)} blocks with changes: heterogeneity needs at least {MIN_BLOCKS}"
        return Heterogeneity(
            null=null, blocks=len(used), excess_share=share, low=None, high=None, reason=reason
        )
    rng = np.random.default_rng(seed)
    times = rng.multinomial(len(used), np.full(len(used), 1 / len(used)), size=draws)
    found = _excess(times @ parts)
    low, high = np.quantile(found[np.isfinite(found)], [0.025, 0.975]).tolist()
    return Heterogeneity(null=null, blocks=len(used), excess_share=share, low=low, high=high, reason=None)


def _excess(sums: np.ndarray) -> np.ndarray:
    """Excess share of rows of |A∩B|, |A|, |B|, I₀; NaN where it is not defined."""
    room = np.minimum(sums[:, 1], sums[:, 2]) - sums[:, 3]
    return np.divide(sums[:, 0] - sums[:, 3], room, out=np.full(len(sums), np.nan), where=room > 0)
