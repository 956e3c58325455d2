"""What the `.metadata` of a torch distributed checkpoint says, read without torch and without running it.

Contract: a pickle of dataclasses becomes `StoredTensor`s: dtype, shape, chunks and where each chunk lies.
Paths stay inside the directory, sizes are sizes, every chunk has one place. Values that are not tensors (a
step, a schedule) are counted, never read.

Source: torch 2.13 `torch/distributed/checkpoint/metadata.py`, `filesystem.py` (`_StorageInfo`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import NoReturn

from sparsity_audit.checkpoint.assembly import Box
from sparsity_audit.checkpoint.restricted_pickle import LEAF, Call, Global, Record
from sparsity_audit.checkpoint.torch_vocabulary import TORCH_DTYPES, load_distributed
from sparsity_audit.errors import CorruptCheckpointError, UnsupportedFormatError
from sparsity_audit.types import ByteRange

__all__ = ["LIMITS", "DcpMetadata", "DcpTensor", "Place", "read_metadata"]

LIMITS = (256_000_000, 50_000_000)
"""Bytes and operations of a `.metadata`; a chunk takes about 150 bytes and 55 operations."""

_MAX_CHUNKS = 2_000_000
_MAX_AXES = 64
_INERT = ("torch.distributed.checkpoint.", "torch.distributed._shard.sharded_tensor.metadata.")
_PATHS = ("pathlib.PosixPath", "pathlib.WindowsPath", "pathlib.PurePosixPath", "pathlib._local.PosixPath")
_CALLS: dict[str, Call] = dict.fromkeys(_PATHS, lambda _: LEAF)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Bytes of one file of the checkpoint.

    Args:
        file: Its path, relative to the directory.
        extent: The bytes.
    """

    file: str
    extent: ByteRange


@dataclass(frozen=True, slots=True, kw_only=True)
class DcpTensor:
    """A tensor of the checkpoint.

    Args:
        dtype: torch's name of its dtype.
        shape: Its shape.
        chunks: Its chunks and where they lie.
        path: The keys that lead to it in what was saved; its name alone where that is not recorded.
    """

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[tuple[Box, Place], ...]
    path: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DcpMetadata:
    """What was saved.

    Args:
        tensors: By flattened name.
        num_others: Values that are not tensors.
    """

    tensors: Mapping[str, DcpTensor]
    num_others: int


def read_metadata(data: bytes, *, subject: str) -> DcpMetadata:
    """The tensors that a `.metadata` describes.

    Args:
        data: The file.
        subject: What messages call it.

    Raises:
        UnsafePickleError: It names something other than the classes of such a file.
        UnsupportedFormatError: Chunks that were compressed or encrypted, or a dtype that is not known.
        CorruptCheckpointError: It contradicts itself.
    """
    root = load_distributed(data, subject=subject, calls=_CALLS, inert=_INERT, limits=LIMITS)
    if not _is(root, "Metadata"):
        _corrupt(subject, "does not describe a checkpoint")
    assert isinstance(root, Record)
    described, stored = root.get("state_dict_metadata"), root.get("storage_data")
    if not isinstance(described, dict) or not isinstance(stored, dict):
        _corrupt(subject, "lists no tensors, or not where they are")
    places = _places(subject, stored)
    paths = root.get("planner_data")
    tensors: dict[str, DcpTensor] = {}
    budget = _MAX_CHUNKS
    for name, about in described.items():
        if not isinstance(name, str) or not name.isprintable():
            _corrupt(subject, f"names a tensor {str(name)[:80]!r}")
        if not _is(about, "TensorStorageMetadata"):
            continue
        tensors[name] = _tensor(subject, name, about, places, paths)
        budget -= len(tensors[name].chunks)
        if budget < 0:
            _corrupt(subject, f"lists more than {_MAX_CHUNKS} chunks")
    return DcpMetadata(tensors=tensors, num_others=len(described) - len(tensors))


