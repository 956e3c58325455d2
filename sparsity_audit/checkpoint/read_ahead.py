"""Fetch planned windows of remote files ahead of the reads that take them.

Contract: reads get exactly the bytes of the file, in whatever order and from however many threads they come;
what was not planned, or was taken before, is fetched by itself. A byte is held from its arrival until its
planned read. Memory: `buffered_bytes`, beyond which a transfer waits unless a reader waits for it; then at
most a window for each reading thread on top. `in_flight` transfers run at once, one more for each reader that
would else wait for a transfer nobody has begun. An error of a transfer is raised by the reads that need it.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from sparsity_audit.checkpoint.ranges import WINDOW_BYTES, Window
from sparsity_audit.checkpoint.store import ByteSource, FileEntry, Remote
from sparsity_audit.types import ByteRange

__all__ = ["AheadSource", "Pace", "ReadAhead", "current_pace", "remote_files", "with_pace"]

_NO_END = 2**63

_JOIN_S = 1.0
"""How long `close` waits for transfers to notice; a silent server keeps one until its timeout."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How far ahead to fetch.

    Args:
        window_bytes: Length of the longest range asked for.
        in_flight: Ranges under way at once, for one checkpoint.
        buffered_bytes: Bytes that wait for their reader.
    """

    window_bytes: int = WINDOW_BYTES
    in_flight: int = 2
    buffered_bytes: int = 64 << 20


_pace: ContextVar[Pace | None] = ContextVar("pace", default=None)


def current_pace() -> Pace:
    """The pace in force; tests and benchmarks set another with `with_pace`."""
    return _pace.get() or Pace()


@contextmanager
def with_pace(pace: Pace) -> Iterator[None]:
    """Fetch at this pace inside the block."""
    token = _pace.set(pace)
    try:
        yield
    finally:
        _pace.reset(token)


class _ClosedError(Exception):
    """The reader has no more use for a transfer."""


@dataclass(slots=True, eq=False)
class _Transfer:
    """A window under way: what has arrived and has not been read."""

    window: Window
    started: bool = False
    received: int = 0
    needed: int = 0
    starts: list[int] = field(default_factory=list)
    chunks: list[bytes | None] = field(default_factory=list)
    unread: list[int] = field(default_factory=list)
    next_read: int = 0
    error: BaseException | None = None

    def add(self, data: bytes) -> int:
        """Take what came next; returns how much of it will be read and must be kept."""
        start = self.window.extent.start + self.received
        self.received += len(data)
        stop, reads, expected = start + len(data), self.window.reads, 0
        while self.next_read < len(reads) and reads[self.next_read].start < stop:
            read = reads[self.next_read]
            expected += min(read.stop, stop) - max(read.start, start)
            if read.stop > stop:
                break
            self.next_read += 1
        self.starts.append(start)
        self.unread.append(expected)
        self.chunks.append(data if expected else None)
        return len(data) if expected else 0

    def take(self, start: int, stop: int) -> tuple[list[memoryview], int] | None:
        """The pieces of these bytes and the room that becomes free; None where a piece is gone."""
        pieces: list[memoryview] = []
        number = bisect_right(self.starts, start) - 1
        first, position = number, start
        while position < stop:
            data = self.chunks[number]
            if data is None:
                return None
            inside = position - self.starts[number]
            piece = memoryview(data)[inside : inside + stop - position]
            pieces.append(piece)
            position += len(piece)
            number += 1
        freed = 0
        for place, piece in enumerate(pieces, start=first):
            self.unread[place] -= len(piece)
            if self.unread[place] <= 0:
                freed += len(self.chunks[place] or b"")
                self.chunks[place] = None
        return pieces, freed


class ReadAhead:
    """The windows of one checkpoint, fetched in order.

    Args:
        files: By number in the catalogue, what is fetched from.
        windows: What to fetch, in order.
        pace: How far ahead.
    """

    def __init__(self, files: Mapping[int, Remote], windows: Sequence[Window], pace: Pace) -> None:
        self._files, self._pace = files, pace
        self._transfers = [_Transfer(window) for window in windows]
        # By read, not by window: a window may lie in the gap of another, and then hides its later reads.
        self._of_file: dict[int, list[tuple[ByteRange, _Transfer]]] = {}
        for transfer in self._transfers:
            of_file = self._of_file.setdefault(transfer.window.file, [])
            of_file += [(read, transfer) for read in transfer.window.reads]
        for of_file in self._of_file.values():
            of_file.sort(key=lambda item: item[0].start)
        self._begins = {f: [read.start for read, _ in of_file] for f, of_file in self._of_file.items()}
        self._changed = threading.Condition()
        self._next, self._buffered, self._closed = 0, 0, False
        self._threads: list[threading.Thread] = []
        for _ in range(min(pace.in_flight, len(self._transfers))):
            self._start_thread(None)

    def read_into(self, file: int, buffer: memoryview, offset: int, direct: ByteSource) -> None:
        """Fill `buffer` with the bytes at `offset` of a file, from its windows or else from `direct`."""
        filled = 0
        while filled < len(buffer):
            start = offset + filled
            transfer, stop = self._transfer_of(file, start)
            part = buffer[filled : filled + stop - start]
            if transfer is None or not self._take(transfer, part, start):
                direct.read_into(part, start)
            filled += len(part)

    def _take(self, transfer: _Transfer, buffer: memoryview, start: int) -> bool:
        """Fill `buffer` from a window; False where a byte is not held (any more)."""
        stop = start + len(buffer)
        with self._changed:
            self._wait_for(transfer, stop)
            taken = transfer.take(start, stop)
            if taken is None:
                return False
            self._buffered -= taken[1]
            self._changed.notify_all()
        filled = 0
        for piece in taken[0]:
            buffer[filled : filled + len(piece)] = piece
            filled += len(piece)
        return True

    @property
    def held_bytes(self) -> int:
        """Bytes that have arrived and wait for their reader."""
        return self._buffered

    def stop(self) -> None:
        """End all transfers without waiting for them; reads that wait for one raise."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def close(self) -> None:
        """End all transfers and let go of what has arrived."""
        self.stop()
        for thread in self._threads:
            thread.join(_JOIN_S)
        with self._changed:
            for transfer in self._transfers:
                transfer.chunks.clear()

    def _transfer_of(self, file: int, start: int) -> tuple[_Transfer | None, int]:
        """The window that was planned to bring byte `start`, if any, and where that read or the gap ends."""
        begins = self._begins.get(file, [])
        place = bisect_right(begins, start)
        if place:
            read, transfer = self._of_file[file][place - 1]
            if start < read.stop:
                return transfer, read.stop
        return None, begins[place] if place < len(begins) else _NO_END

    def _wait_for(self, transfer: _Transfer, stop: int) -> None:
        """Wait, with the lock held, until the bytes before `stop` are there."""
        needed = stop - transfer.window.extent.start
        transfer.needed = max(transfer.needed, needed)
        if not transfer.started:
            # Its turn has not come; were all others full of bytes for later, it never would.
            transfer.started = True
            self._start_thread(transfer)
        self._changed.notify_all()
        while not self._closed and transfer.received < needed:
            if transfer.error is not None:
                raise transfer.error
            self._changed.wait()
        if self._closed:
            raise _ClosedError

    def _start_thread(self, transfer: _Transfer | None) -> None:
        thread = threading.Thread(target=self._run, args=(transfer,), name="fetch", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _run(self, transfer: _Transfer | None) -> None:
        """Fetch one transfer, or those whose turn comes until none is left."""
        current = transfer or self._take_next()
        while current is not None:
            self._fetch(current)
            current = None if transfer is not None else self._take_next()

    def _take_next(self) -> _Transfer | None:
        with self._changed:
            while not self._closed:
                while self._next < len(self._transfers) and self._transfers[self._next].started:
                    self._next += 1
                if self._next == len(self._transfers):
                    return None
                if self._buffered < self._pace.buffered_bytes:
                    transfer = self._transfers[self._next]
                    transfer.started = True
                    return transfer
                self._changed.wait()
        return None

    def _fetch(self, transfer: _Transfer) -> None:
        window = transfer.window
        try:
            self._files[window.file].fetch(window.extent, _TransferSink(self, transfer))
        except _ClosedError:
            pass
        except BaseException as error:  # noqa: BLE001 - it belongs to the reader, which raises it
            with self._changed:
                transfer.error = error
                self._changed.notify_all()

    def put(self, transfer: _Transfer, data: bytes) -> None:
        """Take the next bytes of a transfer when there is room or a reader waits for them."""
        with self._changed:
            while (
                self._buffered >= self._pace.buffered_bytes
                and transfer.received >= transfer.needed
                and not self._closed
            ):
                self._changed.wait()
            if self._closed:
                raise _ClosedError
            self._buffered += transfer.add(data)
            self._changed.notify_all()

    def pause(self, wait_s: float) -> None:
        """Wait, unless it is closed before."""
        with self._changed:
            if self._changed.wait_for(lambda: self._closed, wait_s):
                raise _ClosedError


@dataclass(frozen=True, slots=True)
class _TransferSink:
    ahead: ReadAhead
    transfer: _Transfer

    def put(self, data: bytes) -> None:
        self.ahead.put(self.transfer, data)

    def pause(self, wait_s: float) -> None:
        self.ahead.pause(wait_s)


class AheadSource:
    """A file whose planned reads come out of a `ReadAhead`, and all others from the file itself.

    Args:
        number: Its number in the catalogue.
        ahead: What fetches ahead.
        direct: The file itself.
    """

    def __init__(self, number: int, ahead: ReadAhead, direct: ByteSource) -> None:
        self._number, self._ahead, self._direct = number, ahead, direct

    @property
    def entry(self) -> FileEntry:
        """The catalogued file."""
        return self._direct.entry

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` with the bytes at `offset`. Raises what the store raises."""
        self._ahead.read_into(self._number, buffer, offset, self._direct)

    def close(self) -> None:
        """Close the file itself; the transfers are closed with their `ReadAhead`."""
        self._direct.close()


def remote_files(entries: Sequence[FileEntry]) -> dict[int, Remote]:
    """The remote files among a catalogue's, by number."""
    return {number: e.remote for number, e in enumerate(entries) if e.remote is not None}
