"""One pass over a base, the full run and every retrained run: how far each comes to the full run.

Contract: each checkpoint is read once; memory a worker is one block of every checkpoint. Results do not
depend on the number of workers. Agreement is counted by a kernel under the criteria of `stats.recovery`,
inside and outside one mask for all runs: that of a file, or what full changed (`value`). Run 0 is the base
itself. Frozen means that stored codes outside a run's *own* mask are the base's; dtypes that differ are
compared after exact widening.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from sparsity_audit.align.records import TensorSlice
from sparsity_audit.checkpoint.store import Catalogue
from sparsity_audit.compare.accumulate import Accumulator, Kernel, KernelSpec
from sparsity_audit.compare.convert import widen
from sparsity_audit.compare.numpy_kernel import to_float64
from sparsity_audit.masks.reader import MaskCatalogue, MaskReader
from sparsity_audit.passes.ahead import Reads
from sparsity_audit.passes.aligned import AlignedRuns, AlignedTensor, align_runs
from sparsity_audit.passes.engine import Workers, map_units
from sparsity_audit.passes.execute import read_part
from sparsity_audit.passes.mask_bits import block_bits, runs_within
from sparsity_audit.passes.open_files import OpenFiles
from sparsity_audit.passes.plan import Block, WorkUnit, blocks_of
from sparsity_audit.stats.recovery import CRITERIA, RecoverySums
from sparsity_audit.types import Criterion, DType, View, common_dtype

__all__ = [
    "FULL_MASK",
    "FrozenCount",
    "MaskChoice",
    "Offender",
    "RecoveryPass",
    "align_recovery",
    "measure_recovery",
]

_UNIT_BYTES = 64 << 20


FULL_MASK = "full"
"""The mask of what full changed, made while reading."""

MaskChoice = MaskCatalogue | str | None
"""A mask file, `FULL_MASK`, or None where a run has no mask of its own."""

_EXACT_IN_BF16 = frozenset({DType.BF16, DType.F8_E4M3, DType.F8_E5M2})
_SPECS = {
    dtype: KernelSpec(dtype=dtype, criteria=CRITERIA, mask=1, level="counts")
    for dtype in DType
    if dtype.kind == "float"
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Offender:
    """An entry that should have been frozen.

    Args:
        tensor: The base's name of its tensor.
        entry: Its row-major position there.
        base: Its value in the base.
        run: Its value in the run.
    """

    tensor: str
    entry: int
    base: float
    run: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenCount:
    """Entries outside a run's own mask.

    Args:
        entries: How many there are.
        moved: Entries among them whose stored code is not the base's.
        first: The first of those, in order of tensors and entries.
    """

    entries: int
    moved: int
    first: Offender | None

    @classmethod
    def total(cls, parts: Sequence[FrozenCount]) -> FrozenCount:
        """Of parts in order."""
        return cls(
            entries=sum(part.entries for part in parts),
            moved=sum(part.moved for part in parts),
            first=next((part.first for part in parts if part.first is not None), None),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryPass:
    """What the pass found.

    Args:
        sums: Pair → sums of each run, the base first.
        frozen: For each run, the base first: entries outside its own mask; None where it has none.
    """

    sums: Mapping[str, tuple[RecoverySums, ...]]
    frozen: tuple[FrozenCount | None, ...]


def align_recovery(
    base: Catalogue,
    full: Catalogue,
    runs: Sequence[Catalogue],
    *,
    maps: Sequence[tuple[str, str]],
    view: View,
) -> AlignedRuns:
    """Match the full run and the retrained runs with the base: float tensors that all of them compare alike.

    Args:
        base: The checkpoint all started from.
        full: The full run.
        runs: The retrained runs.
        maps: Rules that rename tensors of the runs to base names.
        view: The view whose numbers are compared.

    Raises:
        AlignmentError: Names of a run are ambiguous.
    """
    return align_runs(
        base,
        (full, *runs),
        maps=maps,
        criteria=(Criterion.parse("bitwise"), Criterion.parse("value")),
        mask=1,
        view=view,
        unit_bytes=_UNIT_BYTES,
        refuse=_refusal,
    )


def _refusal(tensor: AlignedTensor) -> str | None:
    return None if tensor.is_float else "no float numbers"


def measure_recovery(
    base: Catalogue,
    full: Catalogue,
    runs: Sequence[Catalogue],
    aligned: AlignedRuns,
    *,
    mask: MaskCatalogue | str,
    own_masks: Sequence[MaskChoice],
    view: View,
    kernel: Kernel,
    workers: Workers,
) -> RecoveryPass:
    """Compare the runs, and the base, with the full run.

    Args:
        base: The checkpoint all started from.
        full: The full run.
        runs: The retrained runs.
        aligned: Full and runs, in that order, matched with the base.
        mask: What inside and outside mean, in base coordinates.
        own_masks: What each run was allowed to move.
        view: The view whose numbers are compared; the frozen check is of stored codes in either.
        kernel: Counts agreement.
        workers: Threads.

    Raises:
        ChangedInputError: A file changed during the pass.
        MaskError: A mask is damaged.
    """
    with ExitStack() as stack:
        files = []
        for catalogue in (base, full, *runs):
            files.append(OpenFiles(catalogue))
            stack.callback(files[-1].close)
        task = _Task(aligned, files, mask, tuple(own_masks), view, kernel)
        units = aligned.units
        reads = Reads(aligned.parts_of, tuple(files))
        results = map_units(task.run, reads.ordered(units), workers=workers, ahead=reads)
        found = {unit.key: result for unit, result in results}
    for catalogue in (base, full, *runs):
        catalogue.verify_unchanged()
    numbers = range(1 + len(runs))
    blocks: dict[str, list[Sequence[RecoverySums]]] = {}
    frozen: list[list[FrozenCount]] = [[] for _ in runs]
    for unit in units:
        result = found[unit.key]
        blocks.setdefault(aligned.tensors[unit.pair].name, []).extend(result.sums)
        for held, parts in zip(frozen, result.frozen, strict=True):
            held.extend(parts)
    return RecoveryPass(
        sums={
            name: tuple(RecoverySums.of_blocks([sums[number] for sums in of_pair]) for number in numbers)
            for name, of_pair in blocks.items()
        },
        frozen=(
            None,
            *(
                None if own is None else FrozenCount.total(parts)
                for own, parts in zip(own_masks, frozen, strict=True)
            ),
        ),
    )


@dataclass(slots=True, kw_only=True)
class _UnitResult:
    """Of each block the sums of all runs; of each run what moved outside of its mask."""

    sums: list[tuple[RecoverySums, ...]]
    frozen: list[list[FrozenCount]]


@dataclass(frozen=True, slots=True)
class _Task:
    """What the workers share; files are those of base, full and the runs."""

    aligned: AlignedRuns
    files: Sequence[OpenFiles]
    mask: MaskCatalogue | str
    own_masks: tuple[MaskChoice, ...]
    view: View
    kernel: Kernel

    def run(self, unit: WorkUnit) -> _UnitResult:
        tensor = self.aligned.tensors[unit.pair]
        parts = (tensor.base, *tensor.tuned)
        result = _UnitResult(sums=[], frozen=[[] for _ in self.own_masks])
        with ExitStack() as stack:
            held = {
                id(mask): stack.enter_context(MaskReader(mask))
                for mask in (self.mask, *self.own_masks)
                if isinstance(mask, MaskCatalogue)
            }
            for block in blocks_of(unit, itemsize=8):
                first, shape = block.row * unit.total_cols + block.col, (block.num_rows, block.num_cols)
                stored = [
                    read_part(part, files, f"side {number}", first, shape).reshape(-1)
                    for number, (part, files) in enumerate(zip(parts, self.files, strict=True))
                ]
                dtypes = [part.spec.dtype for part in parts]
                seen = self._seen(stored, dtypes)
                changed = self._changed(seen[0], seen[1])
                masks = [
                    self._bits(mask, held, parts[0], block, changed) for mask in (self.mask, *self.own_masks)
                ]
                result.sums.append(self._sums(seen, masks[0]))
                for number, own in enumerate(self.own_masks):
                    if own is not None:
                        sides = (stored[0], dtypes[0]), (stored[2 + number], dtypes[2 + number])
                        result.frozen[number].append(_frozen(sides, ~masks[1 + number], parts[0], first))
        return result

    def _seen(self, stored: Sequence[np.ndarray], dtypes: Sequence[DType]) -> list[tuple[np.ndarray, DType]]:
        """Codes and dtypes in the view: bf16 everywhere, where it rounds and a side is not exact in it."""
        if self.view is View.NATIVE or set(dtypes) <= _EXACT_IN_BF16:
            return list(zip(stored, dtypes, strict=True))
        rounded = []
        for codes, dtype in zip(stored, dtypes, strict=True):
            out = np.empty(codes.shape, dtype=np.uint16)
            self.kernel.to_bf16(codes, dtype, out)
            rounded.append((out, DType.BF16))
        return rounded

    def _changed(self, base: tuple[np.ndarray, DType], full: tuple[np.ndarray, DType]) -> np.ndarray:
        """Entries that full changed under `value`."""
        a, b, dtype = _in_one_dtype(base, full)
        bits = np.empty((1, -(-a.size // 8)), dtype=np.uint8)
        accumulator = Accumulator(_SPECS[dtype], rows=1, cols=a.size)
        self.kernel.compare(
            a.reshape(1, -1), b.reshape(1, -1), accumulator, first_row=0, first_col=0, bits=bits
        )
        return np.unpackbits(bits, count=a.size, bitorder="little").view(np.bool_)

    def _bits(
        self,
        mask: MaskChoice,
        held: Mapping[int, MaskReader],
        part: TensorSlice,
        block: Block,
        changed: np.ndarray,
    ) -> np.ndarray:
        if isinstance(mask, MaskCatalogue):
            return block_bits(part, block, held[id(mask)]).reshape(-1)
        return changed

    def _sums(self, seen: Sequence[tuple[np.ndarray, DType]], inside: np.ndarray) -> tuple[RecoverySums, ...]:
        """Of the base and each run against full."""
        values = [to_float64(codes, dtype) for codes, dtype in seen]
        base, full = values[:2]
        found = []
        for number in (0, *range(2, len(seen))):
            a, b, dtype = _in_one_dtype(seen[1], seen[number])
            unequal = np.array([self._unequal(a[side], b[side], dtype) for side in (inside, ~inside)])
            with np.errstate(invalid="ignore", over="ignore"):
                run = values[number]
                found.append(
                    RecoverySums.from_values(full - base, run - base, run - full, inside, unequal=unequal)
                )
        return tuple(found)

    def _unequal(self, full: np.ndarray, run: np.ndarray, dtype: DType) -> np.ndarray:
        """Entries that differ under each criterion, int64[criteria]."""
        accumulator = Accumulator(_SPECS[dtype], rows=1, cols=full.size)
        if full.size:
            self.kernel.compare(
                full.reshape(1, -1), run.reshape(1, -1), accumulator, first_row=0, first_col=0, bits=None
            )
            self.kernel.finish(accumulator)
        return accumulator.changed


def _in_one_dtype(
    a: tuple[np.ndarray, DType], b: tuple[np.ndarray, DType]
) -> tuple[np.ndarray, np.ndarray, DType]:
    dtype = common_dtype(a[1], b[1])
    assert dtype is not None, (a[1], b[1])  # both match the base, and are floats
    return widen(a[0], a[1], dtype), widen(b[0], b[1], dtype), dtype


def _frozen(
    sides: tuple[tuple[np.ndarray, DType], tuple[np.ndarray, DType]],
    outside: np.ndarray,
    part: TensorSlice,
    first: int,
) -> FrozenCount:
    """Entries of a block outside a mask, and which moved; `first` is the block's first entry in the part."""
    base, run, dtype = _in_one_dtype(*sides)
    moved = np.flatnonzero(outside & (base != run))
    offender = None
    if len(moved):
        place = int(moved[0])
        ((entry, _, _),) = runs_within(part, first + place, 1)
        offender = Offender(
            tensor=part.spec.name,
            entry=entry,
            base=float(to_float64(base[place : place + 1], dtype)[0]),
            run=float(to_float64(run[place : place + 1], dtype)[0]),
        )
    return FrozenCount(entries=int(np.count_nonzero(outside)), moved=len(moved), first=offender)
