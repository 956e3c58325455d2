"""Count many masks at once in compiled loops: every pair of runs, and how many runs hold an entry.

Contract: equals `overlap_counts.NumpyCounter` exactly; arrays come from `new_words`, compiled code runs
without the interpreter lock. Each pair costs one AND and a carry-save popcount, in chunks of 2 KB a run that
stay near the core; entries held by exactly k runs are popcounts of two sets of bit planes. Strata are counted
by `numba_strata`.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numba import njit

from sparsity_audit.compare.numba_generic import OPTIONS
from sparsity_audit.compare.numba_popcount import add_seven_rows, add_three_rows, ones_of_both
from sparsity_audit.compare.numba_strata import BucketCounter, TableCounter
from sparsity_audit.compare.overlap_counts import PADDED_WORDS, OverlapCounter, empty_table
from sparsity_audit.stats.overlap import StratumTable

__all__ = ["MAX_TABLE_CELLS", "WordCounter", "new_counter"]

MAX_TABLE_CELLS: Final = 1 << 22
"""Cells of 4 bytes a worker: 12 runs with the strata of bf16, 9 with those of fp64."""


@njit(**OPTIONS)
def _add_one(plane, carry):
    for i in range(len(plane)):
        held = plane[i]
        plane[i] = held ^ carry[i]
        carry[i] = held & carry[i]


@njit(**OPTIONS)
def _split(plane, without, within):
    """Part the bits of `without` by the plane: those in it go to `within`."""
    for i in range(len(plane)):
        bits = without[i]
        within[i] = bits & plane[i]
        without[i] = bits & ~plane[i]


@njit(**OPTIONS)
def _fill_planes(words, rows, start, zeros, planes, carry):
    """Number of runs that hold each bit, as bit planes: plane j holds bit j of the number."""
    planes[:] = np.uint64(0)
    flat, flat_planes, first, runs = words.reshape(-1), planes.reshape(-1), 0, len(words)
    while first < runs:
        if runs - first > 3:
            add_seven_rows(flat, rows[first : first + 7], start, zeros, flat_planes, carry)
        else:
            add_three_rows(flat, rows[first : first + 3], start, zeros, flat_planes, carry)
        if first:  # the first seven runs at most fill three planes, and carry nothing
            for j in range(3, len(planes)):
                _add_one(planes[j], carry)
        first += 7


@njit(**OPTIONS)
def _fill_terms(planes, first, stop, terms, place):
    """Bits whose number in planes first … stop − 1 is t, in terms[place + t]."""
    terms[place] = ~np.uint64(0)
    for j in range(first, stop):
        half = 1 << (j - first)
        for t in range(half):
            _split(planes[j], terms[place + t], terms[place + half + t])


@njit(**OPTIONS)
def _count_words(words, num_words, rows, zeros, planes, terms, carry, both, core):
    """Add to both[r, q], r ≤ q, the bits in two runs, and to core[k], k ≥ 3, those in exactly k."""
    runs, stride, low = len(words), words.shape[1], len(planes) >> 1
    flat, flat_terms = words.reshape(-1), terms.reshape(-1)
    for start in range(0, num_words, PADDED_WORDS):
        for r in range(runs):
            for q in range(r, runs):
                both[r, q] += ones_of_both(flat, r * stride + start, q * stride + start)
        if runs > 2:
            _fill_planes(words, rows, start, zeros, planes, carry)
            _fill_terms(planes, 0, low, terms, 0)
            _fill_terms(planes, low, len(planes), terms, 1 << low)
            for k in range(3, runs + 1):
                lower, upper = k & ((1 << low) - 1), (1 << low) + (k >> low)
                core[k] += ones_of_both(flat_terms, lower * PADDED_WORDS, upper * PADDED_WORDS)


class WordCounter:
    """Counts without strata: popcounts of pairs; who is in none, one or two runs follows from their sums.

    Args:
        runs: Number of masks.
    """

    def __init__(self, runs: int) -> None:
        num_planes = max(runs.bit_length(), 3)
        num_terms = (1 << num_planes // 2) + (1 << num_planes - num_planes // 2)
        self._planes = np.zeros((num_planes, PADDED_WORDS), dtype=np.uint64)
        self._terms = np.zeros((num_terms, PADDED_WORDS), dtype=np.uint64)
        self._carry, self._zeros = np.zeros((2, PADDED_WORDS), dtype=np.uint64)
        self._both = np.zeros((runs, runs), dtype=np.int64)
        self._core = np.zeros(runs + 1, dtype=np.int64)
        self._entries = 0

    def add(self, words: np.ndarray, length: int, *, strata: np.ndarray | None, counted: int) -> None:
        """Count a block."""
        assert strata is None
        self._entries += counted
        num_words = -(-length // 64)
        rows = np.full(-(-len(words) // 7) * 7, -1, dtype=np.int64)
        rows[: len(words)] = np.arange(len(words)) * words.shape[1]
        scratch = self._zeros, self._planes, self._terms, self._carry
        _count_words(words, num_words, rows, *scratch, self._both, self._core)

    def take(self, tensor: str) -> StratumTable:
        """The counts since the last call.

        Σ_k k·core[k] is the sum of the diagonal of `both`, Σ_k k²·core[k] that of all of it: with core[3:]
        known, two equations for core[1] and core[2].
        """
        runs, entries = len(self._both), self._entries
        if entries == 0:
            return empty_table(tensor, runs)
        both = self._both + self._both.T
        np.fill_diagonal(both, self._both.diagonal())
        core, held = self._core.copy(), np.arange(runs + 1)
        once = int(np.trace(both)) - int(held @ core)
        squared = int(both.sum()) - int(held**2 @ core)
        assert (squared - once) % 2 == 0
        in_two = (squared - once) // 2
        if runs > 1:
            core[2] = in_two
        core[1] = once - 2 * in_two
        core[0] = entries - int(core[1:].sum())
        self._both[:], self._core[:], self._entries = 0, 0, 0
        return StratumTable(
            tensor=tensor,
            strata=np.zeros(1, dtype=np.int64),
            entries=np.array([entries], dtype=np.int64),
            changed=both.diagonal()[:, None].copy(),
            both=both[:, :, None],
            core=core[:, None],
            core_of=tuple(range(runs)),
        )


def new_counter(runs: int, num_strata: int | None) -> OverlapCounter:
    """The fastest counter; `num_strata` is None where strata are not asked for."""
    if num_strata is None:
        return WordCounter(runs)
    if (num_strata + 1) << runs <= MAX_TABLE_CELLS:
        return TableCounter(runs, num_strata)
    return BucketCounter(runs, num_strata)
