"""Ask the Hub, through its own library, what a repository holds.

Contract: a call that fails for a reason that may pass is made again, at most three times in all, after the
time that the server asks for or a short one; what fails for good is a `HubError` in our own words. A listing
names the commit it is of. The library is imported inside functions: local checkpoints never pay for it.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from sparsity_audit.checkpoint.http_range import retry_after_s
from sparsity_audit.checkpoint.hub_errors import is_transient, library_errors, translate
from sparsity_audit.checkpoint.hub_reference import HubReference, is_commit
from sparsity_audit.checkpoint.layout import Layout, choose_layout
from sparsity_audit.errors import CheckpointNotFoundError, HubError

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

__all__ = [
    "DEFAULT_BRANCH",
    "MAX_WAIT_S",
    "MISSING_REMEDY",
    "HubListing",
    "ListedFile",
    "choose_hub_layout",
    "hub_api",
    "list_files",
    "resolve_commit",
    "with_retries",
]

T = TypeVar("T")

DEFAULT_BRANCH = "main"

MISSING_REMEDY = "choose another revision, or ask its owner to upload the rest"
"""Where a shard is not there."""

WAITS_S = (0.5, 1.5)
"""Seconds before the second and the third attempt."""

MAX_WAIT_S = 300.0
"""The longest wait that a server may ask for; the Hub's rate limits are counted over five minutes."""

_SHA256 = re.compile(r"[0-9a-f]{64}")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedFile:
    """A file as the Hub lists it.

    Args:
        num_bytes: Its length.
        digest: `sha256:…` or `xet:…` of its content; "" for small files, which the Hub keeps in git.
    """

    num_bytes: int
    digest: str


HubListing = Mapping[str, ListedFile]
"""Files of one folder of a repository, by name."""


def hub_api() -> HfApi:
    """The library's client; endpoint and token are those of its environment variables."""
    from huggingface_hub import HfApi

    return HfApi(library_name="sparsity-audit")


def resolve_commit(api: HfApi, reference: HubReference) -> tuple[str, tuple[str, ...]]:
    """The commit at which a reference stands, and what the user should be told of it. Raises HubError."""
    from huggingface_hub import constants

    info = with_retries(
        lambda: api.model_info(
            reference.repo_id, revision=reference.revision, timeout=constants.HF_HUB_ETAG_TIMEOUT
        ),
        reference,
    )
    if not is_commit(info.sha):
        raise HubError(reference.text, "the Hub named no commit", remedy="check HF_ENDPOINT and proxies")
    notes: list[str] = []
    if reference.revision != info.sha:
        notes.append(f"{reference.text}: {reference.revision or DEFAULT_BRANCH} is commit {info.sha}")
    if info.id != reference.repo_id:
        notes.append(f"{reference.text}: the Hub calls this model {info.id}")
    assert info.sha is not None
    return info.sha, tuple(notes)


def list_files(api: HfApi, pinned: HubReference) -> dict[str, ListedFile]:
    """The files of the folder that a pinned reference names. Raises HubError."""
    from huggingface_hub.hf_api import RepoFile

    def files() -> dict[str, ListedFile]:
        entries = api.list_repo_tree(
            pinned.repo_id, path_in_repo=pinned.subfolder or None, revision=pinned.revision
        )
        return {e.path.rpartition("/")[2]: _listed(e) for e in entries if isinstance(e, RepoFile)}

    return with_retries(files, pinned)


def _listed(file: RepoFile) -> ListedFile:
    """A file's length and strongest hash: two repositories may name one content by either."""
    if file.lfs is not None and _SHA256.fullmatch(str(file.lfs.sha256)):
        return ListedFile(num_bytes=file.size, digest=f"sha256:{file.lfs.sha256}")
    xet = getattr(file, "xet_hash", None)
    return ListedFile(num_bytes=file.size, digest=f"xet:{xet}" if xet else "")


def choose_hub_layout(reference: HubReference, names: Collection[str]) -> Layout:
    """Which files make the checkpoint. Raises CheckpointNotFoundError."""
    layout = choose_layout(names)
    if layout is None:
        raise CheckpointNotFoundError(
            reference.text,
            f"holds no checkpoint ({len(names)} other files)",
            expected="*.safetensors or pytorch_model*.bin, with or without an index",
            remedy="if they are in a folder of the repository, write hf://org/model/folder",
        )
    return layout


def with_retries(
    call: Callable[[], T],
    reference: HubReference,
    *,
    file: str | None = None,
    attempts: int = 3,
) -> T:
    """What `call` gives, after at most `attempts` attempts; `file` is what errors name. Raises HubError."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    for wait_s in (*WAITS_S[: attempts - 1], None):
        try:
            return call()
        except OfflineModeIsEnabled:
            raise
        except library_errors() as error:
            if wait_s is None or not is_transient(error):
                raise translate(error, reference, file=file) from error
            wait_s = max(wait_s, _asked_wait_s(error))
            if wait_s > MAX_WAIT_S:
                raise translate(error, reference, file=file) from error
            _log.warning("%s: %s; trying again in %g s", reference.text, type(error).__name__, wait_s)
            time.sleep(wait_s)
    raise AssertionError("unreachable")


def _asked_wait_s(error: BaseException) -> float:
    headers = getattr(getattr(error, "response", None), "headers", None)
    return (None if headers is None else retry_after_s(headers)) or 0.0
