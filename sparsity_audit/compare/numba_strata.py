"""Count many masks at once by stratum of the base, in compiled loops.

Contract: every counter equals `overlap_counts.NumpyCounter` exactly; arrays come from `new_words`, compiled
code runs without the interpreter lock. *Table*, few runs: an entry is one increment at (stratum, bits of the
runs), and the table says everything. *Buckets*, where that table would be too large: the bits of changed
entries are gathered by stratum, and each sixty-four of them are turned into words and counted as such.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numba import njit

from sparsity_audit.compare.accumulate import CODE_DTYPE
from sparsity_audit.compare.numba_generic import OPTIONS
from sparsity_audit.compare.numba_popcount import or_bits, transpose
from sparsity_audit.compare.numba_simd import count_ones
from sparsity_audit.stats.overlap import StratumTable
from sparsity_audit.types import DType

__all__ = ["BucketCounter", "TableCounter", "fill_strata"]

_ENTRIES: Final = 2048
"""Entries of a chunk whose places in the table are held at once: 8 KB."""
_MAX_SPREAD_CELLS: Final = 1 << 14
_SPREAD: Final = 2
"""Neighbouring entries often fall into one cell and would wait for each other's store: small tables have
2² cells for each, used in turn."""


@njit(**OPTIONS)
def _start_places(strata, shift, places):
    for i in range(len(strata)):
        places[i] = np.uint32(np.int32(strata[i]) + np.int32(1)) << shift


@njit(**OPTIONS)
def _increment(places, spread, table):
    last = (np.uint32(1) << spread) - np.uint32(1)
    for i in range(len(places)):
        table[np.uint64(places[i] | (np.uint32(i) & last))] += np.uint32(1)


@njit(**OPTIONS)
def _tabulate(words, length, strata, spread, places, table):
    """Add 1 at ((stratum + 1) · 2^runs + bits of the runs) · 2^spread + i mod 2^spread for each entry i."""
    runs = len(words)
    for start in range(0, length, _ENTRIES):
        n = min(_ENTRIES, length - start)
        _start_places(strata[start : start + n], np.uint32(runs + spread), places)
        for r in range(runs):
            row, bit = words[r], np.uint32(1) << np.uint32(r + spread)
            for w in range((n + 63) >> 6):
                or_bits(places, w << 6, row[(start >> 6) + w], bit)
        _increment(places[:n], np.uint32(spread), table)


class TableCounter:
    """Counts with strata for few runs.

    Args:
        runs: Number of masks.
        num_strata: Strata are below this.
    """

    def __init__(self, runs: int, num_strata: int) -> None:
        cells = (num_strata + 1) << runs
        self._runs = runs
        self._spread = _SPREAD if cells <= _MAX_SPREAD_CELLS else 0
        self._table = np.zeros(cells << self._spread, dtype=np.uint32)
        self._places = np.zeros(_ENTRIES + 64, dtype=np.uint32)
        self._entries = 0

    def add(self, words: np.ndarray, length: int, *, strata: np.ndarray | None, counted: int) -> None:
        """Count a block."""
        del counted
        assert strata is not None
        self._entries += length
        assert self._entries < 2**32, "cells have 32 bits: call take before"
        _tabulate(words, length, strata, self._spread, self._places, self._table)

    def take(self, tensor: str) -> StratumTable:
        """The counts since the last call."""
        cells = self._table.reshape(-1, 1 << self._runs << self._spread)
        cells[0] = 0
        rows = np.flatnonzero(cells.max(axis=1))
        patterns = cells[rows].reshape(len(rows), 1 << self._runs, 1 << self._spread)
        cells[rows], self._entries = 0, 0
        return _from_patterns(tensor, rows - 1, patterns.sum(axis=-1, dtype=np.int64).T, self._runs)


def _from_patterns(tensor: str, strata: np.ndarray, patterns: np.ndarray, runs: int) -> StratumTable:
    """The table of entries counted by the bits of their runs, int64[2^runs, strata]."""
    holders = np.bitwise_count(np.arange(1 << runs))
    core = np.array([patterns[holders == k].sum(axis=0) for k in range(runs + 1)], dtype=np.int64)
    supersets = patterns.copy()
    for r in range(runs):
        # Afterwards supersets[p] counts the entries that hold all runs of p, whatever else they hold.
        halves = supersets.reshape(1 << (runs - 1 - r), 2, 1 << r, len(strata))
        halves[:, 0] += halves[:, 1]
    bit = 1 << np.arange(runs)
    both = supersets[bit[:, None] | bit[None]]
    return StratumTable(
        tensor=tensor,
        strata=strata.astype(np.int64),
        entries=supersets[0].copy(),  # a view would keep all patterns
        changed=supersets[bit],
        both=both,
        core=core,
        core_of=tuple(range(runs)),
    )


@njit(**OPTIONS)
def _empty_bucket(row, num, buckets, scratch, both, core):
    """Count the first `num` entries in a stratum's bucket."""
    rows, runs, planes = len(core), both.shape[1], len(scratch) >> 6
    for i in range(num):
        held = np.int64(0)
        for p in range(planes):
            held += count_ones(buckets[((p * rows + row) << 6) + i])
        core[row, held] += 1
    for p in range(planes):
        for i in range(64):
            scratch[(p << 6) + i] = buckets[((p * rows + row) << 6) + i] if i < num else np.uint64(0)
        transpose(scratch, p << 6)
    for r in range(runs):
        bits, others, counts = scratch[r], scratch[r:runs], both[row, r, r:]
        for q in range(len(others)):
            counts[q] += count_ones(bits & others[q])


