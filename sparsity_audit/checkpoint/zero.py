"""Open the fp32 master weights in DeepSpeed ZeRO's optimizer states, stages 1 to 3 and bf16.

Contract: `*_optim_states.pt` of all ranks and `*_model_states.pt`, which name parameters and shapes; each
parameter is a run of the flat fp32 partitions and is assembled while it is read. The ranks of one file set
are complete, partitions hold what the shapes need and no more than their padding, and the bf16 weights are
never read. Frozen parameters, which have no master, are refused; so are several model-parallel ranks.

Source: DeepSpeed `deepspeed/utils/zero_to_fp32.py` (how partitions and padding follow one another) and
`deepspeed/checkpoint/constants.py` (keys).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from sparsity_audit.checkpoint.assembly import Box, Piece, TensorPieces, assemble, verify_cover
from sparsity_audit.checkpoint.contents import FileContents
from sparsity_audit.checkpoint.layout import abridged
from sparsity_audit.checkpoint.restricted_pickle import LEAF, MAX_OPERATIONS, MAX_PICKLE_BYTES, Call
from sparsity_audit.checkpoint.store import FileEntry, LocalFile
from sparsity_audit.checkpoint.torch_vocabulary import TensorRef, load_distributed
from sparsity_audit.checkpoint.torch_zip import TorchArchive, read_archive, tensor_spec
from sparsity_audit.errors import CheckpointNotFoundError, CorruptCheckpointError, UnsupportedFormatError
from sparsity_audit.types import ByteRange, DType, TensorSpec

__all__ = ["OPTIM_FILE", "open_zero"]

OPTIM_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d{1,6})_mp_rank_(\d{2,6})_optim_states\.pt")
_MODEL_FILE = re.compile(r"(?:zero_pp_rank_(\d{1,6})_)?mp_rank_(\d{2,6})_model_states\.pt")
_CALLS: dict[str, Call] = {"builtins.getattr": lambda _: LEAF, "argparse.Namespace": lambda _: LEAF}
_INERT = ("deepspeed.", "torch.optim.", "collections.", "torch.cuda.", "torch._C.")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shapes:
    """Parameters by group, in the order in which they fill the partitions."""

    groups: tuple[Mapping[str, tuple[int, ...]], ...]
    shared: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Partitions:
    """The flat fp32 tensors of one rank, one a group (stage 3: one, of several parts)."""

    stage: int
    num_ranks: int | None
    flat: tuple[tuple[TensorSpec, ...], ...]


def open_zero(folder: Path, names: Iterable[str]) -> tuple[tuple[FileEntry, ...], FileContents]:
    """The optimizer files, the assembled one last, and the fp32 master weights in it.

    Args:
        folder: DeepSpeed's `global_stepN`.
        names: Names of the files in it.

    Raises:
        CheckpointNotFoundError: The file of a rank is not there.
        CorruptCheckpointError: Partitions do not hold what the shapes need.
        UnsupportedFormatError: Several model-parallel ranks, frozen parameters, or no fp32 partitions.
        UnsafePickleError: A file asks for more than tensors.
    """
    names = sorted(names)
    paths = _optim_paths(folder, names)
    shapes = _read_shapes(_model_path(folder, names))
    files = tuple(map(FileEntry.from_path, paths))
    ranks = [_read_partitions(entry, number) for number, entry in enumerate(files)]
    if len({(rank.stage, rank.num_ranks, len(rank.flat)) for rank in ranks}) != 1:
        _corrupt(folder, "ranks disagree about stage, number of ranks or of parameter groups")
    if ranks[0].num_ranks not in (None, len(ranks)):
        raise CheckpointNotFoundError(
            str(folder),
            f"holds the optimizer states of {len(ranks)} ranks",
            expected=f"those of {ranks[0].num_ranks}, which wrote it",
            remedy="copy the files of every rank; each node keeps those of its own",
        )
    if ranks[0].stage == 3:
        tensors = _stage3(folder, shapes, [rank.flat[0] for rank in ranks])
    else:
        if len(ranks[0].flat) != len(shapes.groups):
            _corrupt(
                folder, f"{len(ranks[0].flat)} fp32 groups for {len(shapes.groups)} groups of parameters"
            )
        tensors = [
            tensor
            for number, group in enumerate(shapes.groups)
            for tensor in _stage2(folder, group, [rank.flat[number][0] for rank in ranks])
        ]
    assembled, specs = assemble(tensors, files, path=paths[0])
    aliases = {
        name: target for name, target in shapes.shared.items() if target in specs and name not in specs
    }
    note = f"{folder.name}: fp32 master weights of ZeRO stage {ranks[0].stage}, {len(ranks)} ranks"
    return (*files, assembled), FileContents(tensors=specs, aliases=aliases, notes=(note,))


def _optim_paths(folder: Path, names: Sequence[str]) -> list[Path]:
    found = {name: match for name in names if (match := OPTIM_FILE.fullmatch(name))}
    if {int(match[2]) for match in found.values()} != {0}:
        raise UnsupportedFormatError(
            str(folder),
            "holds several model-parallel ranks",
            expected="data parallelism alone",
            remedy="merge it with DeepSpeed's zero_to_fp32.py",
        )
    by_rank = {int(match[1]): name for name, match in found.items()}
    missing = [rank for rank in range(max(by_rank)) if rank not in by_rank]
    if missing:
        listed = abridged([f"zero_pp_rank_{rank}" for rank in missing], limit=8)
        raise CheckpointNotFoundError(
            str(folder),
            f"lacks the optimizer states of {len(missing)} ranks: {listed}",
            remedy="copy the files of every rank; each node keeps those of its own",
        )
    return [folder / by_rank[rank] for rank in sorted(by_rank)]


def _model_path(folder: Path, names: Sequence[str]) -> Path:
    found = [name for name in names if _MODEL_FILE.fullmatch(name)]
    if not found:
        raise CheckpointNotFoundError(
            str(folder), "lacks *_model_states.pt", expected="the file that names parameters and their shapes"
        )
    return folder / found[0]


def _load(data: bytes, *, subject: str) -> object:
    limits = (MAX_PICKLE_BYTES, MAX_OPERATIONS)
    return load_distributed(data, subject=subject, calls=_CALLS, inert=_INERT, limits=limits)


def _archive(path: Path, number: int) -> TorchArchive:
    with LocalFile(FileEntry.from_path(path)) as source:
        return read_archive(source, file=number, load=_load)


def _read_shapes(path: Path) -> _Shapes:
    root = _archive(path, 0).root
    groups = root.get("param_shapes") if isinstance(root, dict) else None
    groups = [groups] if isinstance(groups, dict) else groups
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        _corrupt(path, "has no param_shapes")
    assert isinstance(root, dict)
    frozen = root.get("frozen_param_shapes")
    if isinstance(frozen, dict) and frozen:
        raise UnsupportedFormatError(
            str(path),
            f"has {len(frozen)} frozen parameters, without fp32 copy: {abridged(sorted(map(str, frozen)))}",
            remedy="merge it with DeepSpeed's zero_to_fp32.py, which takes them as they are",
        )
    for group in groups:
        for name, shape in group.items():
            if not isinstance(name, str) or not name.isprintable() or not _is_shape(shape):
                _corrupt(path, f"gives {str(name)[:80]!r} no shape")
    pairs = root.get("shared_params")
    pairs = list(pairs.items()) if isinstance(pairs, dict) else pairs
    listed = pairs if isinstance(pairs, list) else []
    shared = {str(p[0]): str(p[1]) for p in listed if isinstance(p, list | tuple) and len(p) == 2}
    return _Shapes(groups=tuple(groups), shared=shared)


def _is_shape(value: object) -> bool:
    return (
        isinstance(value, tuple)
        and all(type(size) is int and 0 <= size < 2**63 for size in value)
        and math.prod(value) < 2**60
    )


def _read_partitions(entry: FileEntry, number: int) -> _Partitions:
    archive = _archive(entry.path, number)
    root = archive.root
    state = root.get("optimizer_state_dict") if isinstance(root, dict) else None
    if not isinstance(state, dict):
        _corrupt(entry.path, "has no optimizer_state_dict")
    stage3, stage2 = state.get("fp32_flat_groups"), state.get("single_partition_of_fp32_groups")
    groups = stage3 if stage3 is not None else stage2
    if not isinstance(groups, list) or not groups or not all(isinstance(g, TensorRef) for g in groups):
        raise UnsupportedFormatError(
            str(entry.path),
            "holds no fp32 partitions",
            expected="single_partition_of_fp32_groups or fp32_flat_groups",
            remedy="leave #master out to read the weights as they are stored",
        )
    flat = [tensor_spec(archive, f"partition {index}", group) for index, group in enumerate(groups)]
    for spec in flat:
        if spec.dtype is not DType.F32 or len(spec.shape) != 1 or spec.strides is not None:
            _corrupt(entry.path, f"partition of dtype {spec.dtype} and shape {list(spec.shape)}")
    count = state.get("partition_count")
    count = max(count, default=None) if isinstance(count, list) else count
    num_ranks = count if type(count) is int else None
    if stage3 is not None:
        return _Partitions(stage=3, num_ranks=num_ranks, flat=(tuple(flat),))
    stage = state.get("zero_stage")
    stage = stage if type(stage) is int else 2
    return _Partitions(stage=stage, num_ranks=num_ranks, flat=tuple((spec,) for spec in flat))


def _stage2(
    folder: Path, group: Mapping[str, tuple[int, ...]], ranks: Sequence[TensorSpec]
) -> list[TensorPieces]:
    """Parameters follow one another in the partitions of all ranks, joined; padding comes last."""
    total, end = sum(math.prod(shape) for shape in group.values()), sum(spec.num_entries for spec in ranks)
    unit = 2 * len(ranks)
    if end < total or -(-end // unit) != -(-total // unit):
        _corrupt(folder, f"fp32 partitions of {end:,} entries for parameters of {total:,}")
    tensors, start = [], 0
    for name, shape in group.items():
        runs = _runs(ranks, start, math.prod(shape))
        tensors.append(_flat(folder, name, shape, runs))
        start += math.prod(shape)
    return tensors


def _stage3(folder: Path, shapes: _Shapes, ranks: Sequence[tuple[TensorSpec, ...]]) -> list[TensorPieces]:
    """Every parameter is cut into equal parts, one a rank, the last one padded; parts follow one another."""
    tensors, start = [], 0
    for name, shape in (item for group in shapes.groups for item in group.items()):
        whole = math.prod(shape)
        part = -(-whole // len(ranks))
        runs, done = [], 0
        for parts in ranks:
            count = min(part, whole - done)
            runs += [(done + first, spec) for first, spec in _runs(parts, start, count)]
            done += count
        tensors.append(_flat(folder, name, shape, runs))
        start += part
    held = sum(spec.num_entries for spec in ranks[0])
    if held != start:
        _corrupt(folder, f"fp32 partitions of {held:,} entries a rank for parameters that take {start:,}")
    return tensors


def _runs(parts: Sequence[TensorSpec], start: int, count: int) -> list[tuple[int, TensorSpec]]:
    """Entries start ≤ i < start + count of tensors one behind the other: place in the result, and where."""
    runs, before = [], 0
    for spec in parts:
        first, last = max(start, before), min(start + count, before + spec.num_entries)
        if first < last:
            begin = spec.extent.start + (first - before) * 4
            extent = ByteRange(start=begin, stop=begin + (last - first) * 4)
            place = TensorSpec(
                name=spec.name,
                dtype=spec.dtype,
                shape=(last - first,),
                file=spec.file,
                extent=extent,
                big_endian=spec.big_endian,
            )
            runs.append((first - start, place))
        before += spec.num_entries
    return runs


def _flat(
    folder: Path, name: str, shape: tuple[int, ...], runs: Sequence[tuple[int, TensorSpec]]
) -> TensorPieces:
    pieces = tuple(Piece(box=Box((first,), spec.shape), stored=spec) for first, spec in runs)
    axes = (math.prod(shape),)
    verify_cover(
        str(folder),
        name,
        axes,
        [piece.box for piece in pieces],
        hint="copy the optimizer states of every rank",
    )
    return TensorPieces(name=name, dtype=DType.F32, shape=shape, axes=axes, pieces=pieces)


def _corrupt(path: Path, found: str) -> NoReturn:
    raise CorruptCheckpointError(
        str(path), found, remedy="copy the files of one save together; they are damaged or incomplete"
    )
