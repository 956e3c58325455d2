"""Turn what a user typed into a `Catalogue`.

Contract: a directory (safetensors with or without an index), or a single file. An index is believed only
where the shards confirm it: a named shard that is missing, or a tensor that is not in its shard, is an error.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sparsity_audit.checkpoint.safetensors_io import read_header
from sparsity_audit.checkpoint.store import Catalogue, FileEntry
from sparsity_audit.errors import CheckpointNotFoundError, CorruptCheckpointError
from sparsity_audit.types import TensorSpec

__all__ = ["open_checkpoint"]

_INDEX = "model.safetensors.index.json"


def open_checkpoint(reference: str | Path) -> Catalogue:
    """The catalogue of a checkpoint directory or file; reads headers only.

    Raises:
        CheckpointNotFoundError: Nothing is there, or a shard is missing.
        CorruptCheckpointError: A header or the index contradicts the files.
    """
    path = Path(reference).expanduser()
    if path.is_dir():
        return _open_directory(path, reference=str(reference))
    if path.is_file():
        return _catalogue([path], folder=path.parent, reference=str(reference), resolved=path)
    raise CheckpointNotFoundError(
        str(reference), "no such file or directory", expected="a checkpoint directory or a .safetensors file"
    )


def _open_directory(folder: Path, *, reference: str) -> Catalogue:
    index = folder / _INDEX
    if index.is_file():
        weight_map = _read_index(index)
        shards = sorted({folder / shard for shard in weight_map.values()})
        for shard in shards:
            if not shard.is_file():
                raise CheckpointNotFoundError(
                    str(index), f"names the shard {shard.name}, which is not there", remedy="fetch the missing shard"
                )
        catalogue = _catalogue(shards, folder=folder, reference=reference, resolved=folder)
        _confirm_index(index, weight_map, catalogue)
        return catalogue
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise CheckpointNotFoundError(
            str(folder), "holds no checkpoint", expected="*.safetensors, with or without an index"
        )
    return _catalogue(shards, folder=folder, reference=reference, resolved=folder)


def _catalogue(paths: list[Path], *, folder: Path, reference: str, resolved: Path) -> Catalogue:
    files = tuple(FileEntry.from_path(path) for path in paths)
    tensors: dict[str, TensorSpec] = {}
    for number, entry in enumerate(files):
        for name, spec in read_header(entry, file=number)[0].items():
            if name in tensors:
                other = files[tensors[name].file].name
                raise CorruptCheckpointError(str(folder), f"tensor {name!r} stands in {other} and in {entry.name}")
            tensors[name] = spec
    return Catalogue(
        reference=reference,
        resolved=str(resolved.resolve()),
        files=files,
        tensors=dict(sorted(tensors.items())),
        config=_read_config(folder / "config.json"),
    )


def _read_index(path: Path) -> dict[str, str]:
    index = _read_json(path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptCheckpointError(str(path), "has no weight_map", expected="tensor name → shard file")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CorruptCheckpointError(
                str(path), f"places {name!r} in {shard!r:.80}", expected="a file name inside the directory"
            )
    return weight_map


def _confirm_index(path: Path, weight_map: dict[str, str], catalogue: Catalogue) -> None:
    for name, shard in weight_map.items():
        spec = catalogue.tensors.get(name)
        if spec is None or catalogue.files[spec.file].name != shard:
            raise CorruptCheckpointError(str(path), f"places {name!r} in {shard}, which does not hold it")


def _read_config(path: Path) -> dict[str, Any]:
    return _read_json(path) if path.is_file() else {}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CorruptCheckpointError(str(path), f"is not JSON ({type(error).__name__})") from error
    if not isinstance(value, dict):
        raise CorruptCheckpointError(str(path), "is not a JSON object")
    return value
