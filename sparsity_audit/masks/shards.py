"""Safetensors shards that are written in place, in any order, and appear whole or not at all.

Contract: all sizes are known before, so headers come first and bytes go straight to their final
position. Files carry the suffix `.partial` until `finish`, which patches the late metadata into the
headers (their length never changes), flushes, renames, and writes the index last; a directory without
an index is no mask. Equal input gives equal bytes, whatever the order of writes. Masks and checkpoints are
written alike; a `ShardNaming` tells how their files are called.
"""

from __future__ import annotations

import errno
import json
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sparsity_audit.checkpoint.safetensors_io import MAX_HEADER_BYTES
from sparsity_audit.checkpoint.spelling import verify_local
from sparsity_audit.errors import OutputError
from sparsity_audit.types import DType

__all__ = [
    "CHECKPOINT_NAMING",
    "INDEX_NAME",
    "MASK_NAMING",
    "MAX_SHARD_BYTES",
    "ShardNaming",
    "ShardWriter",
    "StoredTensor",
    "claim_directory",
    "output_error",
    "sync_directory",
]

INDEX_NAME: Final = "mask.safetensors.index.json"
MAX_SHARD_BYTES: Final = 5_000_000_000
_PARTIAL = ".partial"

MetadataOf = Callable[[Sequence[str]], Mapping[str, str]]
"""Names of a shard's tensors → its `__metadata__`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardNaming:
    """How the files of a directory are called.

    Args:
        stem: `mask` gives `mask-00001-of-00002.safetensors`.
        index: Name of the index.
        alone: Name of a shard that is the only one, and then has no index; None where there is always one.
        format: What the index says it is the index of, with a list of the shards; None to leave both out.
    """

    stem: str
    index: str
    alone: str | None
    format: str | None


MASK_NAMING: Final = ShardNaming(stem="mask", index=INDEX_NAME, alone=None, format="sparsity-audit-mask")
CHECKPOINT_NAMING: Final = ShardNaming(
    stem="model", index="model.safetensors.index.json", alone="model.safetensors", format=None
)
"""As `save_pretrained` of transformers calls them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor as it lies in the file."""

    name: str
    dtype: DType
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shard:
    path: Path
    tensors: tuple[StoredTensor, ...]

    @property
    def partial(self) -> Path:
        return self.path.with_name(self.path.name + _PARTIAL)

    def header(self, metadata: Mapping[str, str]) -> bytes:
        """Length prefix and JSON, padded with spaces so that the data starts at a multiple of 8."""
        table: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
        offset = 0
        for tensor in self.tensors:
            stop = offset + tensor.num_bytes
            table[tensor.name] = {
                "dtype": tensor.dtype.value,
                "shape": list(tensor.shape),
                "data_offsets": [offset, stop],
            }
            offset = stop
        text = json.dumps(table, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        if len(text) > MAX_HEADER_BYTES:
            raise OutputError(
                str(self.path),
                f"header of {len(text)} bytes",
                expected=f"at most {MAX_HEADER_BYTES}",
                remedy="choose smaller shards",
            )
        return len(text).to_bytes(8, "little") + text


class ShardWriter:
    """Writes the shards of one directory; thread-safe from construction to `finish`.

    Args:
        target: Directory; created when missing.
        tensors: What will be written; larger dtypes first, then in name order.
        naming: How the files are called.
        metadata_of: The `__metadata__` of a shard, with placeholders for what is known late.
        late_key: Metadata key whose value may differ at the end (at equal length); None where none does.
        max_shard_bytes: Tensor bytes after which a new shard begins; tensors are never split.
        resume: Keep the bytes of an earlier, interrupted writer with the same tensors and metadata.

    Attributes:
        reused: True when an earlier writer's bytes were kept; otherwise all bytes are zero.

    Raises:
        OutputError: The directory holds something else, or cannot be written.
    """

    def __init__(
        self,
        target: Path,
        tensors: Sequence[StoredTensor],
        *,
        naming: ShardNaming,
        metadata_of: MetadataOf,
        late_key: str | None,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        resume: bool = False,
    ) -> None:
        self.target, self._naming, self._late_key = target, naming, late_key
        self._shards = _plan(target, tensors, naming, max_shard_bytes)
        self._has_index = naming.alone is None or len(self._shards) > 1
        headers = [shard.header(metadata_of(_names(shard))) for shard in self._shards]
        self._place: dict[str, tuple[int, int, int]] = {}
        for number, (shard, header) in enumerate(zip(self._shards, headers, strict=True)):
            offset = len(header)
            for tensor in shard.tensors:
                self._place[tensor.name] = (number, offset, tensor.num_bytes)
                offset += tensor.num_bytes
        self._descriptors: list[int] = []
        self._own: list[Path] = []
        self._finished = False
        self._merge_lock = threading.Lock()
        self._created = claim_directory(target, allow_content=resume)
        try:
            self.reused = resume and self._reopen(headers)
            if not self.reused:
                self._create(headers, replace=resume)
        except OSError as error:
            self.abort()
            raise output_error(target, error) from error

    def write(self, name: str, offset: int, data: bytes | memoryview) -> None:
        """Write bytes at `offset` of a tensor. Raises OutputError."""
        view = memoryview(data).cast("B")
        number, start, size = self._place[name]
        assert 0 <= offset <= size - len(view), (name, offset, len(view), size)
        self._pwrite(number, view, start + offset)

    def merge(self, name: str, offset: int, data: bytes) -> None:
        """Set the bits of `data` at `offset`, keeping those that are set already. Raises OutputError."""
        number, start, size = self._place[name]
        assert 0 <= offset <= size - len(data), (name, offset, len(data), size)
        with self._merge_lock:
            there = os.pread(self._descriptors[number], len(data), start + offset)
            merged = int.from_bytes(there, "little") | int.from_bytes(data, "little")
            self._pwrite(number, memoryview(merged.to_bytes(len(data), "little")), start + offset)

    def finish(self, metadata_of: MetadataOf) -> None:
        """Patch the headers, flush, rename, write the index. Raises OutputError; then call `abort`."""
        try:
            for number, shard in enumerate(self._shards):
                header = shard.header(metadata_of(_names(shard)))
                first = min(
                    (start for where, start, _ in self._place.values() if where == number), default=None
                )
                assert first is None or len(header) == first, "late metadata changed the header's length"
                self._pwrite(number, memoryview(header), 0)
                os.fsync(self._descriptors[number])
            for shard in self._shards:
                shard.partial.replace(shard.path)
                self._own.append(shard.path)
            sync_directory(self.target)
            if self._has_index:
                self._write_index()
        except OSError as error:
            raise output_error(self.target, error) from error
        self._finished = True
        self.close()

    @property
    def closed(self) -> bool:
        """Whether nothing is open any more."""
        return not self._descriptors

    def close(self) -> None:
        """Close the files; unfinished ones stay as `.partial` for a later `resume`."""
        while self._descriptors:
            os.close(self._descriptors.pop())

    def abort(self) -> None:
        """Close and delete what is unfinished; does nothing after `finish`."""
        self.close()
        if self._finished:
            return
        (self.target / (self._naming.index + _PARTIAL)).unlink(missing_ok=True)
        for path in self._own:
            path.unlink(missing_ok=True)
        if self._created and self.target.is_dir() and not any(self.target.iterdir()):
            self.target.rmdir()

    def _pwrite(self, number: int, view: memoryview, offset: int) -> None:
        done = 0
        try:
            while done < len(view):
                done += os.pwrite(self._descriptors[number], view[done:], offset + done)
        except OSError as error:
            raise output_error(self._shards[number].partial, error) from error

    def _create(self, headers: Sequence[bytes], *, replace: bool) -> None:
        for number, (shard, header) in enumerate(zip(self._shards, headers, strict=True)):
            if replace:
                shard.partial.unlink(missing_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)
            self._descriptors.append(os.open(shard.partial, flags, 0o666))
            self._own.append(shard.partial)
            _reserve(self._descriptors[number], len(header) + sum(t.num_bytes for t in shard.tensors))
            self._pwrite(number, memoryview(header), 0)

    def _reopen(self, headers: Sequence[bytes]) -> bool:
        """Take over an earlier writer's files when all of them fit; a finished directory is reopened."""
        found = [shard.partial if shard.partial.exists() else shard.path for shard in self._shards]
        sizes = [
            len(h) + sum(t.num_bytes for t in s.tensors) for s, h in zip(self._shards, headers, strict=True)
        ]
        fits = all(
            path.exists() and path.stat().st_size == size and self._same_header(path, header)
            for path, size, header in zip(found, sizes, headers, strict=True)
        )
        index = self.target / self._naming.index
        if not fits:
            finals = [path for path in (index, *(s.path for s in self._shards)) if path.exists()]
            if finals:
                raise OutputError(
                    str(finals[0]),
                    "belongs to another mask",
                    remedy="choose another directory, or delete this one",
                )
            return False
        index.unlink(missing_ok=True)
        for number, (shard, path, header) in enumerate(zip(self._shards, found, headers, strict=True)):
            path.replace(shard.partial)
            self._descriptors.append(os.open(shard.partial, os.O_RDWR | getattr(os, "O_CLOEXEC", 0)))
            self._pwrite(number, memoryview(header), 0)
        self._own = [shard.partial for shard in self._shards]
        return True

    def _same_header(self, path: Path, header: bytes) -> bool:
        with path.open("rb") as file:
            there = file.read(len(header))
        if there == header:
            return True
        if there[:8] != header[:8]:
            return False
        try:
            mine, other = json.loads(header[8:]), json.loads(there[8:])
            if self._late_key is not None:
                other["__metadata__"][self._late_key] = mine["__metadata__"][self._late_key]
        except (ValueError, KeyError, TypeError):
            return False
        return mine == other

    def _write_index(self) -> None:
        weight_map = {tensor.name: shard.path.name for shard in self._shards for tensor in shard.tensors}
        facts: dict[str, object] = {
            "total_size": sum(t.num_bytes for shard in self._shards for t in shard.tensors)
        }
        if self._naming.format is not None:
            facts["format"] = self._naming.format
            facts["shards"] = [shard.path.name for shard in self._shards]
        index = {"metadata": facts, "weight_map": weight_map}
        path = self.target / (self._naming.index + _PARTIAL)
        with path.open("w", encoding="utf-8") as file:
            json.dump(index, file, sort_keys=True, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        path.replace(self.target / self._naming.index)
        sync_directory(self.target)


def claim_directory(target: Path, *, allow_content: bool) -> bool:
    """Make `target` a directory this run may fill; True when it was created here. Raises OutputError."""
    verify_local(target)
    try:
        if not target.exists():
            target.mkdir(parents=True)
            return True
        is_usable = target.is_dir() and (allow_content or not any(target.iterdir()))
    except OSError as error:
        raise output_error(target, error) from error
    if not is_usable:
        raise OutputError(
            str(target),
            "exists and is not empty" if target.is_dir() else "is a file",
            expected="a new or empty directory",
            remedy="choose another directory, or delete this one first",
        )
    return False


def output_error(path: Path, error: OSError) -> OutputError:
    """The OutputError for what the system refused."""
    remedy = {
        errno.ENOSPC: "free space, or write to another disk",
        errno.EDQUOT: "free space within the quota, or write to another disk",
        errno.EACCES: "choose a directory you may write to",
        errno.EPERM: "choose a directory you may write to",
        errno.EROFS: "choose a directory on a writable file system",
        errno.EFBIG: "choose smaller shards or another file system",
    }.get(error.errno or 0, "check the disk, then run again")
    if isinstance(error, OutputError):
        return error
    return OutputError(str(path), f"cannot be written ({error.strerror or error})", remedy=remedy)


def _plan(
    target: Path, tensors: Sequence[StoredTensor], naming: ShardNaming, max_shard_bytes: int
) -> tuple[_Shard, ...]:
    # Larger dtypes first keeps every tensor aligned to its own item size.
    ordered = sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))
    groups: list[list[StoredTensor]] = [[]]
    filled = 0
    for tensor in ordered:
        if groups[-1] and filled + tensor.num_bytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.num_bytes
    names = [f"{naming.stem}-{n:05d}-of-{len(groups):05d}.safetensors" for n in range(1, len(groups) + 1)]
    if naming.alone is not None and len(groups) == 1:
        names = [naming.alone]
    return tuple(
        _Shard(path=target / name, tensors=tuple(group)) for name, group in zip(names, groups, strict=True)
    )


def _names(shard: _Shard) -> list[str]:
    return [tensor.name for tensor in shard.tensors]


def _reserve(descriptor: int, num_bytes: int) -> None:
    """Claim the space now, so that a full disk is reported before hours of work, not after."""
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)
    except (AttributeError, OSError) as error:
        unsupported = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
        if isinstance(error, OSError) and error.errno not in unsupported:
            raise
        os.ftruncate(descriptor, num_bytes)


def sync_directory(folder: Path) -> None:
    """Flush the names in a directory to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
