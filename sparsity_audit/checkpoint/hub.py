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
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from sparsity_audit.checkpoint.hub_errors import is_transient, library_errors, translate
from sparsity_audit.checkpoint.hub_reference import SCHEME, HubReference, is_commit
from sparsity_audit.checkpoint.layout import (
    ADAPTER_CONFIG,
    Layout,
    abridged,
    choose_layout,
    missing_shards,
    unread_weights,
)
from sparsity_audit.errors import CheckpointNotFoundError, HubError

if TYPE_CHECKING:
    from huggingface_hub import CachedRevisionInfo, HfApi

__all__ = ["HubSnapshot", "fetch"]

T = TypeVar("T")

_CONFIG = "config.json"
_DEFAULT_BRANCH = "main"
_MAX_INDEX_BYTES = 50_000_000
_WAITS_S = (0.5, 1.5)
"""Seconds before the second and the third attempt."""

_log = logging.getLogger(__name__)


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
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    api = HfApi(library_name="sparsity-audit")
    with _progress_only_on_terminals():
        try:
            commit, notes = _resolve(api, reference)
        except OfflineModeIsEnabled:
            return _cached_snapshot(reference)
        pinned = reference.pinned(commit)
        sizes = _list_files(api, pinned)
        folder, shards = _download_checkpoint(api, pinned, sizes)
    unread = unread_weights(sizes, shards)
    if shards and unread:
        first = shards[0] + (" …" if len(shards) > 1 else "")
        notes += (f"{reference.text}: read {first}; ignored {abridged(unread)}",)
    return HubSnapshot(folder=folder, reference=pinned, notes=notes)


def _resolve(api: HfApi, reference: HubReference) -> tuple[str, tuple[str, ...]]:
    from huggingface_hub import constants

    info = _with_retries(
        lambda: api.model_info(
            reference.repo_id, revision=reference.revision, timeout=constants.HF_HUB_ETAG_TIMEOUT
        ),
        reference,
    )
    if not is_commit(info.sha):
        raise HubError(reference.text, "the Hub named no commit", remedy="check HF_ENDPOINT and proxies")
    notes: list[str] = []
    if reference.revision != info.sha:
        notes.append(f"{reference.text}: {reference.revision or _DEFAULT_BRANCH} is commit {info.sha}")
    if info.id != reference.repo_id:
        notes.append(f"{reference.text}: the Hub calls this model {info.id}")
    assert info.sha is not None
    return info.sha, tuple(notes)


def _list_files(api: HfApi, pinned: HubReference) -> dict[str, int]:
    from huggingface_hub.hf_api import RepoFile

    def files() -> dict[str, int]:
        entries = api.list_repo_tree(
            pinned.repo_id, path_in_repo=pinned.subfolder or None, revision=pinned.revision
        )
        return {e.path.rpartition("/")[2]: e.size for e in entries if isinstance(e, RepoFile)}

    return _with_retries(files, pinned)


def _download_checkpoint(
    api: HfApi, pinned: HubReference, sizes: Mapping[str, int]
) -> tuple[Path, tuple[str, ...]]:
    """The local folder of the fetched files, and the names of those that hold tensors."""
    layout = _layout(pinned, sizes)
    companions = [name for name in (_CONFIG, ADAPTER_CONFIG) if name in sizes]
    shards: tuple[str, ...] = layout.files
    if layout.index is not None:
        shards = _shards_of(_download(api, pinned, layout.index, num_bytes=sizes[layout.index]))
        companions.append(layout.index)
    _refuse_missing(pinned, layout, shards=shards, present=sizes)
    _refuse_full_disk(pinned, {name: sizes[name] for name in (*companions, *shards)})
    paths = [_download(api, pinned, name, num_bytes=sizes[name]) for name in (*companions, *shards)]
    return paths[-1].parent, shards


def _layout(reference: HubReference, names: Collection[str]) -> Layout:
    layout = choose_layout(names)
    if layout is None:
        raise CheckpointNotFoundError(
            reference.text,
            f"holds no checkpoint ({len(names)} other files)",
            expected="*.safetensors or pytorch_model*.bin, with or without an index",
            remedy="if they are in a folder of the repository, write hf://org/model/folder",
        )
    return layout


def _shards_of(index: Path) -> tuple[str, ...]:
    """The shard names of an index; none when it is malformed, which opening the folder then reports."""
    if index.stat().st_size > _MAX_INDEX_BYTES:
        return ()
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        return tuple(sorted({name for name in weight_map.values() if isinstance(name, str)}))
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return ()


def _refuse_missing(
    reference: HubReference,
    layout: Layout,
    *,
    shards: tuple[str, ...],
    present: Collection[str],
) -> None:
    missing = [s for s in shards if s not in present] if layout.index else missing_shards(layout.files)
    if missing:
        raise CheckpointNotFoundError(
            reference.text,
            f"{layout.index or 'the shard numbering'} names the shard {missing[0]}, which is not there",
            expected=f"all shards; {len(missing)} missing",
            remedy="choose another revision, or ask its owner to upload the rest",
        )


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


def _download(api: HfApi, pinned: HubReference, name: str, *, num_bytes: int) -> Path:
    file = pinned.path_of(name)
    path = Path(
        _with_retries(
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


def _with_retries(
    call: Callable[[], T],
    reference: HubReference,
    *,
    file: str | None = None,
    attempts: int = 3,
) -> T:
    from huggingface_hub.errors import OfflineModeIsEnabled

    for wait_s in (*_WAITS_S[: attempts - 1], None):
        try:
            return call()
        except OfflineModeIsEnabled:
            raise
        except library_errors() as error:
            if wait_s is None or not is_transient(error):
                raise translate(error, reference, file=file) from error
            _log.warning("%s: %s; trying again in %g s", reference.text, type(error).__name__, wait_s)
            time.sleep(wait_s)
    raise AssertionError("unreachable")


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
    layout = _layout(pinned, names)
    shards = _shards_of(folder / layout.index) if layout.index else layout.files
    _refuse_missing(pinned, layout, shards=shards, present=names)
    note = f"{reference.text}: offline, only the files cached at commit {revision.commit_hash} were seen"
    return HubSnapshot(folder=folder, reference=pinned, notes=(note, *guess))


def _cached_revision(reference: HubReference) -> tuple[CachedRevisionInfo, tuple[str, ...]]:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound, OfflineModeIsEnabled

    wanted = reference.revision or _DEFAULT_BRANCH
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
