"""Advantages and token weights against their definitions, their zeros and their invariances."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsity_audit.lab import advantages as adv

MASK = torch.tensor([[True, True, True, False], [True, True, False, False]])


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Group baselines


def test_group_advantages_by_hand_with_and_without_the_deviation() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 5.0, 7.0, 5.0, 7.0])
    centred = adv.group_advantages(rewards, group_size=4, divide_by_std=False)
    assert centred.tolist() == [0.75, -0.25, -0.25, -0.25, -1, 1, -1, 1]
    scaled = adv.group_advantages(rewards, group_size=4, divide_by_std=True)
    assert scaled.tolist() == pytest.approx(
        [1.5, -0.5, -0.5, -0.5, *(x / math.sqrt(4 / 3) for x in (-1, 1, -1, 1))], rel=1e-5
    )


def test_leave_one_out_by_hand_and_as_a_multiple_of_the_group_mean_baseline() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0])
    found = adv.leave_one_out_advantages(rewards, group_size=4)
    assert found.tolist() == pytest.approx([1, -1 / 3, -1 / 3, -1 / 3])
    centred = adv.group_advantages(_random(12), group_size=4, divide_by_std=False)
    assert (adv.leave_one_out_advantages(_random(12), group_size=4) - centred * 4 / 3).abs().max() < 1e-6


def test_a_leave_one_out_baseline_does_not_depend_on_its_own_sample() -> None:
    rewards = _random(8)
    changed = rewards.clone()
    changed[2] += 10
    before, after = (adv.leave_one_out_advantages(r, group_size=8) for r in (rewards, changed))
    assert (after - before)[2].item() == pytest.approx(10, rel=1e-5)


BASELINES = [
    lambda r: adv.group_advantages(r, group_size=4, divide_by_std=True),
    lambda r: adv.group_advantages(r, group_size=4, divide_by_std=False),
    lambda r: adv.leave_one_out_advantages(r, group_size=4),
]


@pytest.mark.parametrize("baseline", BASELINES, ids=["grpo", "without std", "leave-one-out"])
@given(reward=st.floats(-1e3, 1e3, width=32))
@settings(deadline=None, max_examples=30)
def test_an_all_equal_group_has_exactly_no_advantage_whatever_the_rounding(baseline, reward) -> None:
    assert not baseline(torch.full((8,), reward)).any()


@pytest.mark.parametrize("baseline", BASELINES, ids=["grpo", "without std", "leave-one-out"])
@pytest.mark.parametrize("shift", [1.0, -3.0, 100.0])
def test_a_constant_added_to_all_rewards_changes_nothing(baseline, shift) -> None:
    rewards = (_random(8) > 0).float()
    assert (baseline(rewards + shift) - baseline(rewards)).abs().max() < 1e-4


@pytest.mark.parametrize("baseline", BASELINES, ids=["grpo", "without std", "leave-one-out"])
def test_groups_do_not_see_each_other_and_keep_their_order(baseline) -> None:
    rewards = _random(8)
    swapped = torch.cat([rewards[4:], rewards[:4]])
    assert torch.equal(baseline(swapped), torch.cat([baseline(rewards)[4:], baseline(rewards)[:4]]))
    assert baseline(rewards)[:4].sum().abs() < 1e-5


# GAE


def _gae_by_definition(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """Σ_l (γλ)^l δ_{t+l}, written out in double precision."""
    found = torch.zeros(rewards.shape, dtype=torch.float64)
    for b, length in enumerate(mask.sum(1).tolist()):
        r, v = rewards[b, :length].double(), [*values[b, :length].double(), 0.0]
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            found[b, t] = sum((gamma * lam) ** (s - t) * delta[s] for s in range(t, length))
    return found


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
def test_gae_is_its_definition(gamma, lam) -> None:
    lengths = torch.tensor([7, 3, 1, 0])
    mask = torch.arange(7) < lengths[:, None]
    rewards, values = _random(4, 7), _random(4, 7, seed=1)
    found = adv.generalised_advantages(rewards, values, completion_mask=mask, gamma=gamma, lam=lam)
    assert (found - _gae_by_definition(rewards, values, mask, gamma, lam)).abs().max() < 1e-5
    assert not found[~mask].any()


def test_gae_at_both_ends_is_the_return_and_the_one_step_error() -> None:
    rewards, values = _random(2, 4), _random(2, 4, seed=1)
    monte_carlo = adv.generalised_advantages(rewards, values, completion_mask=MASK, gamma=1.0, lam=1.0)
    assert monte_carlo[0, 0].item() == pytest.approx((rewards[0, :3].sum() - values[0, 0]).item(), rel=1e-5)
    one_step = adv.generalised_advantages(rewards, values, completion_mask=MASK, gamma=1.0, lam=0.0)
    assert one_step[1, 1].item() == pytest.approx((rewards[1, 1] - values[1, 1]).item(), rel=1e-5)


def test_a_value_that_is_right_leaves_no_advantage_and_padding_is_not_read() -> None:
    rewards = torch.tensor([[0.0, 0.0, 1.0, 9.0], [0.0, 0.5, 9.0, float("nan")]])
    values = torch.tensor([[1.0, 1.0, 1.0, 9.0], [0.5, 0.5, 9.0, float("nan")]])
    found = adv.generalised_advantages(rewards, values, completion_mask=MASK, gamma=1.0, lam=0.95)
    assert not found.any()


def test_whitened_advantages_have_mean_zero_and_deviation_one_over_tokens() -> None:
    dirty = torch.where(MASK, torch.tensor([[1.0, 2.0, 3.0, 0], [4.0, 5.0, 0, 0]]), float("nan"))
    found = adv.whitened(dirty, completion_mask=MASK)
    step = 1 / math.sqrt(2.5)
    assert found.flatten().tolist() == pytest.approx([-2 * step, -step, 0, 0, step, 2 * step, 0, 0], abs=1e-5)
    assert (adv.whitened(dirty + 7, completion_mask=MASK) - found).abs().max() < 1e-5
    assert not adv.whitened(torch.full((2, 4), 0.1), completion_mask=MASK).any()


def test_the_kl_lies_on_every_token_and_the_outcome_on_the_last_one() -> None:
    divergences = torch.tensor([[1.0, 2.0, 3.0, 9.0], [4.0, 5.0, 9.0, float("nan")]])
    found = adv.kl_in_reward(torch.tensor([1.0, 0.5]), divergences, completion_mask=MASK, coefficient=0.1)
    assert found.flatten().tolist() == pytest.approx([-0.1, -0.2, 0.7, 0, -0.4, 0, 0, 0])
    empty = adv.kl_in_reward(
        torch.ones(2), divergences, completion_mask=torch.zeros_like(MASK), coefficient=1.0
    )
    assert not empty.any()


# Weights on tokens


def _weights(logprobs: Tensor, old: Tensor, **changes) -> Tensor:
    options = {"scale": 0.3, "alpha": 1.0, "control": "none", "generator": None, **changes}
    return adv.divergence_weights(logprobs, old, completion_mask=MASK, **options)


def test_divergence_weights_by_hand() -> None:
    logprobs, old = torch.full((2, 4), -1.0), torch.full((2, 4), -1.0)
    logprobs[0, 1] -= math.log(2)
    kl = 2 - 1 - math.log(2)
    expected = 1 + 0.3 * (1 / (1 + math.exp(-kl)) - 0.5)
    assert _weights(logprobs, old).tolist() == [[1, pytest.approx(expected), 1, 0], [1, 1, 0, 0]]
    opposite = _weights(logprobs, old, alpha=-1.0)[0, 1]
    assert opposite.item() == pytest.approx(2 - expected)


def test_divergence_weights_are_one_right_after_the_rollout_and_carry_no_gradient() -> None:
    logprobs = -_random(2, 4).abs().requires_grad_(True)
    found = _weights(logprobs, logprobs.detach())
    assert torch.equal(found, MASK.float())
    assert not found.requires_grad


def test_the_controls_keep_the_mean_or_the_set_of_weights() -> None:
    logprobs, old = -_random(2, 4).abs(), -_random(2, 4, seed=1).abs()
    plain = _weights(logprobs, old)
    normalised = _weights(logprobs, old, control="mean-normalised")
    assert normalised[MASK].mean().item() == pytest.approx(1)
    assert torch.equal(normalised[MASK] > 1, plain[MASK] > plain[MASK].mean())
    shuffled = _weights(logprobs, old, control="shuffled", generator=torch.Generator().manual_seed(0))
    assert torch.equal(shuffled[MASK].sort().values, plain[MASK].sort().values)
    assert not torch.equal(shuffled, plain)
    assert not shuffled[~MASK].any()


def test_padding_does_not_weigh_and_is_not_read() -> None:
    logprobs, old = -_random(2, 4).abs(), -_random(2, 4, seed=1).abs()
    dirty = torch.where(MASK, logprobs, float("nan"))
    assert torch.equal(_weights(dirty, old), _weights(logprobs, old))


@pytest.mark.parametrize(("share", "kept"), [(0.2, 1), (0.4, 2), (1.0, 5), (0.01, 1)])
def test_the_positions_with_the_highest_entropy_are_selected(share, kept) -> None:
    entropies = torch.tensor([[0.1, 0.9, 0.2, 9.0], [0.5, 0.3, 9.0, 9.0]])
    found = adv.entropy_selected(entropies, completion_mask=MASK, share=share)
    assert int(found.sum()) == kept
    assert found[0, 1]
    assert not found[~MASK].any()


def test_ties_at_the_cut_are_all_kept_and_nothing_is_selected_of_nothing() -> None:
    found = adv.entropy_selected(torch.ones(2, 4), completion_mask=MASK, share=0.2)
    assert torch.equal(found, MASK)
    nothing = torch.zeros_like(MASK)
    assert not adv.entropy_selected(torch.ones(2, 4), completion_mask=nothing, share=0.2).any()


# PRIME


def test_implicit_process_rewards_are_scaled_log_ratios() -> None:
    found = adv.implicit_process_rewards(torch.tensor([-1.0]), torch.tensor([-3.0]), beta=0.05)
    assert found.item() == pytest.approx(0.1)


def test_prime_advantages_by_hand() -> None:
    dense = torch.tensor([[0.3, 0.1, 0.2, 9.0], [0.4, 0.0, 9.0, float("nan")]])
    found = adv.prime_advantages(dense, torch.tensor([1.0, 0.0]), completion_mask=MASK, group_size=2)
    # Row 0: baseline .2 (the mean of row 1), so .1, −.1, 0 to sum from behind, and outcome 1 − 0.
    # Row 1: baseline .2 (the mean of row 0), so .2, −.2, and outcome 0 − 1.
    assert found.flatten().tolist() == pytest.approx([1.0, 0.9, 1.0, 0, -1.0, -1.2, 0, 0], abs=1e-6)


def test_prime_without_process_rewards_is_leave_one_out() -> None:
    outcomes = torch.tensor([1.0, 0.0])
    found = adv.prime_advantages(torch.zeros(2, 4), outcomes, completion_mask=MASK, group_size=2)
    expected = adv.leave_one_out_advantages(outcomes, group_size=2)
    assert torch.equal(found, torch.where(MASK, expected[:, None], 0.0))


def test_prime_is_blind_to_constants_in_either_reward() -> None:
    dense, outcomes = _random(2, 4), torch.tensor([1.0, 0.0])
    options = {"completion_mask": MASK, "group_size": 2}
    found = adv.prime_advantages(dense, outcomes, **options)
    assert (adv.prime_advantages(dense + 3, outcomes + 2, **options) - found).abs().max() < 1e-5
    same = adv.prime_advantages(torch.full((2, 4), 0.25), torch.ones(2), **options)
    assert not same.any()


def test_prompts_are_kept_when_their_accuracy_lies_in_the_band() -> None:
    outcomes = torch.tensor([0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1]).float()
    kept = adv.within_accuracy(outcomes, group_size=4, low=0.2, high=0.8)
    assert kept.view(4, 4).tolist() == [[False] * 4, [True] * 4, [True] * 4, [False] * 4]
