"""Locate the tensors of a file that `torch.save` wrote, without torch.

Contract: reads the zip directory, the local headers and `data.pkl`, never the data. Every tensor lies inside
its storage, every storage inside its zip member; specs carry strides and byte order as stored. Names that
share storage, offset, shape, strides and dtype are aliases of the first of them in the order of the file,
which is the order of module registration: the input embedding before the head, as transformers keeps it.
Tensors that share some bytes in another way stay separate, with a note. What is not a tensor is ignored and
counted. TorchScript archives, compressed members and optimizer state are refused.

Source: torch 2.13 `torch/serialization.py`, `_save` and `_load`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import NoReturn

from sparsity_audit.checkpoint.contents import FileContents, has_absurd_empty_shape
from sparsity_audit.checkpoint.restricted_pickle import MAX_PICKLE_BYTES
from sparsity_audit.checkpoint.state_dict import find_state_dict
from sparsity_audit.checkpoint.store import ByteSource, FileEntry
from sparsity_audit.checkpoint.torch_vocabulary import (
    STORAGE_DTYPES,
    TORCH_DTYPES,
    Refused,
    StorageRef,
    TensorRef,
    load_state,
)
from sparsity_audit.checkpoint.zip_members import Member, locate_members, read_directory
from sparsity_audit.errors import CorruptCheckpointError, UnsupportedFormatError
from sparsity_audit.types import ByteRange, DType, TensorSpec

__all__ = ["TorchArchive", "read_archive", "read_torch_zip", "tensor_spec"]

_MAX_DIMENSIONS = 64
_MAX_EXPANDED_BYTES = 2**40
"""Tensors that repeat entries (stride 0) cost no storage, so the file does not bound them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchArchive:
    """Where the storages of a file that `torch.save` wrote lie, and what its pickle holds.

    Args:
        entry: The file.
        file: Its index in the catalogue.
        ranges: Bytes of the members.
        prefix: What their names begin with.
        big_endian: Whether codes are byte-swapped.
        root: What the pickle holds, as `load_state` gives it.
    """

    entry: FileEntry
    file: int
    ranges: Mapping[str, ByteRange]
    prefix: str
    big_endian: bool
    root: object


def read_torch_zip(entry: FileEntry, *, file: int) -> FileContents:
    """The tensors of one `.bin`, `.pt` or `.pth` file.

    Args:
        entry: The file.
        file: The file's index in the catalogue, stored in the specs.

    Raises:
        CorruptCheckpointError: The archive or the pickle contradicts itself or the file.
        UnsafePickleError: The pickle names something that is not on the allow-list.
        UnsupportedFormatError: TorchScript, compressed, quantised, sparse, optimizer state.
    """
    with closing(entry.open()) as source:
        archive = read_archive(source, file=file)
    found = find_state_dict(archive.root, subject=entry.place)
    specs = {name: tensor_spec(archive, name, value) for name, value in found.tensors.items()}
    tensors, aliases = _split_aliases(specs)
    return FileContents(
        tensors=tensors,
        aliases=aliases,
        notes=tuple(f"{entry.name}: {note}" for note in (*found.notes, *_overlap_notes(tensors))),
    )


def read_archive(source: ByteSource, *, file: int, load: Callable[..., object] = load_state) -> TorchArchive:
    """The members of an archive and what its pickle holds.

    Args:
        source: The open file.
        file: The file's index in the catalogue.
        load: What makes sense of the pickle; called as `load_state` is.

    Raises:
        SparsityAuditError: As `read_torch_zip`.
    """
    entry = source.entry
    members = read_directory(source)
    prefix = _find_prefix(entry, members)
    ranges = locate_members(source, _needed(members, prefix))
    data = _contents(source, ranges[prefix + "data.pkl"], limit=MAX_PICKLE_BYTES)
    order = b"little"
    if prefix + "byteorder" in ranges:
        order = _contents(source, ranges[prefix + "byteorder"], limit=16)
    if order not in (b"little", b"big"):
        _corrupt(entry, f"byteorder is {order!r}", expected="little or big")
    root = load(data, subject=entry.place)
    big_endian = order == b"big"
    return TorchArchive(
        entry=entry, file=file, ranges=ranges, prefix=prefix, big_endian=big_endian, root=root
    )


def _find_prefix(entry: FileEntry, members: Mapping[str, Member]) -> str:
    prefixes = [
        name[: -len("data.pkl")] for name in members if name.endswith("/data.pkl") and name.count("/") == 1
    ]
    if len(prefixes) != 1:
        raise UnsupportedFormatError(
            entry.place,
            f"zip archive with {len(prefixes)} data.pkl",
            expected="an archive that torch.save wrote, or safetensors",
        )
    prefix = prefixes[0]
    if prefix + "constants.pkl" in members or any(name.startswith(prefix + "code/") for name in members):
        raise UnsupportedFormatError(
            entry.place,
            "TorchScript archive: it holds a program",
            remedy="torch.save the `state_dict()` of the module that torch.jit.load gives",
        )
    return prefix


def _needed(members: Mapping[str, Member], prefix: str) -> list[Member]:
    return [
        member
        for name, member in members.items()
        if name in (prefix + "data.pkl", prefix + "byteorder") or name.startswith(prefix + "data/")
    ]


def _contents(source: ByteSource, extent: ByteRange, *, limit: int) -> bytes:
    if extent.num_bytes > limit:
        _corrupt(source.entry, f"zip member of {extent.num_bytes} bytes", expected=f"at most {limit}")
    raw = bytearray(extent.num_bytes)
    source.read_into(memoryview(raw), extent.start)
    return bytes(raw)


