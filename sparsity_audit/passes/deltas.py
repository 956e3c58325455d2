"""One pass over a base and K tuned checkpoints: sums of products and signs of their Δ.

Contract: memory a worker is one block of every checkpoint. Results do not depend on the number of workers.
Only float tensors that every run matches with the same slice of the base are read; the others are named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from sparsity_audit.align.match import match
from sparsity_audit.align.records import Pair
from sparsity_audit.checkpoint.store import Catalogue
from sparsity_audit.compare.deltas import codes_in_view, float_deltas
from sparsity_audit.compare.pair import PairSpec
from sparsity_audit.masks.reader import MaskCatalogue, MaskReader
from sparsity_audit.passes.execute import OpenFiles, in_threads, read_part
from sparsity_audit.passes.plan import Plan, WorkUnit, blocks_of, make_plan
from sparsity_audit.stats.agreement import DeltaSums
from sparsity_audit.types import Criterion, View

__all__ = ["DeltaPass", "sum_deltas"]

_UNIT_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaPass:
    """What the pass found.

    Args:
        sums: Over all tensors read.
        left_out: Tensor → why its Δ were not read.
    """

    sums: DeltaSums
    left_out: Mapping[str, str]


def sum_deltas(
    base: Catalogue,
    runs: Sequence[Catalogue],
    masks: Sequence[MaskCatalogue],
    *,
    maps: Sequence[tuple[str, str]],
    view: View,
    workers: int = 1,
) -> DeltaPass:
    """Sums over every entry that all runs compare, and over the intersections of their masks.

    Args:
        base: The checkpoint all runs started from.
        runs: The tuned checkpoints.
        masks: Their masks, packed, in base coordinates.
        maps: Rules that rename tensors of the runs to base names.
        view: The view whose Δ count.
        workers: Threads.

    Raises:
        ChangedInputError: A file changed during the pass.
    """
    plans = [_plan(base, run, maps, view) for run in runs]
    by_name = [{pair.name: number for number, pair in enumerate(plan.pairs)} for plan in plans]
    left_out = dict(_unlike(plans, by_name, masks))
    units = [unit for unit in plans[0].units if plans[0].pairs[unit.pair].name not in left_out]
    with ExitStack() as stack:
        of_base = _opened(base, stack)
        of_runs = [_opened(run, stack) for run in runs]

        def work(unit: WorkUnit) -> list[DeltaSums]:
            name = plans[0].pairs[unit.pair].name
            numbers = [names[name] for names in by_name]
            with ExitStack() as inner:
                readers = [inner.enter_context(MaskReader(mask)) for mask in masks]
                return list(_of_unit(unit, plans, numbers, of_base, of_runs, readers, view))

        blocks = {unit.key: found for unit, found in in_threads(work, units, workers=workers)}
    for catalogue in (base, *runs):
        catalogue.verify_unchanged()
    ordered = [block for unit in units for block in blocks[unit.key]]
    return DeltaPass(sums=DeltaSums.of_blocks(ordered, len(runs)), left_out=left_out)


def _opened(catalogue: Catalogue, stack: ExitStack) -> OpenFiles:
    files = OpenFiles(catalogue)
    stack.callback(files.close)
    return files


def _plan(base: Catalogue, run: Catalogue, maps: Sequence[tuple[str, str]], view: View) -> Plan:
    alignment = match(base, run, maps=tuple(maps))
    value = Criterion.parse("value")
    specs = tuple(
        PairSpec(base=p.base.spec.dtype, tuned=p.tuned.spec.dtype, criteria=(value,), mask=0, view=view)
        for p in alignment.pairs
    )
    return make_plan(base, run, alignment, specs=specs, unit_bytes=_UNIT_BYTES)


def _unlike(
    plans: Sequence[Plan], by_name: Sequence[Mapping[str, int]], masks: Sequence[MaskCatalogue]
) -> list[tuple[str, str]]:
    found = []
    for name in sorted({name for names in by_name for name in names}):
        if not all(name in names for names in by_name):
            found.append((name, "not matched in every run"))
            continue
        pairs = [plan.pairs[names[name]] for plan, names in zip(plans, by_name, strict=True)]
        specs = [plan.specs[names[name]] for plan, names in zip(plans, by_name, strict=True)]
        first = pairs[0].base
        if any((p.base.start_entry, p.base.shape, p.base.num_runs) != _place(pairs[0]) for p in pairs):
            found.append((name, "matched with different slices of the base"))
        elif first.num_runs > 1 or any(pair.is_scaled for pair in pairs):
            found.append((name, "rows alternate or values are scaled: its Δ are not read"))
        elif len(first.shape) < 2 and not first.is_whole:
            found.append((name, "a part of a vector: its Δ are not read"))
        elif any(spec.native_dtype.kind != "float" for spec in specs):
            found.append((name, "no float numbers"))
        elif any(first.spec.name not in mask.tensors for mask in masks):
            found.append((name, "in no mask"))
    return found


def _place(pair: Pair) -> tuple[int, tuple[int, ...], int]:
    return pair.base.start_entry, pair.base.shape, pair.base.num_runs


def _of_unit(
    unit: WorkUnit,
    plans: Sequence[Plan],
    numbers: Sequence[int],
    of_base: OpenFiles,
    of_runs: Sequence[OpenFiles],
    readers: Sequence[MaskReader],
    view: View,
) -> list[DeltaSums]:
    base = plans[0].pairs[unit.pair].base
    cols = base.rows_cols[1]
    found = []
    for block in blocks_of(unit, itemsize=8):
        first, shape = block.row * cols + block.col, (block.num_rows, block.num_cols)
        deltas = np.empty((len(plans), block.num_rows * block.num_cols))
        masks = np.empty(deltas.shape, dtype=np.bool_)
        codes = read_part(base, of_base, "base", first, shape)
        for run, (plan, number) in enumerate(zip(plans, numbers, strict=True)):
            tuned = read_part(plan.pairs[number].tuned, of_runs[run], "tuned", first, shape)
            seen = codes_in_view(codes, tuned, plan.specs[number], view)
            deltas[run] = float_deltas(*seen).reshape(-1)
            row = base.start_entry // cols + block.row
            bits = readers[run].read_packed(base.spec.name, row, row + block.num_rows)
            wide = np.unpackbits(bits, axis=-1, count=cols, bitorder="little")
            masks[run] = wide[:, block.col : block.col + block.num_cols].reshape(-1).view(np.bool_)
        found.append(DeltaSums.from_deltas(deltas, masks))
    return found
