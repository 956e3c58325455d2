"""Read tensors out of their pieces.

Contract: see `assembly`. A read touches the pieces it needs and no others; nothing is kept but descriptors
and where pieces of archives of their own were found. Safe to share between threads.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from sparsity_audit.checkpoint.assembly import Assembly, Box, Packed, Piece, TensorPieces
from sparsity_audit.checkpoint.reading import boxes, read_box
from sparsity_audit.checkpoint.store import ByteSource, FileEntry, LocalFile
from sparsity_audit.checkpoint.torch_vocabulary import TensorRef
from sparsity_audit.checkpoint.torch_zip import read_archive, tensor_spec
from sparsity_audit.errors import CorruptCheckpointError
from sparsity_audit.types import ByteRange, TensorSpec

__all__ = ["AssembledFile"]

_MAX_OPEN_FILES = 200
"""Above it a file is opened for each read: 10 µs beside the 100 µs that a block takes."""


class AssembledFile:
    """Reads tensors out of their pieces; safe to share between threads.

    Args:
        entry: The assembled file.
        assembly: What it is made of.
    """

    def __init__(self, entry: FileEntry, assembly: Assembly) -> None:
        self.entry, self._assembly = entry, assembly
        self._open: dict[int, LocalFile] = {}
        self._bounds: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._located: dict[tuple[int, int], TensorSpec] = {}
        self._lock = threading.Lock()

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` with the bytes at `offset`, which all belong to one tensor."""
        number = bisect_right(self._assembly.starts, offset) - 1
        tensor = self._assembly.tensors[number]
        size = tensor.dtype.itemsize
        first, rest = divmod(offset - self._assembly.starts[number], size)
        codes = np.frombuffer(buffer, dtype=f"<u{size}")
        assert rest == 0, (tensor.name, offset)
        done = 0
        for corner, shape in boxes(tensor.axes, first, first + len(codes)):
            count = math.prod(shape)
            self._fill(number, Box(corner, shape), codes[done : done + count].reshape(shape))
            done += count

    def close(self) -> None:
        """Close the files."""
        with self._lock:
            for file in self._open.values():
                file.close()
            self._open.clear()

    def _fill(self, number: int, wanted: Box, out: np.ndarray) -> None:
        tensor = self._assembly.tensors[number]
        if not wanted.start:  # a scalar is read as a vector of one
            wanted, out = Box((0,), (1,)), out.reshape(1)
        lows, highs = self._bounds_of(number)
        start, stop = np.array(wanted.start), np.array(wanted.start) + np.array(wanted.size)
        for index in np.flatnonzero(((lows < stop) & (highs > start)).all(axis=1)):
            low, high = np.maximum(lows[index], start), np.minimum(highs[index], stop)
            place = tuple(slice(a, b) for a, b in zip(low - start, high - start, strict=True))
            stored = tensor.pieces[index].stored
            with self._file(stored.file) as source:
                spec = self._spec(tensor, tensor.pieces[index], source)
                read_box(source, spec, tuple(int(n) for n in low - lows[index]), out[place])

    def _bounds_of(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        found = self._bounds.get(number)
        if found is None:
            tensor = self._assembly.tensors[number]
            rank = max(len(tensor.axes), 1)
            lows = np.array([p.box.start or (0,) for p in tensor.pieces], dtype=np.int64).reshape(-1, rank)
            sizes = np.array([p.box.size or (1,) for p in tensor.pieces], dtype=np.int64).reshape(-1, rank)
            found = self._bounds[number] = (lows, lows + sizes)
        return found

    @contextmanager
    def _file(self, number: int) -> Iterator[LocalFile]:
        entry = self._assembly.files[number]
        if len(self._assembly.files) > _MAX_OPEN_FILES:
            with LocalFile(entry) as file:
                yield file
            return
        with self._lock:
            if number not in self._open:
                self._open[number] = LocalFile(entry)
            file = self._open[number]
        yield file

    def _spec(self, tensor: TensorPieces, piece: Piece, source: LocalFile) -> TensorSpec:
        """Where the piece lies in its file, as an array of as many axes as its box (at least one)."""
        stored = piece.stored
        if isinstance(stored, Packed):
            key = (stored.file, stored.extent.start)
            spec = self._located.get(key)
            if spec is None:
                spec = self._located[key] = _locate(tensor, piece, stored, source)
        else:
            spec = stored
        return spec if piece.box.size else replace(spec, shape=(1,), strides=None)


def _locate(tensor: TensorPieces, piece: Piece, stored: Packed, source: LocalFile) -> TensorSpec:
    archive = read_archive(_Window(source, stored.extent, tensor.name), file=stored.file)
    if not isinstance(archive.root, TensorRef):
        raise CorruptCheckpointError(
            archive.entry.name, f"holds a {type(archive.root).__name__}", expected="one tensor"
        )
    spec = tensor_spec(archive, tensor.name, archive.root)
    if (spec.dtype, spec.shape) != (tensor.dtype, piece.box.size):
        raise CorruptCheckpointError(
            str(archive.entry.path),
            f"holds {spec.dtype} of shape {list(spec.shape)}",
            expected=f"{tensor.dtype} of shape {list(piece.box.size)}, as the metadata says",
        )
    start = stored.extent.start
    return replace(spec, extent=ByteRange(start=spec.extent.start + start, stop=spec.extent.stop + start))


class _Window:
    """A part of a file that is itself a file."""

    def __init__(self, source: ByteSource, extent: ByteRange, name: str) -> None:
        self._source, self._start = source, extent.start
        path = source.entry.path
        described = path.with_name(f"{path.name}: piece of {name[:80]!r}".replace("/", "_"))
        self.entry = replace(source.entry, path=described, num_bytes=extent.num_bytes)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` with the bytes at `offset` of the window."""
        self._source.read_into(buffer, self._start + offset)

    def close(self) -> None:
        """Nothing of its own is open."""