@njit(**OPTIONS)
def _gather(words, length, strata, state, buckets, bits, scratch, both, core):
    """Put the bits of each changed entry into its stratum's bucket; count buckets that are full.

    state[row] is 128 · entries seen + entries in the bucket, so that an entry waits for one store only.
    """
    runs, planes, rows = len(words), len(bits) >> 6, np.uint64(len(core))
    for start in range(0, length, 64):
        for r in range(runs):
            bits[r] = words[r, start >> 6]
        for r in range(runs, planes << 6):
            bits[r] = np.uint64(0)
        for p in range(planes):
            transpose(bits, p << 6)
        some = strata[start : start + 64]
        for i in range(len(some)):
            row = np.uint64(np.int64(some[i]) + 1)
            before = state[row]
            place, any_run = (row << np.uint64(6)) + (before & np.uint64(63)), bits[i]
            buckets[place] = any_run
            for p in range(1, planes):
                more = bits[(p << 6) + i]
                any_run |= more
                buckets[place + ((np.uint64(p) * rows) << np.uint64(6))] = more
            after = before + np.uint64(128) + np.uint64(any_run != 0)
            if after & np.uint64(64):
                _empty_bucket(np.int64(row), 64, buckets, scratch, both, core)
                after -= np.uint64(64)
            state[row] = after


class BucketCounter:
    """Counts with strata for any number of runs.

    Args:
        runs: Number of masks.
        num_strata: Strata are below this.
    """

    def __init__(self, runs: int, num_strata: int) -> None:
        rows, planes = num_strata + 1, -(-runs // 64)
        self._state = np.zeros(rows, dtype=np.uint64)
        self._buckets = np.zeros(planes * rows * 64, dtype=np.uint64)
        self._bits, self._scratch = np.zeros((2, planes * 64), dtype=np.uint64)
        # Pages of strata that do not occur are never touched.
        self._both = np.zeros((rows, runs, runs), dtype=np.int64)
        self._core = np.zeros((rows, runs + 1), dtype=np.int64)

    def add(self, words: np.ndarray, length: int, *, strata: np.ndarray | None, counted: int) -> None:
        """Count a block."""
        del counted
        assert strata is not None
        scratch = self._state, self._buckets, self._bits, self._scratch
        _gather(words, length, strata, *scratch, self._both, self._core)

    def take(self, tensor: str) -> StratumTable:
        """The counts since the last call."""
        rows = np.flatnonzero(self._state)
        for row in rows:
            held = int(self._state[row]) & 63
            _empty_bucket(row, held, self._buckets, self._scratch, self._both, self._core)
        entries = (self._state >> np.uint64(7)).astype(np.int64)
        self._state[rows] = 0
        both, core = self._both[rows], self._core[rows]
        self._both[rows], self._core[rows] = 0, 0
        inside = rows > 0
        rows, both, core = rows[inside], both[inside], core[inside].T.copy()
        core[0] = entries[rows] - core[1:].sum(axis=0)
        both = np.moveaxis(np.triu(both) + np.triu(both, 1).transpose(0, 2, 1), 0, -1).copy()
        return StratumTable(
            tensor=tensor,
            strata=rows - 1,
            entries=entries[rows],
            changed=np.einsum("rrs->rs", both).copy(),
            both=both,
            core=core,
            core_of=tuple(range(core.shape[0] - 1)),
        )


@njit(**OPTIONS)
def _fill_strata(codes, magnitude_mask, mantissa_mask, mantissa_bits, strata):
    for i in range(len(codes)):
        magnitude = codes[i] & magnitude_mask
        is_power = (magnitude & mantissa_mask) == 0
        strata[i] = np.int16(((magnitude >> mantissa_bits) << 1) | is_power)


def fill_strata(codes: np.ndarray, dtype: DType, strata: np.ndarray) -> None:
    """Write the stratum of each float code (see `stats.strata`), int16; `numpy_kernel.strata_of` compiled."""
    layout, code = dtype.layout, CODE_DTYPE[dtype.itemsize].type
    mantissa_mask = code((1 << layout.mantissa_bits) - 1)
    _fill_strata(codes, code(layout.magnitude_mask), mantissa_mask, code(layout.mantissa_bits), strata)
