"""pass@k and maj@k by counting equal the average over all subsets; intervals cover what they say."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsity_audit.errors import UsageError
from sparsity_audit.lab.estimators import estimate, majority_at_k, pass_at_k

ROUNDING = 1e-12
"""The enumeration is exact; counting ends in one division and a few sums of floats."""


def brute_force(answers: list[int | None], k: int, *, majority: bool) -> float:
    """The mean over all subsets of k; answer 0 is the right one, None is none."""
    total, subsets = Fraction(0), 0
    for subset in itertools.combinations(answers, k):
        subsets += 1
        votes = Counter(answer for answer in subset if answer is not None)
        if not majority:
            total += votes[0] > 0
        elif votes and votes[0] == max(votes.values()):
            total += Fraction(1, sum(count == votes[0] for count in votes.values()))
    return float(total / subsets)


@given(answers=st.lists(st.sampled_from([0, 0, 1, 2, 3, None]), min_size=1, max_size=9), data=st.data())
def test_both_estimators_equal_the_mean_over_all_subsets(
    answers: list[int | None], data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, len(answers)))
    right = answers.count(0)
    others = [count for answer, count in Counter(answers).items() if answer not in (0, None)]
    passed = pass_at_k(right, num_samples=len(answers), k=k)
    voted = majority_at_k(right, others, num_abstained=answers.count(None), k=k)
    assert abs(passed - brute_force(answers, k, majority=False)) < ROUNDING
    assert abs(voted - brute_force(answers, k, majority=True)) < ROUNDING


def test_pass_at_k_has_no_bias_over_draws_of_samples() -> None:
    """Σ over Binomial(n, p) of pass@k is 1 − (1 − p)^k: what "unbiased" means."""
    n, k, p = 10, 4, 0.3
    mean = sum(
        math.comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k(c, num_samples=n, k=k) for c in range(n + 1)
    )
    assert abs(mean - (1 - (1 - p) ** k)) < ROUNDING


def test_with_one_sample_all_three_are_the_same() -> None:
    assert pass_at_k(3, num_samples=8, k=1) == 3 / 8
    assert majority_at_k(3, [4], num_abstained=1, k=1) == 3 / 8


@pytest.mark.parametrize(
    ("right", "others", "abstained", "expected"),
    [
        (3, [2, 1], 0, 1.0),
        (2, [3, 1], 0, 0.0),
        (2, [2, 2], 0, 1 / 3),  # a tie of three
        (1, [], 5, 1.0),  # who abstains does not outvote
        (0, [], 6, 0.0),
        (0, [1], 3, 0.0),
    ],
)
def test_the_vote_of_all_samples_is_decided_by_counts(
    right: int, others: list[int], abstained: int, expected: float
) -> None:
    k = right + sum(others) + abstained
    assert majority_at_k(right, others, num_abstained=abstained, k=k) == expected


@pytest.mark.parametrize("k", [0, -1, 9])
def test_a_k_beyond_the_samples_is_refused(k: int) -> None:
    with pytest.raises(UsageError, match="expected: 1 to 8"):
        pass_at_k(3, num_samples=8, k=k)
    with pytest.raises(UsageError, match="expected: 1 to 8"):
        majority_at_k(3, [5], num_abstained=0, k=k)


def test_the_interval_of_single_samples_is_wilsons() -> None:
    # Newcombe 1998, table I, method 3: 81 of 263 gives .2553 to .3662.
    figure = estimate([1.0] * 81 + [0.0] * 182)
    assert figure.value == 81 / 263
    assert abs(figure.low - 0.2553) < 1e-4
    assert abs(figure.high - 0.3662) < 2e-4


def test_where_all_prompts_agree_the_interval_still_has_a_width() -> None:
    figure = estimate([0.0] * 100)
    assert (figure.value, figure.standard_error, figure.low) == (0.0, 0.0, 0.0)
    assert abs(figure.high - 3.8415 / 103.8415) < 1e-4
    assert estimate([1.0]).standard_error is None


def test_samples_of_one_prompt_do_not_count_as_prompts() -> None:
    """Four equal samples a prompt say no more than one; four independent ones say more."""
    rng = np.random.default_rng(0)
    one = rng.integers(0, 2, 400).astype(float)
    alike, independent = one, rng.integers(0, 2, (400, 4)).mean(axis=1)
    width = estimate(alike.tolist()).high - estimate(alike.tolist()).low
    narrower = estimate(independent.tolist()).high - estimate(independent.tolist()).low
    assert abs(narrower / width - 0.5) < 0.06


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    """2,000 experiments, 64 prompts × 4 samples of varying difficulty: .95 ± four standard errors."""
    rng = np.random.default_rng(1)
    difficulty = rng.beta(0.6, 1.4, (2000, 64))
    shares = rng.binomial(4, difficulty) / 4
    covered = [(figure := estimate(row.tolist())).low <= 0.3 <= figure.high for row in shares]
    assert abs(float(np.mean(covered)) - 0.95) < 0.0195
