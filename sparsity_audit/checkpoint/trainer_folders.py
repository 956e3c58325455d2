"""Recognise what trainers write and open it: distributed checkpoints, shards of ranks, fp32 master copies.

Contract: decided from file names; a folder that also holds safetensors or `pytorch_model.bin` is read as
those, unless master copies are asked for. The result is a catalogue like any other: real files, and a last
one that stands for what is assembled from them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from sparsity_audit.checkpoint.contents import FileContents
from sparsity_audit.checkpoint.dcp import METADATA_NAME, open_dcp
from sparsity_audit.checkpoint.layout import choose_layout, has_model_files
from sparsity_audit.checkpoint.rank_shards import RANK_FILE, open_rank_shards
from sparsity_audit.checkpoint.sharded_safetensors import SHARD_FILE, open_sharded_safetensors
from sparsity_audit.checkpoint.store import FileEntry
from sparsity_audit.checkpoint.zero import OPTIM_FILE, open_zero

__all__ = ["TrainerKind", "inner_folder", "open_trainer_folder", "trainer_kind"]

_INNER = ("pytorch_model_fsdp_0", "actor", "dist_ckpt", "weights")

TrainerKind = Literal["dcp", "ranks", "sharded safetensors", "zero"]


def trainer_kind(names: Iterable[str], *, master: bool) -> TrainerKind | None:
    """What a trainer wrote into a folder with files of these names; None where model files are read."""
    present = set(names)
    if master and any(map(OPTIM_FILE.fullmatch, present)):
        return "zero"
    if (
        not master
        and any(map(SHARD_FILE.fullmatch, present))
        and "model.safetensors.index.json" not in present
    ):
        return "sharded safetensors"
    if METADATA_NAME in present and (master or choose_layout(present) is None):
        return "dcp"
    if any(map(RANK_FILE.fullmatch, present)) and not has_model_files(present):
        return "ranks"
    return None


def inner_folder(folder: Path) -> Path | None:
    """The folder below that holds the weights, where trainers put them there: accelerate, TRL, verl."""
    for name in (*_latest(folder), *_INNER):
        inner = folder / name
        if inner.is_dir() and trainer_kind([p.name for p in inner.iterdir()], master=True) is not None:
            return inner
    return None


def _latest(folder: Path) -> tuple[str, ...]:
    """The folder that DeepSpeed's file `latest` names, if it is one of this folder."""
    try:
        with (folder / "latest").open("rb") as file:
            name = file.read(256).decode("ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ()
    return (name,) if re.fullmatch(r"[\w.-]{1,200}", name) and name not in (".", "..") else ()


def open_trainer_folder(
    folder: Path, names: Iterable[str], kind: TrainerKind, *, master: bool
) -> tuple[tuple[FileEntry, ...], FileContents]:
    """The files and tensors of a folder of that kind.

    Raises:
        SparsityAuditError: As the reader of the kind.
    """
    if kind == "zero":
        return open_zero(folder, names)
    if kind == "sharded safetensors":
        return open_sharded_safetensors(folder, names)
    if kind == "ranks":
        return open_rank_shards(folder, names, master=master)
    return open_dcp(folder, master=master)
