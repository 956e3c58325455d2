"""Read a file behind a network by position, whatever its store.

Contract: `RemoteSource` gives the passes exactly the bytes they ask for and nothing is kept on a disk. Reads
that were announced come out of `read_ahead`; all others are fetched here, and a thread that goes on where its
last read ended gets up to `_MAX_AHEAD_BYTES` at once. The start of a file is fetched once while headers are
read. Memory: that much for each thread and open file.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sparsity_audit.checkpoint.store import ByteSource, FileEntry, Sink
from sparsity_audit.types import ByteRange

__all__ = [
    "HEAD_BYTES",
    "BufferSink",
    "RemoteFile",
    "RemoteSource",
    "drop_heads",
    "load_heads",
    "remote_entry",
]

HEAD_BYTES = 256 << 10
"""Holds the header of about 2000 tensors; a longer one is fetched by a request of its own."""

_HEADERS_AT_ONCE = 8

_MIN_AHEAD_BYTES = 64 << 10
"""Shorter reads are structure, not data, and nothing is fetched behind them."""

_MAX_AHEAD_BYTES = 16 << 20


class RemoteFile(ABC):
    """What all stores share: a length, a head, and sources over it.

    Args:
        place: Where it lies, for messages.
        num_bytes: Its length.
    """

    def __init__(self, place: str, num_bytes: int) -> None:
        self._place, self._num_bytes, self.head = place, num_bytes, b""

    @property
    def place(self) -> str:
        """Where it lies, for messages."""
        return self._place

    @property
    def num_bytes(self) -> int:
        """Its length."""
        return self._num_bytes

    def load_head(self) -> None:
        """Fetch the start of the file, so that reading its header needs no request more."""
        self.head = self._bytes(ByteRange(start=0, stop=min(self._num_bytes, HEAD_BYTES)))

    def read_whole(self) -> bytes:
        """All bytes of a small file."""
        return self._bytes(ByteRange(start=0, stop=self._num_bytes))

    def drop_head(self) -> None:
        """Forget it: a checkpoint of 163 files would keep 40 MB."""
        self.head = b""

    def open(self, entry: FileEntry) -> ByteSource:
        """Its bytes, by position."""
        return RemoteSource(entry, self)

    def open_planned(self, entry: FileEntry, planned_bytes: int) -> ByteSource | None:  # noqa: ARG002
        """A source of its own for a pass that reads so much of it; None where windows are fetched ahead."""
        return None

    @abstractmethod
    def fetch(self, extent: ByteRange, sink: Sink) -> None:
        """Put exactly the bytes of `extent` into `sink`, in order, however often the transfer is cut."""

    def verify_unchanged(self) -> None:  # noqa: B027 - stores whose names never change content have no more to do
        """Raise ChangedInputError when the file is not the one that was catalogued."""

    def _bytes(self, extent: ByteRange) -> bytes:
        buffer = bytearray(extent.num_bytes)
        if buffer:
            self.fetch(extent, BufferSink(memoryview(buffer)))
        return bytes(buffer)


class BufferSink:
    """Fills a buffer that is as long as the range.

    Args:
        buffer: Where the bytes go.
    """

    def __init__(self, buffer: memoryview) -> None:
        self._buffer, self.filled = buffer, 0

    def put(self, data: bytes) -> None:
        """Take the next bytes."""
        self._buffer[self.filled : self.filled + len(data)] = data
        self.filled += len(data)

    def pause(self, wait_s: float) -> None:
        """Wait before the next attempt."""
        time.sleep(wait_s)


class _Ahead:
    """What one thread has fetched beyond its last read."""

    def __init__(self) -> None:
        self.start, self.data, self.next_offset = 0, b"", -1

    def part(self, offset: int) -> memoryview:
        """The bytes it holds from `offset` on; none where it holds none."""
        inside = offset - self.start
        return memoryview(self.data)[inside:] if 0 <= inside < len(self.data) else memoryview(b"")


class RemoteSource:
    """A remote file, read by position; safe to share between threads.

    Args:
        entry: The catalogued file.
        remote: What fetches its bytes.
    """

    def __init__(self, entry: FileEntry, remote: RemoteFile) -> None:
        self._entry, self._remote = entry, remote
        self._threads = threading.local()

    @property
    def entry(self) -> FileEntry:
        """The catalogued file."""
        return self._entry

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` with the bytes at `offset`. Raises HubError or ChangedInputError."""
        stop = offset + len(buffer)
        head = self._remote.head
        if stop <= len(head):
            buffer[:] = head[offset:stop]
            return
        ahead = self._ahead()
        filled = 0
        while filled < len(buffer):
            known = ahead.part(offset + filled)[: len(buffer) - filled]
            if known:
                buffer[filled : filled + len(known)] = known
                filled += len(known)
                ahead.next_offset = offset + filled
            else:
                self._fetch(ahead, buffer[filled:], offset + filled)
                filled = len(buffer)

    def _fetch(self, ahead: _Ahead, target: memoryview, offset: int) -> None:
        count, stop = len(target), offset + len(target)
        goes_on = offset == ahead.next_offset and count >= _MIN_AHEAD_BYTES
        wanted = min(max(2 * len(ahead.data), 2 * count), _MAX_AHEAD_BYTES) if goes_on else count
        ahead.data, ahead.next_offset = b"", stop
        if min(wanted, self._remote.num_bytes - offset) <= count:
            self._remote.fetch(ByteRange(start=offset, stop=stop), BufferSink(target))
            return
        data = bytearray(min(wanted, self._remote.num_bytes - offset))
        extent = ByteRange(start=offset, stop=offset + len(data))
        self._remote.fetch(extent, BufferSink(memoryview(data)))
        target[:] = memoryview(data)[:count]
        ahead.start, ahead.data = offset, bytes(data)

    def _ahead(self) -> _Ahead:
        held: _Ahead | None = getattr(self._threads, "ahead", None)
        if held is None:
            held = self._threads.ahead = _Ahead()
        return held

    def close(self) -> None:
        """Let go of what was fetched ahead."""
        self._threads = threading.local()


def remote_entry(remote: RemoteFile, *, name: str, digest: str = "", version: str = "") -> FileEntry:
    """The entry of a file behind a network; its path is made up, absolute, and ends like the name."""
    return FileEntry(
        path=Path("/", remote.place.replace(", file ", "/")),
        name=name,
        num_bytes=remote.num_bytes,
        mtime_ns=0,
        inode=0,
        remote=remote,
        digest=digest,
        version=version,
    )


def load_heads(files: Sequence[FileEntry]) -> None:
    """Fetch the starts of remote files, several at a time; the first error in the files' order is raised."""
    remotes = [entry.remote for entry in files if isinstance(entry.remote, RemoteFile)]
    if not remotes:
        return
    with ThreadPoolExecutor(max_workers=_HEADERS_AT_ONCE, thread_name_prefix="header") as pool:
        for done in [pool.submit(remote.load_head) for remote in remotes]:
            done.result()


def drop_heads(files: Sequence[FileEntry]) -> None:
    """Forget the starts of remote files."""
    for entry in files:
        if isinstance(entry.remote, RemoteFile):
            entry.remote.drop_head()
