"""Open a torch distributed checkpoint (DCP): `.metadata` and the `*.distcp` files it speaks of.

Contract: reads `.metadata` and the sizes of files; a missing or shortened file is an error that names it.
Chunks of any cut are assembled while they are read. Weights are what is left without optimizer, schedule and
loader state; the keys that trainers put around them are taken off (torchtitan none, TRL and accelerate
`model`, prime-rl `app.model`). `master` asks for the fp32 copies that an optimizer keeps beside
low-precision weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from sparsity_audit.checkpoint.assembly import Packed, Piece, TensorPieces, assemble, verify_cover
from sparsity_audit.checkpoint.contents import FileContents, has_absurd_empty_shape
from sparsity_audit.checkpoint.dcp_metadata import LIMITS, DcpMetadata, DcpTensor, read_metadata
from sparsity_audit.checkpoint.layout import abridged
from sparsity_audit.checkpoint.store import FileEntry, LocalFile
from sparsity_audit.checkpoint.torch_vocabulary import TORCH_DTYPES
from sparsity_audit.errors import CheckpointNotFoundError, CorruptCheckpointError, UnsupportedFormatError
from sparsity_audit.types import DType

__all__ = ["METADATA_NAME", "open_dcp"]

METADATA_NAME = ".metadata"

_CONTAINERS = frozenset(("app", "model", "module", "state_dict", "model_state_dict", "actor", "policy"))
_TRAINER_STATE = re.compile(
    r"optim(izer)?s?(_?\d+|_state(_dict)?)?|(lr_)?schedulers?|train(er)?_state|data_?loader|progress|rng(_state)?"
    r"|extra_state|ema|scaler"
)
_MASTER_KEYS = (
    "master_param",
    "master_weight",
    "master",
    "fp32_param",
    "fp32_from_fp16",
    "param",
    "master_params",
)


def open_dcp(folder: Path, *, master: bool) -> tuple[tuple[FileEntry, ...], FileContents]:
    """The files of the checkpoint in `folder`, the assembled one last, and the tensors in it.

    Args:
        folder: Directory that holds `.metadata`.
        master: Take the fp32 copies in the optimizer state instead of the weights.

    Raises:
        CheckpointNotFoundError: A file that the metadata speak of is not there.
        CorruptCheckpointError: Metadata or a file contradicts the rest.
        UnsupportedFormatError: No weights, or no fp32 copies where they are asked for.
        UnsafePickleError: The metadata ask for more than tensors.
    """
    metadata = read_metadata(_read_whole(folder / METADATA_NAME), subject=str(folder / METADATA_NAME))
    notes: list[str] = []
    chosen = _masters(folder, metadata, notes) if master else _weights(folder, metadata)
    files = _files(folder, chosen.values())
    numbers = {entry.name: number for number, entry in enumerate(files)}
    tensors = [_pieces(folder, name, tensor, numbers) for name, tensor in sorted(chosen.items())]
    assembled, specs = assemble(tensors, files, path=folder / METADATA_NAME)
    left = len(metadata.tensors) - len(chosen)
    if left or metadata.num_others:
        notes.append(
            f"{folder.name}: read {len(chosen)} tensors of a distributed checkpoint; ignored {left} tensors "
            f"of optimizer and trainer state and {metadata.num_others} other values"
        )
    return (*files, assembled), FileContents(tensors=specs, notes=tuple(notes))


def _read_whole(path: Path) -> bytes:
    entry = FileEntry.from_path(path)
    if entry.num_bytes > LIMITS[0]:
        raise CorruptCheckpointError(str(path), f"{entry.num_bytes} bytes", expected=f"at most {LIMITS[0]}")
    data = bytearray(entry.num_bytes)
    with LocalFile(entry) as source:
        source.read_into(memoryview(data), 0)
    return bytes(data)


def _weights(folder: Path, metadata: DcpMetadata) -> dict[str, DcpTensor]:
    found: dict[str, tuple[str, DcpTensor]] = {}
    for stored, tensor in metadata.tensors.items():
        if _is_trainer_state(tensor.path):
            continue
        name = _without_containers(tensor.path)
        if name in found:
            raise UnsupportedFormatError(
                str(folder),
                f"holds {name!r} twice, as {found[name][0]!r} and {stored!r}",
                expected="one set of weights",
                remedy="save the model you mean alone with torch.distributed.checkpoint.save",
            )
        found[name] = (stored, tensor)
    if not found:
        raise UnsupportedFormatError(
            str(folder),
            f"holds no weights among its {len(metadata.tensors)} tensors",
            remedy="name the directory with the model's weights",
        )
    return {name: tensor for name, (_, tensor) in found.items()}


def _is_trainer_state(path: tuple[str, ...]) -> bool:
    keys = [*path[:-1], path[-1].split(".", 1)[0]]
    if len(path) == 1:
        keys = path[0].split(".")[:2]
    return any(_TRAINER_STATE.fullmatch(key) for key in keys[:3])


def _without_containers(path: tuple[str, ...]) -> str:
    while len(path) > 1 and path[0] in _CONTAINERS:
        path = path[1:]
    return ".".join(path).removeprefix("app.model.")


def _masters(folder: Path, metadata: DcpMetadata, notes: list[str]) -> dict[str, DcpTensor]:
    found: dict[str, DcpTensor] = {}
    kinds: set[str] = set()
    for stored, tensor in metadata.tensors.items():
        _, mark, rest = stored.partition("state.")
        name, _, key = rest.rpartition(".")
        if not mark or not name or not _is_trainer_state(tensor.path):
            continue
        kinds.add(key)
        if key in _MASTER_KEYS and tensor.dtype == "float32":
            found[_without_containers((name,))] = tensor
    if found:
        return found
    weights = _weights(folder, metadata)
    floats = {tensor.dtype for tensor in weights.values() if tensor.dtype.startswith(("float", "bfloat"))}
    if floats == {"float32"}:
        notes.append(f"{folder.name}: its weights are stored in fp32: they are the master copy")
        return weights
    listed = abridged(sorted(kinds)) if kinds else "none"
    raise UnsupportedFormatError(
        str(folder),
        f"keeps no fp32 copy of its weights (optimizer state holds: {listed})",
        expected=f"state named {', '.join(_MASTER_KEYS[:4])}, or weights in fp32",
        remedy="leave #master out to compare the weights as they are stored",
    )


def _files(folder: Path, tensors: Iterable[DcpTensor]) -> tuple[FileEntry, ...]:
    ends: dict[str, int] = {}
    for tensor in tensors:
        for _, place in tensor.chunks:
            ends[place.file] = max(ends.get(place.file, 0), place.extent.stop)
    missing = sorted(name for name in ends if not (folder / name).is_file())
    if missing:
        raise CheckpointNotFoundError(
            str(folder),
            f"lacks {len(missing)} of the {len(ends)} files of this checkpoint: {abridged(missing, limit=8)}",
            remedy="copy the files of every rank; each writes its own",
        )
    files = tuple(FileEntry.from_path(folder / name, name=name) for name in sorted(ends))
    for entry in files:
        if entry.num_bytes < ends[entry.name]:
            raise CorruptCheckpointError(
                str(entry.path),
                f"{entry.num_bytes} bytes long",
                expected=f"at least {ends[entry.name]}, as {METADATA_NAME} says",
                remedy="the file is truncated; copy it again",
            )
    return files


def _pieces(folder: Path, name: str, tensor: DcpTensor, numbers: Mapping[str, int]) -> TensorPieces:
    dtype = _dtype(folder, name, tensor)
    verify_cover(
        str(folder),
        name,
        tensor.shape,
        [box for box, _ in tensor.chunks],
        hint=f"{METADATA_NAME} is of an unfinished or partial save; save the checkpoint again",
    )
    pieces = []
    for box, place in tensor.chunks:
        if math.prod(box.size) * dtype.itemsize > place.extent.num_bytes:
            raise CorruptCheckpointError(
                str(folder),
                f"chunk of {name!r} takes {place.extent.num_bytes} bytes of {place.file}",
                expected=f"more than the {math.prod(box.size) * dtype.itemsize} that its entries take",
            )
        stored = Packed(dtype=dtype, file=numbers[place.file], extent=place.extent)
        pieces.append(Piece(box=box, stored=stored))
    return TensorPieces(name=name, dtype=dtype, shape=tensor.shape, axes=tensor.shape, pieces=tuple(pieces))


def _dtype(folder: Path, name: str, tensor: DcpTensor) -> DType:
    dtype = TORCH_DTYPES[tensor.dtype]
    if dtype is None:
        raise UnsupportedFormatError(
            f"{folder}: tensor {name!r}",
            f"stored as {tensor.dtype}, which is not compared",
            remedy="convert it to bf16, fp32 or another dtype of one to eight bytes before saving",
        )
    if has_absurd_empty_shape(tensor.shape) or math.prod(tensor.shape) * dtype.itemsize >= 2**63:
        raise CorruptCheckpointError(str(folder), f"tensor {name!r} has an absurd shape {tensor.shape[:8]}")
    return dtype
