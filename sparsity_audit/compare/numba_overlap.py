"""Count many masks at once in compiled loops that release the interpreter lock.

Contract: every counter equals `overlap_counts.NumpyCounter` exactly; arrays come from `new_words`.
*Words*, without strata: each pair of runs costs one AND and a carry-save popcount, in chunks that stay in
the first cache. *Table*, few runs: an entry is one increment at (stratum, bits of the runs), and the table
says everything. *Buckets*, where that table would leave the cache: the bits of changed entries are gathered
by stratum, and each sixty-four are turned into words and counted as such.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numba import njit

from sparsity_audit.compare.accumulate import CODE_DTYPE
from sparsity_audit.compare.numba_generic import OPTIONS
from sparsity_audit.compare.numba_popcount import ones_of_both, or_bits, transpose
from sparsity_audit.compare.numba_simd import count_ones
from sparsity_audit.compare.overlap_counts import PADDED_WORDS, OverlapCounter, empty_table
from sparsity_audit.stats.overlap import StratumTable
from sparsity_audit.types import DType

__all__ = ["MAX_TABLE_CELLS", "BucketCounter", "TableCounter", "WordCounter", "fill_strata", "new_counter"]

MAX_TABLE_CELLS: Final = 1 << 22
"""Cells of 4 bytes a worker: 10 runs with the strata of bf16."""

_ENTRIES: Final = 2048
"""Entries of a chunk whose places in the table are held at once: 8 KB."""
_MAX_SPREAD_CELLS: Final = 1 << 14
_SPREAD: Final = 2
"""Neighbouring entries often fall into one cell and would wait for each other's store: small tables have
2² cells for each, used in turn."""


@njit(**OPTIONS)
def _add_two(x, y, plane, carry):
    """Add two runs' bits to the lowest plane; `carry` gets what goes to the next."""
    for i in range(len(x)):
        held, either = plane[i], x[i] ^ y[i]
        carry[i] = (x[i] & y[i]) | (held & either)
        plane[i] = held ^ either


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
def _fill_planes(words, start, planes, carry):
    """Number of runs that hold each bit, as bit planes: plane j holds bit j of the number."""
    runs = len(words)
    planes[:] = np.uint64(0)
    for r in range(0, runs, 2):
        j, most = 1, (r + 2) >> 1
        x = words[r, start : start + PADDED_WORDS]
        if r + 1 < runs:
            _add_two(x, words[r + 1, start : start + PADDED_WORDS], planes[0], carry)
        else:
            for i in range(PADDED_WORDS):
                carry[i] = x[i]
            j, most = 0, r + 1
        while most:
            _add_one(planes[j], carry)
            j, most = j + 1, most >> 1


@njit(**OPTIONS)
def _fill_terms(planes, first, stop, terms, place):
    """Bits whose number in planes first … stop − 1 is t, in terms[place + t]."""
    terms[place] = ~np.uint64(0)
    for j in range(first, stop):
        half = 1 << (j - first)
        for t in range(half):
            _split(planes[j], terms[place + t], terms[place + half + t])


@njit(**OPTIONS)
def _count_words(words, num_words, planes, terms, carry, both, core):
    """Add to both[r, q], r ≤ q, the bits in two runs, and to core[k], k ≥ 3, those in exactly k."""
    runs, stride, low = len(words), words.shape[1], len(planes) >> 1
    flat, flat_terms = words.reshape(-1), terms.reshape(-1)
    for start in range(0, num_words, PADDED_WORDS):
        for r in range(runs):
            for q in range(r, runs):
                both[r, q] += ones_of_both(flat, r * stride + start, q * stride + start)
        if runs > 2:
            _fill_planes(words, start, planes, carry)
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
        num_planes = runs.bit_length()
        num_terms = (1 << num_planes // 2) + (1 << num_planes - num_planes // 2)
        self._planes = np.zeros((num_planes, PADDED_WORDS), dtype=np.uint64)
        self._terms = np.zeros((num_terms, PADDED_WORDS), dtype=np.uint64)
        self._carry = np.zeros(PADDED_WORDS, dtype=np.uint64)
        self._both = np.zeros((runs, runs), dtype=np.int64)
        self._core = np.zeros(runs + 1, dtype=np.int64)
        self._entries = 0

    def add(self, words: np.ndarray, length: int, *, strata: np.ndarray | None, counted: int) -> None:
        """Count a block."""
        assert strata is None
        self._entries += counted
        num_words = -(-length // 64)
        _count_words(words, num_words, self._planes, self._terms, self._carry, self._both, self._core)

    def take(self, tensor: str) -> StratumTable:
        """The counts since the last call.

        Σ_k k·core[k] is the sum of the diagonal of `both`, Σ_k k²·core[k] that of all of it: with core[3:]
        known, two equations for core[1] and core[2].
        """
        runs, entries = len(self._both), self._entries
        if entries == 0:
            return empty_table(tensor, runs)
        both = np.triu(self._both) + np.triu(self._both, 1).T
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
        )


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
    """table[((stratum + 1) · 2^runs + bits of the runs) · 2^spread + i mod 2^spread] += 1 for each entry i."""
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
        rows = np.flatnonzero(cells.any(axis=1))
        patterns = cells[rows].reshape(len(rows), 1 << self._runs, 1 << self._spread)
        cells[rows], self._entries = 0, 0
        return _from_patterns(tensor, rows - 1, patterns.sum(axis=-1, dtype=np.int64), self._runs)


def _from_patterns(tensor: str, strata: np.ndarray, patterns: np.ndarray, runs: int) -> StratumTable:
    """The table of entries counted by the bits of their runs, int64[strata, 2^runs]; overwrites `patterns`."""
    held = np.bitwise_count(np.arange(1 << runs))
    core = np.array([patterns[:, held == k].sum(axis=1) for k in range(runs + 1)], dtype=np.int64)
    for r in range(runs):
        # Afterwards patterns[:, p] counts the entries that hold all runs of p.
        halves = patterns.reshape(len(strata), 1 << (runs - 1 - r), 2, 1 << r)
        halves[:, :, 0] += halves[:, :, 1]
    bit = 1 << np.arange(runs)
    both = np.moveaxis(patterns[:, bit[:, None] | bit[None]], 0, -1).copy()
    return StratumTable(
        tensor=tensor,
        strata=strata.astype(np.int64),
        entries=patterns[:, 0].copy(),
        changed=np.einsum("rrs->rs", both).copy(),
        both=both,
        core=core,
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
        _gather(
            words, length, strata, self._state, self._buckets, self._bits, self._scratch, self._both, self._core
        )  # fmt: skip

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


def new_counter(runs: int, num_strata: int | None) -> OverlapCounter:
    """The fastest counter; `num_strata` is None where strata are not asked for."""
    if num_strata is None:
        return WordCounter(runs)
    if (num_strata + 1) << runs <= MAX_TABLE_CELLS:
        return TableCounter(runs, num_strata)
    return BucketCounter(runs, num_strata)
