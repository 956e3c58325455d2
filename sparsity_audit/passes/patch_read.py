"""Read a patch directory, treating it as hostile.

Contract: opening reads the manifest and the headers, and demands every part that the manifest promises; a
segment's places ascend inside it and go with as many values. What does not is a CorruptCheckpointError that
names the tensor.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import NoReturn

import numpy as np

from sparsity_audit.checkpoint.layout import missing_shards
from sparsity_audit.checkpoint.safetensors_io import read_header
from sparsity_audit.checkpoint.store import FileEntry, LocalFile
from sparsity_audit.errors import CheckpointNotFoundError, CorruptCheckpointError
from sparsity_audit.passes.patch_codec import Compressor
from sparsity_audit.passes.patch_encoding import SEGMENT_ENTRIES, decode_positions
from sparsity_audit.passes.patch_make import PART_KINDS
from sparsity_audit.passes.patch_manifest import PatchTensor, read_manifest
from sparsity_audit.types import TensorSpec

__all__ = ["PatchReader"]

_KEPT_TABLES = 64


class PatchReader:
    """An open patch; safe to share between threads.

    Args:
        folder: The patch directory.

    Attributes:
        manifest: What it is.
        tensors: Its tensors by name.

    Raises:
        UnsupportedFormatError: No patch, or one of a newer version.
        CheckpointNotFoundError: A shard is missing.
        CorruptCheckpointError: Truncated, or a part that is promised is not there.
        MissingExtraError: It is compressed with zstd, which is not installed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.manifest = folder, read_manifest(folder)
        self.tensors = {tensor.name: tensor for tensor in self.manifest.tensors}
        names = sorted(p.name for p in folder.glob("patch*.safetensors"))
        for missing in missing_shards(names):
            raise CheckpointNotFoundError(str(folder), f"lacks {missing}", remedy="copy the missing file")
        self._files = tuple(FileEntry.from_path(folder / name) for name in names)
        self._specs: dict[str, TensorSpec] = {}
        for number, entry in enumerate(self._files):
            self._specs |= read_header(entry, file=number)[0]
        self._compressor = Compressor(self.manifest.codec)
        self._open: dict[int, LocalFile] = {}
        self._tables: dict[str, np.ndarray] = {}
        self._lock = threading.Lock()
        for tensor in self.manifest.tensors:
            self._verify_parts(tensor)

    @property
    def num_bytes(self) -> int:
        """Bytes of all its files."""
        return sum(p.stat().st_size for p in self.folder.rglob("*") if p.is_file())

    def segment(self, tensor: PatchTensor, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Places (in the segment) and codes of the entries that one segment changes.

        Raises:
            CorruptCheckpointError: They are no places of the segment, or go with another number of codes.
        """
        first = number * SEGMENT_ENTRIES
        entries = min(SEGMENT_ENTRIES, tensor.num_entries - first)
        start, stop = (tuple(map(int, row)) for row in self._table(tensor)[number : number + 2])
        count, itemsize = stop[2] - start[2], tensor.dtype.itemsize
        if not 0 <= count <= entries:
            self._damaged(tensor, f"segment {number} of {count} entries")
        try:
            values = self._part(tensor, "values", start[1], stop[1])
            values = self._compressor.unpack(values, limit=count * itemsize) if values else values
            places = b""
            if tensor.encoding != "dense":
                places = self._part(tensor, "positions", start[0], stop[0])
                places = self._compressor.unpack(places, limit=8 * entries) if places else places
            found = decode_positions(
                places, tensor.encoding, first=first, entries=entries, num_entries=tensor.num_entries
            )
        except ValueError as error:
            self._damaged(tensor, f"segment {number}: {error}")
        if len(found) != count or len(values) != count * itemsize:
            self._damaged(tensor, f"segment {number}: {len(found)} places, {len(values)} bytes of values")
        return found, np.frombuffer(values, dtype=f"<u{itemsize}")

    def close(self) -> None:
        """Close the files."""
        with self._lock:
            for file in self._open.values():
                file.close()
            self._open.clear()

    def _verify_parts(self, tensor: PatchTensor) -> None:
        kinds = () if tensor.encoding == "none" else PART_KINDS
        for kind in kinds:
            spec = self._specs.get(f"{tensor.name}.{kind}")
            if spec is None and (kind, tensor.encoding) != ("positions", "dense"):
                self._damaged(tensor, f"its {kind} are not there")
        if kinds and self._specs[f"{tensor.name}.segments"].shape != (tensor.num_segments + 1, 3):
            self._damaged(tensor, "its table of segments has another size")

    def _table(self, tensor: PatchTensor) -> np.ndarray:
        with self._lock:
            found = self._tables.get(tensor.name)
        if found is not None:
            return found
        spec = self._specs[f"{tensor.name}.segments"]
        raw = self._bytes(spec, 0, spec.num_bytes)
        table = np.frombuffer(raw, dtype="<i8").reshape(-1, 3)
        # A dense tensor has a code for every entry, also for those that kept theirs.
        codes = tensor.num_entries if tensor.encoding == "dense" else tensor.changed
        if (np.diff(table, axis=0) < 0).any() or table[0].any() or int(table[-1, 2]) != codes:
            self._damaged(tensor, "its table of segments contradicts itself")
        with self._lock:
            self._tables = (
                {tensor.name: table} if len(self._tables) > 64 else self._tables | {tensor.name: table}
            )
        return table

    def _part(self, tensor: PatchTensor, kind: str, start: int, stop: int) -> bytes:
        spec = self._specs[f"{tensor.name}.{kind}"]
        if stop > spec.num_bytes:
            self._damaged(tensor, f"its {kind} end at byte {spec.num_bytes}, not {stop}")
        return self._bytes(spec, start, stop)

    def _bytes(self, spec: TensorSpec, start: int, stop: int) -> bytes:
        data = bytearray(stop - start)
        with self._lock:
            if spec.file not in self._open:
                self._open[spec.file] = LocalFile(self._files[spec.file])
            source = self._open[spec.file]
        source.read_into(memoryview(data), spec.extent.start + start)
        return bytes(data)

    def _damaged(self, tensor: PatchTensor, found: str) -> NoReturn:
        raise CorruptCheckpointError(
            f"{self.folder}: tensor {tensor.name!r}",
            found,
            expected="a patch as `patch make` wrote it",
            remedy="copy or make it again",
        )
