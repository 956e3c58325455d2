"""Row-column nulls of real tensors, vectors included: known answers and what vectors fall back to."""

import numpy as np
import pytest
from addition_runs import load, strata_of, values

from sparsity_audit.stats.chance import Expectation, hypergeometric
from sparsity_audit.stats.matrix_nulls import Margins, MatrixNulls
from sparsity_audit.stats.overlap import StratumTable, overlap_by, pair_overlap


@pytest.fixture(scope="module")
def found():
    base = load("base-bf16")
    tuned = [load(f"grpo-bf16-lr1e-4-seed{seed}") for seed in (0, 1)]
    tables, others = [], {}
    for tensor, codes in base.items():
        masks = [np.atleast_2d(values(run[tensor]) != values(codes)) for run in tuned]
        strata = np.atleast_2d(strata_of(codes))
        table = StratumTable.from_masks(tensor, strata, masks)
        margins = Margins(
            rows=np.stack([mask.sum(axis=1) for mask in masks]),
            cols=np.stack([mask.sum(axis=0) for mask in masks]),
            strata=strata,
        )
        tables.append(table)
        nulls = MatrixNulls(table, margins)
        others[tensor] = {
            null: nulls.expectation(null, 0, 1) for null in ("row-column", "row-column-magnitude")
        }
    return tables, others


def test_rows_columns_and_magnitude_leave_nothing_of_two_seeds_overlap(found):
    tables, others = found
    totals = {
        null: Expectation.total([part[null] for part in others.values()])
        for null in ("row-column", "row-column-magnitude")
    }
    nulls = pair_overlap(tables, 0, 1, others=totals).nulls
    assert nulls["row-column"].jaccard < 0.2 < nulls["magnitude"].jaccard
    assert nulls["magnitude"].z > 10
    assert nulls["magnitude"].excess_share > 0.08
    assert round(nulls["row-column-magnitude"].excess_share, 3) == 0.013
    assert round(nulls["row-column-magnitude"].z, 1) == 1.4


def test_vectors_fall_back_to_the_rung_below(found):
    tables, others = found
    table = next(table for table in tables if table.tensor == "model.norm.weight")
    whole = table.coarsen(np.zeros_like)
    assert others[table.tensor] == {
        "row-column": hypergeometric(whole.entries, whole.changed[0], whole.changed[1]),
        "row-column-magnitude": hypergeometric(table.entries, table.changed[0], table.changed[1]),
    }


def test_groups_add_the_expectations_of_their_tensors(found):
    tables, others = found
    groups = overlap_by(tables, lambda name: "all" if "layers" in name else None, others=others)
    chosen = [part for tensor, part in others.items() if "layers" in tensor]
    for null in ("row-column", "row-column-magnitude"):
        total = Expectation.total([part[null] for part in chosen])
        assert groups["all"].nulls[null].expected == total.mean
        assert groups["all"].nulls[null].variance == total.variance