def _tensor(
    subject: str,
    name: str,
    about: Record,
    places: Mapping[tuple[str, tuple[int, ...] | None], Place],
    paths: object,
) -> DcpTensor:
    shape, chunks = _sizes(subject, name, about.get("size")), about.get("chunks")
    if not isinstance(chunks, list):
        _corrupt(subject, f"tensor {name!r} has no chunks")
    found: dict[tuple[int, ...], tuple[Box, Place]] = {}
    for chunk in chunks:
        if not isinstance(chunk, Record):
            _corrupt(subject, f"tensor {name!r} has a chunk without offsets and sizes")
        start, size = (_sizes(subject, name, chunk.get(key)) for key in ("offsets", "sizes"))
        place = places.get((name, start)) or places.get((name, None))
        if place is None:
            _corrupt(subject, f"does not say where the chunk of {name!r} at {list(start)} is")
        box = Box(start, size)
        if found.setdefault(start, (box, place))[0] != box:
            _corrupt(subject, f"lists two chunks of {name!r} at {list(start)}")
    return DcpTensor(
        dtype=_dtype(subject, name, about.get("properties")),
        shape=shape,
        chunks=tuple(found.values()),
        path=_path(name, paths),
    )


def _places(subject: str, stored: dict[object, object]) -> dict[tuple[str, tuple[int, ...] | None], Place]:
    places: dict[tuple[str, tuple[int, ...] | None], Place] = {}
    for key, value in stored.items():
        if not isinstance(key, Record) or not isinstance(value, Record):
            _corrupt(subject, "lists a chunk without index or place")
        name, offset = key.get("fqn"), key.get("offset")
        file, start, length = (value.get(k) for k in ("relative_path", "offset", "length"))
        if not isinstance(name, str) or not isinstance(file, str) or not _is_inside(file):
            _corrupt(subject, f"places a chunk in {str(file)[:80]!r}", expected="a file of the checkpoint")
        if value.get("transform_descriptors"):
            raise UnsupportedFormatError(
                subject,
                f"chunk of {name[:80]!r} was transformed when it was saved (compressed, for instance)",
                remedy="save without extensions, or load and save again with torch.distributed.checkpoint",
            )
        if type(start) is not int or type(length) is not int or not 0 <= start <= start + length < 2**63:
            _corrupt(subject, f"places a chunk of {name[:80]!r} at no bytes")
        place = Place(file=file, extent=ByteRange(start=start, stop=start + length))
        index = (name, None if offset is None else _sizes(subject, name, offset))
        if places.setdefault(index, place) != place:
            _corrupt(subject, f"gives a chunk of {name[:80]!r} two places")
    return places


def _path(name: str, paths: object) -> tuple[str, ...]:
    path = paths.get(name) if isinstance(paths, dict) else None
    if isinstance(path, tuple) and path and all(isinstance(key, str | int) for key in path):
        return tuple(map(str, path))
    return (name,)


def _dtype(subject: str, name: str, properties: object) -> str:
    # The state is a tuple that begins with the dtype, since memory formats cannot be pickled.
    state = properties.state if isinstance(properties, Record) else None
    dtype = state[0] if isinstance(state, tuple) and state else None
    if isinstance(state, dict):
        dtype = state.get("dtype")
    text = dtype.path.removeprefix("torch.") if isinstance(dtype, Global) else ""
    if text not in TORCH_DTYPES:
        _corrupt(subject, f"tensor {name!r} has no dtype")
    return text


def _sizes(subject: str, name: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, tuple) or len(value) > _MAX_AXES:
        _corrupt(subject, f"tensor {name[:80]!r} has a shape or an offset that is not one")
    if not all(type(size) is int and 0 <= size < 2**63 for size in value):
        _corrupt(subject, f"tensor {name[:80]!r} has a size that is not one")
    return value


def _is_inside(path: str) -> bool:
    if not path or not path.isprintable() or len(path) > 1000 or "\\" in path:
        return False
    return not PurePosixPath(path).is_absolute() and ".." not in PurePosixPath(path).parts


def _is(value: object, name: str) -> bool:
    return isinstance(value, Record) and value.path.rpartition(".")[2] == name


def _corrupt(subject: str, found: str, *, expected: str | None = None) -> NoReturn:
    raise CorruptCheckpointError(
        subject,
        found,
        expected=expected,
        remedy="the file is damaged or was not written by torch.distributed.checkpoint; save it again",
    )
