"""Say what a pass is about to read, so that files behind a network are fetched in large ranges.

Contract: pure but for `Reads.announce`. Announcing changes when bytes arrive, never which: a part that is
announced wrongly, or not at all, is fetched when it is read. Checkpoints on this disk are left alone, order
included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from sparsity_audit.align.records import TensorSlice
from sparsity_audit.checkpoint.ranges import FileRead
from sparsity_audit.passes.open_files import OpenFiles
from sparsity_audit.passes.plan import WorkUnit
from sparsity_audit.types import ByteRange

__all__ = ["Reads", "in_storage_order", "read_of"]

PartsOf = Callable[[WorkUnit], Sequence[TensorSlice | None]]
"""The parts that a unit reads of each checkpoint, in their order; None where it reads nothing of one."""


@dataclass(frozen=True, slots=True)
class Reads:
    """What the units of a pass read of each checkpoint.

    Args:
        parts_of: What a unit reads.
        files: The checkpoints' open files, in the same order.
    """

    parts_of: PartsOf
    files: tuple[OpenFiles, ...]

    def ordered(self, units: Sequence[WorkUnit]) -> Sequence[WorkUnit]:
        """The units in the order to work in: as the first checkpoint behind a network stores them."""
        remote = next((number for number, opened in enumerate(self.files) if opened.has_remote), None)
        if remote is None:
            return units
        return in_storage_order(units, lambda unit: self.parts_of(unit)[remote])

    def announce(self, units: Iterable[WorkUnit]) -> None:
        """Tell every checkpoint, in the process that reads, what these units will read of it, in turn."""
        ordered = list(units)
        for number, opened in enumerate(self.files):
            if opened.has_remote:
                opened.expect(_reads(ordered, self.parts_of, number))

    def stop(self) -> None:
        """End what is on its way of every checkpoint; reads that wait for it raise."""
        for opened in self.files:
            opened.stop()


def in_storage_order(
    units: Iterable[WorkUnit], part_of: Callable[[WorkUnit], TensorSlice | None]
) -> list[WorkUnit]:
    """The units by file and position of what they read of one checkpoint."""

    def place(unit: WorkUnit) -> tuple[int, int, int]:
        part = part_of(unit)
        if part is None:
            return -1, 0, 0
        first = (part.start_entry + unit.first_entry) * part.spec.dtype.itemsize
        return part.spec.file, part.spec.extent.start, first

    return sorted(units, key=place)


def read_of(part: TensorSlice, unit: WorkUnit) -> FileRead | None:
    """The bytes a unit reads of a part; None where they are no single run."""
    spec = part.spec
    if spec.strides is not None or part.num_runs != 1:
        return None
    start = spec.extent.start + (part.start_entry + unit.first_entry) * spec.dtype.itemsize
    count = _last_entry(unit) - unit.first_entry
    return FileRead(spec.file, ByteRange(start=start, stop=start + count * spec.dtype.itemsize))


def _last_entry(unit: WorkUnit) -> int:
    if unit.num_entries == 0:
        return unit.first_entry
    return (unit.rows[1] - 1) * unit.total_cols + unit.cols[1]


def _reads(units: Iterable[WorkUnit], parts_of: PartsOf, number: int) -> Iterator[FileRead]:
    for unit in units:
        part = parts_of(unit)[number]
        read = None if part is None else read_of(part, unit)
        if read is not None:
            yield read
