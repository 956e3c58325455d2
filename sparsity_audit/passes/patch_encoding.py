"""Where the changed entries of a tensor are, as bytes: positions of one segment, there and back.

Contract: positions are those of the changed entries in a segment of at most `SEGMENT_ENTRIES`, ascending. A
decoder takes hostile bytes: what it returns is ascending and inside the segment, or it raises ValueError.

| encoding | bytes for k changed of n entries |
|---|---|
| `indices` | 4 k: positions in the tensor, 32 bits little-endian (8 k past 2³¹ entries) |
| `mask` | ⌈n/8⌉: one bit an entry, little-endian |
| `gap8` | k + Σ ⌊gap/255⌋: entries skipped before each changed one, a byte; 255 means 255 more and go on |
| `gap16` | the same in 16 bits |
| `dense` | 0: all entries are stored |

*Source*: `indices` is what TRL's delta weight sync and SparseRL-Sync (2605.07330) send, gaps of few bits
what PULSE (2602.03839) compresses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, get_args

import numpy as np

__all__ = [
    "ENCODINGS",
    "SEGMENT_ENTRIES",
    "Encoding",
    "candidate_bytes",
    "cheapest",
    "decode_positions",
    "encode_positions",
]

Encoding = Literal["none", "indices", "mask", "gap8", "gap16", "dense"]
ENCODINGS: Final = get_args(Encoding)

SEGMENT_ENTRIES: Final = 1 << 20

_SPARSE: Final[tuple[Encoding, ...]] = ("indices", "mask", "gap8", "gap16")
_GAP = {"gap8": np.dtype("u1"), "gap16": np.dtype("<u2")}


def _index_dtype(num_entries: int) -> np.dtype:
    return np.dtype("<i4" if num_entries <= 2**31 else "<i8")


def candidate_bytes(positions: np.ndarray, *, entries: int, num_entries: int) -> dict[Encoding, int]:
    """Bytes of each encoding for the positions of one segment.

    Args:
        positions: Changed entries of the segment.
        entries: Entries of the segment.
        num_entries: Entries of the tensor.
    """
    gaps = _gaps(positions)
    return {
        "indices": len(positions) * _index_dtype(num_entries).itemsize,
        "mask": -(-entries // 8),
        "gap8": len(positions) + int((gaps // 255).sum()),
        "gap16": 2 * (len(positions) + int((gaps // 65535).sum())),
    }


def cheapest(sizes: Mapping[str, int], *, changed: int, num_entries: int, itemsize: int) -> Encoding:
    """The encoding of fewest bytes, values included; the first of the table where several are.

    Args:
        sizes: Bytes of the positions in each encoding, over all segments.
        changed: Entries that changed.
        num_entries: Entries of the tensor.
        itemsize: Bytes of a value.
    """
    if not changed:
        return "none"
    total: dict[Encoding, int] = {key: sizes[key] + changed * itemsize for key in _SPARSE}
    total["dense"] = num_entries * itemsize
    return min(total, key=lambda key: total[key])


def encode_positions(
    positions: np.ndarray, encoding: Encoding, *, first: int, entries: int, num_entries: int
) -> bytes:
    """The bytes of one segment.

    Args:
        positions: Changed entries, counted from the segment's first.
        encoding: How to write them; not `none`.
        first: Place of the segment's first entry in the tensor.
        entries: Entries of the segment.
        num_entries: Entries of the tensor.
    """
    if encoding == "dense":
        return b""
    if encoding == "indices":
        return (positions + first).astype(_index_dtype(num_entries)).tobytes()
    if encoding == "mask":
        bits = np.zeros(entries, dtype=bool)
        bits[positions] = True
        return np.packbits(bits, bitorder="little").tobytes()
    return _encode_gaps(_gaps(positions), _GAP[encoding])


def decode_positions(
    data: bytes | memoryview, encoding: Encoding, *, first: int, entries: int, num_entries: int
) -> np.ndarray:
    """The positions that `encode_positions` wrote.

    Raises:
        ValueError: The bytes are not those of positions in the segment.
    """
    if encoding == "dense":
        return np.arange(entries)
    if encoding == "mask":
        if len(data) != -(-entries // 8):
            raise ValueError(f"{len(data)} bytes of mask for {entries} entries")
        bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8), bitorder="little")
        if bits[entries:].any():
            raise ValueError("bits behind the last entry")
        return np.flatnonzero(bits[:entries])
    if encoding == "indices":
        positions = _whole(data, _index_dtype(num_entries)).astype(np.int64) - first
    else:
        positions = _decode_gaps(_whole(data, _GAP[encoding]))
    if len(positions) and (positions[0] < 0 or positions[-1] >= entries or (np.diff(positions) <= 0).any()):
        raise ValueError("positions that do not ascend inside the segment")
    return positions


def _whole(data: bytes | memoryview, dtype: np.dtype) -> np.ndarray:
    if len(data) % dtype.itemsize:
        raise ValueError(f"{len(data)} bytes for numbers of {dtype.itemsize}")
    return np.frombuffer(data, dtype=dtype)


def _gaps(positions: np.ndarray) -> np.ndarray:
    """Unchanged entries before each position since the one before."""
    return np.diff(positions, prepend=-1) - 1


def _encode_gaps(gaps: np.ndarray, dtype: np.dtype) -> bytes:
    top = np.iinfo(dtype).max
    escapes = gaps // top
    codes = np.full(len(gaps) + int(escapes.sum()), top, dtype=dtype)
    codes[np.cumsum(escapes + 1) - 1] = gaps % top
    return codes.tobytes()


def _decode_gaps(codes: np.ndarray) -> np.ndarray:
    top = np.iinfo(codes.dtype).max
    is_last = codes != top
    if len(codes) and not is_last[-1]:
        raise ValueError("gaps that end in the middle")
    # The place of an entry is the sum of all skips up to it, and one for each entry before it.
    reached = np.cumsum(codes, dtype=np.int64)[is_last]
    return reached + np.arange(len(reached))
