"""Packed bits: one bit an entry, little-endian along the last axis, unused tail bits zero.

Contract: numpy only. A tensor of shape S packs to S[:-1] + (⌈S[-1]/8⌉,), 0-d to (1,), empty stays
empty. Rows are all leading axes, columns the last one; [n] is one row. A `Block` is a run of entries
that is contiguous both in the tensor and in the packed bytes: whole rows, or a part of one row that
starts at a multiple of 64 entries. Work goes block by block, so memory does not grow with the tensor.
Source: `numpy.packbits(bitorder="little")`; compressed-tensors packs its bitmasks in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

__all__ = [
    "BLOCK_BYTES",
    "Block",
    "CombineOp",
    "at_least",
    "blocks_of",
    "combine",
    "compared_bits",
    "compared_spans",
    "count_columns",
    "count_rows",
    "has_stray_tail",
    "pack_bits",
    "packed_bytes",
    "packed_shape",
    "popcount",
    "rows_columns",
    "unpack_bits",
]

BLOCK_BYTES: Final = 1 << 17
"""Packed bytes of a block: 2²⁰ entries, so that even the unpacked block is only 1 MiB."""

CombineOp = Literal["and", "or", "xor", "minus"]


def rows_columns(shape: tuple[int, ...]) -> tuple[int, int]:
    """A tensor as a matrix: all leading axes × the last axis; [n] is 1 × n, () is 1 × 1."""
    return (math.prod(shape[:-1]), shape[-1]) if shape else (1, 1)


def packed_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the packed bytes of a tensor of `shape`."""
    return (*shape[:-1], -(-shape[-1] // 8)) if shape else (1,)


def packed_bytes(shape: tuple[int, ...]) -> int:
    """Number of packed bytes of a tensor of `shape`."""
    return math.prod(packed_shape(shape))


def pack_bits(selected: np.ndarray) -> np.ndarray:
    """Packed bytes of a bool array of any shape."""
    rows = np.ascontiguousarray(selected, dtype=np.bool_).reshape(rows_columns(selected.shape))
    return np.packbits(rows, axis=-1, bitorder="little").reshape(packed_shape(selected.shape))


def unpack_bits(packed: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The bool array of `shape` whose packed bytes are `packed`."""
    rows, cols = rows_columns(shape)
    matrix = np.ascontiguousarray(packed).reshape(rows, -(-cols // 8))
    return np.unpackbits(matrix, axis=-1, count=cols, bitorder="little").view(np.bool_).reshape(shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A run of entries of one tensor: whole rows, or a part of a single row.

    Args:
        row_start: First row.
        row_stop: One past the last row.
        byte_start: First packed byte of each row.
        byte_stop: One past the last packed byte of each row.
        cols: Columns of the tensor.
    """

    row_start: int
    row_stop: int
    byte_start: int
    byte_stop: int
    cols: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and packed bytes per row."""
        return self.row_stop - self.row_start, self.byte_stop - self.byte_start

    @property
    def num_bytes(self) -> int:
        """Packed bytes."""
        return self.shape[0] * self.shape[1]

    @property
    def offset(self) -> int:
        """Position of the first byte in the packed tensor."""
        return self.row_start * -(-self.cols // 8) + self.byte_start

    @property
    def num_cols(self) -> int:
        """Entries of each row."""
        return min(8 * self.byte_stop, self.cols) - 8 * self.byte_start

    @property
    def num_entries(self) -> int:
        """Entries of the block."""
        return self.shape[0] * self.num_cols

    @property
    def first_entry(self) -> int:
        """Row-major position of the first entry in the tensor; the others follow without a gap."""
        return self.row_start * self.cols + 8 * self.byte_start

    @property
    def tail(self) -> int:
        """The bits that are used in the last byte of each row."""
        used = self.num_cols % 8
        return (1 << used) - 1 if used else 0xFF


def blocks_of(shape: tuple[int, ...], *, max_bytes: int = BLOCK_BYTES) -> Iterator[Block]:
    """The blocks of a tensor in row-major order, each of at most max(max_bytes, 8) packed bytes."""
    rows, cols = rows_columns(shape)
    row_bytes = -(-cols // 8)
    if row_bytes == 0:
        return
    if row_bytes <= max_bytes:
        step = max_bytes // row_bytes
        for row in range(0, rows, step):
            stop = min(row + step, rows)
            yield Block(row_start=row, row_stop=stop, byte_start=0, byte_stop=row_bytes, cols=cols)
        return
    step = max(max_bytes // 8 * 8, 8)
    for row in range(rows):
        for byte in range(0, row_bytes, step):
            stop = min(byte + step, row_bytes)
            yield Block(row_start=row, row_stop=row + 1, byte_start=byte, byte_stop=stop, cols=cols)


def compared_spans(block: Block, entry_ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The parts of the tensor's entry ranges that lie in the block, counted from its first entry."""
    first, count = block.first_entry, block.num_entries
    return [
        (max(start - first, 0), min(stop - first, count))
        for start, stop in entry_ranges
        if start < first + count and stop > first
    ]


def compared_bits(block: Block, entry_ranges: Sequence[tuple[int, int]]) -> np.ndarray:
    """Bits of the block's entries that lie in one of the tensor's entry ranges; tail bits zero."""
    count = block.num_entries
    inside = compared_spans(block, entry_ranges)
    if inside == [(0, count)]:
        bits = np.full(block.shape, 0xFF, dtype=np.uint8)
        bits[:, -1] = block.tail
        return bits
    entries = np.zeros(count, dtype=np.bool_)
    for start, stop in inside:
        entries[start:stop] = True
    return np.packbits(entries.reshape(-1, block.num_cols), axis=-1, bitorder="little")


def has_stray_tail(bits: np.ndarray, block: Block) -> bool:
    """Whether a bit beyond the last column is set."""
    return block.tail != 0xFF and bool((bits[:, -1] & (0xFF ^ block.tail)).any())


def popcount(bits: np.ndarray) -> int:
    """Number of set bits."""
    flat = np.ascontiguousarray(bits).reshape(-1)
    return sum(
        int(np.bitwise_count(flat[start : start + BLOCK_BYTES]).sum(dtype=np.int64))
        for start in range(0, flat.size, BLOCK_BYTES)
    )


def count_rows(bits: np.ndarray) -> np.ndarray:
    """Set bits of each row of a block, int64[rows]."""
    return np.bitwise_count(bits).sum(axis=1, dtype=np.int64)


def count_columns(bits: np.ndarray, num_cols: int) -> np.ndarray:
    """Set bits of each column of a block, int64[num_cols]."""
    total = np.zeros(num_cols, dtype=np.int64)
    step = max(1, BLOCK_BYTES // max(bits.shape[1], 1))
    for start in range(0, bits.shape[0], step):
        unpacked = np.unpackbits(bits[start : start + step], axis=-1, count=num_cols, bitorder="little")
        total += unpacked.sum(axis=0, dtype=np.int64)
    return total


def combine(op: CombineOp, blocks: Sequence[np.ndarray]) -> np.ndarray:
    """The bits of all blocks joined by `op`; `minus` takes every later block from the first."""
    result = blocks[0].copy()
    for bits in blocks[1:]:
        if op == "and":
            result &= bits
        elif op == "or":
            result |= bits
        elif op == "xor":
            result ^= bits
        else:
            result &= ~bits
    return result


def at_least(blocks: Sequence[np.ndarray], k: int) -> np.ndarray:
    """Bits that are set in at least `k` ≥ 1 of the blocks.

    The count of every entry is kept in bit planes (plane j holds bit j of the count), so that nothing
    is unpacked: n blocks cost about n·log2 n byte operations.
    """
    assert k >= 1
    planes: list[np.ndarray] = []
    for bits in blocks:
        carry = bits
        for j, plane in enumerate(planes):
            planes[j], carry = plane ^ carry, plane & carry
        if carry.any():
            planes.append(carry.copy())
    if k.bit_length() > len(planes):
        return np.zeros_like(blocks[0])
    # Compare from the highest bit down: `greater` is decided, `equal` still open.
    greater = np.zeros_like(blocks[0])
    equal = np.full_like(blocks[0], 0xFF)
    for j in reversed(range(len(planes))):
        if k >> j & 1:
            equal &= planes[j]
        else:
            greater |= equal & planes[j]
            equal &= ~planes[j]
    return greater | equal
