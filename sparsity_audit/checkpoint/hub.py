"""Fetch a checkpoint from the Hub through the Hub's own library.

Contract: the revision is resolved to a commit once, and everything after names that commit. Only the files
that make the checkpoint are fetched, whole, into the library's own cache; a file is used only when it is as
long as the Hub says. Endpoint, token, cache and offline mode are the library's environment variables
(https://huggingface.co/docs/huggingface_hub/package_reference/environment_variables). The library is imported
inside functions, so that local checkpoints never pay for it. Failures are retried: three attempts for
metadata, two for a file (the library itself resumes a cut transfer before that).
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sparsity_audit.checkpoint.hub_calls import (
    DEFAULT_BRANCH,
    MISSING_REMEDY,
    choose_hub_layout,
    hub_api,
    list_files,
    resolve_commit,
    with_retries,
)
from sparsity_audit.checkpoint.hub_errors import translate
from sparsity_audit.checkpoint.hub_reference import SCHEME, HubReference, is_commit
from sparsity_audit.checkpoint.layout import ADAPTER_CONFIG, Layout, unread_note
from sparsity_audit.checkpoint.remote_folder import refuse_missing
from sparsity_audit.errors import HubError

if TYPE_CHECKING:
    from huggingface_hub import CachedRevisionInfo, HfApi

__all__ = ["HubSnapshot", "download_file", "fetch"]

_CONFIG = "config.json"
_MAX_INDEX_BYTES = 50_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class HubSnapshot:
    """A fetched checkpoint in the Hub library's cache.

    Args:
        folder: Local directory that holds the files (of the subfolder, if one was named).
        reference: Where they came from, pinned to the commit.
        notes: What the user should be told, such as the commit a branch stood at.
    """

    folder: Path
    reference: HubReference
    notes: tuple[str, ...]


def fetch(reference: HubReference) -> HubSnapshot:
    """Bring the checkpoint files of `reference` into the Hub library's cache.

    Raises:
        HubError: The Hub refused, failed, could not be reached, or has no such repository or revision.
        CheckpointNotFoundError: The repository holds no checkpoint, or an index names a shard it lacks.
    """
    from huggingface_hub.errors import OfflineModeIsEnabled

    api = hub_api()
    with _progress_only_on_terminals():
        try:
            commit, notes = resolve_commit(api, reference)
        except OfflineModeIsEnabled:
            return _cached_snapshot(reference)
        pinned = reference.pinned(commit)
        sizes = {name: file.num_bytes for name, file in list_files(api, pinned).items()}
        folder, shards = _download_checkpoint(api, pinned, sizes)
    notes += unread_note(reference.text, sizes, shards)
    return HubSnapshot(folder=folder, reference=pinned, notes=notes)


def _download_checkpoint(
    api: HfApi, pinned: HubReference, sizes: Mapping[str, int]
) -> tuple[Path, tuple[str, ...]]:
    """The local folder of the fetched files, and the names of those that hold tensors."""
    layout = choose_hub_layout(pinned, sizes)
    companions = [name for name in (_CONFIG, ADAPTER_CONFIG) if name in sizes]
    shards: tuple[str, ...] = layout.files
    if layout.index is not None:
        shards = _shards_of(
            download_file(api, pinned, pinned.path_of(layout.index), num_bytes=sizes[layout.index])
        )
        companions.append(layout.index)
    _refuse_missing(pinned, layout, shards, sizes)
    _refuse_full_disk(pinned, {name: sizes[name] for name in (*companions, *shards)})
    paths = [
        download_file(api, pinned, pinned.path_of(name), num_bytes=sizes[name])
        for name in (*companions, *shards)
    ]
    return paths[-1].parent, shards


def _refuse_missing(
    pinned: HubReference, layout: Layout, shards: Collection[str], present: Collection[str]
) -> None:
    refuse_missing(layout, shards, present, reference=pinned.text, remedy=MISSING_REMEDY)


def _shards_of(index: Path) -> tuple[str, ...]:
    """The shard names of an index; none when it is malformed, which opening the folder then reports."""
    if index.stat().st_size > _MAX_INDEX_BYTES:
        return ()
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        return tuple(sorted({name for name in weight_map.values() if isinstance(name, str)}))
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return ()


def _refuse_full_disk(pinned: HubReference, sizes: Mapping[str, int]) -> None:
    """Say so before a download that cannot fit; the library only warns, then fails at the end."""
    from huggingface_hub import constants, try_to_load_from_cache

    needed = sum(
        num_bytes
        for name, num_bytes in sizes.items()
        if not isinstance(
            try_to_load_from_cache(pinned.repo_id, pinned.path_of(name), revision=pinned.revision), str
        )
    )
    cache = Path(constants.HF_HUB_CACHE)
    while not cache.exists() and cache != cache.parent:
        cache = cache.parent
    free = shutil.disk_usage(cache).free
    if needed > free:
        raise HubError(
            pinned.text,
            f"needs {needed} bytes in the Hub cache, where {free} are free",
            remedy="free some, or set HF_HOME to a larger disk",
        )


def download_file(api: HfApi, pinned: HubReference, file: str, *, num_bytes: int) -> Path:
    """Where the cache holds a file of the repository, fetched if need be. Raises HubError."""
    path = Path(
        with_retries(
            lambda: api.hf_hub_download(pinned.repo_id, file, revision=pinned.revision),
            pinned,
            file=file,
            attempts=2,
        )
    )
    found = path.stat().st_size
    if found != num_bytes:
        raise HubError(
            f"{pinned.text}, file {file}",
            f"{found} bytes in the Hub cache",
            expected=f"{num_bytes} bytes, as the Hub lists",
            remedy=f"delete {path.resolve()} and run again",
        )
    return path


@contextmanager
def _progress_only_on_terminals() -> Iterator[None]:
    """Keep the library's progress bars out of logs; they go to stderr in any case."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    silence = (
        not sys.stderr.isatty()
        and not are_progress_bars_disabled()
        and "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ
    )
    if silence:
        disable_progress_bars()
    try:
        yield
    finally:
        if silence:
            enable_progress_bars()


