"""Open the shards that verl writes: `model_world_size_N_rank_R.pt`, one state dict of DTensors a rank.

Contract: the files of all N ranks are there, name the same tensors, and agree about dtype, shape, placements
and mesh; each local part has the shape that its placement gives it, so that a tensor is covered exactly.
Sharding along any axes, replicas, plain tensors. Read without torch and without running the pickles.

Source: torch 2.13 `torch/distributed/tensor/_dtensor_spec.py`, `placement_types.py` (`Shard`: pieces of
⌈n / ranks⌉, the last ones shorter or empty); verl's `FSDPCheckpointManager`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from sparsity_audit.checkpoint.assembly import Box, Piece, TensorPieces, assemble, verify_cover
from sparsity_audit.checkpoint.contents import FileContents
from sparsity_audit.checkpoint.dtensors import LocalShard, load_dtensors
from sparsity_audit.checkpoint.layout import abridged
from sparsity_audit.checkpoint.state_dict import find_state_dict
from sparsity_audit.checkpoint.store import FileEntry, LocalFile
from sparsity_audit.checkpoint.torch_zip import TorchArchive, read_archive, tensor_spec
from sparsity_audit.errors import CheckpointNotFoundError, CorruptCheckpointError, UnsupportedFormatError
from sparsity_audit.types import DType, TensorSpec

__all__ = ["RANK_FILE", "open_rank_shards"]

RANK_FILE = re.compile(r"model_world_size_(\d{1,6})_rank_(\d{1,6})\.pt")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rank:
    """What the file of one rank holds."""

    file: FileEntry
    shards: Mapping[str, LocalShard]
    local: Mapping[str, TensorSpec]
    notes: tuple[str, ...]


def open_rank_shards(
    folder: Path, names: Iterable[str], *, master: bool = False
) -> tuple[tuple[FileEntry, ...], FileContents]:
    """The files of all ranks, the assembled one last, and the tensors in it.

    Args:
        folder: Directory that holds them.
        names: Names of the files in it.
        master: Demand that they are fp32: FSDP keeps its master copy as the weights.

    Raises:
        CheckpointNotFoundError: The file of a rank is not there.
        CorruptCheckpointError: Ranks contradict each other, or a part has another shape than its place.
        UnsupportedFormatError: A placement that is not read.
        UnsafePickleError: A file asks for more than tensors.
    """
    paths = _rank_paths(folder, names)
    ranks = [_read_rank(path, number) for number, path in enumerate(paths)]
    files = tuple(rank.file for rank in ranks)
    for rank in ranks[1:]:
        odd = sorted(rank.local.keys() ^ ranks[0].local.keys())
        if odd:
            raise CorruptCheckpointError(
                str(rank.file.path),
                f"holds other tensors than {ranks[0].file.name}: {abridged(odd)}",
                expected="the same names in the file of every rank",
                remedy="copy the files of one save together",
            )
    tensors = [_pieces(folder, name, ranks) for name in ranks[0].local]
    if master:
        _verify_fp32(folder, tensors)
    tensors, aliases = _without_ties(tensors)
    assembled, specs = assemble(tensors, files, path=paths[0])
    return (*files, assembled), FileContents(
        tensors=specs,
        aliases=aliases,
        notes=tuple(dict.fromkeys(note for rank in ranks for note in rank.notes)),
    )


def _without_ties(tensors: Iterable[TensorPieces]) -> tuple[list[TensorPieces], dict[str, str]]:
    """Tensors whose pieces are one storage on every rank are one tensor, under the first of their names."""
    first: dict[object, str] = {}
    kept, aliases = [], {}
    for tensor in tensors:
        stored = [(p.box, p.stored) for p in tensor.pieces if isinstance(p.stored, TensorSpec)]
        pieces = ((box, replace(spec, name="")) for box, spec in stored)
        places = (tensor.dtype, tensor.shape, *pieces)
        owner = first.setdefault(places, tensor.name)
        if owner == tensor.name or 0 in tensor.shape:
            kept.append(tensor)
        else:
            aliases[tensor.name] = owner
    return kept, aliases


def _verify_fp32(folder: Path, tensors: Iterable[TensorPieces]) -> None:
    narrow = sorted(t.name for t in tensors if t.dtype in (DType.BF16, DType.F16))
    if narrow:
        raise UnsupportedFormatError(
            str(folder),
            f"keeps {len(narrow)} tensors in 16 bits: {abridged(narrow)}",
            expected="weights in fp32, which are FSDP's master copy",
            remedy="leave #master out to compare the weights as they are stored",
        )


def _rank_paths(folder: Path, names: Iterable[str]) -> list[Path]:
    found = [match for match in map(RANK_FILE.fullmatch, names) if match]
    sizes = sorted({int(match[1]) for match in found})
    if len(sizes) != 1:
        raise CorruptCheckpointError(
            str(folder),
            f"holds shards of {len(sizes)} saves, of world sizes {', '.join(map(str, sizes))}",
            expected="one save",
            remedy="move the others to a directory of their own",
        )
    wanted = [f"model_world_size_{sizes[0]}_rank_{rank}.pt" for rank in range(sizes[0])]
    there = {match[0] for match in found}
    missing = [name for name in wanted if name not in there]
    if missing:
        raise CheckpointNotFoundError(
            str(folder),
            f"lacks the shards of {len(missing)} of {sizes[0]} ranks: {abridged(missing, limit=8)}",
            remedy="copy the files of every rank; each node keeps those of its own",
        )
    return [folder / name for name in wanted]


def _read_rank(path: Path, number: int) -> _Rank:
    entry = FileEntry.from_path(path)
    with LocalFile(entry) as source:
        archive = read_archive(source, file=number, load=load_dtensors)
    plain, shards = _without_shards(archive.root)
    found = find_state_dict(plain, subject=str(path))
    local = {name: tensor_spec(archive, name, value) for name, value in found.tensors.items()}
    named = {name: shards[id(value)] for name, value in found.tensors.items() if id(value) in shards}
    return _Rank(file=entry, shards=named, local=local, notes=_notes(archive, found.notes))


def _notes(archive: TorchArchive, notes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{archive.entry.name}: {note}" for note in notes)


def _without_shards(root: object) -> tuple[object, dict[int, LocalShard]]:
    """The same dicts with local tensors in place of shards, and by identity the shard that each is."""
    shards: dict[int, LocalShard] = {}
    seen: dict[int, object] = {}

    def plain(node: object, depth: int) -> object:
        if isinstance(node, LocalShard):
            shards[id(node.local)] = node
            return node.local
        if not isinstance(node, dict) or depth > 4:
            return node
        if id(node) not in seen:
            seen[id(node)] = {key: plain(value, depth + 1) for key, value in node.items()}
        return seen[id(node)]

    return plain(root, 0), shards


def _pieces(folder: Path, name: str, ranks: list[_Rank]) -> TensorPieces:
    first, spec = ranks[0].shards.get(name), ranks[0].local[name]
    for rank in ranks:
        other = rank.shards.get(name)
        about = None if other is None else (other.shape, other.placements, other.mesh)
        same = None if first is None else (first.shape, first.placements, first.mesh)
        if about != same or rank.local[name].dtype is not spec.dtype:
            raise CorruptCheckpointError(
                str(rank.file.path),
                f"describes {name!r} otherwise than {ranks[0].file.name}",
                expected="one dtype, shape and sharding on every rank",
                remedy="copy the files of one save together",
            )
    if first is None:
        whole = Piece(box=Box((0,) * len(spec.shape), spec.shape), stored=spec)
        return TensorPieces(name=name, dtype=spec.dtype, shape=spec.shape, axes=spec.shape, pieces=(whole,))
    pieces = []
    for number, rank in enumerate(ranks):
        box = first.box(number, len(ranks), subject=f"{rank.file.path}: tensor {name!r}")
        if box is None:
            continue
        if rank.local[name].shape != box.size:
            raise CorruptCheckpointError(
                str(rank.file.path),
                f"holds {list(rank.local[name].shape)} of {name!r}",
                expected=f"{list(box.size)}, its part of {list(first.shape)} on rank {number}",
            )
        pieces.append(Piece(box=box, stored=rank.local[name]))
    hint = "copy the files of one save together"
    verify_cover(str(folder), name, first.shape, [piece.box for piece in pieces], hint=hint)
    return TensorPieces(
        name=name, dtype=spec.dtype, shape=first.shape, axes=first.shape, pieces=tuple(pieces)
    )
