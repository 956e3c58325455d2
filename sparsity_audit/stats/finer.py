"""Finer and coarser strata: how far a chance level still moves when strata of |w_base| change.

Contract: pure. Quantile strata of a tensor are cut by value: `np.quantile` of |w| at 1/K … (K−1)/K (linear),
and stratum = `searchsorted(edges, |w|, side="left")`: equal values share a stratum, which ends at its edge.
The finer the strata, the less is left to chance; one entry a stratum repeats the observation. So a row says
how small the strata are beside what they account for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sparsity_audit.stats.overlap import MAGNITUDE, StratumTable, pair_overlap

__all__ = [
    "MIN_STRATUM_ENTRIES",
    "ConvergenceRow",
    "convergence",
    "quantile_edges",
    "quantile_edges_of_counts",
    "quantile_strata",
    "quantiles_of_magnitudes",
]

MIN_STRATUM_ENTRIES = 30
"""Smaller strata are counted: their rates are hardly known, and they repeat the observation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvergenceRow:
    """A pair under the magnitude null with one way to cut strata.

    Args:
        scheme: How strata were cut.
        num_strata: Strata with entries, over all tensors.
        median_entries: Entries of the stratum in which the median entry lies.
        in_small_strata: Share of the entries in strata of fewer than `MIN_STRATUM_ENTRIES`.
        jaccard: Chance level.
        excess_share: What is left of the overlap.
        z: Of the intersection.
    """

    scheme: str
    num_strata: int
    median_entries: int
    in_small_strata: float
    jaccard: float | None
    excess_share: float | None
    z: float | None


def quantile_edges(magnitudes: np.ndarray, count: int) -> np.ndarray:
    """Inner edges of `count` quantile strata of a tensor's |w|, float64[count − 1]; ascending.

    NaN is left out; a tensor without numbers has edges of 0.
    """
    assert count >= 1, count
    flat = magnitudes.reshape(-1).astype(np.float64)
    flat = flat[~np.isnan(flat)]
    if flat.size == 0:
        return np.zeros(count - 1)
    return np.quantile(flat, np.linspace(0, 1, count + 1)[1:-1])


def quantile_edges_of_counts(magnitudes: np.ndarray, entries: np.ndarray, count: int) -> np.ndarray:
    """`quantile_edges` of a tensor given as distinct |w| and how often each occurs, to the same last bit.

    Args:
        magnitudes: Distinct |w|, float64 ascending; NaN last, and left out.
        entries: How often each occurs, int64 > 0.
        count: Number of strata.
    """
    assert count >= 1, count
    known = ~np.isnan(magnitudes)
    last = np.cumsum(entries[known])
    if last.size == 0:
        return np.zeros(count - 1)
    at = np.linspace(0, 1, count + 1)[1:-1] * (int(last[-1]) - 1)
    below = np.floor(at)
    low, high = (
        magnitudes[known][np.searchsorted(last, np.minimum(place, last[-1] - 1), side="right")]
        for place in (below, below + 1)
    )
    part, step = at - below, high - low
    # As numpy interpolates: from the nearer end, so that equal ends give that very number.
    return np.where(part < 0.5, low + step * part, high - step * (1 - part))


def quantiles_of_magnitudes(table: StratumTable, magnitudes: np.ndarray, count: int) -> StratumTable:
    """A tensor's counts by distinct |w|, in `count` quantile strata.

    Args:
        table: One stratum a distinct |w|.
        magnitudes: |w| of each stratum, float64 ascending; NaN last.
        count: Number of strata.
    """
    edges = quantile_edges_of_counts(magnitudes, table.entries, count)
    places = quantile_strata(magnitudes, edges)
    return table.coarsen(lambda strata: places[np.searchsorted(table.strata, strata)])


def quantile_strata(magnitudes: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Stratum of each |w|: 0 up to and with the first edge, len(edges) above the last and for NaN."""
    return np.searchsorted(edges, magnitudes, side="left")


def convergence(
    schemes: Mapping[str, Sequence[StratumTable]], r: int = 0, q: int = 1
) -> tuple[ConvergenceRow, ...]:
    """One row a scheme, in the order given.

    Args:
        schemes: The tables of all tensors, cut one way or another, by the name of the way.
        r: The first run.
        q: The second.
    """
    return tuple(_row(scheme, tables, r, q) for scheme, tables in schemes.items())


def _row(scheme: str, tables: Sequence[StratumTable], r: int, q: int) -> ConvergenceRow:
    sizes = np.sort(np.concatenate([np.zeros(0, dtype=np.int64), *(table.entries for table in tables)]))
    sizes = sizes[sizes > 0]
    total, before = int(sizes.sum()), np.cumsum(sizes)
    null = pair_overlap(tables, r, q).nulls[MAGNITUDE]
    return ConvergenceRow(
        scheme=scheme,
        num_strata=len(sizes),
        median_entries=int(sizes[np.searchsorted(before, (total + 1) // 2)]) if total else 0,
        in_small_strata=int(sizes[sizes < MIN_STRATUM_ENTRIES].sum()) / total if total else 0.0,
        jaccard=null.jaccard,
        excess_share=null.excess_share,
        z=null.z,
    )
