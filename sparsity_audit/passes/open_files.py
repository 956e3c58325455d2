"""The open files of one checkpoint, wherever they lie.

Contract: a file is opened when it is first read, and kept. Files behind a network are fetched ahead of the
reads that were announced (`expect`); every other read gets its bytes all the same, only later. A copy in
another process opens its files again there.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from sparsity_audit.checkpoint.ranges import FileRead, coalesce
from sparsity_audit.checkpoint.read_ahead import AheadSource, ReadAhead, current_pace, remote_files
from sparsity_audit.checkpoint.store import ByteSource, Catalogue

__all__ = ["OpenFiles"]


class OpenFiles:
    """The open files of one checkpoint, opened when first read."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._files: dict[int, ByteSource] = {}
        self._remote = remote_files(catalogue.files)
        self._ahead: ReadAhead | None = None
        self._lock = threading.Lock()

    @property
    def has_remote(self) -> bool:
        """Whether a file lies behind a network."""
        return bool(self._remote)

    def expect(self, reads: Iterable[FileRead], *, in_flight: int | None = None) -> None:
        """Begin to fetch what will be read next, in this order; what was expected before is dropped."""
        reads = [read for read in reads if read.file in self._remote]
        self.close()
        planned = Counter[int]()
        for read in reads:
            planned[read.file] += read.extent.num_bytes
        for number, num_bytes in planned.items():
            entry = self._catalogue.files[number]
            source = self._remote[number].open_planned(entry, num_bytes)
            if source is not None:
                self._files[number] = source
        reads = [read for read in reads if read.file not in self._files]
        pace = current_pace()
        if in_flight is not None:
            pace = replace(pace, in_flight=in_flight)
        windows = coalesce(reads, window_bytes=pace.window_bytes)
        if windows:
            self._ahead = ReadAhead(self._remote, windows, pace)

    def __getitem__(self, number: int) -> ByteSource:
        with self._lock:
            if number not in self._files:
                file = self._catalogue.files[number].open()
                if self._ahead is not None and number in self._remote:
                    file = AheadSource(number, self._ahead, file)
                self._files[number] = file
            return self._files[number]

    def stop(self) -> None:
        """End what is under way, from any thread: reads that wait for it raise. `close` comes after it."""
        ahead = self._ahead
        if ahead is not None:
            ahead.stop()

    def close(self) -> None:
        """End what is under way and close all files; a later read opens them again."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None
        while self._files:
            self._files.popitem()[1].close()

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process they are opened again."""
        return OpenFiles, (self._catalogue,)

    def __del__(self) -> None:
        """A copy in a worker process has nobody who closes it."""
        self.close()
