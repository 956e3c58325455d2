"""Compare fp8 tensors by their values: code × the scale of its block.

Contract: a value is the float64 product of the code's number and the scale. It is exact: at most 4
significant bits times at most 24, and no exponent leaves float64's range. So the native view of a scaled pair
is fp64, with `value`, `atol`, `rel`, `ulp`, strata and sums counted there; the served view rounds the same
values to bf16, once. `bitwise` compares the stored codes where both sides have one fp8 format, and does not
look at scales, which are tensors of their own; where the formats differ it compares the fp64 codes, as for
every pair of mixed dtypes. A NaN has one code here, whatever its payload. See `docs/design/scaled-fp8.md`.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np

from sparsity_audit.align.records import TensorSlice
from sparsity_audit.compare.accumulate import Kernel
from sparsity_audit.compare.convert import widen
from sparsity_audit.compare.pair import PairSpec, UnitComparer
from sparsity_audit.stats.tally import Tally
from sparsity_audit.types import DType, View

__all__ = ["Descaler", "ScaledUnitComparer"]

_NAN = np.float64("nan")


class Descaler:
    """Makes fp64 codes of the stored codes of one side.

    Args:
        part: The slice; without a scale its codes are only widened.
        factors: Its scales as stored, as float64, in row-major order; None without a scale.
    """

    def __init__(self, part: TensorSlice, factors: np.ndarray | None) -> None:
        assert (part.scale is None) == (factors is None), part.spec.name
        self._part = part
        self._factors = np.empty((0, 0))
        if part.scale is not None and factors is not None:
            self._factors = factors.reshape(part.scale.spec.rows_cols)

    def __call__(self, codes: np.ndarray, *, first_row: int, first_col: int) -> np.ndarray:
        """fp64 codes of a block (rows, cols) of the slice."""
        wide = widen(codes, self._part.spec.dtype, DType.F64)
        values = wide.view(np.float64)
        if self._part.scale is not None and codes.size:
            col_block = self._part.scale.block[1]
            places = (first_col + np.arange(codes.shape[1])) // col_block
            grid_rows = self._grid_rows(first_row, codes.shape[0])
            edges = [0, *(np.flatnonzero(np.diff(grid_rows)) + 1).tolist(), codes.shape[0]]
            with np.errstate(invalid="ignore"):  # 0 × Inf, in a broken scale
                for start, stop in pairwise(edges):
                    values[start:stop] *= self._factors[grid_rows[start], places]
        is_nan = np.isnan(values)
        return np.where(is_nan, _NAN, values).view(np.uint64) if is_nan.any() else values.view(np.uint64)

    def _grid_rows(self, first_row: int, num_rows: int) -> np.ndarray:
        """The row of the scale tensor, as a matrix, for each row of the slice."""
        part, scale = self._part, self._part.scale
        assert scale is not None
        height, cols = part.spec.shape[-2:]
        run, within = np.divmod(np.arange(first_row, first_row + num_rows), part.run_entries // cols)
        matrix, row = np.divmod((part.start_entry + run * part.step) // cols + within, height)
        return matrix * scale.spec.shape[-2] + row // scale.block[0]


class ScaledUnitComparer(UnitComparer):
    """`UnitComparer` for a scaled pair.

    Args:
        spec: What is asked; `spec.scaled`.
        kernel: The kernel to run.
        rows: Rows of the whole pair.
        cols: Its columns.
        first_entry: Flat position of the unit's first entry; a multiple of 64.
        descalers: What makes values of the base's and of the tuned side's codes.
    """

    def __init__(
        self,
        spec: PairSpec,
        kernel: Kernel,
        *,
        rows: int,
        cols: int,
        first_entry: int,
        descalers: tuple[Descaler, Descaler],
    ) -> None:
        super().__init__(spec, kernel, rows=rows, cols=cols, first_entry=first_entry)
        self._descalers = descalers
        self._counts_codes = spec.base is spec.tuned
        self._masks_codes = self._counts_codes and spec.mask == 0 and self._mask_view is View.NATIVE
        self._codes_changed = 0
        self._rows, self._cols = np.zeros(rows, dtype=np.int64), np.zeros(cols, dtype=np.int64)

    def add(
        self, base: np.ndarray, tuned: np.ndarray, *, first_row: int, first_col: int, bits: np.ndarray | None
    ) -> None:
        """Count one block of stored codes (rows, cols); write its packed mask bits where asked."""
        self._base_print.add(base)
        self._tuned_print.add(tuned)
        where = {"first_row": first_row, "first_col": first_col}
        if self._counts_codes:
            differs = base != tuned
            self._codes_changed += int(np.count_nonzero(differs))
            if self._masks_codes:
                self._rows[first_row : first_row + len(base)] += np.count_nonzero(differs, axis=1)
                self._cols[first_col : first_col + base.shape[1]] += np.count_nonzero(differs, axis=0)
                if bits is not None:
                    bits[...] = np.packbits(differs, axis=-1, bitorder="little")
        of_base, of_tuned = self._descalers
        values = of_base(base, **where), of_tuned(tuned, **where)
        self._count(*values, (DType.F64, DType.F64), **where, bits=None if self._masks_codes else bits)

    def tally(self) -> Tally:
        """The unit's tally; call once, after the last block."""
        tally = super().tally()
        if self._counts_codes:
            changed = {**tally.native.changed, "bitwise": self._codes_changed}
            tally = replace(tally, native=replace(tally.native, changed=changed))
        if self._masks_codes and tally.axes is not None:
            tally = replace(tally, axes=replace(tally.axes, rows=self._rows, cols=self._cols))
        return tally
