"""Write the base with a part of the update, for several parts in one pass over both checkpoints.

Contract: an entry that is kept has the tuned side's stored value, any other the base's: values are copied or
widened exactly, never computed. The result has the names and shapes of one side (`like`); what of that side
has no counterpart is copied from it. Memory a worker is a few blocks. Bytes do not depend on the number of
workers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass

import numpy as np

from sparsity_audit.align.records import Pair, Side, TensorSlice
from sparsity_audit.checkpoint.reading import read_entries
from sparsity_audit.checkpoint.store import Catalogue
from sparsity_audit.compare.accumulate import CODE_DTYPE
from sparsity_audit.compare.convert import widen
from sparsity_audit.errors import UnsupportedFormatError, UsageError
from sparsity_audit.masks.reader import MaskReader
from sparsity_audit.masks.shards import ShardWriter, StoredTensor
from sparsity_audit.passes.engine import Workers, map_units
from sparsity_audit.passes.execute import read_blocks
from sparsity_audit.passes.mask_bits import block_bits, runs_within
from sparsity_audit.passes.open_files import OpenFiles
from sparsity_audit.passes.plan import BLOCK_BYTES, Block, Plan, WorkUnit
from sparsity_audit.passes.prune_masks import KeepMask
from sparsity_audit.passes.topk import delta_codes
from sparsity_audit.seams import reached
from sparsity_audit.types import DType, TensorSpec, View, common_dtype

__all__ = ["KeptCounts", "Outlet", "PairCounts", "stored_tensors", "uncovered_runs", "write_pruned"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlet:
    """One checkpoint to write.

    Args:
        keep: What it keeps.
        writer: Where its tensors go.
    """

    keep: KeepMask
    writer: ShardWriter


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptCounts:
    """What one checkpoint keeps of a pair.

    Args:
        kept: Entries with the tuned value.
        changed: Of these, entries whose codes differ from the base's.
        moved: Of these, entries with Δ neither 0 nor NaN.
        square: Σ Δ² over those with a finite Δ².
    """

    kept: int
    changed: int
    moved: int
    square: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PairCounts:
    """A pair's update, and what each checkpoint keeps of it. Δ is that of the view asked for.

    Args:
        entries: Entries compared.
        changed: Entries whose codes differ.
        moved: Entries with Δ neither 0 nor NaN.
        not_finite: Of these, entries whose Δ² is not finite, left out of squares.
        square: Σ Δ² over the others.
        kept: One for each checkpoint.
    """

    entries: int
    changed: int
    moved: int
    not_finite: int
    square: float
    kept: tuple[KeptCounts, ...]


def stored_tensors(plan: Plan, like: Side, *, upcast: bool) -> tuple[StoredTensor, ...]:
    """The tensors of the result: those of the side `like`, in the dtype that holds both sides exactly.

    Args:
        plan: The pairs.
        like: The side that gives names and shapes.
        upcast: Whether a tensor whose sides differ in dtype may be stored in the wider one.

    Raises:
        UsageError: Dtypes differ, and `upcast` is not given; or no dtype holds all parts of a tensor.
        UnsupportedFormatError: A pair is block-scaled: a code means nothing without its side's scale.
    """
    of_side = plan.base if like == "base" else plan.tuned
    dtypes = {name: spec.dtype for name, spec in of_side.tensors.items()}
    for pair in plan.pairs:
        if pair.is_scaled:
            raise UnsupportedFormatError(
                f"tensor {pair.name!r}",
                "block-scaled fp8: one side's codes under the other side's scales are other numbers",
                remedy="de-quantise both checkpoints to bf16 or fp32 first",
            )
        mine, other = (pair.base, pair.tuned) if like == "base" else (pair.tuned, pair.base)
        name, found = mine.spec.name, dtypes[mine.spec.name]
        wider = common_dtype(found, other.spec.dtype)
        if other.spec.dtype is not mine.spec.dtype and not upcast:
            raise UsageError(
                f"tensor {pair.name!r}",
                f"{pair.base.spec.dtype.label} in base, {pair.tuned.spec.dtype.label} in tuned",
                expected="one dtype, so that every stored value can be taken as it is",
                remedy="--upcast stores such tensors in the dtype that holds both exactly",
            )
        if wider is None:
            raise UsageError(f"tensor {name!r}", "no dtype holds the values of all its parts")
        dtypes[name] = wider
    return tuple(
        StoredTensor(name=name, dtype=dtypes[name], shape=spec.shape)
        for name, spec in of_side.tensors.items()
    )


def uncovered_runs(spec: TensorSpec, parts: Sequence[TensorSlice]) -> list[tuple[int, int]]:
    """Runs of a tensor's entries that stand in none of the parts, first and one past the last."""
    runs, end = [], 0
    for start, stop in sorted(run for part in parts for run in part.runs if run[0] < run[1]):
        if end < start:
            runs.append((end, start))
        end = stop
    return [*runs, (end, spec.num_entries)] if end < spec.num_entries else runs


