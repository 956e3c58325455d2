"""Give disk space back: remove from the Hub library's cache what a run has put there.

Contract: works through the library's public cache interface
(https://huggingface.co/docs/huggingface_hub/guides/manage-cache). A revision that was cached when the
`CacheKeeper` was made is never removed, whole or in part; neither is one outside the repositories that the
caller names. Another process that relies on a revision which this run downloaded is not seen: do not evict
from a cache in which somebody else is working.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sparsity_audit.checkpoint.hub_reference import HubReference, parse_reference
from sparsity_audit.errors import UsageError

if TYPE_CHECKING:
    from huggingface_hub import CachedRepoInfo, HFCacheInfo

__all__ = ["CacheKeeper", "Eviction", "hub_reference_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Eviction:
    """What one call removed.

    Args:
        removed: `org/model@<commit>` of each revision removed.
        kept: Revisions of the repositories asked for that had been cached before the run.
        freed_bytes: Disk space given back, as the library estimates it.
    """

    removed: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    freed_bytes: int = 0


class CacheKeeper:
    """Remembers what the cache holds now, so that only later downloads are ever removed."""

    def __init__(self) -> None:
        self._before = {
            (repo.repo_id, revision.commit_hash) for repo in _models(_scan()) for revision in repo.revisions
        }

    def evict(self, repositories: Collection[str]) -> Eviction:
        """Remove the model revisions of `repositories` that were not cached when this object was made."""
        removed, kept, freed = [], [], 0
        cache = _scan()
        for repo in sorted(_models(cache), key=lambda repo: repo.repo_id):
            if repo.repo_id not in repositories:
                continue
            new = []
            for commit in sorted(revision.commit_hash for revision in repo.revisions):
                is_old = (repo.repo_id, commit) in self._before
                (kept if is_old else removed).append(f"{repo.repo_id}@{commit}")
                new += [] if is_old else [commit]
            if new and cache is not None:
                # One repository at a time: forks share commits, and the library looks for commits alone.
                strategy = replace(cache, repos=frozenset({repo})).delete_revisions(*new)
                strategy.execute()
                freed += strategy.expected_freed_size
        return Eviction(removed=tuple(removed), kept=tuple(kept), freed_bytes=freed)


def hub_reference_of(reference: str) -> HubReference | None:
    """The Hub reference a text stands for, as opening decides it; None for local paths and malformed text."""
    try:
        if not reference.startswith("hf://") and Path(reference).expanduser().exists():
            return None
        return parse_reference(reference)
    except (UsageError, OSError, RuntimeError):
        return None


def _scan() -> HFCacheInfo | None:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        return scan_cache_dir()
    except CacheNotFound:
        return None


def _models(cache: HFCacheInfo | None) -> list[CachedRepoInfo]:
    return [] if cache is None else [repo for repo in cache.repos if repo.repo_type == "model"]
