"""Finer strata: the quantile rule on ties and edges, known answers, what a convergence row says."""

import numpy as np
import pytest
from addition_runs import load, strata_of, values
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsity_audit.stats.finer import (
    convergence,
    quantile_edges,
    quantile_edges_of_counts,
    quantile_strata,
    quantiles_of_magnitudes,
)
from sparsity_audit.stats.overlap import StratumTable, pair_overlap


def test_equal_values_share_a_stratum_and_an_edge_belongs_below():
    edges = np.array([1.0, 2.0])
    found = quantile_strata(np.array([0.0, 1.0, 1.5, 2.0, 2.5, np.inf, np.nan]), edges)
    assert found.tolist() == [0, 0, 1, 1, 2, 2, 2]


def test_edges_are_quantiles_of_the_numbers():
    assert quantile_edges(np.arange(5.0), 4).tolist() == [1.0, 2.0, 3.0]
    assert quantile_edges(np.array([np.nan, 0.0, 2.0]), 2).tolist() == [1.0]
    assert quantile_edges(np.zeros(0), 3).tolist() == [0.0, 0.0]
    assert quantile_edges(np.ones(7), 1).size == 0


@pytest.fixture(scope="module")
def runs():
    base = load("base-bf16")
    tuned = [load(f"grpo-bf16-lr1e-4-seed{seed}") for seed in (0, 1)]
    return {t: (codes, [values(run[t]) != values(codes) for run in tuned]) for t, codes in base.items()}


# Known answers of tests/data/addition/README.md.
@pytest.mark.parametrize(("count", "jaccard"), [(20, 0.8417), (100, 0.9018), (400, 0.9151)])
def test_known_answers_of_quantile_strata(runs, count, jaccard):
    tables = []
    for tensor, (codes, masks) in runs.items():
        magnitudes = np.abs(values(codes)).astype(np.float64)
        strata = quantile_strata(magnitudes, quantile_edges(magnitudes, count))
        tables.append(StratumTable.from_masks(tensor, strata, masks))
    assert round(pair_overlap(tables, 0, 1).nulls["magnitude"].jaccard, 4) == jaccard


def test_a_convergence_table_shows_what_finer_strata_cost(runs):
    cuts = {
        "tensor": lambda codes: np.zeros(codes.size),
        "exponent and power of two": strata_of,
        "one entry": lambda codes: np.arange(codes.size),
    }
    schemes = {
        scheme: [StratumTable.from_masks(t, cut(codes), masks) for t, (codes, masks) in runs.items()]
        for scheme, cut in cuts.items()
    }
    rows = convergence(schemes)
    assert [row.scheme for row in rows] == list(schemes)
    assert [round(row.jaccard, 3) for row in rows] == [0.118, 0.916, 0.922]
    assert rows[0].in_small_strata == 0
    assert (rows[2].num_strata, rows[2].median_entries, rows[2].in_small_strata) == (148_928, 1, 1.0)
    assert (rows[2].excess_share, rows[2].z) == (0.0, None)
    assert rows[0].num_strata == len(runs)
    assert rows[0].median_entries > rows[1].median_entries > 1


def test_no_entries_make_an_empty_row():
    table = StratumTable.from_masks("t", np.zeros(0, int), [np.zeros(0, bool)] * 2)
    (row,) = convergence({"s": [table]})
    assert (row.num_strata, row.median_entries, row.in_small_strata, row.jaccard) == (0, 0, 0.0, None)


@settings(deadline=None, max_examples=200)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.integers(0, 60),
    places=st.integers(0, 3),
    count=st.integers(1, 40),
)
def test_quantiles_of_counts_are_those_of_the_entries_to_the_last_bit(seed, size, places, count):
    rng = np.random.default_rng(seed)
    magnitudes = np.round(np.abs(rng.normal(size=size)), places)
    magnitudes[rng.random(size) < 0.1] = np.nan
    distinct, entries = np.unique(magnitudes, return_counts=True)
    edges = quantile_edges(magnitudes, count)
    assert quantile_edges_of_counts(distinct, entries, count).tolist() == edges.tolist()
    masks = [rng.random(size) < 0.5 for _ in range(2)]
    by_code = StratumTable.from_masks("t", np.searchsorted(distinct, magnitudes), masks)
    found = quantiles_of_magnitudes(by_code, distinct, count)
    expected = StratumTable.from_masks("t", quantile_strata(magnitudes, edges), masks)
    for field in ("strata", "entries", "changed", "both", "core"):
        assert np.array_equal(getattr(found, field), getattr(expected, field)), field
