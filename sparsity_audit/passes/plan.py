"""Cut an alignment into work units, as plain data that `--dry-run` prints and tests read.

Contract: units cover every compared entry once; each starts at a multiple of 64 entries of its pair, so
that packed bits and fingerprint words never straddle two units. Nothing is read here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import gcd
from typing import Any

from sparsity_audit.align.records import Alignment, Pair, TensorSlice
from sparsity_audit.checkpoint.layout import abridged
from sparsity_audit.checkpoint.store import Catalogue, FileEntry
from sparsity_audit.compare.accumulate import Level
from sparsity_audit.compare.pair import PairSpec
from sparsity_audit.types import Criterion

__all__ = ["BLOCK_BYTES", "Block", "Plan", "WorkUnit", "blocks_of", "default_criteria", "make_plan"]

BLOCK_BYTES = 1 << 20
"""Bytes of one block on one side: both sides and the masks stay in the second-level cache."""

_ALIGNMENT = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkUnit:
    """Rows (or, of a single huge row, columns) of one pair: the smallest resumable piece.

    Args:
        pair: Index into the plan's pairs.
        rows: First row and the row after the last.
        cols: First column and the column after the last.
        total_cols: Columns of the whole pair.
    """

    pair: int
    rows: tuple[int, int]
    cols: tuple[int, int]
    total_cols: int

    @property
    def num_entries(self) -> int:
        """Entries of the unit."""
        return (self.rows[1] - self.rows[0]) * (self.cols[1] - self.cols[0])

    @property
    def first_entry(self) -> int:
        """Flat position of its first entry in the pair."""
        return self.rows[0] * self.total_cols + self.cols[0]

    @property
    def key(self) -> str:
        """Its name in the journal."""
        return f"{self.pair}:{self.rows[0]}-{self.rows[1]}:{self.cols[0]}-{self.cols[1]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A piece of a unit that is read and compared at once; whole rows, or a part of one row."""

    row: int
    num_rows: int
    col: int
    num_cols: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything a pass will do.

    Args:
        base: The base checkpoint.
        tuned: The tuned checkpoint.
        pairs: The matched slices.
        specs: What is asked of each pair; parallel to `pairs`.
        units: Work units in plan order.
        key: Hash over inputs and questions; two runs with equal keys give equal results.
    """

    base: Catalogue
    tuned: Catalogue
    pairs: tuple[Pair, ...]
    specs: tuple[PairSpec, ...]
    units: tuple[WorkUnit, ...]
    key: str

    @property
    def num_bytes(self) -> int:
        """Bytes that are compared, both sides."""
        return sum(
            pair.base.num_entries * (spec.base.itemsize + spec.tuned.itemsize)
            for pair, spec in zip(self.pairs, self.specs, strict=True)
        )

    @property
    def equal_files(self) -> tuple[str, ...]:
        """Names of the tuned side's files that hashes prove equal to the base's."""
        numbers = {
            pair.tuned.spec.file
            for pair, spec in zip(self.pairs, self.specs, strict=True)
            if spec.known_equal
        }
        return tuple(self.tuned.files[number].name for number in sorted(numbers))

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user must know of files that are not read, or read once for both sides."""
        names, files = self.equal_files, self.tuned.files
        if not names:
            return ()
        is_unread = all(spec.unread for spec in self.specs if spec.known_equal)
        done = "not read" if is_unread else "read once for both sides"
        kinds = " or ".join(sorted({file.digest.partition(":")[0] for file in files if file.digest}))
        return (f"{len(names)} of {len(files)} files are the base's by {kinds}, {done}: {abridged(names)}",)

    def parts_of(self, unit: WorkUnit) -> tuple[TensorSlice | None, TensorSlice | None]:
        """What a unit reads of base and tuned; None where it reads nothing of a side."""
        pair, spec = self.pairs[unit.pair], self.specs[unit.pair]
        return None if spec.unread else pair.base, None if spec.known_equal else pair.tuned

    @property
    def num_entries(self) -> int:
        """Entries that will be compared."""
        return sum(pair.base.num_entries for pair in self.pairs)


