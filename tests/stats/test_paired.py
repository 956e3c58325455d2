"""Means, differences and shares of a gap over the same prompts."""

from __future__ import annotations

import numpy as np
import pytest

from sparsity_audit.stats.paired import gap_share, mean_interval


def draw(seed: int, num: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Start, goal and run of which 60 % of the gap is true, on the same prompts."""
    rng = np.random.default_rng(seed)
    noise = rng.random(num)
    return tuple((noise < p).astype(float) for p in (0.3, 0.6, 0.48))


def test_a_mean_leaves_out_what_was_not_judged() -> None:
    found = mean_interval(np.array([1.0, np.nan, 0.0, 1.0]), seed=0)
    assert (found.value, found.num_prompts) == (2 / 3, 3)
    assert 0 <= found.low < found.value < found.high <= 1
    assert mean_interval(np.array([np.nan]), seed=0).value is None
    assert mean_interval(np.array([1.0]), seed=0).low is None


def test_a_bootstrap_interval_is_near_the_normal_one() -> None:
    scores = (np.random.default_rng(0).random(400) < 0.5).astype(float)
    found = mean_interval(scores, seed=1)
    half = 1.96 * scores.std(ddof=1) / 20
    assert found.high - found.value == pytest.approx(half, rel=0.1)
    assert found.value - found.low == pytest.approx(half, rel=0.1)


def test_start_and_goal_have_shares_0_and_1_without_spread() -> None:
    start, goal, _ = draw(0, 200)
    assert (gap_share(start, goal, start).value, gap_share(start, goal, goal).value) == (0.0, 1.0)
    found = gap_share(start, goal, goal)
    assert (found.low, found.high) == (pytest.approx(1.0), pytest.approx(1.0))


def test_fiellers_set_holds_the_truth_about_as_often_as_it_says() -> None:
    held = 0
    for seed in range(300):
        found = gap_share(*draw(seed, 300))
        assert found.low is not None
        held += found.low <= 0.6 <= found.high
    assert 0.90 <= held / 300 <= 0.99  # 95 % ± 4 standard errors


def test_the_ends_of_the_set_are_where_the_test_rejects() -> None:
    start, goal, run = draw(3, 250)
    found = gap_share(start, goal, run)
    for end in (found.low, found.high):
        rest = (run - start) - end * (goal - start)
        assert abs(rest.mean()) / (rest.std(ddof=1) / len(rest) ** 0.5) == pytest.approx(1.959964, rel=1e-6)


def test_a_gap_that_may_be_nothing_has_a_reason_and_no_interval() -> None:
    start, goal, run = draw(0, 4)
    found = gap_share(start, start + np.array([1, -1, 0, 0]), run)
    assert (found.value, found.low) == (None, None)
    assert "cannot be told from 0" in str(found.reason)
    assert "2 prompts" not in str(gap_share(start[:1], goal[:1], run[:1]).reason)
    assert gap_share(start[:1], goal[:1], run[:1]).value is None


def test_prompts_that_one_side_has_not_are_left_out_of_all() -> None:
    start, goal, run = draw(1, 100)
    holes = run.copy()
    holes[:10] = np.nan
    assert gap_share(start, goal, holes) == gap_share(start[10:], goal[10:], run[10:])
