"""Make a catalogue of a folder behind a network, whatever store it lies in.

Contract: headers, index and configurations are read, no tensor data. An index is believed only where the
files confirm it; a shard that it or the numbering promises and that is not there is an error.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any, Protocol

from sparsity_audit.checkpoint.joining import confirm_index, gathered, join_contents, weight_map_of
from sparsity_audit.checkpoint.layout import (
    ADAPTER_CONFIG,
    Layout,
    is_adapter,
    missing_shards,
    unread_note,
)
from sparsity_audit.checkpoint.remote import drop_heads, load_heads
from sparsity_audit.checkpoint.store import Catalogue, FileEntry
from sparsity_audit.errors import CheckpointNotFoundError

__all__ = ["RemoteFolder", "open_folder", "refuse_missing"]

_CONFIG = "config.json"


class RemoteFolder(Protocol):
    """Files by name."""

    @property
    def reference(self) -> str:
        """What the user typed."""
        ...

    @property
    def names(self) -> Collection[str]:
        """Names of the files."""
        ...

    @property
    def is_file(self) -> bool:
        """Whether the user named one file, which is the checkpoint whatever its number."""
        ...

    @property
    def missing_remedy(self) -> str:
        """What to do when a shard is not there."""
        ...

    def entry(self, name: str) -> FileEntry:
        """A file of weights."""
        ...

    def json(self, name: str) -> dict[str, Any]:
        """A small file, parsed."""
        ...


def open_folder(folder: RemoteFolder, layout: Layout, *, resolved: str) -> Catalogue:
    """The catalogue of the files that a layout names.

    Args:
        folder: Where they lie.
        layout: Which of them make the checkpoint.
        resolved: What the reference led to.

    Raises:
        CheckpointNotFoundError: A shard is missing.
        CorruptCheckpointError: A header or the index contradicts the files.
        SparsityAuditError: As the folder raises it.
    """
    shards, weight_map, subject = layout.files, None, f"{folder.reference}: {layout.index}"
    if layout.index is not None:
        weight_map = weight_map_of(folder.json(layout.index), subject=subject)
        shards = tuple(sorted(set(weight_map.values())))
    if not folder.is_file:
        remedy = folder.missing_remedy
        refuse_missing(layout, shards, folder.names, reference=folder.reference, remedy=remedy)
    files = tuple(folder.entry(name) for name in shards)
    load_heads(files)
    contents = join_contents(files, subject=folder.reference)
    drop_heads(files)
    config = folder.json(_CONFIG) if _CONFIG in folder.names else {}
    catalogue = gathered(files, contents, reference=folder.reference, resolved=resolved, config=config)
    if weight_map is not None:
        confirm_index(subject, weight_map, catalogue)
    if is_adapter(shards) and ADAPTER_CONFIG in folder.names:
        catalogue = replace(catalogue, adapter=folder.json(ADAPTER_CONFIG))
    notes = unread_note(folder.reference, folder.names, shards)
    return replace(catalogue, notes=(*notes, *catalogue.notes))


def refuse_missing(
    layout: Layout, shards: Collection[str], present: Collection[str], *, reference: str, remedy: str
) -> None:
    """Raise CheckpointNotFoundError when the index or the numbering names a shard that is not there."""
    missing = [s for s in shards if s not in present] if layout.index else missing_shards(layout.files)
    if missing:
        raise CheckpointNotFoundError(
            reference,
            f"{layout.index or 'the shard numbering'} names the shard {missing[0]}, which is not there",
            expected=f"all shards; {len(missing)} missing",
            remedy=remedy,
        )
