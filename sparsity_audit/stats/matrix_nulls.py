"""The row-column nulls of one tensor, whatever its shape.

Contract: pure. A matrix is leading axes × last axis. A vector (one row or one column) has no rows and columns
to condition on: it falls back to the null one rung below, its whole tensor for `row-column` and its strata
for `row-column-magnitude`. Fits meet every margin within `MARGIN_TOLERANCE`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sparsity_audit.stats.chance import Expectation, hypergeometric
from sparsity_audit.stats.maxent import MaxentFit, fit_row_column, fit_row_column_strata, maxent_expectation
from sparsity_audit.stats.overlap import StratumTable

__all__ = ["row_column_magnitude_null", "row_column_null"]


def row_column_null(
    table: StratumTable, r: int, q: int, *, rows: Sequence[np.ndarray], cols: Sequence[np.ndarray]
) -> Expectation:
    """Intersection of runs r and q given which rows and columns are hit.

    Args:
        table: The tensor's counts.
        r: The first run.
        q: The second.
        rows: Changed entries of each row, int64[m], one array a run.
        cols: Changed entries of each column, int64[n], one array a run.
    """
    if min(len(rows[r]), len(cols[r])) < 2:
        whole = table.coarsen(np.zeros_like)
        return hypergeometric(whole.entries, whole.changed[r], whole.changed[q])
    fits = [_converged(table, fit_row_column(rows[run], cols[run])) for run in (r, q)]
    return maxent_expectation(*fits)


def row_column_magnitude_null(
    table: StratumTable,
    r: int,
    q: int,
    *,
    rows: Sequence[np.ndarray],
    cols: Sequence[np.ndarray],
    strata: np.ndarray,
) -> Expectation:
    """Intersection of runs r and q given rows, columns and strata.

    Args:
        table: The tensor's counts.
        r: The first run.
        q: The second.
        rows: Changed entries of each row, int64[m], one array a run.
        cols: Changed entries of each column, int64[n], one array a run.
        strata: Stratum of each entry, numbered as in the table, integers[m, n].
    """
    if min(len(rows[r]), len(cols[r])) < 2:
        return hypergeometric(table.entries, table.changed[r], table.changed[q])
    number = np.zeros(int(table.strata[-1]) + 1, dtype=np.uint16)
    number[table.strata] = np.arange(len(table.strata))
    places = number[strata]
    fits = [
        _converged(
            table, fit_row_column_strata(rows[run], cols[run], strata=places, changed=table.changed[run])
        )
        for run in (r, q)
    ]
    return maxent_expectation(*fits)


def _converged(table: StratumTable, fit: MaxentFit) -> MaxentFit:
    assert fit.is_converged, (table.tensor, fit.steps, fit.remainder)
    return fit
