"""The row-column nulls of one tensor, whatever its shape, for every pair of runs.

Contract: pure; each run is fitted once, whichever pairs are asked for. A matrix is leading axes × last axis.
A vector (one row or one column) has no rows and columns to condition on: it falls back to the null one rung
below, its whole tensor for `row-column` and its strata for `row-column-magnitude`. A fit that does not meet
every margin within `MARGIN_TOLERANCE` gives no expectation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparsity_audit.stats.chance import Expectation, hypergeometric
from sparsity_audit.stats.maxent import MaxentFit, fit_row_column, fit_row_column_strata, maxent_expectation
from sparsity_audit.stats.overlap import ROW_COLUMN, ROW_COLUMN_MAGNITUDE, StratumTable

__all__ = ["Margins", "MatrixNulls"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Margins:
    """Rows, columns and strata of one tensor, its compared rows alone.

    Args:
        rows: Changed entries of each row, int64[R, m].
        cols: Changed entries of each column, int64[R, n].
        strata: Stratum of each entry, numbered as in the tensor's table, integers[m, n]; None where only
            `row-column` is asked for.
    """

    rows: np.ndarray
    cols: np.ndarray
    strata: np.ndarray | None

    @property
    def is_matrix(self) -> bool:
        """Whether there are rows and columns to condition on."""
        return min(self.rows.shape[1], self.cols.shape[1]) >= 2


class MatrixNulls:
    """Expectations of pairs of runs under `row-column` and `row-column-magnitude`.

    Args:
        table: The tensor's counts.
        margins: The same masks by row and column.
    """

    def __init__(self, table: StratumTable, margins: Margins) -> None:
        self._table, self._margins = table, margins
        self._places = None
        if margins.strata is not None and margins.is_matrix and len(table.strata):
            number = np.zeros(int(table.strata[-1]) + 1, dtype=np.uint16)
            number[table.strata] = np.arange(len(table.strata))
            self._places = number[margins.strata]
        self._fits: dict[tuple[str, int], MaxentFit] = {}

    def expectation(self, null: str, r: int, q: int) -> Expectation | None:
        """The intersection of runs r and q; None where a fit did not converge.

        Args:
            null: `row-column` or `row-column-magnitude`; the latter needs strata.
            r: The first run.
            q: The second.
        """
        assert null in (ROW_COLUMN, ROW_COLUMN_MAGNITUDE), null
        table = self._table
        if not self._margins.is_matrix or not len(table.strata):
            level = table.coarsen(np.zeros_like) if null == ROW_COLUMN else table
            return hypergeometric(level.entries, level.changed[r], level.changed[q])
        fits = [self._fit(null, run) for run in (r, q)]
        return maxent_expectation(*fits) if all(fit.is_converged for fit in fits) else None

    def _fit(self, null: str, run: int) -> MaxentFit:
        if (null, run) not in self._fits:
            rows, cols = self._margins.rows[run], self._margins.cols[run]
            if null == ROW_COLUMN:
                fit = fit_row_column(rows, cols)
            else:
                assert self._places is not None, "row-column-magnitude needs strata"
                changed = self._table.changed[run]
                fit = fit_row_column_strata(rows, cols, strata=self._places, changed=changed)
            self._fits[null, run] = fit
        return self._fits[null, run]
