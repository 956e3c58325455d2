"""Compute merged weights, some rows at a time.

Contract: results do not depend on what is asked for together: rows are computed in tiles of a fixed size. B
A is taken in float64, scaled, and rounded to fp32; the sum with the weight is fp32 and is rounded once, to
nearest even. An embedding's update is rounded to the weight's dtype before, as peft does. DoRA: rows are
divided by their length and multiplied by the learned one, in fp32. Equal to `merge_and_unload` but where its
fp32 product rounds otherwise. Memory: both factors of the weights being read, and a tile a thread.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from dataclasses import dataclass

import numpy as np

from sparsity_audit.checkpoint.merging import Merge, MergedContent, merged_dtype
from sparsity_audit.checkpoint.reading import read_entries
from sparsity_audit.checkpoint.store import ByteSource, FileEntry
from sparsity_audit.types import DType, TensorSpec

__all__ = ["MergedFile"]

_TILE_ENTRIES = 1 << 18
_KEPT_FACTORS = 8


@dataclass(frozen=True, slots=True)
class _Loaded:
    """Factors in memory: rows × rank, rank × columns (float64), lengths (fp32)."""

    left: np.ndarray
    right: np.ndarray
    lengths: np.ndarray | None


class MergedFile:
    """Reads merged weights; safe to share between threads.

    Args:
        entry: The file that stands for them.
        content: What it is made of.
    """

    def __init__(self, entry: FileEntry, content: MergedContent) -> None:
        self.entry, self._content = entry, content
        self._open: dict[int, ByteSource] = {}
        self._factors: dict[int, _Loaded] = {}
        self._lock = threading.Lock()
        self._local = threading.local()

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` with the bytes at `offset`, which all belong to one weight."""
        number = bisect_right(self._content.starts, offset) - 1
        merge = self._content.merges[number]
        itemsize = merged_dtype(merge.base.dtype, rounded=self._content.rounded).itemsize
        first, rest = divmod(offset - self._content.starts[number], itemsize)
        assert rest == 0, (merge.base.name, offset)
        out = np.frombuffer(buffer, dtype=f"<u{itemsize}")
        tile = _tile_rows(merge) * merge.factors.cols
        done = 0
        while done < len(out):
            index, skipped = divmod(first + done, tile)
            codes = self._tile(number, index)
            count = min(len(codes) - skipped, len(out) - done)
            out[done : done + count] = codes[skipped : skipped + count]
            done += count

    def close(self) -> None:
        """Close the files."""
        with self._lock:
            for file in self._open.values():
                file.close()
            self._open.clear()

    def _tile(self, number: int, index: int) -> np.ndarray:
        held = getattr(self._local, "tile", None)
        if held is None or held[0] != (number, index):
            held = self._local.tile = ((number, index), self._compute(number, index))
        return held[1]

    def _compute(self, number: int, index: int) -> np.ndarray:
        merge, loaded = self._content.merges[number], self._loaded(number)
        rows = _tile_rows(merge)
        first, stop = index * rows, min((index + 1) * rows, merge.factors.rows)
        weight = self._read(merge.base, first * merge.factors.cols, (stop - first, merge.factors.cols))
        with np.errstate(over="ignore", invalid="ignore"):
            update = ((loaded.left[first:stop] @ loaded.right) * merge.scale).astype(np.float32)
            if merge.factors.embeds:
                update = _decode(_encode(update, merge.base.dtype), merge.base.dtype)
            merged = weight + update  # fp32, or fp64 on an fp64 base
            if loaded.lengths is not None:
                wide = merged.astype(np.float64)
                norms = np.sqrt((wide * wide).sum(axis=1)).astype(merged.dtype)
                merged = (loaded.lengths[first:stop] / norms)[:, None] * merged
            dtype = merged_dtype(merge.base.dtype, rounded=self._content.rounded)
            return _encode(merged, dtype).reshape(-1)

    def _loaded(self, number: int) -> _Loaded:
        with self._lock:
            found = self._factors.get(number)
        if found is not None:
            return found
        factors = self._content.merges[number].factors
        first, second = (
            self._read(s, 0, s.shape).astype(np.float64) for s in (factors.first, factors.second)
        )
        left, right = (first.T, second.T) if factors.swapped else (second, first)
        spec = factors.magnitude
        lengths = None if spec is None else self._read(spec, 0, (spec.num_entries,))
        found = _Loaded(np.ascontiguousarray(left), np.ascontiguousarray(right), lengths)
        with self._lock:
            while len(self._factors) >= _KEPT_FACTORS:
                self._factors.pop(next(iter(self._factors)))
            self._factors[number] = found
        return found

    def _read(self, spec: TensorSpec, first: int, shape: tuple[int, ...]) -> np.ndarray:
        """Values of consecutive entries: float32, or float64 where they are stored so."""
        codes = np.empty(shape, dtype=f"<u{spec.dtype.itemsize}")
        if codes.size:
            read_entries(self._source(spec.file), spec, first, codes.reshape(-1).view(np.uint8).data)
        return _decode(codes, spec.dtype)

    def _source(self, number: int) -> ByteSource:
        with self._lock:
            if number not in self._open:
                self._open[number] = self._content.files[number].open()
            return self._open[number]


def _tile_rows(merge: Merge) -> int:
    return max(_TILE_ENTRIES // max(merge.factors.cols, 1), 1)


def _decode(codes: np.ndarray, dtype: DType) -> np.ndarray:
    if dtype is DType.BF16:
        return (codes.astype(np.uint32) << 16).view(np.float32)
    if dtype is DType.F16:
        return codes.view(np.float16).astype(np.float32)
    return codes.view(np.float64 if dtype is DType.F64 else np.float32)


def _encode(values: np.ndarray, dtype: DType) -> np.ndarray:
    """Codes of values, rounded to nearest even; every NaN becomes the quiet one, as torch makes it."""
    if dtype is DType.F64:
        return values.astype(np.float64).view(np.uint64)
    if dtype is DType.F16:
        return values.astype(np.float16).view(np.uint16)
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    if dtype is DType.F32:
        return bits
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    rounded[np.isnan(values)] = 0x7FC0
    return rounded
