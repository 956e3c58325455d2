"""A second pass, over the base alone: how many entries of each stratum lie in each row and column.

Contract: the counts are exact integers and are folded into the magnitude null in an order that depends on the
pair alone, so that results do not depend on workers or work units. Memory a worker: one block, and
columns × strata counters (8 bytes each; some 60 strata occur in a weight matrix). Each file is checked to be
the catalogued one after it was read. Tensors without a stripe score, or whose changes by stratum are not
known, are not read; those with a single stratum need no reading. Strata are those of the first pass: of the
view's codes, and of the values where they are codes times block scales.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sparsity_audit.align.records import TensorSlice
from sparsity_audit.checkpoint.reading import read_entries
from sparsity_audit.checkpoint.store import ByteSource
from sparsity_audit.compare.accumulate import CODE_DTYPE
from sparsity_audit.compare.convert import widen
from sparsity_audit.compare.numpy_kernel import NumpyKernel, strata_of
from sparsity_audit.compare.pair import PairSpec
from sparsity_audit.passes.ahead import Reads
from sparsity_audit.passes.engine import Workers, map_units
from sparsity_audit.passes.execute import descaler
from sparsity_audit.passes.open_files import OpenFiles
from sparsity_audit.passes.plan import Block, Plan, WorkUnit, blocks_of
from sparsity_audit.stats.stripes import MagnitudeNull, MatrixNull, StratumRate, line_score, stratum_rates
from sparsity_audit.stats.tally import Tally
from sparsity_audit.types import DType, View

__all__ = ["magnitude_nulls", "margin_bytes"]

_Rates = tuple[StratumRate, ...]


def margin_bytes(plan: Plan) -> int:
    """Bytes that `magnitude_nulls` reads at most: the base's side of every matrix."""
    return sum(
        pair.base.num_entries * spec.base.itemsize
        for pair, spec in zip(plan.pairs, plan.specs, strict=True)
        if min(pair.base.rows_cols) > 1
    )


def magnitude_nulls(
    plan: Plan,
    tallies: tuple[Tally, ...],
    *,
    view: View,
    workers: Workers = 1,
    on_bytes: Callable[[int], None] | None = None,
) -> tuple[MatrixNull | None, ...]:
    """The magnitude null of each pair's rows and columns; None where it has none.

    Args:
        plan: The plan that was run.
        tallies: Its tallies at level `full`.
        view: The view in which rows and columns were counted.
        workers: Threads, one a tensor.
        on_bytes: Called in this thread with the bytes read of each tensor.

    Raises:
        ChangedInputError: A file of the base changed since the plan was made.
    """
    nulls: list[MatrixNull | None] = [None] * len(plan.pairs)
    rates: dict[int, _Rates] = {}
    units: list[WorkUnit] = []
    for number, (pair, tally) in enumerate(zip(plan.pairs, tallies, strict=True)):
        rows, cols = pair.base.rows_cols
        if tally.axes is None or line_score(tally.axes.rows, cols) is None:
            continue
        found = stratum_rates(tally, view)
        if found is None:
            continue
        rates[number] = found
        if len(found) == 1:
            nulls[number] = _single(found, rows, cols)
        else:
            units.append(WorkUnit(pair=number, rows=(0, rows), cols=(0, cols), total_cols=cols))
    files = OpenFiles(plan.base)
    try:
        reads = Reads(lambda unit: (plan.pairs[unit.pair].base,), (files,))
        results = map_units(
            lambda unit: _count(plan, unit, rates[unit.pair], files=files, view=view),
            reads.ordered(units),
            workers=workers,
            ahead=reads,
        )
        for unit, null in results:
            nulls[unit.pair] = null
            if on_bytes is not None:
                on_bytes(unit.num_entries * plan.specs[unit.pair].base.itemsize)
    finally:
        files.close()
    return tuple(nulls)