def _cached_snapshot(reference: HubReference) -> HubSnapshot:
    revision, guess = _cached_revision(reference)
    pinned = reference.pinned(revision.commit_hash)
    folder = Path(revision.snapshot_path, *reference.subfolder.split("/"))
    names = {path.name for path in folder.iterdir() if path.is_file()} if folder.is_dir() else set()
    layout = choose_hub_layout(pinned, names)
    shards = _shards_of(folder / layout.index) if layout.index else layout.files
    _refuse_missing(pinned, layout, shards, names)
    note = f"{reference.text}: offline, only the files cached at commit {revision.commit_hash} were seen"
    return HubSnapshot(folder=folder, reference=pinned, notes=(note, *guess))


def _cached_revision(reference: HubReference) -> tuple[CachedRevisionInfo, tuple[str, ...]]:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound, OfflineModeIsEnabled

    wanted = reference.revision or DEFAULT_BRANCH
    try:
        repos = scan_cache_dir().repos
    except CacheNotFound:
        repos = frozenset()
    revisions = [
        revision
        for repo in repos
        if repo.repo_type == "model" and repo.repo_id == reference.repo_id
        for revision in repo.revisions
    ]
    for revision in revisions:
        if wanted == revision.commit_hash or wanted in revision.refs:
            return revision, ()
    if not revisions or is_commit(wanted):
        raise translate(OfflineModeIsEnabled(), reference)
    if len(revisions) == 1:
        return revisions[0], (f"{reference.text}: {wanted} is taken to be the only cached commit",)
    commits = ", ".join(sorted(revision.commit_hash for revision in revisions))
    raise HubError(
        reference.text,
        f"offline, and it is not known which cached commit {wanted} is",
        expected=f"one of {commits}",
        remedy=f"write {SCHEME}{reference.repo_id}@<commit>",
    )
