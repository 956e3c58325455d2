"""Which ranges of remote files are asked for: plain data from plain data."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsity_audit.checkpoint.ranges import FileRead, coalesce
from sparsity_audit.types import ByteRange


def read(start: int, stop: int, file: int = 0) -> FileRead:
    return FileRead(file, ByteRange(start=start, stop=stop))


def shown(reads: list[FileRead], **sizes: int) -> list[tuple[int, int, int]]:
    sizes = {"window_bytes": 100, "max_gap_bytes": 10, **sizes}
    return [(w.file, w.extent.start, w.extent.stop) for w in coalesce(reads, **sizes)]


@pytest.mark.parametrize(
    ("reads", "windows"),
    [
        ([], []),
        ([read(5, 5)], []),
        ([read(0, 40), read(40, 100)], [(0, 0, 100)]),
        ([read(0, 40), read(50, 100)], [(0, 0, 100)]),
        ([read(0, 40), read(51, 100)], [(0, 0, 40), (0, 51, 100)]),
        ([read(0, 60), read(60, 101)], [(0, 0, 60), (0, 60, 101)]),
        ([read(0, 250)], [(0, 0, 100), (0, 100, 200), (0, 200, 250)]),
        ([read(50, 60), read(0, 40)], [(0, 50, 60), (0, 0, 40)]),
        ([read(0, 40), read(0, 40, 1), read(40, 80), read(40, 90, 1)], [(0, 0, 80), (1, 0, 90)]),
    ],
)
def test_reads_that_follow_each_other_in_a_file_become_one_range(reads, windows):
    assert shown(reads) == windows


def test_bytes_announced_twice_are_fetched_ahead_once():
    assert shown([read(0, 40), read(0, 40), read(20, 60)]) == [(0, 0, 40)]


def test_no_more_files_than_allowed_keep_a_range_open():
    reads = [read(0, 10, file) for file in range(3)] + [read(10, 20, file) for file in range(3)]
    assert shown(reads, max_open=3) == [(0, 0, 20), (1, 0, 20), (2, 0, 20)]
    assert shown(reads, max_open=2) == [(f, start, start + 10) for start in (0, 10) for f in range(3)]


@settings(deadline=None, max_examples=100)
@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 300), st.integers(0, 80)).map(
            lambda t: read(t[1], t[1] + t[2], t[0])
        ),
        max_size=25,
    ),
    st.integers(1, 120),
    st.integers(0, 20),
    st.integers(1, 3),
)
def test_every_announced_byte_lies_in_one_window_at_most_and_new_bytes_in_exactly_one(
    reads, window_bytes, gap, max_open
):
    windows = coalesce(reads, window_bytes=window_bytes, max_gap_bytes=gap, max_open=max_open)
    fetched: list[tuple[int, int]] = []
    planned: list[tuple[int, int]] = []
    for window in windows:
        assert 0 < window.extent.num_bytes <= window_bytes
        fetched += [(window.file, i) for i in range(window.extent.start, window.extent.stop)]
        ends = [window.extent.start]
        for part in window.reads:
            assert ends[-1] <= part.start <= ends[-1] + gap
            ends.append(part.stop)
            planned += [(window.file, i) for i in range(part.start, part.stop)]
        assert ends[-1] == window.extent.stop
        assert window.read_bytes == sum(part.num_bytes for part in window.reads)
    assert len(planned) == len(set(planned))
    asked = [(r.file, i) for r in reads for i in range(r.extent.start, r.extent.stop)]
    assert set(planned) <= set(asked)
    once = {byte for byte, count in Counter(asked).items() if count == 1}
    overlapped = {
        (r.file, i)
        for r in reads
        for other in reads
        if other is not r and other.file == r.file and r.extent.num_bytes and other.extent.num_bytes
        if r.extent.start < other.extent.stop and other.extent.start < r.extent.stop
        for i in range(r.extent.start, r.extent.stop)
    }
    assert once - overlapped <= set(planned)
    if not overlapped and gap == 0:
        assert sorted(fetched) == sorted(asked)
