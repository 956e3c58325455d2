"""The row-column nulls of every pair of masks: margins read tensor by tensor, fitted, and let go.

Contract: results do not depend on the number of workers. Memory a worker is that of the largest matrix: 2
bytes an entry for strata and 4 for the weights of a fit, whatever the size of the model. A tensor whose fit
does not meet its margins is named, and no pair has an expectation under that null.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from sparsity_audit.masks.bitmask import blocks_of, compared_bits, count_columns, count_rows, rows_columns
from sparsity_audit.masks.metadata import MaskTensor
from sparsity_audit.masks.reader import MaskCatalogue, MaskReader
from sparsity_audit.masks.sampling import Grouping
from sparsity_audit.passes.engine import Workers, map_units
from sparsity_audit.stats.chance import Expectation
from sparsity_audit.stats.matrix_nulls import Margins, MatrixNulls
from sparsity_audit.stats.overlap import ROW_COLUMN_MAGNITUDE, StratumTable

__all__ = ["MatrixExpectations", "matrix_expectations", "read_margins"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixExpectations:
    """Expectations of all tensors.

    Args:
        by_pair: Pair of runs → tensor → null → expectation of the intersection.
        unfitted: Null → the tensors in which it could not be fitted; it is then in no pair.
    """

    by_pair: Mapping[tuple[int, int], Mapping[str, Mapping[str, Expectation]]]
    unfitted: Mapping[str, tuple[str, ...]]


def matrix_expectations(
    masks: Sequence[MaskCatalogue],
    tensors: Mapping[str, MaskTensor],
    tables: Sequence[StratumTable],
    *,
    nulls: Sequence[str],
    pairs: Sequence[tuple[int, int]],
    grouping: Grouping | None = None,
    workers: Workers = 1,
) -> MatrixExpectations:
    """Fit each run of each tensor once and hold every pair against it.

    Args:
        masks: The runs' masks, packed.
        tensors: What is compared.
        tables: Their counts, from `count_overlaps` with the same grouping.
        nulls: `row-column`, `row-column-magnitude`, or both.
        pairs: Pairs of runs.
        grouping: Strata of the base's entries; `row-column-magnitude` needs them.
        workers: Threads, one a tensor.

    Raises:
        MaskError: A mask is damaged.
        ChangedInputError: A file changed during the pass.
    """
    of_tensor: dict[str, dict[tuple[int, int], dict[str, Expectation | None]]] = {}
    strata = grouping if ROW_COLUMN_MAGNITUDE in nulls else None

    def fit(table: StratumTable) -> dict[tuple[int, int], dict[str, Expectation | None]]:
        with ExitStack() as stack:
            readers = [stack.enter_context(MaskReader(mask)) for mask in masks]
            found = MatrixNulls(table, read_margins(tensors[table.tensor], readers, strata))
        return {pair: {null: found.expectation(null, *pair) for null in nulls} for pair in pairs}

    for table, found in map_units(fit, tables, workers=workers):
        of_tensor[table.tensor] = found
    unfitted = {
        null: tuple(
            table.tensor
            for table in tables
            if any(part[null] is None for part in of_tensor[table.tensor].values())
        )
        for null in nulls
    }
    kept = [null for null in nulls if not unfitted[null]]
    return MatrixExpectations(
        by_pair={
            pair: {table.tensor: dict(_known(of_tensor[table.tensor][pair], kept)) for table in tables}
            for pair in pairs
        },
        unfitted={null: names for null, names in unfitted.items() if names},
    )


def _known(
    found: Mapping[str, Expectation | None], nulls: Sequence[str]
) -> Iterator[tuple[str, Expectation]]:
    for null in nulls:
        expectation = found[null]
        assert expectation is not None, null
        yield null, expectation


def read_margins(tensor: MaskTensor, readers: Sequence[MaskReader], strata: Grouping | None) -> Margins:
    """Changed entries of each row and column of every run, and the strata of the compared rows."""
    rows, cols = rows_columns(tensor.shape)
    by_row = np.zeros((len(readers), rows), dtype=np.int64)
    by_col = np.zeros((len(readers), cols), dtype=np.int64)
    for run, reader in enumerate(readers):
        for block, stored in reader.blocks(tensor.name):
            bits = stored & compared_bits(block, tensor.entry_ranges)
            first = 8 * block.byte_start
            by_row[run, block.row_start : block.row_stop] += count_rows(bits)
            by_col[run, first : first + block.num_cols] += count_columns(bits, block.num_cols)
    compared = np.zeros(rows, dtype=np.bool_)
    for start, stop in tensor.entry_ranges:
        compared[start // cols : -(-stop // cols)] = True
    found = None
    if strata is not None and min(int(compared.sum()), cols) >= 2:
        found = np.empty(rows * cols, dtype=np.int16)
        for block in blocks_of(tensor.shape):
            groups = strata.groups(tensor.name, block)
            found[block.first_entry : block.first_entry + block.num_entries] = groups
        found = found.reshape(rows, cols)[compared]
    return Margins(rows=by_row[:, compared], cols=by_col, strata=found)
