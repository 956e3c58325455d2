"""Make one catalogue of the files of a checkpoint, wherever they lie.

Contract: each tensor stands in one file. An index is believed only where the files confirm it. What is parsed
is bounded before, and what contradicts itself is a `CorruptCheckpointError` that names `subject`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from sparsity_audit.checkpoint.contents import FileContents
from sparsity_audit.checkpoint.formats import read_contents
from sparsity_audit.checkpoint.store import Catalogue, FileEntry
from sparsity_audit.errors import CorruptCheckpointError
from sparsity_audit.types import TensorSpec

__all__ = [
    "MAX_JSON_BYTES",
    "confirm_index",
    "gathered",
    "join_contents",
    "parse_object",
    "verify_json_size",
    "weight_map_of",
]

MAX_JSON_BYTES = 50_000_000
"""The index of a checkpoint of 100,000 tensors takes some 10 MB."""

_MAX_NAME_CHARACTERS = 255


def join_contents(files: Sequence[FileEntry], *, subject: str) -> FileContents:
    """The tensors of all files; reads their headers. Raises SparsityAuditError, as `read_contents`."""
    tensors: dict[str, TensorSpec] = {}
    aliases: dict[str, str] = {}
    notes: list[str] = []
    holders: dict[str, str] = {}
    for number, entry in enumerate(files):
        contents = read_contents(entry, file=number)
        for name in (*contents.tensors, *contents.aliases):
            if name in holders:
                raise CorruptCheckpointError(
                    subject,
                    f"tensor {name!r} stands in {holders[name]} and in {entry.name}",
                    expected="files that belong to one checkpoint, each tensor in one of them",
                    remedy="name the file to read, or move the other away",
                )
            holders[name] = entry.name
        tensors |= contents.tensors
        aliases |= contents.aliases
        notes += contents.notes
    return FileContents(tensors=tensors, aliases=aliases, notes=tuple(notes))


def gathered(
    files: tuple[FileEntry, ...],
    contents: FileContents,
    *,
    reference: str,
    resolved: str,
    config: dict[str, Any],
) -> Catalogue:
    """The catalogue of these files and their contents, tensors in name order."""
    return Catalogue(
        reference=reference,
        resolved=resolved,
        files=files,
        tensors=dict(sorted(contents.tensors.items())),
        aliases=dict(sorted(contents.aliases.items())),
        config=config,
        notes=contents.notes,
    )


def weight_map_of(index: Mapping[str, Any], *, subject: str) -> dict[str, str]:
    """Tensor → file, as an index says. Raises CorruptCheckpointError."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptCheckpointError(subject, "has no weight_map", expected="tensor name → shard file")
    good: set[str] = set()  # ninety thousand names lie in some hundred shards
    for name, shard in weight_map.items():
        if isinstance(shard, str) and shard in good:
            continue
        if _is_file_name(shard):
            good.add(shard)
        else:
            shown = repr(shard[:80]) if isinstance(shard, str) else f"a {type(shard).__name__}"
            raise CorruptCheckpointError(
                subject, f"places {name[:200]!r} in {shown}", expected="a file name inside the directory"
            )
    # JSON makes a new text of every value: interned, ninety thousand shard names are some hundred.
    return {sys.intern(name): sys.intern(shard) for name, shard in weight_map.items()}


def _is_file_name(value: object) -> bool:
    if not isinstance(value, str) or not value.isprintable() or len(value) > _MAX_NAME_CHARACTERS:
        return False
    return value not in ("", "..") and PurePosixPath(value).name == value


def confirm_index(subject: str, weight_map: Mapping[str, str], catalogue: Catalogue) -> None:
    """Raise CorruptCheckpointError unless every file holds what the index places there."""
    for name, shard in weight_map.items():
        spec = catalogue.tensors.get(catalogue.aliases.get(name, name))
        if spec is None or catalogue.files[spec.file].name.rpartition("/")[2] != shard:
            raise CorruptCheckpointError(subject, f"places {name!r} in {shard}, which does not hold it")


def verify_json_size(num_bytes: int, *, subject: str) -> None:
    """Raise CorruptCheckpointError where a file is too long to be parsed."""
    if num_bytes > MAX_JSON_BYTES:
        raise CorruptCheckpointError(
            subject, f"is longer than {MAX_JSON_BYTES} bytes", expected="an index or a configuration"
        )


def parse_object(raw: bytes, *, subject: str) -> dict[str, Any]:
    """A JSON object of at most `MAX_JSON_BYTES`. Raises CorruptCheckpointError."""
    verify_json_size(len(raw), subject=subject)
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpointError(subject, f"is not JSON ({type(error).__name__})") from error
    if not isinstance(value, dict):
        raise CorruptCheckpointError(subject, "is not a JSON object")
    return value
