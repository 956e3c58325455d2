"""One pass over the bits of many masks: exact counts of every pair of runs, by stratum of the base.

Contract: the counts are integers and add over any split, so neither block size, kernel nor number of workers
matters. Memory a worker: one block of every mask, and of the base where strata are asked for. Bits outside
the compared ranges count nowhere. Each unit ends with a check that the masks' files are still those that
were opened, before its counts are used.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

from sparsity_audit.compare.dispatch import load_overlap_counter
from sparsity_audit.compare.overlap_counts import PADDED_BYTES, CoreOfSomeCounter, OverlapCounter, new_words
from sparsity_audit.masks.bitmask import Block, blocks_of, compared_spans
from sparsity_audit.masks.metadata import MaskTensor
from sparsity_audit.masks.reader import MaskCatalogue, MaskReader
from sparsity_audit.masks.sampling import OUTSIDE, Grouping
from sparsity_audit.passes.base_strata import StrataGrouping
from sparsity_audit.passes.engine import Workers, map_units
from sparsity_audit.stats.overlap import StratumTable

__all__ = ["count_overlaps"]

_BLOCK_BYTES = 1 << 18
_STRATA_BLOCK_BYTES = 1 << 16
"""Packed bytes of a block: 2²¹ entries cost few calls, but with codes and strata they would take 12 MB."""

_BLOCKS_A_UNIT = 32
_JOINED_ENTRIES = 1 << 16
"""Entries whose bits are unpacked at once; larger temporaries would be mapped and faulted for every block."""

_NewCounter = Callable[[int | None], OverlapCounter]


def count_overlaps(
    masks: Sequence[MaskCatalogue],
    tensors: Mapping[str, MaskTensor],
    *,
    grouping: Grouping | None = None,
    core_of: Sequence[int] | None = None,
    block_bytes: int | None = None,
    workers: Workers = 1,
    kernel: Literal["auto", "numpy", "numba"] = "auto",
    on_entries: Callable[[int], None] | None = None,
) -> tuple[StratumTable, ...]:
    """Counts of each tensor, in the order given; a tensor without compared entries has no strata.

    Args:
        masks: The runs' masks, packed; each holds all of `tensors` in the shapes given.
        tensors: What is counted, and where it is compared.
        grouping: Stratum of each entry of the base; without it a tensor is a single stratum 0.
        core_of: The runs whose agreement the tables' `core` counts, ascending; all without it.
        block_bytes: Packed bytes that are read of each mask at once, None for what is fast; the result is
            the same.
        workers: Threads; the result is the same.
        kernel: What counts; the result is the same. `auto` goes by how much there is to count.
        on_entries: Called in this thread with the entries that were done.

    Raises:
        MaskError: A mask is damaged.
        ChangedInputError: A file changed during the pass.
        MissingExtraError: `numba` was asked for and is not installed.
    """
    chosen = tuple(range(len(masks)) if core_of is None else core_of)
    num_entries = sum(tensor.num_entries for tensor in tensors.values())
    new_counter = _counters(
        kernel, len(masks), chosen, num_entries=num_entries, by_stratum=grouping is not None
    )
    if block_bytes is None:
        block_bytes = _BLOCK_BYTES if grouping is None else _STRATA_BLOCK_BYTES
    tables: dict[str, StratumTable] = {}
    crew = _Crew(masks, grouping, new_counter, block_bytes)
    units = _units(tensors.values(), block_bytes)
    with closing(crew), closing(map_units(crew.count, units, workers=workers)) as counted:
        for unit, table in counted:
            name = unit.tensor.name
            tables[name] = tables[name].merge(table) if name in tables else table
            if on_entries is not None:
                on_entries(sum(block.num_entries for block in unit.blocks))
    return tuple(tables.get(name) or new_counter(None).take(name) for name in tensors)


def _counters(
    kernel: Literal["auto", "numpy", "numba"],
    runs: int,
    core_of: tuple[int, ...],
    *,
    num_entries: int,
    by_stratum: bool,
) -> _NewCounter:
    load = partial(load_overlap_counter, kernel, num_entries=num_entries, by_stratum=by_stratum)
    of_all, of_some = load(runs=runs), load(runs=len(core_of)) if core_of else None
    if core_of == tuple(range(runs)):
        return of_all
    return lambda strata: CoreOfSomeCounter(
        of_all(strata), None if of_some is None else of_some(strata), core_of
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Unit:
    """Some blocks of one tensor."""

    tensor: MaskTensor
    blocks: tuple[Block, ...]


def _units(tensors: Iterable[MaskTensor], block_bytes: int) -> Iterator[_Unit]:
    for tensor in tensors:
        held: list[Block] = []
        for block in blocks_of(tensor.shape, max_bytes=block_bytes):
            held.append(block)
            if len(held) == _BLOCKS_A_UNIT:
                yield _Unit(tensor=tensor, blocks=tuple(held))
                held = []
        if held:
            yield _Unit(tensor=tensor, blocks=tuple(held))


class _Crew:
    """One `_Worker` a thread; all of them are closed together."""

    def __init__(
        self,
        masks: Sequence[MaskCatalogue],
        grouping: Grouping | None,
        new_counter: _NewCounter,
        block_bytes: int,
    ) -> None:
        self._parts = masks, grouping, new_counter, block_bytes
        self._mine = threading.local()
        self._all: list[_Worker] = []

    def count(self, unit: _Unit) -> StratumTable:
        """Counts of a unit, by this thread's worker."""
        if not hasattr(self._mine, "worker"):
            self._mine.worker = _Worker(*self._parts)
            self._all.append(self._mine.worker)
        return self._mine.worker.count(unit)

    def close(self) -> None:
        """Close all files."""
        for worker in self._all:
            worker.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process its workers are made anew."""
        return _Crew, self._parts


class _Worker:
    """What a thread uses again from block to block: open files, buffers, counters."""

    def __init__(
        self,
        masks: Sequence[MaskCatalogue],
        grouping: Grouping | None,
        new_counter: _NewCounter,
        block_bytes: int,
    ) -> None:
        most_bytes = max(block_bytes, 8)
        self._readers = [MaskReader(mask) for mask in masks]
        self._files: list[int] = []
        self._grouping = grouping
        self._new_counter = new_counter
        self._counters: dict[int | None, OverlapCounter] = {}
        self._words = new_words(len(masks), 8 * most_bytes)
        self._bytes = self._words.view(np.uint8)
        self._padded = np.empty(most_bytes, dtype=np.uint8)
        self._strata = np.empty(0 if grouping is None else 8 * most_bytes, dtype=np.int16)

    def count(self, unit: _Unit) -> StratumTable:
        """Counts of a unit, of files that have not changed meanwhile."""
        name = unit.tensor.name
        self._turn_to(name)
        num_strata = None if self._grouping is None else self._grouping.num_groups(name)
        if num_strata not in self._counters:
            self._counters[num_strata] = self._new_counter(num_strata)
        counter = self._counters[num_strata]
        for block in unit.blocks:
            self._add(unit.tensor, block, counter)
        for reader in self._readers:
            reader.verify_unchanged(name)
        return counter.take(name)

    def close(self) -> None:
        """Close the files."""
        for reader in self._readers:
            reader.close()

    def _turn_to(self, name: str) -> None:
        """Close shards that the tensor is not in: many runs of many shards are too many open files."""
        files = [reader.catalogue.specs[name].file for reader in self._readers]
        if files != self._files:
            self.close()
        self._files = files

    def _add(self, tensor: MaskTensor, block: Block, counter: OverlapCounter) -> None:
        length = block.num_entries
        spans = compared_spans(block, tensor.entry_ranges)
        counted = sum(stop - start for start, stop in spans)
        self._read(tensor.name, block, -(-length // 8))
        strata = None
        if self._grouping is not None:
            strata = self._strata[:length]
            _fill_strata(self._grouping, tensor.name, block, strata)
            for start, stop in _gaps(spans, length):
                strata[start:stop] = OUTSIDE
        elif counted < length:
            self._words[:, : -(-length // 64)] &= _inside(spans, length)
        counter.add(self._words, length, strata=strata, counted=counted)

    def _read(self, name: str, block: Block, used: int) -> None:
        """Fill the words: entry after entry without the padding of rows, and zeros behind them."""
        is_dense = block.shape[0] == 1 or block.num_cols % 8 == 0
        self._bytes[:, used : -(-used // PADDED_BYTES) * PADDED_BYTES] = 0
        for reader, row in zip(self._readers, self._bytes, strict=True):
            if is_dense:
                reader.read_into(name, block, row[:used])
            else:
                padded = self._padded[: block.num_bytes]
                reader.read_into(name, block, padded)
                _join_rows(padded.reshape(block.shape), block.num_cols, row)


def _join_rows(padded: np.ndarray, num_cols: int, row: np.ndarray) -> None:
    """Write the bits of all rows one after another; eight rows end on a byte."""
    step = max(_JOINED_ENTRIES // num_cols // 8, 1) * 8
    for first in range(0, len(padded), step):
        bits = np.unpackbits(padded[first : first + step], axis=-1, count=num_cols, bitorder="little")
        joined = np.packbits(bits.reshape(-1), bitorder="little")
        row[first * num_cols // 8 :][: len(joined)] = joined


def _fill_strata(grouping: Grouping, name: str, block: Block, strata: np.ndarray) -> None:
    if isinstance(grouping, StrataGrouping):
        grouping.groups_into(name, block, strata)
    else:
        strata[:] = grouping.groups(name, block)
        assert strata.max(initial=OUTSIDE) < grouping.num_groups(name), "counters have no other cells"


def _gaps(spans: Iterable[tuple[int, int]], length: int) -> Iterator[tuple[int, int]]:
    """What the sorted, disjoint spans leave of `length` entries."""
    end = 0
    for start, stop in spans:
        yield end, start
        end = stop
    yield end, length


def _inside(spans: Iterable[tuple[int, int]], length: int) -> np.ndarray:
    """The entries of the spans as words."""
    entries = np.zeros(-(-length // 64) * 64, dtype=np.bool_)
    for start, stop in spans:
        entries[start:stop] = True
    return np.packbits(entries, bitorder="little").view(np.uint64)
