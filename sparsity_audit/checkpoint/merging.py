"""The weights that an adapter changes, as one file whose bytes are computed when they are read.

Contract: `merged_entry` makes the file and the specs in it, without reading; `merged_file` computes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sparsity_audit.checkpoint.store import ByteSource, FileEntry
from sparsity_audit.types import ByteRange, DType, TensorSpec

__all__ = ["Factors", "Merge", "MergedContent", "merged_entry"]

_ALIGNMENT = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """The low-rank factors of one weight.

    Args:
        first: A, rank × inputs.
        second: B, outputs × rank.
        swapped: Whether the weight is stored inputs × outputs.
        embeds: Whether it is an embedding, whose update is rounded before it is added.
        magnitude: DoRA's length of each row.
    """

    first: TensorSpec
    second: TensorSpec
    swapped: bool
    embeds: bool
    magnitude: TensorSpec | None

    @property
    def rank(self) -> int:
        """Columns of B, rows of A."""
        return self.first.shape[0]

    @property
    def rows(self) -> int:
        """Rows of the weight."""
        return self.first.shape[1] if self.swapped else self.second.shape[0]

    @property
    def cols(self) -> int:
        """Columns of the weight."""
        return self.second.shape[0] if self.swapped else self.first.shape[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Merge:
    """One weight and what is added to it.

    Args:
        base: The weight.
        factors: The factors.
        scale: What B A is multiplied by.
    """

    base: TensorSpec
    factors: Factors
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedContent:
    """What stands behind the file of merged weights.

    Args:
        files: Files of the base and of the adapter, as the specs number them.
        merges: The weights, in the order of their bytes.
        starts: First byte of each.
        rounded: Whether they have the base's dtype.
    """

    files: tuple[FileEntry, ...]
    merges: tuple[Merge, ...]
    starts: tuple[int, ...]
    rounded: bool

    def open(self, entry: FileEntry) -> ByteSource:
        """Its bytes."""
        from sparsity_audit.checkpoint.merged_file import MergedFile

        return MergedFile(entry, self)

    def files_of(self, spec: TensorSpec) -> frozenset[int]:
        """Indexes of the files that hold a weight and its factors."""
        merge = self.merges[bisect_right(self.starts, spec.extent.start) - 1]
        parts = (merge.base, merge.factors.first, merge.factors.second)
        return frozenset(part.file for part in parts)


def merged_dtype(base: DType, *, rounded: bool) -> DType:
    """Dtype of a merged weight."""
    return base if rounded or base is DType.F64 else DType.F32


def merged_entry(
    merges: Sequence[Merge], files: tuple[FileEntry, ...], *, path: Path, rounded: bool
) -> tuple[FileEntry, dict[str, TensorSpec]]:
    """The file of all merged weights, and their specs in it, at index `len(files)`.

    Args:
        merges: The weights.
        files: Files of the base and of the adapter.
        path: The file that stands for it in messages.
        rounded: Whether weights keep the base's dtype.
    """
    specs: dict[str, TensorSpec] = {}
    starts: list[int] = []
    end = 0
    for merge in merges:
        start = -(-end // _ALIGNMENT) * _ALIGNMENT
        dtype = merged_dtype(merge.base.dtype, rounded=rounded)
        end = start + merge.base.num_entries * dtype.itemsize
        starts.append(start)
        specs[merge.base.name] = replace(
            merge.base,
            dtype=dtype,
            file=len(files),
            extent=ByteRange(start=start, stop=end),
            strides=None,
            big_endian=False,
        )
    content = MergedContent(files=files, merges=tuple(merges), starts=tuple(starts), rounded=rounded)
    entry = FileEntry(
        path=path, name="merged with the adapter", num_bytes=end, mtime_ns=0, inode=0, content=content
    )
    return entry, specs
