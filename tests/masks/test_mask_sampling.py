"""Random masks: exact counts, and every subset equally likely.

Limits are set at p < 1e-6 for correct code, and seeds are fixed, so a failure is a change of the draw.
"""

import itertools
from collections import Counter
from math import comb

import numpy as np
import pytest
from scipy import stats

from sparsity_audit.masks.sampling import OUTSIDE, choose, split_draw

_P = 1e-6


def test_counts_split_over_cells_follow_the_hypergeometric_law():
    sizes, count, draws = np.array([3, 1, 4, 0, 2]), 4, 20_000
    rng = np.random.default_rng(1)
    seen = Counter(tuple(split_draw(sizes, count, rng).tolist()) for _ in range(draws))
    cells = [c for c in itertools.product(*(range(n + 1) for n in sizes)) if sum(c) == count]
    expected = np.array([np.prod([comb(n, k) for n, k in zip(sizes, c, strict=True)]) for c in cells])
    assert set(seen) <= set(cells)
    observed = np.array([seen[c] for c in cells])
    assert stats.chisquare(observed, expected / expected.sum() * draws).pvalue > _P


@pytest.mark.parametrize("count", [0, 1, 9, 10])
def test_splits_are_exact_at_the_ends(count):
    rng = np.random.default_rng(0)
    drawn = split_draw(np.array([3, 0, 7]), count, rng)
    assert drawn.sum() == count
    assert (drawn <= [3, 0, 7]).all()
    assert (drawn >= 0).all()


def test_splits_go_beyond_the_billion_entries_where_numpy_stops():
    sizes = np.full(3_000, 1 << 20)
    drawn = split_draw(sizes, 777_777_777, np.random.default_rng(2))
    assert drawn.sum() == 777_777_777
    mean, share = 777_777_777 / 3_000, 777_777_777 / sizes.sum()
    spread = np.sqrt((1 << 20) * share * (1 - share))
    assert np.abs(drawn - mean).max() < 6 * spread


def test_every_subset_of_a_group_is_equally_likely_and_outside_is_never_drawn():
    groups = np.array([0, OUTSIDE, 1, 0, 0, 1, OUTSIDE, 1, 0], dtype=np.int16)
    wanted, draws = np.array([2, 1]), 18_000
    rng = np.random.default_rng(3)
    seen = Counter(tuple(np.flatnonzero(choose(groups, wanted, rng)).tolist()) for _ in range(draws))
    subsets = {tuple(sorted((*a, b))) for a in itertools.combinations((0, 3, 4, 8), 2) for b in (2, 5, 7)}
    assert seen.keys() == subsets
    assert stats.chisquare([seen[s] for s in sorted(subsets)]).pvalue > _P
