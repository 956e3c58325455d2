"""Open the safetensors that torch's `HuggingFaceStorageWriter` writes for every rank (`save_distributed`).

Contract: `shard-R-model-I-of-N.safetensors`; each header says where its parts begin in the whole tensor.
Nothing in these files says how large a tensor or how many ranks there are: sizes are those that the parts
add up to, gaps are errors, and a note says that ranks missing at the end would not show but as another
shape.

Source: torch 2.13 `torch/distributed/checkpoint/hf_storage.py`, `_hf_utils.py` (`DCP_SHARDING_INFO`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

from sparsity_audit.checkpoint.assembly import Box, Piece, TensorPieces, assemble, verify_cover
from sparsity_audit.checkpoint.contents import FileContents
from sparsity_audit.checkpoint.layout import abridged
from sparsity_audit.checkpoint.safetensors_io import read_header
from sparsity_audit.checkpoint.store import FileEntry
from sparsity_audit.errors import CheckpointNotFoundError, CorruptCheckpointError
from sparsity_audit.types import TensorSpec

__all__ = ["SHARD_FILE", "open_sharded_safetensors"]

SHARD_FILE = re.compile(r"shard-(\d{5})-model-(\d{5})-of-(\d{5})\.safetensors")
_INFO = "DCP_SHARDING_INFO"


def open_sharded_safetensors(
    folder: Path, names: Iterable[str]
) -> tuple[tuple[FileEntry, ...], FileContents]:
    """The files of all ranks, the assembled one last, and the tensors in it.

    Args:
        folder: Directory that holds them.
        names: Names of the files in it.

    Raises:
        CheckpointNotFoundError: The files of a rank are not there.
        CorruptCheckpointError: A header lacks offsets, or parts overlap or leave gaps.
    """
    matches = sorted(filter(None, map(SHARD_FILE.fullmatch, names)), key=lambda match: match[0])
    ranks = {int(match[1]) for match in matches}
    gone = [f"shard-{rank:05}-…" for rank in range(1, max(ranks)) if rank not in ranks]
    if gone:
        raise CheckpointNotFoundError(
            str(folder),
            f"lacks the files of {len(gone)} ranks: {abridged(gone, limit=8)}",
            remedy="copy the files of every rank",
        )
    files = tuple(FileEntry.from_path(folder / match[0]) for match in matches)
    parts: dict[str, list[Piece]] = {}
    for number, entry in enumerate(files):
        for name, piece in _parts(entry, number):
            parts.setdefault(name, []).append(piece)
    tensors = [_joined(folder, name, pieces) for name, pieces in parts.items()]
    assembled, specs = assemble(tensors, files, path=files[0].path)
    note = (
        f"{folder.name}: the parts of {len(ranks)} ranks; these files do not say how many there were, and "
        "ranks missing at the end would show as smaller shapes"
    )
    return (*files, assembled), FileContents(tensors=specs, notes=(note,))


def _parts(entry: FileEntry, number: int) -> list[tuple[str, Piece]]:
    tensors, metadata = read_header(entry, file=number)
    try:
        info = json.loads(metadata.get(_INFO, ""))
        starts = {name: tuple(info[name]["saved_offsets"]) for name in tensors}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CorruptCheckpointError(
            str(entry.path),
            f"does not say where its parts begin ({_INFO})",
            expected="one offset list a tensor",
        ) from error
    return [(name, _piece(entry, spec, starts[name])) for name, spec in tensors.items()]


def _piece(entry: FileEntry, spec: TensorSpec, start: tuple[object, ...]) -> Piece:
    sizes = [n for n in start if type(n) is int and 0 <= n < 2**62]
    if len(sizes) != len(start) or len(start) != len(spec.shape):
        raise CorruptCheckpointError(str(entry.path), f"places {spec.name!r} at {str(start)[:80]}")
    return Piece(box=Box(tuple(sizes), spec.shape), stored=spec)


def _joined(folder: Path, name: str, pieces: list[Piece]) -> TensorPieces:
    specs = [piece.stored for piece in pieces]
    if len({spec.dtype for spec in specs}) != 1 or len({len(piece.box.start) for piece in pieces}) != 1:
        raise CorruptCheckpointError(str(folder), f"holds parts of {name!r} of different dtype or rank")
    unique = {piece.box: piece for piece in pieces}  # replicas are written by every rank
    boxes = list(unique)
    shape = tuple(max(b.start[axis] + b.size[axis] for b in boxes) for axis in range(len(boxes[0].start)))
    verify_cover(str(folder), name, shape, boxes, hint="copy the files of every rank")
    return TensorPieces(
        name=name, dtype=specs[0].dtype, shape=shape, axes=shape, pieces=tuple(unique.values())
    )