def tensor_spec(archive: TorchArchive, name: str, value: TensorRef | Refused) -> TensorSpec:
    """Where a tensor of the archive lies, checked against its storage.

    Raises:
        UnsupportedFormatError: A kind of tensor or a dtype that is not read.
        CorruptCheckpointError: It reaches out of its storage, or contradicts itself.
    """
    entry = archive.entry
    if isinstance(value, Refused):
        raise UnsupportedFormatError(f"{entry.place}: tensor {name!r}", value.what, remedy=value.remedy)
    dtype = _dtype(entry, name, value)
    extent = _storage_extent(archive, name, value.storage)
    start, shape, strides = value.start, value.shape, value.strides
    if not _is_size_tuple(shape) or not _is_size_tuple(strides) or not _is_size_tuple((start,)):
        _corrupt(entry, f"tensor {name!r} has a shape, stride or offset that is not a size")
    assert isinstance(shape, tuple)
    assert isinstance(strides, tuple)
    assert isinstance(start, int)
    if len(shape) != len(strides) or len(shape) > _MAX_DIMENSIONS:
        _corrupt(entry, f"tensor {name!r} has {len(shape)} sizes and {len(strides)} strides")
    num_entries = _product(shape)
    if num_entries >= 2**63:
        _corrupt(entry, f"tensor {name!r} has a shape of more than 2^63 entries")
    if has_absurd_empty_shape(shape):
        _corrupt(entry, f"tensor {name!r} has no entries, yet large sizes")
    if num_entries == 0:
        empty = ByteRange(start=extent.start, stop=extent.start)
        return TensorSpec(name=name, dtype=dtype, shape=shape, file=archive.file, extent=empty)
    stop = start + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + 1
    capacity = extent.num_bytes // dtype.itemsize
    if stop > capacity:
        _corrupt(entry, f"tensor {name!r} reaches entry {stop} of a storage of {capacity}")
    if num_entries > stop - start and num_entries * dtype.itemsize > _MAX_EXPANDED_BYTES:
        _corrupt(entry, f"tensor {name!r} expands {stop - start} entries to {num_entries}")
    contiguous = _is_contiguous(shape, strides)
    return TensorSpec(
        name=name,
        dtype=dtype,
        shape=shape,
        file=archive.file,
        extent=ByteRange(
            start=extent.start + start * dtype.itemsize, stop=extent.start + stop * dtype.itemsize
        ),
        strides=None if contiguous else _normal_strides(shape, strides),
        big_endian=archive.big_endian and dtype.itemsize > 1,
    )


def _dtype(entry: FileEntry, name: str, value: TensorRef) -> DType:
    if value.dtype is None:
        dtype, stored = STORAGE_DTYPES.get(value.storage.type_name), value.storage.type_name
    else:
        dtype, stored = TORCH_DTYPES.get(value.dtype), value.dtype
    if dtype is None:
        raise UnsupportedFormatError(
            f"{entry.place}: tensor {name!r}",
            f"stored as {stored[:40]}, which is not compared",
            remedy="convert it to bf16, fp32 or another dtype of one to eight bytes before saving",
        )
    return dtype


def _storage_extent(archive: TorchArchive, name: str, storage: StorageRef) -> ByteRange:
    extent = archive.ranges.get(f"{archive.prefix}data/{storage.key}")
    if extent is None:
        _corrupt(
            archive.entry,
            f"tensor {name!r} lies in storage {storage.key[:40]!r}, which is not in the archive",
        )
    known = STORAGE_DTYPES.get(storage.type_name)
    itemsize = 1 if known is None else known.itemsize
    if storage.num_entries != extent.num_bytes // itemsize:
        _corrupt(
            archive.entry,
            f"tensor {name!r} lies in a storage of {extent.num_bytes} bytes",
            expected=f"{storage.num_entries} entries of {itemsize} bytes",
        )
    return extent


def _is_size_tuple(value: object) -> bool:
    return isinstance(value, tuple) and all(
        type(v) is int and 0 <= v < 2**63 for v in value[: _MAX_DIMENSIONS + 1]
    )


def _product(shape: tuple[int, ...]) -> int:
    if 0 in shape:
        return 0
    product = 1
    for size in shape:
        product *= size
    return product


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _normal_strides(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    # The stride of an axis of size 1 means nothing; as 0 it cannot make equal views look different.
    return tuple(0 if size == 1 else stride for size, stride in zip(shape, strides, strict=True))


def _split_aliases(specs: Mapping[str, TensorSpec]) -> tuple[dict[str, TensorSpec], dict[str, str]]:
    first: dict[tuple[object, ...], str] = {}
    tensors: dict[str, TensorSpec] = {}
    aliases: dict[str, str] = {}
    for name, spec in specs.items():
        key = (spec.extent.start, spec.dtype, spec.shape, spec.strides)
        if spec.num_entries and first.setdefault(key, name) != name:
            aliases[name] = first[key]
        else:
            tensors[name] = spec
    return tensors, aliases


def _overlap_notes(tensors: Mapping[str, TensorSpec]) -> list[str]:
    end, holder, pairs = 0, "", []
    for name, spec in sorted(tensors.items(), key=lambda item: (item[1].extent.start, item[1].extent.stop)):
        if spec.extent.start < end:
            pairs.append((holder, name))
        if spec.extent.stop > end:
            end, holder = spec.extent.stop, name
    if not pairs:
        return []
    left, right = pairs[0]
    more = f" (and {len(pairs) - 1} more pairs)" if len(pairs) > 1 else ""
    return [f"{left!r} and {right!r}{more} share part of a storage; each counts in full"]


def _corrupt(entry: FileEntry, found: str, *, expected: str | None = None) -> NoReturn:
    raise CorruptCheckpointError(
        entry.place,
        found,
        expected=expected,
        remedy="the file is damaged or was not written by torch.save; make or download it again",
    )
