"""The mask bits of one share of a split run: packed rows of the tensors it touched, and nothing else.

Contract: a file of its own a share, so that no two processes write to one file, on whatever file system.
It is safetensors (U8, packed as in a mask) but no mask: rows the share did not compare are 0, as are rows
without a change. It gets its name when the share is finished; until then it ends in `.partial` and is taken
up again. `copy_share_bits` joins the shares; tensors that straddle two of them meet bit by bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from sparsity_audit.checkpoint.safetensors_io import read_header
from sparsity_audit.checkpoint.store import FileEntry, LocalFile
from sparsity_audit.errors import MaskError
from sparsity_audit.masks.bitmask import packed_shape
from sparsity_audit.masks.container import MaskWriter, shifted_bits
from sparsity_audit.masks.shards import ShardNaming, ShardWriter, StoredTensor
from sparsity_audit.types import DType, TensorSpec

__all__ = ["ShareBits", "copy_share_bits", "share_bits_path"]

_FORMAT = "sparsity-audit-share-bits"
_BUFFER_BYTES = 4 << 20


def share_bits_path(folder: Path, share: str) -> Path:
    """Where the bits of a finished share lie."""
    return folder / f"{share}.bits.safetensors"


class ShareBits:
    """Writes the bits of one share; thread-safe. What an interrupted writer of the same share left is kept.

    Args:
        folder: The share's directory.
        share: The share's name.
        tensors: The base tensors that its units touch.
        plan_key: The plan it belongs to.

    Attributes:
        reused: Whether bits of an earlier run were kept.

    Raises:
        OutputError: The file belongs to another plan, or cannot be written.
    """

    def __init__(self, folder: Path, share: str, tensors: Sequence[TensorSpec], *, plan_key: str) -> None:
        self._metadata = {"format": _FORMAT, "plan": plan_key}
        self._writer = ShardWriter(
            folder,
            [StoredTensor(name=t.name, dtype=DType.U8, shape=packed_shape(t.shape)) for t in tensors],
            naming=ShardNaming(
                stem=share, index=f"{share}.index.json", alone=f"{share}.bits.safetensors", format=None
            ),
            metadata_of=lambda _names: self._metadata,
            late_key=None,
            max_shard_bytes=1 << 62,
            resume=True,
        )
        self.reused = self._writer.reused

    def write_bits(self, name: str, byte_offset: int, data: np.ndarray) -> None:
        """Write packed bytes at `byte_offset` of a tensor. Raises OutputError."""
        self._writer.write(name, byte_offset, np.ascontiguousarray(data).reshape(-1).data)

    def write_entries(self, name: str, first_entry: int, bits: np.ndarray, num_entries: int) -> None:
        """As `MaskWriter.write_entries`."""
        if num_entries:
            self._writer.merge(name, first_entry // 8, shifted_bits(bits, num_entries, first_entry % 8))

    def finish(self) -> None:
        """Flush, and give the file its name. Raises OutputError."""
        self._writer.finish(lambda _names: self._metadata)

    def close(self) -> None:
        """Close; an unfinished file stays for the next run."""
        self._writer.close()


def copy_share_bits(paths: Sequence[Path], writer: MaskWriter, *, plan_key: str) -> None:
    """Put the bits of finished shares into a mask. Raises MaskError for one of another plan."""
    seen: set[str] = set()
    for path in paths:
        entry = FileEntry.from_path(path)
        specs, strings = read_header(entry, file=0)
        if _identity(strings) != (_FORMAT, plan_key):
            raise MaskError(str(path), "bits of another plan", remedy="run this share again with --overwrite")
        with LocalFile(entry) as file:
            for name, spec in specs.items():
                _copy(file, spec, writer, is_first=name not in seen)
        entry.verify_unchanged()
        seen |= specs.keys()


def _identity(strings: Mapping[str, str]) -> tuple[str | None, str | None]:
    return strings.get("format"), strings.get("plan")


def _copy(file: LocalFile, spec: TensorSpec, writer: MaskWriter, *, is_first: bool) -> None:
    buffer = memoryview(bytearray(min(spec.num_bytes, _BUFFER_BYTES)))
    for offset in range(0, spec.num_bytes, _BUFFER_BYTES):
        piece = buffer[: min(_BUFFER_BYTES, spec.num_bytes - offset)]
        file.read_into(piece, spec.extent.start + offset)
        if is_first:
            writer.write_bits(spec.name, offset, piece)
        else:
            writer.merge_bits(spec.name, offset, piece)
