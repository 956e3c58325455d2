"""The phantom null: rates against redraws and erfc, σ recovered, edges, the walk."""

import math

import numpy as np
import pytest
from addition_runs import load, strata_of, values
from scipy.special import erfc

from sparsity_audit.stats.overlap import StratumTable
from sparsity_audit.stats.phantom import fit_sigma, phantom_of_table, phantom_overlap
from sparsity_audit.stats.rooms import Rooms, change_rates, rooms_of_strata, rooms_of_values
from sparsity_audit.stats.walks import redraw, walk, walk_overlap

Z_LIMIT = 4.0  # two-sided p = 6e-5


def base_codes(copies: int) -> np.ndarray:
    codes = np.concatenate([x.ravel() for x in load("base-bf16").values()])
    return np.tile(codes, copies)


def rooms_of(codes: np.ndarray) -> Rooms:
    strata, entries = np.unique(strata_of(codes), return_counts=True)
    return rooms_of_strata(strata, entries)


def test_rates_are_those_of_a_normal_displacement():
    rooms = Rooms(up=np.array([0.5, 2.0]), down=np.array([0.25, 2.0]), entries=np.array([1, 1]))
    for sigma in (0.05, 0.3, 1.0, 40.0):
        scale = sigma * math.sqrt(2)
        exact = 0.5 * (erfc(rooms.up / scale) + erfc(rooms.down / scale))
        # Twice half the interpolation's error.
        assert np.abs(change_rates(rooms, sigma) - exact).max() < 4e-9


def test_rates_are_those_of_redrawn_updates_on_real_weights():
    codes, sigma = base_codes(4), 2e-4
    changed = redraw(values(codes), sigma, np.random.default_rng(1))
    strata, places = np.unique(strata_of(codes), return_inverse=True)
    rooms = rooms_of(codes)
    p = change_rates(rooms, sigma)
    spread = np.sqrt(np.maximum(rooms.entries * p * (1 - p), 1e-9))
    z = (np.bincount(places, changed, minlength=len(strata)) - rooms.entries * p) / spread
    # 25 strata: a limit of 5 (p = 6e-7 each) where the normal holds, and whole agreement elsewhere.
    is_normal = spread > 4
    assert is_normal.sum() > 8
    assert np.abs(z[is_normal]).max() < 5


def test_off_grid_rates_are_those_of_redrawn_updates():
    base = np.concatenate([x.ravel() for x in load("base-fp32").values()])
    rooms = rooms_of_values(base)
    assert rooms.num_entries == len(base)
    for sigma in (1e-5, 3e-4):
        p = change_rates(rooms, sigma)
        expected, variance = rooms.entries @ p, rooms.entries @ (p * (1 - p))
        found = redraw(base, sigma, np.random.default_rng(2)).sum()
        assert abs(found - expected) < Z_LIMIT * math.sqrt(variance)


def test_sigma_of_the_process_is_found_again():
    codes = base_codes(8)
    changed = redraw(values(codes), 1e-4, np.random.default_rng(3)).sum()
    # Relative error of σ ≈ that of a density of 2e5 changes, times an elasticity near 1.
    assert fit_sigma(rooms_of(codes), int(changed)) == pytest.approx(1e-4, rel=0.01)


def test_a_phantom_has_the_observed_density_and_one_sigma_per_run():
    rooms = rooms_of(base_codes(1))
    found = phantom_overlap(rooms, 30_000, 60_000)
    assert found.expected_a == pytest.approx(30_000, abs=1e-3)
    assert found.expected_b == pytest.approx(60_000, abs=1e-3)
    assert found.sigma_a < found.sigma_b
    assert found.expectation.mean > 30_000 * 60_000 / rooms.num_entries


def test_the_intersection_of_redraws_is_the_expected_one():
    codes = base_codes(7)
    rng = np.random.default_rng(4)
    a, b = (redraw(values(codes), sigma, rng) for sigma in (1e-4, 2e-4))
    found = phantom_overlap(rooms_of(codes), int(a.sum()), int(b.sum())).expectation
    assert abs((a & b).sum() - found.mean) < Z_LIMIT * math.sqrt(found.variance)


