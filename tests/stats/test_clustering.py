"""Average linkage: by hand, against scipy, ties."""

import numpy as np
import pytest
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from sparsity_audit.stats.clustering import Merge, average_linkage


def symmetric(rng: np.random.Generator, runs: int) -> np.ndarray:
    upper = np.triu(rng.random((runs, runs)), 1)
    return upper + upper.T


def test_three_runs_by_hand():
    found = average_linkage([[0, 0.6, 0.2], [0, 0, 1.0], [0, 0, 0]])
    assert found.merges == (
        Merge(left=0, right=2, height=0.2, size=2),
        Merge(left=1, right=3, height=0.8, size=3),
    )
    assert found.order == (1, 0, 2)


@pytest.mark.parametrize("runs", [2, 3, 4, 7, 12, 30])
def test_merges_heights_and_order_are_those_of_scipy(runs):
    for seed in range(20):
        distances = symmetric(np.random.default_rng((runs, seed)), runs)
        tree = linkage(squareform(distances), "average")
        found = average_linkage(distances.tolist())
        assert [(m.left, m.right, m.size) for m in found.merges] == [
            tuple(map(int, row)) for row in tree[:, [0, 1, 3]]
        ]
        # Sums of up to 30 doubles in another order.
        assert np.abs(np.array([m.height for m in found.merges]) - tree[:, 2]).max() < 1e-13
        assert list(found.order) == leaves_list(tree).tolist()


def test_of_equally_near_runs_the_first_ones_are_merged_first():
    found = average_linkage([[1.0] * 4] * 4)
    assert [(m.left, m.right) for m in found.merges] == [(0, 1), (2, 3), (4, 5)]
    assert found.order == (0, 1, 2, 3)


def test_one_run_and_none_have_no_merges():
    assert average_linkage([[0.0]]).order == (0,)
    assert average_linkage([]).merges == average_linkage([]).order == ()
