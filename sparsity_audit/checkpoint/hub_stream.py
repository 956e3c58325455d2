"""Open a checkpoint on the Hub without downloading it: headers now, tensor data by ranges when it is read.

Contract: as `hub.fetch` for what is read and which commit it is of; `config.json` and the index are held in
memory and nothing is written. A file that lies in the Hub library's cache at that commit, in the length that
the Hub lists, is read from there. Shards' headers are fetched several at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsity_audit.checkpoint.access import Access, current_access
from sparsity_audit.checkpoint.hub_calls import (
    HubListing,
    ListedFile,
    choose_hub_layout,
    hub_api,
    list_files,
    refuse_missing,
    resolve_commit,
)
from sparsity_audit.checkpoint.hub_errors import translate
from sparsity_audit.checkpoint.hub_file import HubFile
from sparsity_audit.checkpoint.hub_reference import HubReference
from sparsity_audit.checkpoint.joining import (
    MAX_JSON_BYTES,
    confirm_index,
    gathered,
    join_contents,
    parse_object,
    weight_map_of,
)
from sparsity_audit.checkpoint.layout import ADAPTER_CONFIG, abridged, is_adapter, unread_weights
from sparsity_audit.checkpoint.remote import drop_heads, load_heads, remote_entry
from sparsity_audit.checkpoint.store import Catalogue, FileEntry
from sparsity_audit.errors import CorruptCheckpointError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

__all__ = ["open_streamed"]

_CONFIG = "config.json"


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
    layout = choose_hub_layout(pinned, listing)
    shards, weight_map = layout.files, None
    if layout.index is not None:
        index = _small_file(api, pinned, layout.index, listing)
        subject = f"{reference.text}: {layout.index}"
        weight_map = weight_map_of(parse_object(index, subject=subject), subject=subject)
        shards = tuple(sorted(set(weight_map.values())))
    refuse_missing(pinned, layout, shards=shards, present=listing)
    files = tuple(_entry(api, pinned, name, listing[name]) for name in shards)
    config = _json_beside(api, pinned, _CONFIG, listing)
    load_heads(files)
    contents = join_contents(files, subject=reference.text)
    drop_heads(files)
    catalogue = gathered(files, contents, reference=reference.text, resolved=pinned.uri, config=config)
    if weight_map is not None:
        confirm_index(f"{reference.text}: {layout.index}", weight_map, catalogue)
    notes = (*notes, *_unread_note(reference, listing, shards), *catalogue.notes)
    adapter = _json_beside(api, pinned, ADAPTER_CONFIG, listing) if is_adapter(shards) else {}
    return replace(catalogue, notes=notes, adapter=adapter or None)


def _entry(api: HfApi, pinned: HubReference, name: str, listed: ListedFile) -> FileEntry:
    cached = _cached(pinned, name, listed)
    if cached is not None:
        return replace(FileEntry.from_path(cached), name=pinned.path_of(name), digest=listed.digest)
    kind = HubFile
    if current_access() is Access.SHARDS:
        from sparsity_audit.checkpoint.hub_shards import HubShard

        kind = HubShard
    remote = kind(api, pinned, pinned.path_of(name), listed)
    return remote_entry(remote, name=pinned.path_of(name), digest=listed.digest)


def _cached(pinned: HubReference, name: str, listed: ListedFile) -> Path | None:
    """Where the Hub library's cache holds the file whole, if it does."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(pinned.repo_id, pinned.path_of(name), revision=pinned.revision)
    if not isinstance(found, str) or Path(found).stat().st_size != listed.num_bytes:
        return None
    return Path(found)


def _json_beside(api: HfApi, pinned: HubReference, name: str, listing: HubListing) -> dict[str, Any]:
    """A configuration beside the weights; empty where there is none."""
    if name not in listing:
        return {}
    return parse_object(_small_file(api, pinned, name, listing), subject=f"{pinned.text}: {name}")


def _small_file(api: HfApi, pinned: HubReference, name: str, listing: HubListing) -> bytes:
    listed = listing[name]
    if listed.num_bytes > MAX_JSON_BYTES:
        raise CorruptCheckpointError(
            f"{pinned.text}: {name}",
            f"is longer than {MAX_JSON_BYTES} bytes",
            expected="an index or a configuration",
        )
    cached = _cached(pinned, name, listed)
    return (
        HubFile(api, pinned, pinned.path_of(name), listed).read_whole()
        if cached is None
        else cached.read_bytes()
    )


def _unread_note(
    reference: HubReference, names: Mapping[str, object], shards: Sequence[str]
) -> tuple[str, ...]:
    unread = unread_weights(names, shards)
    if not unread:
        return ()
    first = shards[0] + (" …" if len(shards) > 1 else "")
    return (f"{reference.text}: read {first}; ignored {abridged(unread)}",)
