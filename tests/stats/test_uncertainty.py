"""Intervals over runs and blocks: coverage, limits below which there is none, closed cases."""

import math

import numpy as np
import pytest
from scipy.stats import binom, t

from sparsity_audit.stats.overlap import PairOverlap, StratumTable, overlap_by
from sparsity_audit.stats.uncertainty import _student, block_heterogeneity, jackknife_over_runs


def test_students_quantile_is_within_a_percent():
    for freedom in range(3, 40):
        assert _student(freedom) == pytest.approx(t.ppf(0.975, freedom), rel=0.01)


def pairwise(runs: np.ndarray) -> list[list[float]]:
    return [[float(x + y) for y in runs] for x in runs]


def test_for_sums_over_runs_the_jackknife_is_the_error_of_a_mean():
    runs = np.random.default_rng(0).normal(size=7)
    found = jackknife_over_runs(pairwise(runs))
    assert found.mean == pytest.approx(2 * runs.mean(), rel=1e-12)
    assert found.standard_error == pytest.approx(2 * runs.std(ddof=1) / math.sqrt(7), rel=1e-12)
    assert found.low < found.mean < found.high


def test_intervals_over_runs_hold_the_mean_of_new_runs():
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(1000):
        runs = rng.normal(0.3, 1, 5)
        found = jackknife_over_runs(pairwise(runs))
        held += found.low < 0.6 < found.high
    # Limits at p < 1e-4 of 1,000 draws at 95 %.
    assert binom.ppf(0.5e-4, 1000, 0.95) <= held <= binom.isf(0.5e-4, 1000, 0.95)


@pytest.mark.parametrize("runs", [0, 1, 2, 3])
def test_fewer_than_four_runs_have_no_interval_but_a_reason(runs):
    found = jackknife_over_runs(pairwise(np.arange(float(runs))))
    assert found.standard_error is None
    assert found.low is None
    assert found.reason
    assert (found.mean is None) == (runs < 2)


def test_a_pair_without_a_figure_leaves_no_interval():
    figures: list[list[float | None]] = [[0.5] * 4 for _ in range(4)]
    figures[0][3] = None
    found = jackknife_over_runs(figures)
    assert (found.mean, found.reason) == (None, "a pair has no such figure")


def blocks_of(count: int, rng: np.random.Generator, *, shared: float) -> list[PairOverlap]:
    tables = []
    for block in range(count):
        common = rng.random(500) < shared * (block % 2)
        masks = [(rng.random(500) < 0.2) | common for _ in range(2)]
        tables.append(StratumTable.from_masks(str(block), rng.integers(0, 3, 500), masks))
    return list(overlap_by(tables, lambda name: name).values())


def test_unlike_blocks_are_more_heterogeneous():
    rng = np.random.default_rng(2)
    alike = block_heterogeneity(blocks_of(30, rng, shared=0.0), "magnitude", draws=400, seed=1)
    unlike = block_heterogeneity(blocks_of(30, rng, shared=0.4), "magnitude", draws=400, seed=1)
    assert alike.reason is None
    assert alike.low < alike.excess_share < alike.high
    assert unlike.high - unlike.low > alike.high - alike.low
    assert unlike.low > 0


def test_resamples_follow_the_seed():
    blocks = blocks_of(25, np.random.default_rng(3), shared=0.2)
    first, second = (block_heterogeneity(blocks, "per-tensor", draws=200, seed=9) for _ in range(2))
    assert first == second
    assert first != block_heterogeneity(blocks, "per-tensor", draws=200, seed=10)


def test_fewer_than_twenty_blocks_with_changes_have_no_interval_but_a_reason():
    rng = np.random.default_rng(4)
    empty = StratumTable.from_masks("e", np.zeros(10), [np.zeros(10, bool)] * 2)
    blocks = blocks_of(19, rng, shared=0.2) + list(overlap_by([empty], lambda name: name).values())
    found = block_heterogeneity(blocks, "magnitude", draws=100, seed=0)
    assert (found.blocks, found.low, found.high) == (19, None, None)
    assert "19 blocks" in found.reason
    assert found.excess_share is not None
    assert block_heterogeneity([], "magnitude", draws=10, seed=0).excess_share is None
