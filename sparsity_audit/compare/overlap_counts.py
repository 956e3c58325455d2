"""Counts of many masks, block by block: the contract of all counters, and the one in numpy.

Contract: a counter gets blocks of one tensor as *words*, uint64[runs, …] in which bit i of word w is entry
64·w + i, with the stratum of every entry where strata are wanted. It adds integers, so its table does not
depend on how the tensor was cut. `take` gives the table and empties the counter. `StratumTable.from_masks`
is the slow reference of all.

The numpy counter puts a block's entries in the order of their strata, each stratum on a word border. Then a
stratum is a run of words, and each pair of runs costs one AND and one popcount a word, however many strata
there are. An entry of the padding that brings a stratum to whole words is in no mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Final, Protocol

import numpy as np

from sparsity_audit.masks.sampling import OUTSIDE
from sparsity_audit.stats.overlap import StratumTable

__all__ = [
    "PADDED_BYTES",
    "PADDED_WORDS",
    "CoreOfSomeCounter",
    "NumpyCounter",
    "OverlapCounter",
    "empty_table",
    "new_words",
]

PADDED_WORDS: Final = 256
PADDED_BYTES: Final = 8 * PADDED_WORDS
"""A row of words is zero beyond the block's entries, up to a multiple of this."""

_WORD_BITS = 64
_RUNS_A_BYTE = 8
_APART_WORDS = 136
"""Rows a power of two apart would share the sets of the cache; with these words between, they do not."""


class OverlapCounter(Protocol):
    """What counts the blocks of one tensor after another."""

    def add(self, words: np.ndarray, length: int, *, strata: np.ndarray | None, counted: int) -> None:
        """Count a block.

        Args:
            words: uint64[runs, …] of `new_words`, zero from bit `length` on up to a multiple of PADDED_WORDS.
            length: Entries of the block, counted or not.
            strata: int16[length], OUTSIDE where an entry is not counted; None puts all into stratum 0.
            counted: Entries that count; where there are no strata, no other has a bit.
        """
        ...

    def take(self, tensor: str) -> StratumTable:
        """The counts since the last call."""
        ...