def write_pruned(
    plan: Plan,
    outlets: Sequence[Outlet],
    stored: Sequence[StoredTensor],
    *,
    like: Side,
    view: View,
    workers: Workers,
) -> tuple[PairCounts, ...]:
    """Write the tensors of all checkpoints; counts of each pair, in plan order. The writers stay open.

    Args:
        plan: The pairs.
        outlets: The checkpoints.
        stored: From `stored_tensors`.
        like: The side that gives names and shapes.
        view: The view whose Δ is counted, and moved or not.
        workers: Threads.

    Raises:
        OutputError: A writer fails.
        ChangedInputError: A file changed during the run.
    """
    base, tuned = OpenFiles(plan.base), OpenFiles(plan.tuned)
    found: dict[str, list[PairCounts]] = {}
    task = _Task(plan, outlets, {t.name: t.dtype for t in stored}, like, view, base, tuned)
    try:
        with closing(map_units(task.copy, task.unmatched(), workers=workers)) as copies:
            for _ in copies:
                pass
        with closing(map_units(task.write, plan.units, workers=workers)) as results:
            for unit, counts in results:
                reached("unit pruned")
                found[unit.key] = counts
    finally:
        base.close()
        tuned.close()
    plan.base.verify_unchanged()
    plan.tuned.verify_unchanged()
    of_pair: list[list[PairCounts]] = [[] for _ in plan.pairs]
    for unit in plan.units:
        of_pair[unit.pair] += found[unit.key]
    return tuple(_total(blocks, len(outlets)) for blocks in of_pair)


def _total(blocks: Sequence[PairCounts], num_outlets: int) -> PairCounts:
    """The sum over blocks; floats by `math.fsum`, which does not know an order."""

    def kept(number: int) -> KeptCounts:
        parts = [block.kept[number] for block in blocks]
        return KeptCounts(
            kept=sum(part.kept for part in parts),
            changed=sum(part.changed for part in parts),
            moved=sum(part.moved for part in parts),
            square=math.fsum(part.square for part in parts),
        )

    return PairCounts(
        entries=sum(block.entries for block in blocks),
        changed=sum(block.changed for block in blocks),
        moved=sum(block.moved for block in blocks),
        not_finite=sum(block.not_finite for block in blocks),
        square=math.fsum(block.square for block in blocks),
        kept=tuple(kept(number) for number in range(num_outlets)),
    )


@dataclass(frozen=True, slots=True)
class _Task:
    """What the workers share."""

    plan: Plan
    outlets: Sequence[Outlet]
    dtypes: Mapping[str, DType]
    like: Side
    view: View
    base: OpenFiles
    tuned: OpenFiles

    @property
    def of_side(self) -> Catalogue:
        return self.plan.base if self.like == "base" else self.plan.tuned

    def mine(self, pair: Pair) -> TensorSlice:
        return pair.base if self.like == "base" else pair.tuned

    def unmatched(self) -> Iterator[tuple[TensorSpec, int, int]]:
        """Pieces of at most a block that no pair covers: tensor, first entry, number of entries."""
        parts: dict[str, list[TensorSlice]] = {name: [] for name in self.of_side.tensors}
        for pair in self.plan.pairs:
            parts[self.mine(pair).spec.name].append(self.mine(pair))
        for name, spec in self.of_side.tensors.items():
            step = BLOCK_BYTES // spec.dtype.itemsize
            for start, stop in uncovered_runs(spec, parts[name]):
                for first in range(start, stop, step):
                    yield spec, first, min(step, stop - first)

    def copy(self, piece: tuple[TensorSpec, int, int]) -> None:
        spec, first, count = piece
        files = self.base if self.like == "base" else self.tuned
        codes = np.empty(count, dtype=CODE_DTYPE[spec.dtype.itemsize])
        read_entries(files[spec.file], spec, first, codes.view(np.uint8).data)
        dtype = self.dtypes[spec.name]
        wide = widen(codes, spec.dtype, dtype)
        for outlet in self.outlets:
            outlet.writer.write(spec.name, first * dtype.itemsize, wide.data.cast("B"))

    def write(self, unit: WorkUnit) -> list[PairCounts]:
        pair, spec = self.plan.pairs[unit.pair], self.plan.specs[unit.pair]
        part, counts = self.mine(pair), []
        dtype = self.dtypes[part.spec.name]
        with ExitStack() as stack:
            readers = [
                None if o.keep.mask is None else stack.enter_context(MaskReader(o.keep.mask))
                for o in self.outlets
            ]
            for block, base, tuned in read_blocks(self.plan, unit, base=self.base, tuned=self.tuned):
                size = delta_codes(base, tuned, spec, self.view).view(np.float64)
                wide = widen(base, spec.base, dtype), widen(tuned, spec.tuned, dtype)
                chosen = [
                    outlet.keep.choose(block_bits(pair.base, block, reader), size > 0)
                    for outlet, reader in zip(self.outlets, readers, strict=True)
                ]
                for outlet, kept in zip(self.outlets, chosen, strict=True):
                    self._put(outlet, part, block, np.where(kept, wide[1], wide[0]))
                counts.append(_count(size, wide[0] != wide[1], chosen))
        return counts

    def _put(self, outlet: Outlet, part: TensorSlice, block: Block, codes: np.ndarray) -> None:
        """Write the codes of a block of a pair, which are consecutive in it, to the runs of the part."""
        flat = codes.reshape(-1)
        first = block.row * part.rows_cols[1] + block.col
        for start, stop, done in runs_within(part, first, flat.size):
            piece = flat[done : done + stop - start].data.cast("B")
            outlet.writer.write(part.spec.name, start * flat.itemsize, piece)


def _count(size: np.ndarray, changed: np.ndarray, chosen: Sequence[np.ndarray]) -> PairCounts:
    moved = size > 0
    with np.errstate(over="ignore"):
        squares = size * size
    finite = np.isfinite(squares)
    squares[~finite] = 0.0
    return PairCounts(
        entries=size.size,
        changed=int(np.count_nonzero(changed)),
        moved=int(np.count_nonzero(moved)),
        not_finite=int(np.count_nonzero(~finite)),
        square=float(squares.sum()),
        kept=tuple(
            KeptCounts(
                kept=int(np.count_nonzero(kept)),
                changed=int(np.count_nonzero(changed & kept)),
                moved=int(np.count_nonzero(moved & kept)),
                square=float(squares[kept].sum()),
            )
            for kept in chosen
        ),
    )
