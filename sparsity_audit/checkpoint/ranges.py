"""Decide which ranges of remote files to fetch, from what will be read.

Contract: pure; plain data in and out. Every byte that is announced once lies in exactly one window; a window
is one consecutive range of one file, at most `window_bytes` long, and holds no gap of more than
`max_gap_bytes` between reads. Windows stand in the order of their first read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from sparsity_audit.types import ByteRange

__all__ = ["MAX_GAP_BYTES", "MAX_OPEN_WINDOWS", "WINDOW_BYTES", "FileRead", "Window", "coalesce"]

WINDOW_BYTES = 128 << 20
"""A request costs some 100 ms over the Internet, in which 10 Gbit/s bring 125 MB; two are under way."""

MAX_GAP_BYTES = 1 << 20
"""Bytes that are fetched and thrown away rather than asked around: a request of its own costs more."""

MAX_OPEN_WINDOWS = 4
"""Windows that reads may still extend: two checkpoints may be cut into files at other places."""


@dataclass(frozen=True, slots=True)
class FileRead:
    """A read that will come: bytes `extent` of the file of that number in the catalogue."""

    file: int
    extent: ByteRange


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """One range to fetch.

    Args:
        file: Number of the file in the catalogue.
        extent: Bytes to ask for.
        reads: The bytes of it that will be read, by position, without overlap.
    """

    file: int
    extent: ByteRange
    reads: tuple[ByteRange, ...]

    @property
    def read_bytes(self) -> int:
        """Bytes of it that will be read."""
        return sum(read.num_bytes for read in self.reads)


@dataclass(slots=True)
class _Growing:
    file: int
    start: int
    stop: int
    reads: list[ByteRange] = field(default_factory=list)


def coalesce(
    reads: Sequence[FileRead],
    *,
    window_bytes: int = WINDOW_BYTES,
    max_gap_bytes: int = MAX_GAP_BYTES,
    max_open: int = MAX_OPEN_WINDOWS,
) -> tuple[Window, ...]:
    """The windows that bring every byte of `reads`, in the order in which the first of each is read.

    Bytes announced a second time are left out: they are fetched when they are read again.

    Args:
        reads: What will be read, in order.
        window_bytes: Length of the longest window; a longer read is cut.
        max_gap_bytes: Longest gap between two reads of a window.
        max_open: Files whose last window may still grow; the oldest is closed first.
    """
    assert window_bytes > 0
    growing: dict[int, _Growing] = {}
    found: list[_Growing] = []
    for read in _once(reads):
        for piece in _cut(read.extent, window_bytes):
            last = growing.get(read.file)
            if last is None or not _fits(last, piece, window_bytes, max_gap_bytes):
                growing.pop(read.file, None)
                last = growing[read.file] = _Growing(read.file, piece.start, piece.start)
                found.append(last)
                if len(growing) > max_open:
                    del growing[next(iter(growing))]
            last.stop = piece.stop
            last.reads.append(piece)
    return tuple(
        Window(file=w.file, extent=ByteRange(start=w.start, stop=w.stop), reads=tuple(w.reads)) for w in found
    )


def _fits(window: _Growing, piece: ByteRange, window_bytes: int, max_gap_bytes: int) -> bool:
    gap = piece.start - window.stop
    return 0 <= gap <= max_gap_bytes and piece.stop - window.start <= window_bytes


def _cut(extent: ByteRange, max_bytes: int) -> Iterator[ByteRange]:
    for start in range(extent.start, extent.stop, max_bytes):
        yield ByteRange(start=start, stop=min(start + max_bytes, extent.stop))


def _once(reads: Iterable[FileRead]) -> list[FileRead]:
    """The reads without empty ones and without those that overlap one that begins before."""
    numbered = [(r.file, r.extent.start, n, r) for n, r in enumerate(reads) if r.extent.num_bytes]
    kept: list[tuple[int, FileRead]] = []
    ends: dict[int, int] = {}
    for file, start, number, read in sorted(numbered, key=lambda item: item[:3]):
        if start >= ends.get(file, 0):
            kept.append((number, read))
            ends[file] = read.extent.stop
    return [read for _, read in sorted(kept, key=lambda item: item[0])]
