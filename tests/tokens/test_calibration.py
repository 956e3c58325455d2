"""Thresholds and positions that spend what they are asked to spend."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsity_audit.errors import UsageError
from sparsity_audit.tokens.calibration import budget_threshold, random_positions, share_threshold


def test_a_share_threshold_has_that_share_above_it() -> None:
    signal = torch.arange(10.0)[None]
    written = torch.ones(1, 10, dtype=torch.bool)
    for share, above in ((0.3, 3), (0.05, 0), (1.0, 9), (0.0, 0)):
        threshold = share_threshold(signal, written, share=share)
        assert int((signal > threshold).sum()) == above
    assert share_threshold(signal, written, share=0.0) == math.inf
    with pytest.raises(UsageError, match="share"):
        share_threshold(signal, written, share=1.5)


def test_positions_behind_the_end_count_for_nothing() -> None:
    signal = torch.tensor([[1.0, 2.0, 9.0], [3.0, 4.0, 9.0]])
    written = torch.tensor([[True, True, False], [True, True, False]])
    assert share_threshold(signal, written, share=0.5) == 2.0
    assert budget_threshold(signal, written, budget=1, spent_frac=1.0) < 2.0


@given(
    st.lists(st.lists(st.floats(0, 1, width=32), min_size=4, max_size=4), min_size=1, max_size=9),
    st.integers(1, 4),
)
def test_a_budget_threshold_is_the_largest_that_spends_the_budget(rows, budget) -> None:
    signal = torch.tensor(rows)
    written = torch.ones_like(signal, dtype=torch.bool)
    threshold = budget_threshold(signal, written, budget=budget, spent_frac=0.6)
    needed = math.ceil(0.6 * len(rows))

    def spending(value: float) -> int:
        return int(((signal > value).sum(dim=1) >= budget).sum())

    if threshold > 0:
        assert spending(threshold) >= needed
        higher = signal[signal > threshold]
        assert spending(float(higher.min())) < needed
    else:
        assert spending(1e-45) < needed or float(signal.min()) >= 0


def test_a_budget_beyond_the_longest_completion_is_spent_as_far_as_it_goes() -> None:
    signal = torch.ones(2, 3)
    assert budget_threshold(signal, signal > 0, budget=7) == 0.0
    with pytest.raises(UsageError, match="budget"):
        budget_threshold(signal, signal > 0, budget=0)


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=6), st.integers(0, 99))
def test_random_positions_are_as_many_as_asked_within_the_row(pairs, seed) -> None:
    counts, lengths = torch.tensor(pairs).T
    seeds = [seed + row for row in range(len(pairs))]
    found = random_positions(counts, lengths, seeds=seeds)
    assert found.sum(dim=1).tolist() == torch.minimum(counts, lengths).tolist()
    for row, length in enumerate(lengths.tolist()):
        assert not found[row, length:].any()
    assert torch.equal(found, random_positions(counts, lengths, seeds=seeds))


def test_random_positions_are_uniform() -> None:
    rows = 4000
    found = random_positions(torch.full((rows,), 2), torch.full((rows,), 8), seeds=range(rows))
    expected, spread = rows / 4, (rows * 0.25 * 0.75) ** 0.5
    assert bool(((found.sum(dim=0) - expected).abs() < 5 * spread).all())
