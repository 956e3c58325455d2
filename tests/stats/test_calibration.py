"""Calibration: z has mean 0, sd 1 and honest tails under every null; only the right nulls reject.

Limits are at p < 1e-4 for the number of draws; seeds are fixed.
"""

import math

import numpy as np
import pytest
from addition_runs import load, strata_of, values
from ml_dtypes import bfloat16
from scipy.stats import binom, norm

from sparsity_audit.stats.chance import Expectation
from sparsity_audit.stats.maxent import fit_row_column, fit_row_column_strata, maxent_expectation
from sparsity_audit.stats.overlap import StratumTable, pair_overlap
from sparsity_audit.stats.phantom import phantom_of_table, phantom_overlap
from sparsity_audit.stats.rooms import change_rates, rooms_of_strata
from sparsity_audit.stats.walks import redraw

LIMIT = norm.isf(0.5e-4)  # 3.9


def assert_calibrated(z: np.ndarray) -> None:
    draws = len(z)
    assert draws >= 1000
    assert abs(z.mean()) < LIMIT / math.sqrt(draws)
    assert abs(z.std() - 1) < LIMIT / math.sqrt(2 * draws)
    for level in (0.05, 0.01):
        beyond = int((np.abs(z) > norm.isf(level / 2)).sum())
        assert binom.ppf(0.5e-4, draws, level) <= beyond <= binom.isf(0.5e-4, draws, level)