def make_plan(
    base: Catalogue,
    tuned: Catalogue,
    alignment: Alignment,
    *,
    specs: tuple[PairSpec, ...],
    unit_bytes: int,
    skip_equal: bool = False,
) -> Plan:
    """The work units of a comparison.

    Args:
        base: The base checkpoint.
        tuned: The tuned checkpoint.
        alignment: How they match.
        specs: What is asked of each pair, in the alignment's order; the alignment says which are scaled.
        unit_bytes: Aim for at most so many bytes a side and unit.
        skip_equal: Read nothing of files whose hashes are equal; only where counts are all that is wanted.
    """
    specs = tuple(
        _completed(spec, pair, base, tuned, skip_equal=skip_equal)
        for pair, spec in zip(alignment.pairs, specs, strict=True)
    )
    units: list[WorkUnit] = []
    for number, (pair, spec) in enumerate(zip(alignment.pairs, specs, strict=True)):
        itemsize = max(spec.base.itemsize, spec.tuned.itemsize)
        units.extend(_cut(number, pair.base.rows_cols, max_entries=max(unit_bytes // itemsize, 1)))
    return Plan(
        base=base,
        tuned=tuned,
        pairs=alignment.pairs,
        specs=specs,
        units=tuple(units),
        key=_plan_key(base, tuned, alignment, specs, unit_bytes),
    )


def _completed(
    spec: PairSpec, pair: Pair, base: Catalogue, tuned: Catalogue, *, skip_equal: bool
) -> PairSpec:
    is_equal = pair.base.spec.dtype is pair.tuned.spec.dtype and all(
        _is_same_place(ours, theirs, base, tuned) for ours, theirs in _stored(pair)
    )
    unread = is_equal and skip_equal and spec.level == "counts"
    return replace(spec, scaled=pair.is_scaled, known_equal=is_equal, unread=unread)


def _stored(pair: Pair) -> Iterator[tuple[TensorSlice | None, TensorSlice | None]]:
    """The slices on both sides, and those of their scales."""
    yield pair.base, pair.tuned
    if pair.is_scaled:
        ours, theirs = pair.base.scale, pair.tuned.scale
        yield (
            None if ours is None else TensorSlice.whole(ours.spec),
            None if theirs is None else TensorSlice.whole(theirs.spec),
        )


def _is_same_place(
    ours: TensorSlice | None, theirs: TensorSlice | None, base: Catalogue, tuned: Catalogue
) -> bool:
    """Whether both are the same bytes of files with one content, by hash."""
    if ours is None or theirs is None:
        return False
    digests = base.files[ours.spec.file].digest, tuned.files[theirs.spec.file].digest
    if not digests[0] or digests[0] != digests[1]:
        return False

    def place(part: TensorSlice) -> tuple[object, ...]:
        spec = part.spec
        layout = spec.dtype, spec.extent, spec.strides, spec.big_endian, spec.shape
        return (*layout, part.start_entry, part.num_runs, part.step)

    return place(ours) == place(theirs)


def _cut(number: int, shape: tuple[int, int], *, max_entries: int) -> Iterator[WorkUnit]:
    rows, cols = shape
    if rows * cols == 0:
        yield WorkUnit(pair=number, rows=(0, rows), cols=(0, cols), total_cols=cols)
        return
    if cols > max_entries and (rows == 1 or cols % _ALIGNMENT == 0):
        step = max(max_entries // _ALIGNMENT, 1) * _ALIGNMENT
        for row in range(rows):
            for col in range(0, cols, step):
                piece = (col, min(col + step, cols))
                yield WorkUnit(pair=number, rows=(row, row + 1), cols=piece, total_cols=cols)
        return
    group = _ALIGNMENT // gcd(_ALIGNMENT, cols)
    step = max(max_entries // cols // group, 1) * group
    for row in range(0, rows, step):
        piece = (row, min(row + step, rows))
        yield WorkUnit(pair=number, rows=piece, cols=(0, cols), total_cols=cols)


def blocks_of(unit: WorkUnit, *, itemsize: int, block_bytes: int = BLOCK_BYTES) -> Iterator[Block]:
    """The unit's blocks in row-major order."""
    limit = max(block_bytes // itemsize, _ALIGNMENT)
    (row_start, row_stop), (col_start, col_stop) = unit.rows, unit.cols
    width = col_stop - col_start
    if width > limit:
        step = limit // _ALIGNMENT * _ALIGNMENT
        for row in range(row_start, row_stop):
            for col in range(col_start, col_stop, step):
                yield Block(row=row, num_rows=1, col=col, num_cols=min(step, col_stop - col))
        return
    step = max(limit // max(width, 1), 1)
    for row in range(row_start, row_stop, step):
        yield Block(row=row, num_rows=min(step, row_stop - row), col=col_start, num_cols=width)


def _identity(file: FileEntry) -> list[str | int]:
    return [file.name, file.num_bytes, file.mtime_ns] + ([file.version] if file.version else [])


def _plan_key(
    base: Catalogue, tuned: Catalogue, alignment: Alignment, specs: tuple[PairSpec, ...], unit_bytes: int
) -> str:
    def side(catalogue: Catalogue) -> list[Any]:
        return [catalogue.resolved, [_identity(f) for f in catalogue.files]]

    questions = [
        [
            pair.name,
            [
                [s.spec.name, s.spec.file, s.spec.extent.start, s.start_entry, s.shape, s.num_runs, s.step]
                + ([] if s.scale is None else [s.scale.spec.name, s.scale.block])
                for s in (pair.base, pair.tuned)
            ],
            [spec.base, spec.tuned, spec.mask, spec.view, spec.level, spec.shrink]
            + (["unread"] if spec.unread else []),
            [c.key for c in spec.criteria],
        ]
        for pair, spec in zip(alignment.pairs, specs, strict=True)
    ]
    text = json.dumps([side(base), side(tuned), questions, unit_bytes])
    return hashlib.sha256(text.encode()).hexdigest()


def default_criteria(extra: tuple[Criterion, ...] = (), *, level: Level = "full") -> tuple[Criterion, ...]:
    """`bitwise`, `value`, the published tolerances, then what the user added, without repeats.

    Level `counts` leaves the tolerances to the user: without them a kernel needs no arithmetic at all.
    """
    texts = ("bitwise", "value") if level == "counts" else ("bitwise", "value", "atol:1e-5", "rel:1e-3")
    standard = tuple(Criterion.parse(text) for text in texts)
    return tuple(dict.fromkeys(standard + tuple(c for c in extra if c.kind != "top")))
