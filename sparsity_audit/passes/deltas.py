"""One pass over a base and K tuned checkpoints: sums of products and signs of their Δ.

Contract: memory a worker is one block of every checkpoint. Results do not depend on the number of workers.
Only float tensors that every run matches with the same slice of the base are read; the others are named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from sparsity_audit.checkpoint.store import Catalogue
from sparsity_audit.compare.deltas import codes_in_view, float_deltas
from sparsity_audit.masks.reader import MaskCatalogue, MaskReader
from sparsity_audit.passes.aligned import AlignedRuns, align_runs
from sparsity_audit.passes.execute import OpenFiles, in_threads, read_part
from sparsity_audit.passes.mask_bits import block_bits
from sparsity_audit.passes.plan import WorkUnit, blocks_of
from sparsity_audit.stats.agreement import DeltaSums
from sparsity_audit.types import View

__all__ = ["DeltaPass", "sum_deltas"]


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
    aligned = align_runs(base, runs, maps=maps, view=view)
    held = [pair.base.spec.name for pair in aligned.plans[0].pairs if pair.name not in aligned.left_out]
    unmasked = {name: "in no mask" for name in held if any(name not in mask.tensors for mask in masks)}
    units = [u for u in aligned.units if aligned.plans[0].pairs[u.pair].base.spec.name not in unmasked]
    with ExitStack() as stack:
        of_base = _opened(base, stack)
        of_runs = [_opened(run, stack) for run in runs]

        def work(unit: WorkUnit) -> list[DeltaSums]:
            with ExitStack() as inner:
                readers = [inner.enter_context(MaskReader(mask)) for mask in masks]
                return list(_of_unit(unit, aligned, of_base, of_runs, readers, view))

        blocks = {unit.key: found for unit, found in in_threads(work, units, workers=workers)}
    for catalogue in (base, *runs):
        catalogue.verify_unchanged()
    ordered = [block for unit in units for block in blocks[unit.key]]
    left_out = dict(sorted({**aligned.left_out, **unmasked}.items()))
    return DeltaPass(sums=DeltaSums.of_blocks(ordered, len(runs)), left_out=left_out)


def _opened(catalogue: Catalogue, stack: ExitStack) -> OpenFiles:
    files = OpenFiles(catalogue)
    stack.callback(files.close)
    return files


def _of_unit(
    unit: WorkUnit,
    aligned: AlignedRuns,
    of_base: OpenFiles,
    of_runs: Sequence[OpenFiles],
    readers: Sequence[MaskReader],
    view: View,
) -> list[DeltaSums]:
    name = aligned.name(unit)
    pairs, specs = aligned.pairs(name), aligned.specs(name)
    base = pairs[0].base
    found = []
    for block in blocks_of(unit, itemsize=8):
        first, shape = block.row * unit.total_cols + block.col, (block.num_rows, block.num_cols)
        deltas = np.empty((len(pairs), block.num_rows * block.num_cols))
        masks = np.empty(deltas.shape, dtype=np.bool_)
        codes = read_part(base, of_base, "base", first, shape)
        for run, (pair, spec) in enumerate(zip(pairs, specs, strict=True)):
            tuned = read_part(pair.tuned, of_runs[run], "tuned", first, shape)
            deltas[run] = float_deltas(*codes_in_view(codes, tuned, spec, view)).reshape(-1)
            masks[run] = block_bits(base, block, readers[run]).reshape(-1)
        found.append(DeltaSums.from_deltas(deltas, masks))
    return found
