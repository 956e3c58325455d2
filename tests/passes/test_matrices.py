"""Margins of masks and the row-column nulls of every pair, against the same from whole tensors."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from support import WholeGroups

from sparsity_audit.masks.bitmask import pack_bits
from sparsity_audit.masks.container import MaskWriter
from sparsity_audit.masks.metadata import MaskMetadata, MaskTensor
from sparsity_audit.masks.reader import MaskReader, open_mask
from sparsity_audit.masks.sampling import OUTSIDE
from sparsity_audit.passes import matrices
from sparsity_audit.passes.many import count_overlaps
from sparsity_audit.passes.matrices import matrix_expectations, read_margins
from sparsity_audit.stats.matrix_nulls import Margins, MatrixNulls
from sparsity_audit.stats.overlap import ROW_COLUMN, ROW_COLUMN_MAGNITUDE

NULLS = (ROW_COLUMN, ROW_COLUMN_MAGNITUDE)


@pytest.fixture
def found(tmp_path):
    """Three masks of a matrix, one with rows that are not compared, a stack of matrices, a vector."""
    rng = np.random.default_rng(2)
    shapes = {"m": (12, 21), "part": (9, 10), "stack": (3, 4, 17), "v": (40,)}
    tensors = {name: MaskTensor.whole(name, shape) for name, shape in shapes.items()}
    tensors["part"] = MaskTensor(name="part", shape=(9, 10), compared=((1, 3), (4, 9)))
    bits = [{name: rng.random(shape) < 0.4 for name, shape in shapes.items()} for _ in range(3)]
    strata = {name: rng.integers(0, 3, shape) for name, shape in shapes.items()}
    outside = np.array([0, 3])
    strata["part"][outside] = OUTSIDE
    masks = []
    for run, arrays in enumerate(bits):
        arrays["part"][outside] = False
        folder = tmp_path / str(run)
        with MaskWriter(
            folder, list(tensors.values()), MaskMetadata(criterion="value", view="native")
        ) as out:
            for name, array in arrays.items():
                out.write_bits(name, 0, pack_bits(array))
            out.finish()
        masks.append(open_mask(folder))
    return tensors, bits, strata, masks


def test_margins_are_those_of_the_compared_rows(found) -> None:
    tensors, bits, strata, masks = found
    readers = [MaskReader(mask) for mask in masks]
    for name, tensor in tensors.items():
        margins = read_margins(tensor, readers, WholeGroups(strata))
        wide = strata[name].reshape(-1, strata[name].shape[-1])
        kept = (wide != OUTSIDE).any(axis=1)
        for run, arrays in enumerate(bits):
            flat = arrays[name].reshape(wide.shape)[kept]
            assert margins.rows[run].tolist() == flat.sum(axis=1).tolist()
            assert margins.cols[run].tolist() == flat.sum(axis=0).tolist()
        if margins.is_matrix:
            assert np.array_equal(margins.strata, wide[kept])
    for reader in readers:
        reader.close()


def test_expectations_are_those_of_whole_tensors_for_any_number_of_workers(found) -> None:
    tensors, bits, strata, masks = found
    grouping = WholeGroups(strata)
    tables = count_overlaps(masks, tensors, grouping=grouping)
    pairs = list(combinations(range(3), 2))
    one, two = (
        matrix_expectations(
            masks, tensors, tables, nulls=NULLS, pairs=pairs, grouping=grouping, workers=workers
        )
        for workers in (1, 2)
    )
    assert one == two
    assert one.unfitted == {}
    for table in tables:
        name = table.tensor
        wide = strata[name].reshape(-1, strata[name].shape[-1])
        kept = (wide != OUTSIDE).any(axis=1)
        flat = [arrays[name].reshape(wide.shape)[kept] for arrays in bits]
        margins = Margins(
            rows=np.stack([mask.sum(axis=1) for mask in flat]),
            cols=np.stack([mask.sum(axis=0) for mask in flat]),
            strata=wide[kept],
        )
        nulls = MatrixNulls(table, margins)
        for pair in pairs:
            expected = {null: nulls.expectation(null, *pair) for null in NULLS}
            assert one.by_pair[pair][name] == expected


def test_a_null_that_cannot_be_fitted_is_in_no_pair_and_names_the_tensor(found, monkeypatch) -> None:
    tensors, _, strata, masks = found
    tables = count_overlaps(masks, tensors, grouping=WholeGroups(strata))

    class _Unfitted(MatrixNulls):
        def expectation(self, null, r, q):
            fails = null == ROW_COLUMN and self._table.tensor == "m"
            return None if fails else super().expectation(null, r, q)

    monkeypatch.setattr(matrices, "MatrixNulls", _Unfitted)
    result = matrix_expectations(
        masks, tensors, tables, nulls=NULLS, pairs=[(0, 1)], grouping=WholeGroups(strata)
    )
    assert result.unfitted == {ROW_COLUMN: ("m",)}
    assert all(list(nulls) == [ROW_COLUMN_MAGNITUDE] for nulls in result.by_pair[0, 1].values())
