"""Consensus of R masks: in how many runs an entry changed, beside what independent runs would give.

Contract: pure. The R runs are those whose agreement the tables count (`core_of`). Under a null each run
changes an entry of stratum s with probability a_rs/n_s, independently, so that the number of runs is
Poisson-binomial in each stratum; strata are tensors × |w| (`magnitude`), tensors (`per-tensor`), or
everything (`uniform`). Expected numbers are sums of n_s · P_s(k), by `math.fsum`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sparsity_audit.stats.chance import share_of
from sparsity_audit.stats.overlap import MAGNITUDE, PER_TENSOR, UNIFORM, StratumTable

__all__ = ["Consensus", "Core", "consensus", "poisson_binomial"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Core:
    """Entries that changed in at least k runs.

    Args:
        runs: k.
        observed: How many there are.
        expected: By null.
        excess_share: By null: (observed − expected) ÷ (most there can be − expected); the most is
            min(⌊Σ|M_r|/k⌋, entries), for k = R the smallest mask. None where chance leaves no room.
    """

    runs: int
    observed: int
    expected: Mapping[str, float]
    excess_share: Mapping[str, float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Consensus:
    """How many runs agree on an entry.

    Args:
        entries: Entries compared.
        observed: Entries changed in exactly k runs, k = 0 … R.
        expected: The same under each null.
        cores: At least k runs, k = 1 … R; the last is the core.
    """

    entries: int
    observed: tuple[int, ...]
    expected: Mapping[str, tuple[float, ...]]
    cores: tuple[Core, ...]


def poisson_binomial(rates: np.ndarray) -> np.ndarray:
    """Probability of k successes among independent trials, float64[R + 1, S], from rates [R, S]."""
    found = np.zeros((len(rates) + 1, rates.shape[1]))
    found[0] = 1.0
    for number, rate in enumerate(rates):
        found[1 : number + 2] = found[1 : number + 2] * (1 - rate) + found[: number + 1] * rate
        found[0] *= 1 - rate
    return found


def consensus(tables: Sequence[StratumTable]) -> Consensus:
    """The consensus of the runs of `core_of` over all tables (at least one), one table a tensor."""
    chosen = tables[0].core_of
    assert all(table.core_of == chosen for table in tables), "tables of different runs"
    by_tensor = [table.coarsen(np.zeros_like) for table in tables]
    counts = {
        PER_TENSOR: _joined(by_tensor),
        MAGNITUDE: _joined(tables),
    }
    entries, changed = counts[PER_TENSOR]
    counts = {UNIFORM: (entries.sum(keepdims=True), changed.sum(axis=1, keepdims=True)), **counts}
    expected = {null: _expected(*pair) for null, pair in counts.items()}
    observed = tuple(sum(int(table.core[k].sum()) for table in tables) for k in range(len(chosen) + 1))
    sizes = [int(size) for size in counts[UNIFORM][1][:, 0]]
    return Consensus(
        entries=sum(observed),
        observed=observed,
        expected=expected,
        cores=tuple(_core(k, observed, expected, sizes) for k in range(1, len(chosen) + 1)),
    )


def _joined(tables: Sequence[StratumTable]) -> tuple[np.ndarray, np.ndarray]:
    return (
        np.concatenate([table.entries for table in tables]),
        np.concatenate([table.changed[list(table.core_of)] for table in tables], axis=1),
    )


def _expected(entries: np.ndarray, changed: np.ndarray) -> tuple[float, ...]:
    shares = poisson_binomial(changed / np.maximum(entries, 1))
    return tuple(math.fsum(row.tolist()) for row in shares * entries)


def _core(
    k: int, observed: tuple[int, ...], expected: Mapping[str, tuple[float, ...]], sizes: list[int]
) -> Core:
    found = sum(observed[k:])
    most = min(sum(sizes) // k, sum(observed), *(sizes if k == len(sizes) else ()))
    chance = {null: math.fsum(row[k:]) for null, row in expected.items()}
    return Core(
        runs=k,
        observed=found,
        expected=chance,
        excess_share={null: share_of(found - value, most - value) for null, value in chance.items()},
    )
