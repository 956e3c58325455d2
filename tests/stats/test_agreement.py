"""Signs and cosines of two updates, by hand and against numpy."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsity_audit.stats.agreement import DeltaSums, delta_agreement


def test_signs_and_cosines_by_hand():
    deltas = np.array([[1.0, -2.0, 3.0, 0.0, 5.0], [2.0, 1.0, 3.0, 4.0, 0.0]])
    masks = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]], dtype=bool)
    found = delta_agreement(DeltaSums.from_deltas(deltas, masks), 0, 1)
    # In both: entries 0 … 3; both move: 0, 1, 2; of one sign: 0 and 2. Upwards: 2 of 3, and 3 of 3.
    assert (found.both, found.moving) == (4, 3)
    assert found.sign_agreement == 2 / 3
    assert found.independent_signs == pytest.approx(2 / 3, abs=1e-15)
    assert found.cosine_intersection == pytest.approx(9 / math.sqrt(14 * 30), abs=1e-15)
    assert found.cosine_overall == pytest.approx(9 / math.sqrt(39 * 30), abs=1e-15)


def test_opposite_updates_have_cosine_minus_one_and_no_sign_in_common():
    delta = np.array([1.0, -3.0, 0.5])
    masks = np.ones((2, 3), dtype=bool)
    found = delta_agreement(DeltaSums.from_deltas(np.stack([delta, -delta]), masks), 0, 1)
    assert (found.sign_agreement, found.cosine_overall) == (0.0, -1.0)


def test_without_a_common_move_nothing_is_said():
    deltas = np.array([[1.0, 0.0], [0.0, 0.0]])
    found = delta_agreement(DeltaSums.from_deltas(deltas, deltas != 0), 0, 1)
    assert (found.both, found.moving) == (0, 0)
    assert found.sign_agreement is None
    assert found.independent_signs is None
    assert found.cosine_intersection is None
    assert found.cosine_overall is None


def test_deltas_that_are_no_numbers_are_left_out_and_counted():
    deltas = np.array([[np.nan, 1.0, np.inf], [1.0, 2.0, 3.0]])
    found = delta_agreement(DeltaSums.from_deltas(deltas, np.ones((2, 3), dtype=bool)), 0, 1)
    assert (found.not_finite, found.moving, found.both) == (2, 1, 3)
    assert found.cosine_intersection == pytest.approx(2 / math.sqrt(14), abs=1e-15)


def test_independent_signs_agree_as_often_as_the_null_says():
    rng = np.random.default_rng(4)
    size = 200_000
    deltas = np.stack([np.where(rng.random(size) < p, 1.0, -1.0) for p in (0.7, 0.2)])
    found = delta_agreement(DeltaSums.from_deltas(deltas, np.ones((2, size), dtype=bool)), 0, 1)
    limit = 4.5 * math.sqrt(found.independent_signs * (1 - found.independent_signs) / size)  # p = 7e-6
    assert abs(found.sign_agreement - found.independent_signs) < limit
    assert found.independent_signs == pytest.approx(0.38, abs=0.01)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1), runs=st.integers(1, 4), size=st.integers(0, 70), parts=st.integers(1, 5)
)
def test_sums_of_blocks_are_those_of_the_whole(seed, runs, size, parts):
    rng = np.random.default_rng(seed)
    # Eighths: products and sums are exact, so that any split gives the same bits.
    deltas = rng.integers(-9, 9, (runs, size)) / 8
    masks = rng.random((runs, size)) < 0.6
    whole = DeltaSums.from_deltas(deltas, masks)
    cuts = np.sort(rng.integers(0, size + 1, parts - 1))
    blocks = [
        DeltaSums.from_deltas(d, m)
        for d, m in zip(np.split(deltas, cuts, axis=1), np.split(masks, cuts, axis=1), strict=True)
    ]
    found = DeltaSums.of_blocks(blocks, runs)
    for field in DeltaSums.__dataclass_fields__:
        assert np.array_equal(getattr(found, field), getattr(whole, field)), field
    for r in range(runs):
        for q in range(runs):
            inside = masks[r] & masks[q]
            assert whole.both[r, q] == inside.sum()
            assert whole.dot_both[r, q] == (deltas[r] * deltas[q])[inside].sum()
            assert whole.square_both[r, q] == (deltas[r] ** 2)[inside].sum()
            assert whole.dot[r, q] == (deltas[r] * deltas[q]).sum()