def new_words(runs: int, length: int) -> np.ndarray:
    """Zero words for blocks of at most `length` entries, uint64[runs, …]."""
    padded = -(-length // (_WORD_BITS * PADDED_WORDS)) * PADDED_WORDS
    return np.zeros((runs, padded + _APART_WORDS), dtype=np.uint64)


def empty_table(tensor: str, runs: int) -> StratumTable:
    """The table of no entries."""

    def zeros(*shape: int) -> np.ndarray:
        return np.zeros((*shape, 0), dtype=np.int64)

    return StratumTable(
        tensor=tensor,
        strata=zeros(),
        entries=zeros(),
        changed=zeros(runs),
        both=zeros(runs, runs),
        core=zeros(runs + 1),
        core_of=tuple(range(runs)),
    )


class NumpyCounter:
    """See the module docstring.

    Args:
        runs: Number of masks.
    """

    def __init__(self, runs: int) -> None:
        self._runs = runs
        self._held = empty_table("", runs)

    def add(self, words: np.ndarray, length: int, *, strata: np.ndarray | None, counted: int) -> None:
        """Count a block; temporaries are about 16 bytes an entry."""
        if counted == 0:
            return
        used = words[:, : -(-length // _WORD_BITS)]
        if strata is None:
            layout = _Layout(
                strata=np.zeros(1, dtype=np.int64),
                entries=np.array([counted], dtype=np.int64),
                starts=np.zeros(1, dtype=np.intp),
            )
            table = _count_words(layout, used)
        else:
            table = _count_strata(used, length, strata)
        self._held = self._held.merge(table)

    def take(self, tensor: str) -> StratumTable:
        """The counts since the last call."""
        held, self._held = self._held, empty_table("", self._runs)
        return StratumTable(
            tensor=tensor,
            strata=held.strata,
            entries=held.entries,
            changed=held.changed,
            both=held.both,
            core=held.core,
            core_of=held.core_of,
        )


class CoreOfSomeCounter:
    """Counts all runs in pairs, and the agreement of some of them: a reference run is set aside.

    Args:
        of_all: Counts every run.
        of_some: Counts the runs of `core_of`; None where there are none.
        core_of: Their numbers, ascending.
    """

    def __init__(
        self, of_all: OverlapCounter, of_some: OverlapCounter | None, core_of: tuple[int, ...]
    ) -> None:
        self._all, self._some, self._core_of = of_all, of_some, core_of

    def add(self, words: np.ndarray, length: int, *, strata: np.ndarray | None, counted: int) -> None:
        """Count a block."""
        self._all.add(words, length, strata=strata, counted=counted)
        if self._some is not None:
            self._some.add(words[list(self._core_of)], length, strata=strata, counted=counted)

    def take(self, tensor: str) -> StratumTable:
        """The counts since the last call."""
        table = self._all.take(tensor)
        core = table.entries[None] if self._some is None else self._some.take(tensor).core
        return replace(table, core=core, core_of=self._core_of)


def _count_strata(words: np.ndarray, length: int, strata: np.ndarray) -> StratumTable:
    chosen = np.argsort(strata, kind="stable")
    chosen = chosen[np.searchsorted(strata[chosen], OUTSIDE, side="right") :]
    if chosen.size == 0:
        return empty_table("", len(words))
    layout, places, end = _arrange(strata[chosen])
    ordered = np.empty((len(words), end // _WORD_BITS), dtype=np.uint64)
    for first in range(0, len(words), _RUNS_A_BYTE):
        # Entries are moved once for eight runs: bit k of an entry's byte is that of run first + k.
        together = np.zeros(length, dtype=np.uint8)
        group = words[first : first + _RUNS_A_BYTE]
        for k, bits in enumerate(group):
            unpacked = np.unpackbits(bits.view(np.uint8), count=length, bitorder="little")
            together |= unpacked << np.uint8(k)
        moved = np.zeros(end, dtype=np.uint8)
        moved[places] = together[chosen]
        for k in range(len(group)):
            ordered[first + k] = np.packbits(moved & np.uint8(1 << k), bitorder="little").view(np.uint64)
    return _count_words(layout, ordered)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Layout:
    """Runs of words, one a stratum: its number, its entries, its first word."""

    strata: np.ndarray
    entries: np.ndarray
    starts: np.ndarray


def _arrange(ordered: np.ndarray) -> tuple[_Layout, np.ndarray, int]:
    """The layout of entries that are sorted by stratum, the place of each, and the length in bits."""
    first = np.concatenate([[0], np.flatnonzero(ordered[1:] != ordered[:-1]) + 1])
    strata, counts = ordered[first], np.diff(first, append=len(ordered))
    num_words = -(-counts // _WORD_BITS)
    starts = np.cumsum(num_words) - num_words
    places = np.arange(len(ordered)) + np.repeat(_WORD_BITS * starts - first, counts)
    layout = _Layout(strata=strata.astype(np.int64), entries=counts.astype(np.int64), starts=starts)
    return layout, places, int(num_words.sum()) * _WORD_BITS


def _count_words(layout: _Layout, words: np.ndarray) -> StratumTable:
    runs, strata = len(words), len(layout.strata)

    def count(bits: np.ndarray) -> np.ndarray:
        return np.add.reduceat(np.bitwise_count(bits), layout.starts, dtype=np.int64)

    both = np.empty((runs, runs, strata), dtype=np.int64)
    for r in range(runs):
        for q in range(r, runs):
            both[r, q] = both[q, r] = count(words[r] & words[q])
    core = np.empty((runs + 1, strata), dtype=np.int64)
    planes = _held_planes(words)
    for k in range(1, runs + 1):
        core[k] = count(_equal_to(planes, k))
    # Padding is held by no run, so what is held by none is told from the entries.
    core[0] = layout.entries - core[1:].sum(axis=0)
    return StratumTable(
        tensor="",
        strata=layout.strata,
        entries=layout.entries,
        changed=np.einsum("rrs->rs", both).copy(),
        both=both,
        core=core,
        core_of=tuple(range(runs)),
    )


def _held_planes(words: np.ndarray) -> list[np.ndarray]:
    """In how many runs each bit is set, as bit planes: plane j holds bit j of the number."""
    planes = [np.zeros_like(words[0]) for _ in range(len(words).bit_length())]
    for bits in words:
        carry = bits
        for j, plane in enumerate(planes):
            planes[j], carry = plane ^ carry, plane & carry
    return planes


def _equal_to(planes: Sequence[np.ndarray], k: int) -> np.ndarray:
    return reduce(np.bitwise_and, (plane if k >> j & 1 else ~plane for j, plane in enumerate(planes)))
