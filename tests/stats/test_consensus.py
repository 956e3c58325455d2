"""Consensus of many masks: the Poisson-binomial against enumeration and scipy, cores, calibration."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from sparsity_audit.stats.consensus import consensus, poisson_binomial
from sparsity_audit.stats.overlap import StratumTable


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0, 1), min_size=0, max_size=6))
def test_the_distribution_is_that_of_all_outcomes(rates):
    found = poisson_binomial(np.array(rates).reshape(-1, 1))[:, 0]
    exact = np.zeros(len(rates) + 1)
    for outcome in itertools.product((0, 1), repeat=len(rates)):
        exact[sum(outcome)] += math.prod(r if hit else 1 - r for r, hit in zip(rates, outcome, strict=True))
    assert np.abs(found - exact).max() < 1e-14


def test_equal_rates_are_binomial():
    found = poisson_binomial(np.full((10, 2), [0.3, 1.0]))
    assert np.abs(found[:, 0] - binom.pmf(np.arange(11), 10, 0.3)).max() < 1e-14
    assert found[:, 1].tolist() == [0.0] * 10 + [1.0]


def tables_of(rng, rates: np.ndarray, runs: int) -> list[StratumTable]:
    tables = []
    for tensor in range(2):
        strata = rng.integers(0, 3, 20_000)
        masks = [rng.random(20_000) < rates[tensor, strata] for _ in range(runs)]
        tables.append(StratumTable.from_masks(str(tensor), strata, masks))
    return tables


def test_independent_runs_agree_as_magnitude_says_and_more_than_coarser_nulls_say():
    rates = np.array([[0.05, 0.2, 0.8], [0.01, 0.1, 0.5]])
    found = consensus(tables_of(np.random.default_rng(0), rates, 5))
    assert sum(found.observed) == found.entries == 40_000
    for null in ("uniform", "per-tensor", "magnitude"):
        assert math.fsum(found.expected[null]) == pytest.approx(40_000, rel=1e-12)
    core = found.cores[-1]
    assert core.runs == 5
    assert core.observed == found.observed[5]
    # Four standard deviations of a binomial count.
    assert abs(core.observed - core.expected["magnitude"]) < 4 * math.sqrt(core.expected["magnitude"])
    assert core.expected["uniform"] < core.expected["per-tensor"] < core.expected["magnitude"] / 2
    assert abs(core.excess_share["magnitude"]) < 0.05 < core.excess_share["uniform"]


def test_the_core_is_the_sum_of_products_over_strata():
    rng = np.random.default_rng(1)
    tables = tables_of(rng, np.full((2, 3), 0.4), 3)
    direct = sum((table.changed / table.entries).prod(axis=0) @ table.entries for table in tables)
    assert consensus(tables).cores[-1].expected["magnitude"] == pytest.approx(direct, rel=1e-12)


def test_identical_runs_have_an_excess_share_of_one():
    mask = np.arange(1000) % 3 == 0
    found = consensus([StratumTable.from_masks("t", np.zeros(1000), [mask] * 4)])
    assert found.observed == (666, 0, 0, 0, 334)
    assert found.cores[-1].excess_share["uniform"] == 1.0


def test_empty_full_and_missing_entries_are_defined():
    empty, full = np.zeros(5, bool), np.ones(5, bool)
    tables = [
        StratumTable.from_masks("t", np.zeros(5), [empty, full]),
        StratumTable.from_masks("none", np.zeros(0), [empty[:0], full[:0]]),
    ]
    found = consensus(tables)
    assert found.observed == (0, 5, 0)
    assert found.expected["magnitude"] == (0.0, 5.0, 0.0)
    assert found.cores[1].excess_share["magnitude"] is None


def test_a_run_that_is_set_aside_changes_nothing_about_the_consensus_of_the_others():
    rng = np.random.default_rng(2)
    strata = rng.integers(0, 4, 2_000)
    masks = [rng.random(2_000) < rate for rate in (0.2, 0.9, 0.5, 0.4)]
    aside = StratumTable.from_masks("t", strata, masks, core_of=(0, 2, 3))
    alone = StratumTable.from_masks("t", strata, [masks[0], masks[2], masks[3]])
    aside.check()
    assert consensus([aside]) == consensus([alone])
