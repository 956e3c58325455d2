"""How checkpoints on the Hub are read: downloaded first, by ranges, or shard by shard.

Contract: one choice for everything that is opened inside a `with hub_access(…)` block of this thread,
whichever function opens it; outside of any block whole checkpoints are downloaded. No result depends on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from enum import StrEnum

from sparsity_audit.errors import UsageError

__all__ = ["Access", "current_access", "hub_access"]


class Access(StrEnum):
    """`download` into the Hub library's cache, `stream` by ranges without a disk, `shards` one at a time."""

    DOWNLOAD = "download"
    STREAM = "stream"
    SHARDS = "shards"


_current: ContextVar[Access] = ContextVar("hub_access", default=Access.DOWNLOAD)


def current_access() -> Access:
    """The choice in force."""
    return _current.get()


@contextmanager
def hub_access(access: Access | str) -> Iterator[None]:
    """Read checkpoints on the Hub in this way inside the block.

    `stream` reads ranges of the files and writes nothing to a disk. `shards` downloads each file when it is
    first read and removes it from the cache when its last planned byte was read, unless it was cached before.

    Args:
        access: `download`, `stream` or `shards`.

    Raises:
        UsageError: Another word.
    """
    try:
        chosen = Access(access)
    except ValueError as error:
        expected = ", ".join(a.value for a in Access)
        raise UsageError("hub access", repr(access), expected=expected) from error
    token = _current.set(chosen)
    try:
        yield
    finally:
        _current.reset(token)
