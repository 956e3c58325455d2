"""A divergence along saved steps: overlap with the last step's set beside chance, and monotone growth."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sparsity_audit.tokens.series import summarise_series


def test_each_step_is_compared_with_the_last() -> None:
    last = np.array([0.5, 0.4, 0.3, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.01])
    half = np.array([0.2, 0.05, 0.05, 0.15, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    found = summarise_series(np.stack([np.zeros(10), half, last]), [0, 0, 1, 1, 2, 2, 3, 3, 4, 4], seed=0)
    zero, middle, end = found.steps
    assert (zero.divergent, zero.jaccard, zero.coverage, zero.jaccard_top) == (0, 0.0, 0.0, None)
    assert (middle.divergent, middle.shared) == (2, 1)
    assert middle.jaccard == 1 / 4
    assert middle.coverage == 1 / 3
    assert middle.chance_jaccard == pytest.approx(0.6 / (5 - 0.6))  # 2 · 3 / 10 shared on average
    assert middle.jaccard_top == 1.0  # the one largest of ten
    assert end.jaccard == 1.0
    assert found.mean_grows
    assert found.monotone == 1.0
    assert (found.positions, found.prompts) == (10, 5)


def test_a_fall_is_counted_where_the_last_step_is_divergent() -> None:
    js = np.array([[0.0, 0.3, 0.6], [0.3, 0.2, 0.0], [0.2, 0.25, 0.0]])
    found = summarise_series(js, [0, 1, 2], seed=0)
    assert not found.mean_grows
    assert found.monotone == 0.0
    assert found.falls == pytest.approx((0.1 + 0.1) / 2)


def test_a_single_step_or_no_divergence_has_no_growth_to_judge() -> None:
    one = summarise_series(np.array([[0.5, 0.0]]), [0, 1], seed=0)
    assert (one.monotone, one.falls) == (None, None)
    none = summarise_series(np.zeros((2, 4)), [0, 0, 1, 1], seed=0)
    assert none.steps[0].jaccard is None
    assert none.monotone is None


def test_random_sets_overlap_as_chance_says() -> None:
    rng = np.random.default_rng(0)
    js = (rng.random((200, 2000)) < 0.1) * 0.5
    found = summarise_series(js, np.arange(2000) % 50, seed=0)
    mean = np.mean([step.jaccard for step in found.steps[:-1]])
    chance = np.mean([step.chance_jaccard for step in found.steps[:-1]])
    spread = np.std([step.jaccard for step in found.steps[:-1]]) / math.sqrt(199)
    assert abs(mean - chance) < 4 * spread + 1e-3  # the ratio of means is not the mean of ratios
