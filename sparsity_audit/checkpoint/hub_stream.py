"""Open a checkpoint on the Hub without downloading it: headers now, tensor data by ranges when it is read.

Contract: as `hub.fetch` for what is read and which commit it is of; `config.json` and the index are held in
memory and nothing is written. A file that lies in the Hub library's cache at that commit, in the length that
the Hub lists, is read from there. Shards' headers are fetched several at a time.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsity_audit.checkpoint.access import Access, current_access
from sparsity_audit.checkpoint.hub_calls import (
    MISSING_REMEDY,
    HubListing,
    ListedFile,
    choose_hub_layout,
    hub_api,
    list_files,
    resolve_commit,
)
from sparsity_audit.checkpoint.hub_errors import translate
from sparsity_audit.checkpoint.hub_file import HubFile
from sparsity_audit.checkpoint.hub_reference import HubReference
from sparsity_audit.checkpoint.joining import parse_object, verify_json_size
from sparsity_audit.checkpoint.remote import remote_entry
from sparsity_audit.checkpoint.remote_folder import open_folder
from sparsity_audit.checkpoint.store import Catalogue, FileEntry

if TYPE_CHECKING:
    from huggingface_hub import HfApi

__all__ = ["open_streamed"]


def open_streamed(reference: HubReference) -> Catalogue:
    """The catalogue of a checkpoint whose files stay on the Hub.

    Raises:
        HubError: The Hub refused, failed, could not be reached, or has no such repository or revision.
        CheckpointNotFoundError: The repository holds no checkpoint, or an index names a shard it lacks.
        CorruptCheckpointError: A header or the index contradicts the files.
    """
    from huggingface_hub.errors import OfflineModeIsEnabled

    api = hub_api()
    try:
        commit, notes = resolve_commit(api, reference)
        pinned = reference.pinned(commit)
        listing = list_files(api, pinned)
    except OfflineModeIsEnabled as error:
        raise translate(error, reference) from error
    folder = _HubFolder(api=api, pinned=pinned, listing=listing)
    catalogue = open_folder(folder, choose_hub_layout(pinned, listing), resolved=pinned.uri)
    return replace(catalogue, notes=(*notes, *catalogue.notes))


@dataclass(frozen=True, slots=True, kw_only=True)
class _HubFolder:
    """A folder of a repository at a commit."""

    api: HfApi
    pinned: HubReference
    listing: HubListing

    @property
    def reference(self) -> str:
        return self.pinned.text

    @property
    def names(self) -> Collection[str]:
        return self.listing.keys()

    @property
    def is_file(self) -> bool:
        return False

    @property
    def missing_remedy(self) -> str:
        return MISSING_REMEDY

    def entry(self, name: str) -> FileEntry:
        pinned, listed = self.pinned, self.listing[name]
        cached = _cached(pinned, name, listed)
        if cached is not None:
            return replace(FileEntry.from_path(cached), name=pinned.path_of(name), digest=listed.digest)
        kind = HubFile
        if current_access() is Access.SHARDS:
            from sparsity_audit.checkpoint.hub_shards import HubShard

            kind = HubShard
        remote = kind(self.api, pinned, pinned.path_of(name), listed)
        return remote_entry(remote, name=pinned.path_of(name), digest=listed.digest)

    def json(self, name: str) -> dict[str, Any]:
        pinned, listed, subject = self.pinned, self.listing[name], f"{self.pinned.text}: {name}"
        verify_json_size(listed.num_bytes, subject=subject)
        cached = _cached(pinned, name, listed)
        if cached is not None:
            return parse_object(cached.read_bytes(), subject=subject)
        file = HubFile(self.api, pinned, pinned.path_of(name), listed)
        return parse_object(file.read_whole(), subject=subject)


def _cached(pinned: HubReference, name: str, listed: ListedFile) -> Path | None:
    """Where the Hub library's cache holds the file whole, if it does."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(pinned.repo_id, pinned.path_of(name), revision=pinned.revision)
    if not isinstance(found, str) or Path(found).stat().st_size != listed.num_bytes:
        return None
    return Path(found)
