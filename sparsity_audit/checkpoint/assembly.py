"""A checkpoint whose tensors lie in pieces over several files, read as if it were one file.

Contract: each tensor is a box of entries that its pieces cover exactly; `verify_cover` proves it, in time
linear in the number of pieces. In the file that an `Assembly` stands for, tensors follow one another in
row-major order, so that whatever reads a contiguous tensor reads an assembled one. A read touches the pieces
it needs and no others; nothing is kept but descriptors. Pieces in an archive of their own are located when
first read.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from sparsity_audit.checkpoint.store import ByteSource, FileEntry
from sparsity_audit.errors import CorruptCheckpointError
from sparsity_audit.types import ByteRange, DType, TensorSpec

__all__ = ["Assembly", "Box", "Packed", "Piece", "TensorPieces", "assemble", "verify_cover"]

_MAX_AXES = 12
_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Box:
    """Entries start ≤ index < start + size along each axis."""

    start: tuple[int, ...]
    size: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """A tensor inside a file that `torch.save` wrote, which is itself a part of a file.

    Args:
        dtype: Its dtype, which is confirmed when it is read.
        file: Index of the file.
        extent: The bytes of the inner file.
    """

    dtype: DType
    file: int
    extent: ByteRange


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A part of a tensor.

    Args:
        box: Where it lies in the tensor.
        stored: Where its entries lie in a file; of the shape of the box.
    """

    box: Box
    stored: TensorSpec | Packed


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPieces:
    """A tensor and what it is made of.

    Args:
        name: Its name.
        dtype: Its dtype, that of all pieces.
        shape: Its shape.
        axes: Shape in which the boxes are meant: `shape`, or one axis where pieces are runs of entries.
        pieces: The pieces.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    pieces: tuple[Piece, ...]


def verify_cover(subject: str, name: str, axes: tuple[int, ...], found: Sequence[Box], *, hint: str) -> None:
    """Raise unless the boxes cover every entry of a tensor of shape `axes` exactly once.

    Boxes whose volumes add up to the tensor's, and of whose corners an odd number meet only in the tensor's
    own, cover it once: the corners give the number of boxes over each entry modulo 2.

    Args:
        subject: What messages call the checkpoint.
        name: The tensor.
        axes: Its shape.
        found: The boxes.
        hint: What to do where some are missing.

    Raises:
        CorruptCheckpointError: A box leaves the tensor, boxes overlap, or entries are missing.
    """
    for box in found:
        if len(box.start) != len(axes) or any(
            first < 0 or size < 0 or first + size > whole
            for first, size, whole in zip(box.start, box.size, axes, strict=True)
        ):
            raise CorruptCheckpointError(
                subject,
                f"a piece of {name!r} at {_shown(box.start)} of size {_shown(box.size)} leaves the tensor",
                expected=f"pieces inside {_shown(axes)}",
            )
    whole = math.prod(axes)
    covered = sum(math.prod(box.size) for box in found)
    if covered < whole:
        raise CorruptCheckpointError(
            subject,
            f"pieces of {name!r} hold {covered:,} of its {whole:,} entries",
            expected="all of them",
            remedy=hint,
        )
    if covered > whole or (whole and not _meets_only_outside(found, axes)):
        raise CorruptCheckpointError(
            subject, f"pieces of {name!r} overlap", expected="each entry in one piece", remedy=hint
        )


def _meets_only_outside(found: Sequence[Box], axes: tuple[int, ...]) -> bool:
    """Whether an odd number of boxes meet in the tensor's own corners and nowhere else."""
    cut = [n for n, whole in enumerate(axes) if any((b.start[n], b.size[n]) != (0, whole) for b in found)]
    if len(cut) > _MAX_AXES:
        return False
    odd: set[tuple[int, ...]] = set()
    for box in found:
        if 0 not in box.size:
            odd ^= set(product(*((box.start[n], box.start[n] + box.size[n]) for n in cut)))
    return odd == set(product(*((0, axes[n]) for n in cut)))


def assemble(
    tensors: Sequence[TensorPieces], files: tuple[FileEntry, ...], *, path: Path
) -> tuple[FileEntry, dict[str, TensorSpec]]:
    """The file that stands for all tensors, and their specs in it, at index `len(files)`.

    Args:
        tensors: Tensors whose pieces cover them.
        files: The files that pieces name by index.
        path: The file that stands for the checkpoint in messages.
    """
    specs: dict[str, TensorSpec] = {}
    starts: list[int] = []
    end = 0
    for tensor in tensors:
        start = -(-end // _ALIGNMENT) * _ALIGNMENT
        end = start + math.prod(tensor.shape) * tensor.dtype.itemsize
        starts.append(start)
        specs[tensor.name] = TensorSpec(
            name=tensor.name,
            dtype=tensor.dtype,
            shape=tensor.shape,
            file=len(files),
            extent=ByteRange(start=start, stop=end),
        )
    content = Assembly(files=files, tensors=tuple(tensors), starts=tuple(starts))
    name = f"assembled from {len(files)} file{'s' * (len(files) != 1)}"
    return FileEntry(path=path, name=name, num_bytes=end, mtime_ns=0, inode=0, content=content), specs


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembly:
    """What stands behind an assembled file.

    Args:
        files: The files that hold the pieces.
        tensors: The tensors, in the order of their bytes.
        starts: First byte of each.
    """

    files: tuple[FileEntry, ...]
    tensors: tuple[TensorPieces, ...]
    starts: tuple[int, ...]

    def open(self, entry: FileEntry) -> ByteSource:
        """Its bytes."""
        from sparsity_audit.checkpoint.assembled_file import AssembledFile

        return AssembledFile(entry, self)

    def files_of(self, spec: TensorSpec) -> frozenset[int]:
        """Indexes of the files that hold pieces of a tensor."""
        tensor = self.tensors[bisect_right(self.starts, spec.extent.start) - 1]
        return frozenset(piece.stored.file for piece in tensor.pieces)


def _shown(sizes: Sequence[int]) -> str:
    return "[" + ", ".join(map(str, sizes[:8])) + (", …]" if len(sizes) > 8 else "]")
