"""The KL-optimal policy, against its definition on a policy small enough to write down."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsity_audit.lab.optimum import kl_to_optimum, log_partition, optimal_shares

ROUNDING = 1e-9


def tilted(reference: torch.Tensor, rewards: torch.Tensor, beta: float) -> torch.Tensor:
    """π* ∝ π₀ e^{r/β}, by definition."""
    return torch.softmax(reference.log() + rewards / beta, dim=0)


def kl(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first * (first / second).log()).sum())


# Six completions of one prompt: format, reward, and the probability under reference and policy.
FORMATS = torch.tensor([0, 0, 1, 1, 2, 2])
REWARDS = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
REFERENCE = torch.tensor([0.25, 0.05, 0.10, 0.25, 0.15, 0.20], dtype=torch.float64)
POLICY = torch.tensor([0.60, 0.05, 0.15, 0.10, 0.05, 0.05], dtype=torch.float64)


def by_format(weights: torch.Tensor) -> torch.Tensor:
    return torch.zeros(3, dtype=torch.float64).index_add(0, FORMATS, weights)


@given(beta=st.floats(0.02, 5))
def test_the_distance_is_the_kl_of_the_definition(beta: float) -> None:
    distance = kl_to_optimum(
        torch.tensor([kl(POLICY, REFERENCE)], dtype=torch.float64),
        (POLICY * REWARDS).sum()[None],
        (REFERENCE * REWARDS).sum()[None],
        beta=beta,
    )
    assert abs(distance - kl(POLICY, tilted(REFERENCE, REWARDS, beta))) < ROUNDING / beta


@given(beta=st.floats(0.02, 5))
def test_the_optimal_POLICYis_at_distance_zero(beta: float) -> None:
    best = tilted(REFERENCE, REWARDS, beta)
    distance = kl_to_optimum(
        torch.tensor([kl(best, REFERENCE)], dtype=torch.float64),
        (best * REWARDS).sum()[None],
        (REFERENCE * REWARDS).sum()[None],
        beta=beta,
    )
    assert abs(distance) < ROUNDING / beta


@given(beta=st.floats(0.02, 5))
def test_the_optimums_format_shares_are_those_of_the_definition(beta: float) -> None:
    best = tilted(REFERENCE, REWARDS, beta)
    shares = by_format(REFERENCE)
    accuracies = by_format(REFERENCE * REWARDS) / shares
    expected = by_format(best)
    assert (optimal_shares(shares, accuracies, beta=beta) - expected).abs().max() < ROUNDING


def test_limits_are_the_REFERENCEand_the_REFERENCEamong_right_answers() -> None:
    shares, accuracies = torch.tensor([0.3, 0.35, 0.35]), torch.tensor([0.9, 0.2, 0.0])
    assert (optimal_shares(shares, accuracies, beta=1e6) - shares).abs().max() < 1e-5
    right = shares * accuracies
    assert (optimal_shares(shares, accuracies, beta=1e-3) - right / right.sum()).abs().max() < 1e-6


def test_a_format_that_never_occurs_has_no_share_and_beta_never_overflows() -> None:
    shares = optimal_shares(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0]), beta=1e-6)
    assert shares.tolist() == [1.0, 0.0]
    accuracies = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    assert log_partition(accuracies, beta=1e-4).tolist() == [0.0, math.log(0.5) + 1e4, 1e4]
