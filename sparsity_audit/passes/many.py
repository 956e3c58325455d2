"""One pass over the bits of many masks: exact counts of every pair of runs, by stratum of the base.

Contract: the counts are integers and add over any split, so neither block size nor number of workers matters.
Memory a worker: one block of every mask, and of the base where strata are asked for. Bits outside the
compared ranges count nowhere. An entry of the padding that brings a stratum to whole words is in no mask.

Within a block the entries are put in the order of their strata, each stratum on a word border. Then the
counts of a stratum are those of a run of words, and each pair of runs costs one AND and one popcount a word,
however many strata there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import reduce

import numpy as np

from sparsity_audit.masks.bitmask import Block, blocks_of, compared_bits
from sparsity_audit.masks.metadata import MaskTensor
from sparsity_audit.masks.reader import MaskCatalogue, MaskReader
from sparsity_audit.masks.sampling import OUTSIDE, Grouping
from sparsity_audit.passes.execute import in_threads
from sparsity_audit.stats.overlap import StratumTable

__all__ = ["BLOCK_BYTES", "count_overlaps"]

BLOCK_BYTES = 1 << 16
"""Packed bytes of a block: 2¹⁹ entries, whose order and places take 8 MB a worker."""

_BLOCKS_A_UNIT = 32
_WORD_BITS = 64
_RUNS_A_BYTE = 8


def count_overlaps(
    masks: Sequence[MaskCatalogue],
    tensors: Mapping[str, MaskTensor],
    *,
    grouping: Grouping | None = None,
    core_of: Sequence[int] | None = None,
    block_bytes: int = BLOCK_BYTES,
    workers: int = 1,
    on_entries: Callable[[int], None] | None = None,
) -> tuple[StratumTable, ...]:
    """Counts of each tensor, in the order given; a tensor without compared entries has no strata.

    Args:
        masks: The runs' masks, packed; each holds all of `tensors` in the shapes given.
        tensors: What is counted, and where it is compared.
        grouping: Stratum of each entry of the base; without it a tensor is a single stratum 0.
        core_of: The runs whose agreement the tables' `core` counts, ascending; all without it.
        block_bytes: Packed bytes that are read of each mask at once; the result is the same.
        workers: Threads; the result is the same.
        on_entries: Called in this thread with the entries that were done.

    Raises:
        MaskError: A mask is damaged.
        ChangedInputError: A file changed during the pass.
    """
    chosen = tuple(range(len(masks)) if core_of is None else core_of)
    tables = {name: _empty(name, len(masks), chosen) for name in tensors}

    def count(unit: _Unit) -> StratumTable:
        name = unit.tensor.name
        with ExitStack() as stack:
            readers = [stack.enter_context(MaskReader(mask)) for mask in masks]
            parts = (_count_block(unit.tensor, block, readers, grouping, chosen) for block in unit.blocks)
            return reduce(StratumTable.merge, parts, _empty(name, len(masks), chosen))

    for unit, table in in_threads(count, _units(tensors.values(), block_bytes), workers=workers):
        name = unit.tensor.name
        tables[name] = tables[name].merge(table)
        if on_entries is not None:
            on_entries(sum(block.num_entries for block in unit.blocks))
    return tuple(tables.values())


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


def _count_block(
    tensor: MaskTensor,
    block: Block,
    readers: Sequence[MaskReader],
    grouping: Grouping | None,
    core_of: tuple[int, ...],
) -> StratumTable:
    inside = compared_bits(block, tensor.entry_ranges)
    packed = [reader.read_block(tensor.name, block) & inside for reader in readers]
    if grouping is None:
        num_entries = int(np.bitwise_count(inside).sum(dtype=np.int64))
        if num_entries == 0:
            return _empty(tensor.name, len(readers), core_of)
        layout = _Layout(
            strata=np.zeros(1, dtype=np.int64),
            entries=np.array([num_entries], dtype=np.int64),
            starts=np.zeros(1, dtype=np.intp),
        )
        return _count_words(tensor.name, layout, np.stack([_words(bits) for bits in packed]), core_of)
    groups = np.where(_unpack(inside, block).view(np.bool_), grouping.groups(tensor.name, block), OUTSIDE)
    chosen = np.argsort(groups, kind="stable")
    chosen = chosen[np.searchsorted(groups[chosen], OUTSIDE, side="right") :]
    if chosen.size == 0:
        return _empty(tensor.name, len(readers), core_of)
    layout, places, length = _arrange(groups[chosen])
    words = np.empty((len(readers), length // _WORD_BITS), dtype=np.uint64)
    for first in range(0, len(readers), _RUNS_A_BYTE):
        # Entries are moved once for eight runs: bit k of an entry's byte is that of run first + k.
        together = np.zeros(block.num_entries, dtype=np.uint8)
        for k, bits in enumerate(packed[first : first + _RUNS_A_BYTE]):
            together |= _unpack(bits, block) << np.uint8(k)
        moved = np.zeros(length, dtype=np.uint8)
        moved[places] = together[chosen]
        for k in range(min(_RUNS_A_BYTE, len(readers) - first)):
            words[first + k] = np.packbits(moved & np.uint8(1 << k), bitorder="little").view(np.uint64)
    return _count_words(tensor.name, layout, words, core_of)


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


def _count_words(name: str, layout: _Layout, words: np.ndarray, core_of: tuple[int, ...]) -> StratumTable:
    runs, strata = len(words), len(layout.strata)

    def count(bits: np.ndarray) -> np.ndarray:
        return np.add.reduceat(np.bitwise_count(bits), layout.starts, dtype=np.int64)

    both = np.empty((runs, runs, strata), dtype=np.int64)
    for r in range(runs):
        for q in range(r, runs):
            both[r, q] = both[q, r] = count(words[r] & words[q])
    core = np.empty((len(core_of) + 1, strata), dtype=np.int64)
    planes = _held_planes(words[list(core_of)])
    for k in range(1, len(core_of) + 1):
        core[k] = count(_equal_to(planes, k))
    # Padding is held by no run, so what is held by none is told from the entries.
    core[0] = layout.entries - core[1:].sum(axis=0)
    return StratumTable(
        tensor=name,
        strata=layout.strata,
        entries=layout.entries,
        changed=np.einsum("rrs->rs", both).copy(),
        both=both,
        core=core,
        core_of=core_of,
    )


def _held_planes(words: np.ndarray) -> list[np.ndarray]:
    """In how many runs each bit is set, as bit planes: plane j holds bit j of the number."""
    planes = [np.zeros(words.shape[1:], dtype=words.dtype) for _ in range(len(words).bit_length())]
    for bits in words:
        carry = bits
        for j, plane in enumerate(planes):
            planes[j], carry = plane ^ carry, plane & carry
    return planes


def _equal_to(planes: Sequence[np.ndarray], k: int) -> np.ndarray:
    return reduce(np.bitwise_and, (plane if k >> j & 1 else ~plane for j, plane in enumerate(planes)))


def _words(bits: np.ndarray) -> np.ndarray:
    padded = np.zeros(-(-bits.size // 8) * 8, dtype=np.uint8)
    padded[: bits.size] = bits.reshape(-1)
    return padded.view(np.uint64)


def _unpack(bits: np.ndarray, block: Block) -> np.ndarray:
    return np.unpackbits(bits, axis=-1, count=block.num_cols, bitorder="little").reshape(-1)


def _empty(name: str, runs: int, core_of: tuple[int, ...]) -> StratumTable:
    def zeros(*shape: int) -> np.ndarray:
        return np.zeros((*shape, 0), dtype=np.int64)

    return StratumTable(
        tensor=name,
        strata=zeros(),
        entries=zeros(),
        changed=zeros(runs),
        both=zeros(runs, runs),
        core=zeros(len(core_of) + 1),
        core_of=core_of,
    )
