"""One pass over a base and K tuned checkpoints: sums of products and signs of their Δ.

Contract: memory a worker is one block of every checkpoint. Results do not depend on the number of workers.
Only float tensors that every run matches with the same slice of the base are read; the others are named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass

import numpy as np

from sparsity_audit.checkpoint.store import Catalogue
from sparsity_audit.compare.deltas import codes_in_view, float_deltas
from sparsity_audit.masks.reader import MaskCatalogue, MaskReader
from sparsity_audit.passes.ahead import Reads
from sparsity_audit.passes.aligned import AlignedTensor, align_runs
from sparsity_audit.passes.engine import Workers, map_units
from sparsity_audit.passes.execute import read_part
from sparsity_audit.passes.open_files import OpenFiles
from sparsity_audit.passes.plan import WorkUnit, blocks_of
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
    workers: Workers = 1,
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
    aligned = align_runs(
        base,
        runs,
        maps=maps,
        criteria=(Criterion.parse("value"),),
        mask=0,
        view=view,
        unit_bytes=_UNIT_BYTES,
        refuse=lambda tensor: _refusal(tensor, masks),
    )
    with ExitStack() as stack:
        of_base, *of_runs = [stack.enter_context(closing(OpenFiles(c))) for c in (base, *runs)]

        def work(unit: WorkUnit) -> list[DeltaSums]:
            with ExitStack() as inner:
                readers = [inner.enter_context(MaskReader(mask)) for mask in masks]
                return _of_unit(unit, aligned.tensors[unit.pair], of_base, of_runs, readers, view)

        reads = Reads(aligned.parts_of, (of_base, *of_runs))
        found = map_units(work, reads.ordered(aligned.units), workers=workers, ahead=reads)
        blocks = {unit.key: result for unit, result in found}
    for catalogue in (base, *runs):
        catalogue.verify_unchanged()
    ordered = [block for unit in aligned.units for block in blocks[unit.key]]
    return DeltaPass(sums=DeltaSums.of_blocks(ordered, len(runs)), left_out=aligned.left_out)


def _refusal(tensor: AlignedTensor, masks: Sequence[MaskCatalogue]) -> str | None:
    if tensor.base.num_runs > 1 or (len(tensor.base.shape) < 2 and not tensor.base.is_whole):
        return "its rows are no run of rows of the mask"
    if not tensor.is_float:
        return "no float numbers"
    return None if all(tensor.base.spec.name in mask.tensors for mask in masks) else "not in every mask"


def _of_unit(
    unit: WorkUnit,
    tensor: AlignedTensor,
    of_base: OpenFiles,
    of_runs: Sequence[OpenFiles],
    readers: Sequence[MaskReader],
    view: View,
) -> list[DeltaSums]:
    base, cols = tensor.base, tensor.base.rows_cols[1]
    found = []
    for block in blocks_of(unit, itemsize=8):
        first, shape = block.row * cols + block.col, (block.num_rows, block.num_cols)
        deltas = np.empty((len(readers), block.num_rows * block.num_cols))
        masks = np.empty(deltas.shape, dtype=np.bool_)
        codes = read_part(base, of_base, "base", first, shape)
        for run, (part, spec, files) in enumerate(zip(tensor.tuned, tensor.specs, of_runs, strict=True)):
            tuned = read_part(part, files, "tuned", first, shape)
            deltas[run] = float_deltas(*codes_in_view(codes, tuned, spec, view)).reshape(-1)
            row = base.start_entry // cols + block.row
            bits = readers[run].read_packed(base.spec.name, row, row + block.num_rows)
            wide = np.unpackbits(bits, axis=-1, count=cols, bitorder="little")
            masks[run] = wide[:, block.col : block.col + block.num_cols].reshape(-1).view(np.bool_)
        found.append(DeltaSums.from_deltas(deltas, masks))
    return found
