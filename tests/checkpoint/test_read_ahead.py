"""Reads give the bytes of the file in any order and from any number of threads, in bounded memory."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsity_audit.checkpoint.ranges import FileRead, coalesce
from sparsity_audit.checkpoint.read_ahead import AheadSource, Pace, ReadAhead
from sparsity_audit.checkpoint.remote import RemoteFile
from sparsity_audit.checkpoint.store import FileEntry, Sink
from sparsity_audit.errors import HubError
from sparsity_audit.types import ByteRange


class MemoryFile(RemoteFile):
    """A remote file that hands out its bytes in pieces of `chunk`; counts what it was asked for."""

    def __init__(self, data: bytes, *, chunk: int = 7) -> None:
        super().__init__("mem://file", len(data))
        self.data, self.chunk, self.asked = data, chunk, []
        self.fail_at: int | None = None
        self.gate: threading.Event | None = None

    def fetch(self, extent: ByteRange, sink: Sink) -> None:
        self.asked.append(extent)
        for start in range(extent.start, extent.stop, self.chunk):
            if self.gate is not None:
                while not self.gate.wait(0.01):
                    sink.pause(0.0)
            if self.fail_at is not None and start >= self.fail_at:
                raise HubError(self.place, "failed")
            sink.put(self.data[start : min(start + self.chunk, extent.stop)])

    def entry(self) -> FileEntry:
        return FileEntry(
            path=Path("/mem"), name="mem", num_bytes=self.num_bytes, mtime_ns=0, inode=0, remote=self
        )


def opened(files: list[MemoryFile], reads: list[FileRead], pace: Pace) -> tuple[ReadAhead, list[AheadSource]]:
    windows = coalesce(reads, window_bytes=pace.window_bytes, max_gap_bytes=16)
    ahead = ReadAhead(dict(enumerate(files)), windows, pace)
    return ahead, [AheadSource(n, ahead, file.open(file.entry())) for n, file in enumerate(files)]


def take(source: AheadSource, start: int, stop: int) -> bytes:
    buffer = bytearray(stop - start)
    source.read_into(memoryview(buffer), start)
    return bytes(buffer)


def sequence(num_bytes: int, step: int) -> list[FileRead]:
    return [
        FileRead(0, ByteRange(start=start, stop=min(start + step, num_bytes)))
        for start in range(0, num_bytes, step)
    ]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32), st.integers(1, 4), st.integers(8, 200), st.integers(1, 300))
def test_reads_in_any_order_by_any_threads_give_the_files_bytes(seed, workers, window, buffered):
    rng = random.Random(seed)
    files = [MemoryFile(rng.randbytes(rng.randint(1, 900)), chunk=rng.randint(1, 40)) for _ in range(2)]
    reads = []
    for number, file in enumerate(files):
        edges = sorted({0, file.num_bytes, *(rng.randint(0, file.num_bytes) for _ in range(12))})
        reads += [
            FileRead(number, ByteRange(start=a, stop=b)) for a, b in pairwise(edges) if rng.random() < 0.8
        ]
    order = [*reads, *rng.choices(reads, k=3)] if reads else []
    if rng.random() < 0.5:
        rng.shuffle(order)
    pace = Pace(window_bytes=window, in_flight=rng.randint(1, 3), buffered_bytes=buffered)
    ahead, sources = opened(files, reads, pace)
    with ThreadPoolExecutor(workers) as pool:
        results = pool.map(lambda r: take(sources[r.file], r.extent.start, r.extent.stop), order)
        for asked, found in zip(order, results, strict=True):
            assert found == files[asked.file].data[asked.extent.start : asked.extent.stop]
    ahead.close()


def test_planned_bytes_are_asked_for_once_and_in_large_ranges():
    file = MemoryFile(random.Random(1).randbytes(10_000))
    ahead, (source,) = opened([file], sequence(10_000, 100), Pace(window_bytes=2500, buffered_bytes=10_000))
    for part in sequence(10_000, 100):
        take(source, part.extent.start, part.extent.stop)
    ahead.close()
    assert sorted(e.start for e in file.asked) == [0, 2500, 5000, 7500]
    assert sum(e.num_bytes for e in file.asked) == 10_000


def test_a_read_across_two_windows_is_put_together():
    file = MemoryFile(random.Random(1).randbytes(1000))
    reads = [FileRead(0, ByteRange(start=0, stop=1000))]
    ahead, (source,) = opened([file], reads, Pace(window_bytes=300, buffered_bytes=10_000))
    assert take(source, 0, 1000) == file.data
    ahead.close()
    assert sum(e.num_bytes for e in file.asked) == 1000


def test_transfers_wait_for_their_reader_when_the_buffer_is_full():
    file = MemoryFile(bytes(100_000), chunk=100)
    pace = Pace(window_bytes=10_000, in_flight=2, buffered_bytes=5_000)
    ahead, (source,) = opened([file], sequence(100_000, 1000), pace)
    most = 0
    for part in sequence(100_000, 1000):
        time.sleep(0.0005)
        most = max(most, ahead.held_bytes)
        take(source, part.extent.start, part.extent.stop)
    assert most <= 5_000 + 2 * 100
    assert ahead.held_bytes == 0
    ahead.close()


def test_gaps_between_reads_are_not_kept():
    file = MemoryFile(bytes(1000), chunk=5)
    reads = [FileRead(0, ByteRange(start=s, stop=s + 5)) for s in (0, 20, 40)]
    ahead, (source,) = opened([file], reads, Pace(window_bytes=1000, buffered_bytes=1000))
    take(source, 40, 45)
    assert ahead.held_bytes == 10
    ahead.close()
    assert [(e.start, e.stop) for e in file.asked] == [(0, 45)]


def test_a_window_in_the_gap_of_another_does_not_hide_what_comes_after_it():
    file = MemoryFile(random.Random(4).randbytes(60), chunk=5)
    reads = [FileRead(0, ByteRange(start=a, stop=b)) for a, b in ((0, 10), (25, 60), (15, 20))]
    ahead, (source,) = opened([file], reads, Pace(window_bytes=1000, buffered_bytes=1000))
    for read in reads:
        assert take(source, read.extent.start, read.extent.stop) == file.data[slice(*_ends(read))]
    assert ahead.held_bytes == 0
    ahead.close()
    assert sorted((e.start, e.stop) for e in file.asked) == [(0, 60), (15, 20)]


def _ends(read: FileRead) -> tuple[int, int]:
    return read.extent.start, read.extent.stop


def test_a_reader_far_ahead_of_a_full_buffer_is_served():
    file = MemoryFile(random.Random(2).randbytes(50_000), chunk=100)
    pace = Pace(window_bytes=5_000, in_flight=1, buffered_bytes=1_000)
    ahead, (source,) = opened([file], sequence(50_000, 1000), pace)
    assert take(source, 44_000, 45_000) == file.data[44_000:45_000]
    assert take(source, 0, 1000) == file.data[:1000]
    ahead.close()


def test_the_error_of_a_transfer_is_raised_by_the_reads_that_need_it_and_by_no_others():
    file = MemoryFile(bytes(1000), chunk=10)
    file.fail_at = 500
    ahead, (source,) = opened([file], sequence(1000, 100), Pace(window_bytes=1000, buffered_bytes=2000))
    assert take(source, 400, 500) == bytes(100)
    for _ in range(2):
        with pytest.raises(HubError, match="failed"):
            take(source, 500, 600)
    ahead.close()


def test_closing_ends_transfers_that_nobody_reads():
    file = MemoryFile(bytes(100_000), chunk=10)
    ahead, _ = opened([file], sequence(100_000, 100), Pace(window_bytes=1000, buffered_bytes=50))
    waiting = MemoryFile(bytes(100))
    waiting.gate = threading.Event()
    other, _ = opened([waiting], sequence(100, 100), Pace(window_bytes=1000))
    started = time.monotonic()
    ahead.close()
    other.close()
    assert time.monotonic() - started < 1.0
    assert not [t for t in threading.enumerate() if t.name == "fetch"]


def test_reads_that_go_on_where_a_thread_stopped_are_fetched_in_growing_pieces():
    file = MemoryFile(random.Random(3).randbytes(8 << 20), chunk=1 << 20)
    source = file.open(file.entry())
    step = 128 << 10
    for start in range(0, 8 << 20, step):
        buffer = bytearray(step)
        source.read_into(memoryview(buffer), start)
        assert bytes(buffer) == file.data[start : start + step]
    assert len(file.asked) <= 7
    assert sum(e.num_bytes for e in file.asked) == 8 << 20


def test_short_reads_fetch_nothing_behind_them_and_the_head_is_fetched_once():
    file = MemoryFile(random.Random(3).randbytes(1 << 20), chunk=1 << 20)
    file.load_head()
    source = file.open(file.entry())
    for start in (0, 8, 5000, 500_000, 500_100):
        buffer = bytearray(100)
        source.read_into(memoryview(buffer), start)
        assert bytes(buffer) == file.data[start : start + 100]
    assert [(e.start, e.num_bytes) for e in file.asked] == [(0, 256 << 10), (500_000, 100), (500_100, 100)]
