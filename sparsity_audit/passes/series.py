"""One pass over a base and T saved steps: masks against the base, and codes against earlier steps.

Contract: each byte is read once; memory a worker is one block of every checkpoint. Counts are integers, so
that neither blocks nor workers matter. Codes are compared as stored, so a tensor that is not stored alike in
every step is left out and named.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass

import numpy as np

from sparsity_audit.checkpoint.store import Catalogue
from sparsity_audit.compare.accumulate import Accumulator, Kernel
from sparsity_audit.compare.deltas import codes_in_view
from sparsity_audit.compare.dispatch import load_kernel
from sparsity_audit.compare.pair import PairSpec
from sparsity_audit.masks.bitmask import popcount
from sparsity_audit.passes.ahead import Reads
from sparsity_audit.passes.aligned import AlignedRuns, AlignedTensor, align_runs
from sparsity_audit.passes.engine import Workers, map_units
from sparsity_audit.passes.execute import read_part
from sparsity_audit.passes.open_files import OpenFiles
from sparsity_audit.passes.plan import WorkUnit, blocks_of, default_criteria
from sparsity_audit.stats.trajectory import TrajectoryCounts
from sparsity_audit.types import Criterion, View

__all__ = ["SeriesPass", "count_series"]

_UNIT_BYTES = 64 << 20
_MAX_I32 = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SeriesPass:
    """What the pass found.

    Args:
        counts: By tensor, in base order.
        left_out: Tensor → why it was not read, or what of it was not.
    """

    counts: Mapping[str, TrajectoryCounts]
    left_out: Mapping[str, str]


def count_series(
    base: Catalogue,
    steps: Sequence[Catalogue],
    *,
    criterion: Criterion,
    view: View,
    lags: Sequence[int],
    maps: Sequence[tuple[str, str]] = (),
    unit_bytes: int = _UNIT_BYTES,
    workers: Workers = 1,
) -> SeriesPass:
    """Count every entry that all steps compare.

    Args:
        base: θ_0.
        steps: θ_1 … θ_T, in order.
        criterion: What changed means against the base; not `top`.
        view: The view in which it is asked.
        lags: How many saved steps lie between codes that are compared.
        maps: Rules that rename tensors of the steps to base names.
        unit_bytes: Aim of a work unit's bytes of one checkpoint; the result is the same.
        workers: Threads; the result is the same.

    Raises:
        ChangedInputError: A file changed during the pass.
    """
    criteria = default_criteria((criterion,), level="counts")
    aligned = align_runs(
        base,
        steps,
        maps=maps,
        criteria=criteria,
        mask=criteria.index(criterion),
        view=view,
        unit_bytes=unit_bytes,
        refuse=_refusal,
    )
    num_bytes = (len(steps) + 1) * sum(t.base.num_entries * t.specs[0].base.itemsize for t in aligned.tensors)
    kernel = load_kernel("auto", num_bytes=num_bytes)
    with ExitStack() as stack:
        files = [stack.enter_context(closing(OpenFiles(catalogue))) for catalogue in (base, *steps)]

        def work(unit: WorkUnit) -> TrajectoryCounts:
            return _of_unit(unit, aligned.tensors[unit.pair], files, kernel=kernel, view=view, lags=lags)

        reads = Reads(aligned.parts_of, tuple(files))
        results = map_units(work, reads.ordered(aligned.units), workers=workers, ahead=reads)
        counts = _merged(aligned, results, lags)
    for catalogue in (base, *steps):
        catalogue.verify_unchanged()
    return SeriesPass(counts=counts, left_out=aligned.left_out)


def _refusal(tensor: AlignedTensor) -> str | None:
    stored = {spec.base for spec in tensor.specs} | {spec.tuned for spec in tensor.specs}
    if len(stored) > 1:
        return f"stored as {' and '.join(sorted(dtype.value for dtype in stored))}"
    return None


def _merged(
    aligned: AlignedRuns,
    results: Iterable[tuple[WorkUnit, TrajectoryCounts]],
    lags: Sequence[int],
) -> dict[str, TrajectoryCounts]:
    counts = {tensor.name: _nothing(tensor, len(tensor.tuned), lags) for tensor in aligned.tensors}
    for unit, found in results:
        name = aligned.tensors[unit.pair].name
        counts[name] = counts[name].merge(found)
    return counts


def _nothing(tensor: AlignedTensor, num_steps: int, lags: Sequence[int]) -> TrajectoryCounts:
    """No entry yet; lags that reach back beyond the base are marked from the start."""
    zeros = np.zeros(num_steps, dtype=np.int64)
    reach = np.arange(1, num_steps + 1)
    return TrajectoryCounts(
        entries=0,
        itemsize=tensor.specs[0].base.itemsize,
        index_bytes=4 if tensor.base.num_entries <= _MAX_I32 else 8,
        changed=zeros,
        born=zeros,
        died=zeros,
        seen=zeros,
        kept=zeros,
        moved=np.where(reach >= np.array(lags)[:, np.newaxis], 0, -1).astype(np.int64),
    )


def _of_unit(
    unit: WorkUnit,
    tensor: AlignedTensor,
    files: Sequence[OpenFiles],
    *,
    kernel: Kernel,
    view: View,
    lags: Sequence[int],
) -> TrajectoryCounts:
    parts, cols = (tensor.base, *tensor.tuned), tensor.base.rows_cols[1]
    total = _nothing(tensor, len(tensor.tuned), lags)
    for block in blocks_of(unit, itemsize=tensor.specs[0].base.itemsize):
        first, shape = block.row * cols + block.col, (block.num_rows, block.num_cols)
        codes = [
            read_part(part, opened, f"step {number}", first, shape)
            for number, (part, opened) in enumerate(zip(parts, files, strict=True))
        ]
        masks = [
            _mask(codes[0], tuned, spec, kernel, view)
            for tuned, spec in zip(codes[1:], tensor.specs, strict=True)
        ]
        total = total.merge(_of_block(codes, masks, total, lags))
    return total


def _mask(base: np.ndarray, tuned: np.ndarray, spec: PairSpec, kernel: Kernel, view: View) -> np.ndarray:
    """Packed bits of the entries of a block that changed."""
    base, tuned, dtype = codes_in_view(base, tuned, spec, view)
    asked = spec.kernel_spec(view if spec.has_served_view else View.NATIVE)
    assert asked.dtype is dtype, (asked.dtype, dtype)
    rows, cols = base.shape
    bits = np.empty((rows, -(-cols // 8)), dtype=np.uint8)
    kernel.compare(base, tuned, Accumulator(asked, rows=rows, cols=cols), first_row=0, first_col=0, bits=bits)
    return bits


def _of_block(
    codes: Sequence[np.ndarray], masks: Sequence[np.ndarray], like: TrajectoryCounts, lags: Sequence[int]
) -> TrajectoryCounts:
    before, ever = np.zeros_like(masks[0]), np.zeros_like(masks[0])
    rows: dict[str, list[int]] = {name: [] for name in ("changed", "born", "died", "seen", "kept")}
    for mask in masks:
        ever = ever | mask
        for name, bits in (
            ("changed", mask),
            ("born", mask & ~before),
            ("died", before & ~mask),
            ("seen", ever),
            ("kept", mask & masks[-1]),
        ):
            rows[name].append(popcount(bits))
        before = mask
    moved = np.full(like.moved.shape, -1, dtype=np.int64)
    for row, lag in enumerate(lags):
        for step in range(lag, len(codes)):
            moved[row, step - 1] = np.count_nonzero(codes[step] != codes[step - lag])
    return TrajectoryCounts(
        entries=codes[0].size,
        itemsize=like.itemsize,
        index_bytes=like.index_bytes,
        moved=moved,
        **{name: np.array(values, dtype=np.int64) for name, values in rows.items()},
    )