@pytest.mark.parametrize(("a", "b", "mean"), [(0, 0, 0), (0, 5, 0), (8, 8, 8), (8, 5, 5)])
def test_nothing_or_everything_changed_needs_no_sigma(a, b, mean):
    rooms = Rooms(up=np.array([1.0, 2.0]), down=np.array([1.0, 2.0]), entries=np.array([3, 5]))
    found = phantom_overlap(rooms, a, b)
    assert found.expectation.mean == pytest.approx(mean, abs=1e-9)
    assert found.expectation.variance == pytest.approx(0.0, abs=1e-9)
    assert (found.sigma_a is None) == (a in (0, 8))


def test_a_tensor_without_entries_has_an_empty_phantom():
    rooms = rooms_of_strata(np.zeros(0, np.int64), np.zeros(0, np.int64))
    assert phantom_overlap(rooms, 0, 0).expectation.mean == 0


def test_infinities_nan_and_zeros_stay():
    special = np.array([np.inf, -np.inf, np.nan, 0.0, -0.0], dtype=np.float32)
    assert not redraw(special, 1e-6, np.random.default_rng(0)).any()
    rooms = rooms_of_values(special)
    assert rooms.entries.sum() == 5
    assert rooms.entries @ change_rates(rooms, 1e-6) == 0


def test_zeros_of_a_table_are_counted_as_their_own_stratum():
    codes = np.concatenate([np.zeros(400, np.uint16), base_codes(1)[:4000]])
    rng = np.random.default_rng(8)
    masks = [redraw(values(codes), 1e-4, rng) for _ in range(2)]
    plain = phantom_of_table(StratumTable.from_masks("t", strata_of(codes), masks), 0, 1)
    for mask, first in zip(masks, (0, 50), strict=True):
        mask[first : first + 100] = True
    found = phantom_of_table(StratumTable.from_masks("t", strata_of(codes), masks), 0, 1)
    assert found.sigma_a == plain.sigma_a
    assert found.expected_a == pytest.approx(masks[0].sum(), abs=1e-6)
    assert found.expectation.mean - plain.expectation.mean == pytest.approx(100 * 100 / 400, abs=1e-9)


def test_half_a_ulp_lies_nearer_below_a_power_of_two():
    one, other = 0x3F80, 0x3F81
    rooms = rooms_of_strata(strata_of(np.array([other, one])), np.array([1, 1]))
    assert rooms.up.tolist() == [2.0**-8, 2.0**-8]
    assert rooms.down.tolist() == [2.0**-8, 2.0**-9]


def test_a_walk_cannot_leave_a_weight_whose_half_ulp_exceeds_the_step():
    base = values(np.array([0x3F81, 0x3A00], dtype=np.uint16))
    ended = walk(np.repeat(base[:, None], 500, axis=1), steps=7, lr=1e-4, rng=np.random.default_rng(5))
    assert not ended[0].any()
    # An odd number of steps cannot end where it began on a grid as fine as this one.
    assert ended[1].mean() > 0.9


def test_walks_are_counted_without_bias():
    distinct, entries = np.unique(base_codes(1), return_counts=True)
    at = values(distinct.astype(np.uint16))
    found = walk_overlap(at, entries, steps=12, lr=1e-4, walkers=40, rng=np.random.default_rng(6))
    rng = np.random.default_rng(7)
    weights = values(base_codes(1))
    a, b = (walk(weights, steps=12, lr=1e-4, rng=rng) for _ in range(2))
    # Sampling errors: sqrt(n/4) of the walk over entries, and half of it of the 80 walkers a value.
    limit = Z_LIMIT * 2 * math.sqrt(len(weights) / 4)
    assert abs(a.sum() - found.expected_each) < limit
    assert abs((a & b).sum() - found.expected_both) < limit
    assert 0 < found.jaccard < 1
