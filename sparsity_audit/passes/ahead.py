"""Say what a pass is about to read, so that files behind a network are fetched in large ranges.

Contract: pure but for `announce`. Announcing changes when bytes arrive, never which: a part that is announced
wrongly, or not at all, is fetched when it is read. Checkpoints on this disk are left alone, order included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from sparsity_audit.align.records import TensorSlice
from sparsity_audit.checkpoint.ranges import FileRead
from sparsity_audit.passes.plan import WorkUnit
from sparsity_audit.types import ByteRange

if TYPE_CHECKING:
    from sparsity_audit.passes.execute import OpenFiles

__all__ = ["announce", "in_storage_order", "read_of"]

PartsOf = Callable[[WorkUnit], Sequence[TensorSlice | None]]
"""The parts that a unit reads of each checkpoint, in their order; None where it reads nothing of one."""


def announce(units: Iterable[WorkUnit], parts_of: PartsOf, files: Sequence[OpenFiles]) -> list[WorkUnit]:
    """Tell every checkpoint what the units will read of it; returns them in the order to work in.

    Args:
        units: What the pass will do, each once.
        parts_of: What a unit reads.
        files: The checkpoints' open files.
    """
    ordered = list(units)
    remote = [number for number, opened in enumerate(files) if opened.has_remote]
    if not remote:
        return ordered
    ordered = in_storage_order(ordered, lambda unit: parts_of(unit)[remote[0]])
    for number in remote:
        files[number].expect(_reads(ordered, parts_of, number))
    return ordered


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