def fixed_margin_mask(rng, groups: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """A uniformly random mask with counts[g] entries in each group."""
    order = np.lexsort((rng.random(len(groups)), groups))
    sizes = np.bincount(groups)
    rank = np.arange(len(groups)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    mask = np.zeros(len(groups), bool)
    mask[order] = rank < counts[groups[order]]
    return mask


@pytest.mark.parametrize("null", ["uniform", "per-tensor", "magnitude"])
def test_z_is_calibrated_where_masks_are_exchangeable_within_strata(null):
    rng = np.random.default_rng(11)
    tensor, stratum = np.repeat([0, 1], [1500, 2500]), rng.integers(0, 4, 4000)
    groups = {"uniform": 0 * tensor, "per-tensor": tensor, "magnitude": 4 * tensor + stratum}[null]
    rates = {"uniform": [0.3], "per-tensor": [0.2, 0.6], "magnitude": np.linspace(0.1, 0.8, 8)}[null]
    counts = [rng.binomial(np.bincount(groups), rates) for _ in range(2)]
    z = []
    for _ in range(1000):
        a, b = (fixed_margin_mask(rng, groups, count) for count in counts)
        tables = [
            StratumTable.from_masks(str(t), stratum[tensor == t], [a[tensor == t], b[tensor == t]])
            for t in (0, 1)
        ]
        z.append(pair_overlap(tables, 0, 1).nulls[null].z)
    assert_calibrated(np.array(z))


def logistic(t: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-t))


def row_column_draws(rng, p, q, draws):
    for _ in range(draws):
        a, b = rng.random(p.shape) < p, rng.random(p.shape) < q
        fits = [fit_row_column(x.sum(axis=1), x.sum(axis=0)) for x in (a, b)]
        assert all(fit.is_converged for fit in fits)
        yield fits, int((a & b).sum())


def test_z_is_calibrated_under_the_row_column_null():
    rng = np.random.default_rng(12)
    rows, cols = rng.normal(-1, 1.5, (40, 1)), rng.normal(0, 1.5, 60)
    p, q = logistic(rows + cols), logistic(rows + rng.normal(0, 0.5, (40, 1)) + cols)
    z, naive = [], []
    for fits, both in row_column_draws(rng, p, q, 1000):
        found = maxent_expectation(*fits)
        product = fits[0].probabilities() * fits[1].probabilities()
        z.append((both - found.mean) / math.sqrt(found.variance))
        naive.append((both - found.mean) / math.sqrt((product * (1 - product)).sum()))
    assert_calibrated(np.array(z))
    # Forgetting that the margins are fitted makes the variance far too large.
    assert np.std(naive) < 0.8


@pytest.mark.parametrize(("shape", "mean", "spread"), [((100, 120), -5.0, 1.0), ((12, 100), -2.0, 1.0)])
def test_z_is_nearly_calibrated_on_sparse_masks_and_narrow_matrices(shape, mean, spread):
    rng = np.random.default_rng(16)
    logits = rng.normal(mean, spread, (shape[0], 1)) + rng.normal(0, spread, shape[1])
    z = []
    for fits, both in row_column_draws(rng, logistic(logits), logistic(logits), 1000):
        found = maxent_expectation(*fits)
        z.append((both - found.mean) / math.sqrt(found.variance))
    # Here the variance is an approximation: its sd is allowed .07 beyond the sampling error, its mean .05.
    assert abs(np.mean(z)) < 0.05 + LIMIT / math.sqrt(1000)
    assert abs(np.std(z) - 1) < 0.07 + LIMIT / math.sqrt(2000)


def test_z_is_calibrated_under_the_nested_null():
    rng = np.random.default_rng(13)
    strata = rng.integers(0, 4, (30, 40)).astype(np.uint8)
    rows, cols = rng.normal(-0.5, 1, (30, 1)), rng.normal(0, 1, 40)
    logits = rows + cols + np.array([-1.5, -0.5, 0.5, 1.5])[strata]
    p, q = logistic(logits), logistic(logits + rng.normal(0, 0.4, 40))
    z = []
    for _ in range(1000):
        a, b = rng.random(p.shape) < p, rng.random(p.shape) < q
        fits = [
            fit_row_column_strata(
                x.sum(axis=1), x.sum(axis=0), strata=strata, changed=np.bincount(strata[x], minlength=4)
            )
            for x in (a, b)
        ]
        found = maxent_expectation(*fits)
        z.append(((a & b).sum() - found.mean) / math.sqrt(found.variance))
    assert_calibrated(np.array(z))


def test_z_is_calibrated_under_the_phantom_null():
    rng = np.random.default_rng(14)
    codes = np.concatenate([x.ravel() for x in load("base-bf16").values()])
    strata, entries = np.unique(strata_of(codes), return_counts=True)
    rooms = rooms_of_strata(strata, entries)
    p, q = change_rates(rooms, 8e-5), change_rates(rooms, 1.5e-4)
    z = []
    for _ in range(1000):
        a = rng.binomial(entries, p)
        both = rng.binomial(a, q)
        b = both + rng.binomial(entries - a, q)
        found = phantom_overlap(rooms, int(a.sum()), int(b.sum())).expectation
        z.append((both.sum() - found.mean) / math.sqrt(found.variance))
    assert_calibrated(np.array(z))


def bounded_redraw(base: np.ndarray, size: float, rng: np.random.Generator) -> np.ndarray:
    """Like `redraw`, with |Δ| between ½ and 1½ of a size: an Adam step is about its learning rate."""
    steps = (rng.random(base.shape, dtype=np.float32) + np.float32(0.5)) * np.float32(size)
    moved = base + np.where(rng.random(base.shape, dtype=np.float32) < 0.5, -steps, steps)
    return (base != 0) & (moved.astype(bfloat16) != base.astype(bfloat16))


def independent_updates(copies: int, draw=redraw) -> list[StratumTable]:
    """Two independent updates of the real base, repeated, rounded once to bf16."""
    rng = np.random.default_rng(15)
    tables = []
    for number, (name, codes) in enumerate(load("base-bf16").items()):
        repeated = np.tile(codes.ravel(), copies)
        size = 2e-5 * (1 + number % 5)
        masks = [draw(values(repeated), size, rng) for _ in range(2)]
        tables.append(StratumTable.from_masks(name, strata_of(repeated), masks))
    return tables


def phantom_z(tables: list[StratumTable]) -> float:
    found = Expectation.total([phantom_of_table(table, 0, 1).expectation for table in tables])
    return pair_overlap(tables, 0, 1, others={"phantom": found}).nulls["phantom"].z


def test_independent_updates_of_a_million_weights_pass_magnitude_and_phantom_alone():
    tables = independent_updates(copies=7)
    pair = pair_overlap(tables, 0, 1)
    assert pair.entries > 1_000_000
    assert pair.nulls["uniform"].z > 100
    assert pair.nulls["per-tensor"].z > 100
    assert abs(pair.nulls["magnitude"].z) < LIMIT
    assert abs(phantom_z(tables)) < LIMIT


@pytest.mark.slow
def test_normal_updates_of_ten_million_weights_pass_magnitude_and_phantom():
    tables = independent_updates(copies=68)
    pair = pair_overlap(tables, 0, 1)
    assert pair.entries > 10_000_000
    assert pair.nulls["per-tensor"].z > 100
    assert abs(pair.nulls["magnitude"].z) < LIMIT
    assert abs(phantom_z(tables)) < LIMIT


@pytest.mark.slow
def test_at_ten_million_weights_the_power_of_two_bit_is_needed():
    # With normal updates the bit would be worth z < 2 here (docs/design/chance.md).
    tables = independent_updates(copies=68, draw=bounded_redraw)
    without_bit = [table.coarsen(lambda s: s // 2) for table in tables]
    assert abs(pair_overlap(tables, 0, 1).nulls["magnitude"].z) < LIMIT
    assert pair_overlap(without_bit, 0, 1).nulls["magnitude"].z > LIMIT
