"""Write what turns a base into a tuned checkpoint: places and stored values of the entries that changed.

Contract: tensors of one name, dtype and shape are compared by their stored codes; any other of the tuned
side is stored whole. Each is read once, in segments, so that memory a worker is a few segments; what is
encoded waits in scratch files until all sizes are known. The files have the same bytes for any number of
workers.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

from sparsity_audit.checkpoint.reading import read_entries
from sparsity_audit.checkpoint.store import Catalogue
from sparsity_audit.masks.shards import MAX_SHARD_BYTES, ShardNaming, ShardWriter, StoredTensor
from sparsity_audit.passes.engine import map_units
from sparsity_audit.passes.open_files import OpenFiles
from sparsity_audit.passes.patch_codec import Compressor
from sparsity_audit.passes.patch_encoding import (
    SEGMENT_ENTRIES,
    Encoding,
    candidate_bytes,
    cheapest,
    encode_positions,
)
from sparsity_audit.passes.patch_manifest import Codec, PatchTensor
from sparsity_audit.seams import reached
from sparsity_audit.types import DType, TensorSpec

__all__ = ["PART_KINDS", "PATCH_NAMING", "positions_dtype", "write_patch"]

PATCH_NAMING = ShardNaming(
    stem="patch", index="patch.safetensors.index.json", alone="patch.safetensors", format=None
)
PART_KINDS = ("segments", "positions", "values")

_COPY_BYTES = 1 << 22


def positions_dtype(encoding: Encoding, num_entries: int, codec: Codec) -> DType:
    """Dtype under which the places of a tensor are stored."""
    if codec != "none" or encoding in ("mask", "gap8"):
        return DType.U8
    if encoding == "gap16":
        return DType.U16
    return DType.I32 if num_entries <= 2**31 else DType.I64


@dataclass(frozen=True, slots=True, kw_only=True)
class _Encoded:
    """A tensor of the patch, and the scratch files that hold its parts."""

    about: PatchTensor
    parts: Mapping[str, Path]


def write_patch(
    base: Catalogue, tuned: Catalogue, folder: Path, *, scratch: Path, codec: Codec, workers: int
) -> tuple[PatchTensor, ...]:
    """Write the payload of a patch; what it holds for each tensor, in name order.

    Args:
        base: What the patch applies to.
        tuned: What it makes.
        folder: Directory for the shards.
        scratch: Directory for what waits; about as large as the patch.
        codec: How segments are compressed.
        workers: Threads, each with a tensor of its own.

    Raises:
        ChangedInputError: A file changed during the run.
        OutputError: A file cannot be written.
        MissingExtraError: zstd is asked for and not installed.
    """
    Compressor(codec)
    task = _Task(tuned, base, OpenFiles(tuned), OpenFiles(base), scratch, codec)
    # The largest first, so that no worker is left alone with one at the end.
    names = sorted(tuned.tensors, key=lambda name: (-tuned.tensors[name].num_bytes, name))
    found: dict[str, _Encoded] = {}
    try:
        with closing(map_units(task.encode, names, workers=workers)) as results:
            for name, encoded in results:
                reached("tensor encoded")
                found[name] = encoded
    finally:
        task.tuned_files.close()
        task.base_files.close()
    base.verify_unchanged()
    tuned.verify_unchanged()
    encoded = [found[name] for name in sorted(found)]
    _write_shards(encoded, folder, codec)
    return tuple(item.about for item in encoded)


def _write_shards(encoded: Sequence[_Encoded], folder: Path, codec: Codec) -> None:
    stored: list[StoredTensor] = []
    sources: dict[str, Path] = {}
    for item in encoded:
        for kind, path in item.parts.items():
            name = f"{item.about.name}.{kind}"
            stored.append(_stored(name, kind, item.about, path, codec))
            sources[name] = path
    writer = ShardWriter(
        folder,
        stored,
        naming=PATCH_NAMING,
        metadata_of=lambda _names: {"format": "pt"},
        late_key=None,
        max_shard_bytes=MAX_SHARD_BYTES,
    )
    try:
        for name, path in sources.items():
            for offset, data in _chunks(path):
                writer.write(name, offset, data)
            path.unlink()
        writer.finish(lambda _names: {"format": "pt"})
    finally:
        writer.close()


def _stored(name: str, kind: str, about: PatchTensor, path: Path, codec: Codec) -> StoredTensor:
    num_bytes = path.stat().st_size
    if kind == "segments":
        return StoredTensor(name=name, dtype=DType.I64, shape=(about.num_segments + 1, 3))
    if kind == "positions":
        dtype = positions_dtype(about.encoding, about.num_entries, codec)
    else:
        dtype = about.dtype if codec == "none" else DType.U8
    return StoredTensor(name=name, dtype=dtype, shape=(num_bytes // dtype.itemsize,))


def _chunks(path: Path) -> Iterator[tuple[int, bytes]]:
    offset = 0
    with path.open("rb") as file:
        while data := file.read(_COPY_BYTES):
            yield offset, data
            offset += len(data)


@dataclass(frozen=True, slots=True)
class _Task:
    """What the workers share."""

    tuned: Catalogue
    base: Catalogue
    tuned_files: OpenFiles
    base_files: OpenFiles
    scratch: Path
    codec: Codec

    def encode(self, name: str) -> _Encoded:
        """Compare one tensor with its counterpart and leave its parts in scratch files."""
        spec = self.tuned.tensors[name]
        other = self.base.tensors.get(self.base.aliases.get(name, name))
        if other is not None and (other.dtype, other.shape) != (spec.dtype, spec.shape):
            other = None
        stem = self.scratch / hashlib.sha256(name.encode()).hexdigest()
        raw = _Raw(stem)
        hashes = hashlib.sha256(), hashlib.sha256()
        sizes, counts = Counter[str](), list[int]()
        with raw.opened("wb"):
            for first, count in _segments(spec):
                codes = _read(self.tuned_files, spec, first, count)
                hashes[1].update(codes.data.cast("B"))
                if other is not None:
                    before = _read(self.base_files, other, first, count)
                    hashes[0].update(before.data.cast("B"))
                    places = np.flatnonzero(before != codes)
                    found = candidate_bytes(places, entries=count, num_entries=spec.num_entries)
                    sizes.update({str(key): size for key, size in found.items()})
                    raw.add(places, codes[places])
                    counts.append(len(places))
        changed = spec.num_entries if other is None else sum(counts)
        encoding: Encoding = "dense" if spec.num_entries else "none"
        if other is not None:
            about = {"num_entries": spec.num_entries, "itemsize": spec.dtype.itemsize}
            encoding = cheapest(sizes, changed=changed, **about)
        tensor = PatchTensor(
            name=name,
            dtype=spec.dtype,
            shape=spec.shape,
            encoding=encoding,
            changed=changed,
            sizes=dict(sizes),
            base_sha256=None if other is None else hashes[0].hexdigest(),
            sha256=hashes[1].hexdigest(),
        )
        parts = self._pack(tensor, spec, raw, counts) if encoding != "none" else {}
        raw.unlink()
        return _Encoded(about=tensor, parts=parts)

    def _pack(self, about: PatchTensor, spec: TensorSpec, raw: _Raw, counts: list[int]) -> dict[str, Path]:
        """Encode and compress the segments; returns the files of the parts."""
        parts = {kind: raw.stem.with_suffix(f".{kind}") for kind in PART_KINDS}
        compressor = Compressor(self.codec)
        table = np.zeros((about.num_segments + 1, 3), dtype="<i8")
        with parts["positions"].open("wb") as places, parts["values"].open("wb") as values, raw.opened("rb"):
            for number, (first, count) in enumerate(_segments(spec)):
                if about.encoding == "dense":
                    where, codes = np.arange(0), _read(self.tuned_files, spec, first, count)
                else:
                    where, codes = raw.take(counts[number], spec.dtype.itemsize)
                data = encode_positions(
                    where, about.encoding, first=first, entries=count, num_entries=about.num_entries
                )
                places.write(compressor.pack(data) if data else b"")
                values.write(compressor.pack(codes.tobytes()) if codes.size else b"")
                table[number + 1] = places.tell(), values.tell(), table[number, 2] + codes.size
        parts["segments"].write_bytes(table.tobytes())
        if about.encoding == "dense":
            parts.pop("positions").unlink()
        return parts


class _Raw:
    """Places and values of one tensor, on the disk until it is known how to encode them."""

    def __init__(self, stem: Path) -> None:
        self.stem = stem
        self._paths = stem.with_suffix(".raw-places"), stem.with_suffix(".raw-values")
        self._files: list[BinaryIO] = []

    @contextmanager
    def opened(self, mode: Literal["rb", "wb"]) -> Iterator[None]:
        """Open both files, at their beginning."""
        with ExitStack() as stack:
            self._files = [stack.enter_context(path.open(mode)) for path in self._paths]
            yield

    def add(self, places: np.ndarray, values: np.ndarray) -> None:
        """Take the changed entries of the next segment."""
        self._files[0].write(places.astype("<u4").tobytes())
        self._files[1].write(values.tobytes())

    def take(self, count: int, itemsize: int) -> tuple[np.ndarray, np.ndarray]:
        """The changed entries of the next segment."""
        places = np.frombuffer(self._files[0].read(4 * count), dtype="<u4").astype(np.int64)
        return places, np.frombuffer(self._files[1].read(itemsize * count), dtype=f"<u{itemsize}")

    def unlink(self) -> None:
        """Remove the files."""
        for path in self._paths:
            path.unlink(missing_ok=True)


def _segments(spec: TensorSpec) -> Iterator[tuple[int, int]]:
    """First entry and number of entries of each segment."""
    for first in range(0, spec.num_entries, SEGMENT_ENTRIES):
        yield first, min(SEGMENT_ENTRIES, spec.num_entries - first)


def _read(files: OpenFiles, spec: TensorSpec, first: int, count: int) -> np.ndarray:
    codes = np.empty(count, dtype=f"<u{spec.dtype.itemsize}")
    read_entries(files[spec.file], spec, first, codes.view(np.uint8).data)
    return codes