def _single(rates: _Rates, rows: int, cols: int) -> MatrixNull:
    ends = []
    for lines, across in ((rows, cols), (cols, rows)):
        null = MagnitudeNull(rates, lines=lines, across=across)
        null.fold(np.full((lines, 1), across, dtype=np.int64))
        ends.append(null.result())
    return MatrixNull(rows=ends[0], cols=ends[1])


def _count(plan: Plan, unit: WorkUnit, rates: _Rates, *, files: OpenFiles, view: View) -> MatrixNull:
    part, spec = plan.pairs[unit.pair].base, plan.specs[unit.pair]
    rows, cols = part.rows_cols
    by_row = MagnitudeNull(rates, lines=rows, across=cols)
    by_col = MagnitudeNull(rates, lines=cols, across=rows)
    strata = _Strata(spec.of_values, rates, served=view is View.SERVED and spec.has_served_view)
    values = descaler(part, files) if spec.scaled else None
    width = len(rates)
    columns = np.zeros(cols * width, dtype=np.int64)
    pending = np.zeros((1, width), dtype=np.int64)
    for block in blocks_of(unit, itemsize=spec.base.itemsize):
        codes = _read(part, files[part.spec.file], block, cols)
        if values is not None:
            codes = values(codes, first_row=block.row, first_col=block.col)
        found = strata.of(codes)
        lines = np.arange(block.num_rows)[:, np.newaxis]
        in_rows = np.bincount((lines * width + found).reshape(-1), minlength=block.num_rows * width)
        across = np.arange(block.num_cols) * width
        last = (block.col + block.num_cols) * width
        found += across
        columns[block.col * width : last] += np.bincount(found.reshape(-1), minlength=block.num_cols * width)
        pending = pending + in_rows.reshape(block.num_rows, width)
        if block.col + block.num_cols == cols:
            by_row.fold(pending)
            pending = np.zeros((1, width), dtype=np.int64)
    plan.base.files[part.spec.file].verify_unchanged()
    if part.scale is not None:
        plan.base.files[part.scale.spec.file].verify_unchanged()
    counted = columns.reshape(cols, width).sum(axis=0).tolist()
    assert counted == [rate.entries for rate in rates], "both passes bin the same numbers"
    by_col.fold(columns.reshape(cols, width))
    return MatrixNull(rows=by_row.result(), cols=by_col.result())


def _read(part: TensorSlice, file: ByteSource, block: Block, cols: int) -> np.ndarray:
    source, start = part.source
    codes = np.empty((block.num_rows, block.num_cols), dtype=CODE_DTYPE[source.dtype.itemsize])
    first = start + block.row * cols + block.col
    read_entries(file, source, first, codes.reshape(-1).view(np.uint8).data)
    return codes


class _Strata:
    """Position among `rates` of the stratum of each stored code, as the view sees it."""

    def __init__(self, spec: PairSpec, rates: _Rates, *, served: bool) -> None:
        self._spec, self._served = spec, served
        self._dtype = DType.BF16 if served else spec.native_dtype
        number = 2 * self._dtype.layout.num_exponents
        self._position = np.zeros(number, dtype=np.intp)
        self._position[[rate.stratum for rate in rates]] = np.arange(len(rates))
        self._by_code = None
        if spec.base.itemsize <= 2:
            codes = np.arange(1 << 8 * spec.base.itemsize, dtype=CODE_DTYPE[spec.base.itemsize])
            self._by_code = self._look_up(codes)

    def of(self, codes: np.ndarray) -> np.ndarray:
        """Positions, shaped like the codes."""
        return self._look_up(codes) if self._by_code is None else self._by_code[codes]

    def _look_up(self, codes: np.ndarray) -> np.ndarray:
        if self._served:
            seen = np.empty(codes.shape, dtype=CODE_DTYPE[2])
            NumpyKernel().to_bf16(codes, self._spec.base, seen)
        else:
            seen = widen(codes, self._spec.base, self._dtype)
        return self._position[strata_of(seen, self._dtype)]
