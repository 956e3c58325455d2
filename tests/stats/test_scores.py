"""Intervals of accuracies, differences and recovered shares: by hand, at the edges, how often they cover."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsity_audit.errors import UsageError
from sparsity_audit.stats.scores import (
    Accuracy,
    difference_interval,
    recovered_share,
    wilson_interval,
)

Z = 1.959963984540054


def _of(value: float, trials: float = 512) -> Accuracy:
    return Accuracy(value=value, trials=trials)


def test_wilson_and_newcombe_are_those_of_the_papers() -> None:
    # Newcombe 1998 (single proportion): 81/263 gives .2553 to .3662, 15/148 .0624 to .1605, 0/20 0 to .1611.
    for right, trials, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
    ):
        found = wilson_interval(_of(right / trials, trials))
        assert (round(found.low, 4), round(found.high, 4)) == (low, high)
    # Newcombe 1998 (differences), method 10: 56/70 − 48/80 gives .0524 to .3339; 9/10 − 3/10: .1705 to .8090.
    for a, b, low, high in (((56, 70), (48, 80), 0.0524, 0.3339), ((9, 10), (3, 10), 0.1705, 0.8090)):
        found = difference_interval(_of(a[0] / a[1], a[1]), _of(b[0] / b[1], b[1]))
        assert (round(found.low, 4), round(found.high, 4)) == (low, high)


def test_a_share_of_the_gain_with_its_interval() -> None:
    found = recovered_share(_of(0.36), _of(0.75), _of(0.48))
    assert found.value == pytest.approx(0.12 / 0.39, abs=1e-12)
    assert found.interval is not None
    assert found.interval.low < found.value < found.interval.high
    assert found.reason is None


@given(b=st.floats(0, 1), f=st.floats(0, 1), s=st.floats(0, 1), n=st.integers(8, 4000))
def test_the_ends_of_the_interval_are_where_the_test_just_does_not_reject(b, f, s, n) -> None:
    found = recovered_share(_of(b, n), _of(f, n), _of(s, n))
    if found.interval is None:
        assert found.reason is not None
        return
    (b, vb), (f, vf), (s, vs) = (
        (x := (p * n + 2 / 3) / (n + 4 / 3), x * (1 - x) / (n + 4 / 3)) for p in (b, f, s)
    )
    for rho in (found.interval.low, found.interval.high):
        distance = s - b - rho * (f - b)
        limit = Z * math.sqrt(vs + (1 - rho) ** 2 * vb + rho**2 * vf)
        # Near an unbounded set the ends lie far out, where the two sides are large and cancel.
        assert abs(distance) == pytest.approx(limit, rel=1e-6)
    middle = (s - b) / (f - b)
    assert found.interval.low <= middle <= found.interval.high


def test_a_gain_that_may_be_none_has_no_interval_and_says_so() -> None:
    found = recovered_share(_of(0.5, 64), _of(0.52, 64), _of(0.51, 64))
    assert found.value == pytest.approx(0.5)
    assert found.interval is None
    assert found.reason == "the full run's gain cannot be told from 0 with so few trials"
    assert recovered_share(_of(0.5), _of(0.5), _of(0.9)).value is None


def test_a_loss_has_shares_as_a_gain_has() -> None:
    gain, loss = (recovered_share(_of(b), _of(f), _of(s)) for b, f, s in ((0.3, 0.8, 0.6), (0.7, 0.2, 0.4)))
    assert gain.interval is not None
    assert loss.interval is not None
    assert loss.value == pytest.approx(gain.value, abs=1e-12)
    assert loss.interval.low == pytest.approx(gain.interval.low, abs=1e-9)


def test_clustered_trials_count_for_what_their_standard_error_says() -> None:
    whole = Accuracy.from_standard_error(0.5, 0.025, trials=2048)
    assert whole.trials == pytest.approx(400)
    assert Accuracy.from_standard_error(1.0, 0.0, trials=2048).trials == 2048
    with pytest.raises(UsageError, match="positive number of trials"):
        _of(0.5, 0)


CASES = [
    *[(0.36, 0.75, share) for share in (0.75, 0.48, 0.36, 0.82)],
    *[(0.02, 0.98, 0.95), (0.3, 0.4, 0.35), (0.1, 0.9, 0.2)],
]


@pytest.mark.parametrize("trials", [64, 256, 1024])
@pytest.mark.parametrize(("base", "full", "run"), CASES)
def test_intervals_cover_as_often_as_they_say(base, full, run, trials) -> None:
    """Of the true share, over new evaluations of all three; an unbounded set counts by its test."""
    draws, rho = 4000, (run - base) / (full - base)
    rng = np.random.default_rng([trials, round(1000 * run)])
    right = rng.binomial(trials, [base, full, run], size=(draws, 3)) / trials
    covered = 0
    for b, f, s in right:
        found = recovered_share(_of(b, trials), _of(f, trials), _of(s, trials))
        if found.interval is not None:
            covered += found.interval.low <= rho <= found.interval.high
            continue
        adjusted = [(p * trials + 2 / 3) / (trials + 4 / 3) for p in (b, f, s)]
        variances = [p * (1 - p) / (trials + 4 / 3) for p in adjusted]
        limit = Z**2 * (variances[2] + (1 - rho) ** 2 * variances[0] + rho**2 * variances[1])
        covered += (adjusted[2] - adjusted[0] - rho * (adjusted[1] - adjusted[0])) ** 2 <= limit
    # Coverage with 10⁵ draws: .9456 to .9646 in all of these. Four sd of 4000 draws (p < 1e-4): .0144.
    assert 0.9456 - 0.0144 < covered / draws < 0.9646 + 0.0144
