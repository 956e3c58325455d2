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
from sparsity_audit.passes.equal_files import is_known_equal
from sparsity_audit.types import Criterion

__all__ = [
    "BLOCK_BYTES",
    "Block",
    "Plan",
    "WorkUnit",
    "blocks_of",
    "default_criteria",
    "expected_core_seconds",
    "make_plan",
]

BLOCK_BYTES = 1 << 20
"""Bytes of one block on one side: both sides and the masks stay in the second-level cache."""

_ALIGNMENT = 64

_CORE_BYTES_S = {"full": 2.0e9, "counts": 4.0e9, "scaled": 0.03e9}
"""Bytes of both sides that one core compares in a second: stated, so that `--dry-run` can name a time.

Full and scaled lie below what was measured on a 2.5 GHz core; counts was not measured one core at a time."""


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
        itemsizes = [spec.base.itemsize + spec.tuned.itemsize for spec in self.specs]
        return sum(unit.num_entries * itemsizes[unit.pair] for unit in self.units)

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
        return sum(unit.num_entries for unit in self.units)


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
    has_hashes = any(file.digest for file in base.files)
    specs = tuple(
        _completed(
            spec,
            scaled=pair.is_scaled,
            known_equal=has_hashes and is_known_equal(pair, base, tuned),
            skip_equal=skip_equal,
        )
        for pair, spec in zip(alignment.pairs, specs, strict=True)
    )
    units: list[WorkUnit] = []
    # Ninety thousand tensors have some twenty shapes: their units share what does not name the tensor.
    cuts: dict[tuple[tuple[int, int], int], tuple[_Piece, ...]] = {}
    for number, (pair, spec) in enumerate(zip(alignment.pairs, specs, strict=True)):
        shape, itemsize = pair.base.rows_cols, max(spec.base.itemsize, spec.tuned.itemsize)
        if (shape, itemsize) not in cuts:
            cuts[shape, itemsize] = tuple(_cut(shape, max_entries=max(unit_bytes // itemsize, 1)))
        units.extend(
            WorkUnit(pair=number, rows=rows, cols=cols, total_cols=shape[1])
            for rows, cols in cuts[shape, itemsize]
        )
    return Plan(
        base=base,
        tuned=tuned,
        pairs=alignment.pairs,
        specs=specs,
        units=tuple(units),
        key=_plan_key(base, tuned, alignment, specs, unit_bytes),
    )


def _completed(spec: PairSpec, *, scaled: bool, known_equal: bool, skip_equal: bool) -> PairSpec:
    """The spec with what only the pair and its files say; the same object where it says so already."""
    unread = known_equal and skip_equal and spec.level == "counts"
    if (spec.scaled, spec.known_equal, spec.unread) == (scaled, known_equal, unread):
        return spec  # ninety thousand pairs share a few
    return replace(spec, scaled=scaled, known_equal=known_equal, unread=unread)


_Piece = tuple[tuple[int, int], tuple[int, int]]
"""Rows and columns of a unit, half-open."""


def _cut(shape: tuple[int, int], *, max_entries: int) -> Iterator[_Piece]:
    rows, cols = shape
    if rows * cols == 0:
        yield (0, rows), (0, cols)
        return
    if cols > max_entries and (rows == 1 or cols % _ALIGNMENT == 0):
        step = max(max_entries // _ALIGNMENT, 1) * _ALIGNMENT
        for row in range(rows):
            for col in range(0, cols, step):
                yield (row, row + 1), (col, min(col + step, cols))
        return
    group = _ALIGNMENT // gcd(_ALIGNMENT, cols)
    step = max(max_entries // cols // group, 1) * group
    whole = (0, cols)
    for row in range(0, rows, step):
        yield (row, min(row + step, rows)), whole


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


def expected_core_seconds(plan: Plan) -> float:
    """Seconds that one core compares for, at stated rates; docs/design/cluster.md says whence they are."""
    seconds = 0.0
    for unit in plan.units:
        spec = plan.specs[unit.pair]
        kind = "scaled" if spec.scaled else spec.level
        seconds += unit.num_entries * (spec.base.itemsize + spec.tuned.itemsize) / _CORE_BYTES_S[kind]
    return seconds


def _identity(file: FileEntry, *, is_pinned: bool) -> list[str | int]:
    # A commit pins what its files hold; when they were downloaded differs from machine to machine.
    when = 0 if is_pinned else file.mtime_ns
    return [file.name, file.num_bytes, when] + ([file.version] if file.version else [])


def _plan_key(
    base: Catalogue, tuned: Catalogue, alignment: Alignment, specs: tuple[PairSpec, ...], unit_bytes: int
) -> str:
    def side(catalogue: Catalogue) -> list[Any]:
        is_pinned = catalogue.resolved.startswith("hf://")
        return [catalogue.resolved, [_identity(file, is_pinned=is_pinned) for file in catalogue.files]]

    # Fed piece by piece: as one text the key of ninety thousand pairs takes more memory than the plan.
    digest = hashlib.sha256(json.dumps([side(base), side(tuned), unit_bytes]).encode())
    asked: dict[tuple[Criterion, ...], list[str]] = {}
    for pair, spec in zip(alignment.pairs, specs, strict=True):
        if spec.criteria not in asked:
            asked[spec.criteria] = [c.key for c in spec.criteria]
        question = [
            pair.name,
            [
                [s.spec.name, s.spec.file, s.spec.extent.start, s.start_entry, s.shape, s.num_runs, s.step]
                + ([] if s.scale is None else [s.scale.spec.name, s.scale.block])
                for s in (pair.base, pair.tuned)
            ],
            [spec.base, spec.tuned, spec.mask, spec.view, spec.level, spec.shrink]
            + (["unread"] if spec.unread else []),
            asked[spec.criteria],
        ]
        digest.update(json.dumps(question).encode())
    return digest.hexdigest()


def default_criteria(extra: tuple[Criterion, ...] = (), *, level: Level = "full") -> tuple[Criterion, ...]:
    """`bitwise`, `value`, the published tolerances, then what the user added, without repeats.

    Level `counts` leaves the tolerances to the user: without them a kernel needs no arithmetic at all.
    """
    texts = ("bitwise", "value") if level == "counts" else ("bitwise", "value", "atol:1e-5", "rel:1e-3")
    standard = tuple(Criterion.parse(text) for text in texts)
    return tuple(dict.fromkeys(standard + tuple(c for c in extra if c.kind != "top")))
