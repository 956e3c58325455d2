"""From rewards to advantages: baselines, returns, and the weights that papers put on single tokens.

Contract: pure functions without gradients; rows of one group (the samples of one prompt) stand together, in
the order of the rollout. Positions where `completion_mask` is False may hold anything and get 0. A group
whose rewards are all equal gets exactly 0, whatever the rounding: it teaches nothing.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from sparsity_audit.lab.losses import k3

__all__ = [
    "WeightControl",
    "divergence_weights",
    "entropy_selected",
    "generalised_advantages",
    "group_advantages",
    "implicit_process_rewards",
    "kl_in_reward",
    "leave_one_out_advantages",
    "prime_advantages",
    "whitened",
    "within_accuracy",
]

_STD_FLOOR = 1e-6

WeightControl = Literal["none", "mean-normalised", "shuffled"]


def group_advantages(rewards: Tensor, *, group_size: int, divide_by_std: bool) -> Tensor:
    """A_i = r_i − mean(group), divided by the group's standard deviation when `divide_by_std`.

    Args:
        rewards: float[batch], batch = prompts · group_size.
        group_size: Samples of one prompt, ≥ 2.
        divide_by_std: GRPO as published; without it "Dr. GRPO" (2503.20783), where a prompt that is nearly
            always or nearly never solved gets no larger step than the others.

    Source: 2402.03300 §4.1.2. The deviation is the sample one (n − 1), plus 1e-6, as in TRL and verl.
    """
    groups = rewards.view(-1, group_size)
    centred = groups - groups.mean(dim=1, keepdim=True)
    if divide_by_std:
        centred = centred / (groups.std(dim=1, keepdim=True) + _STD_FLOOR)
    return torch.where(_varies(groups), centred, 0.0).reshape(-1)


def leave_one_out_advantages(rewards: Tensor, *, group_size: int) -> Tensor:
    """A_i = r_i − mean of the other samples of the prompt: a baseline that does not depend on sample i.

    Args:
        rewards: float[batch], batch = prompts · group_size.
        group_size: Samples of one prompt, ≥ 2.

    Source: RLOO, 2402.14740 §2.2 (Kool et al. 2019). It equals k/(k − 1) times r_i − mean(group).
    """
    groups = rewards.view(-1, group_size)
    others = (groups.sum(dim=1, keepdim=True) - groups) / (group_size - 1)
    return torch.where(_varies(groups), groups - others, 0.0).reshape(-1)


def generalised_advantages(
    rewards: Tensor, values: Tensor, *, completion_mask: Tensor, gamma: float, lam: float
) -> Tensor:
    """GAE: A_t = Σ_l (γλ)^l δ_{t+l} with δ_t = r_t + γ V_{t+1} − V_t and V = 0 behind the last token.

    λ = 1 gives the return less the value, λ = 0 the one-step error. Advantage + value is the return the value
    head is fitted to. A completion cut by the length limit ends like any other: no value is put in behind it,
    because its reward (0) is final.

    Args:
        rewards: float[batch, seq], the reward of each token; the outcome stands at the last.
        values: float[batch, seq], V before token t.
        completion_mask: bool[batch, seq], True on a prefix of each row.
        gamma: Discount, in [0, 1].
        lam: λ in [0, 1].

    Source: 1506.02438 eq. 16.
    """
    rewards, values = (torch.where(completion_mask, x, 0.0) for x in (rewards, values))
    advantages = torch.zeros_like(values)
    following = torch.zeros_like(values[:, 0])
    next_value = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = delta + gamma * lam * following
        advantages[:, t] = following
        next_value = values[:, t]
    return advantages


def whitened(advantages: Tensor, *, completion_mask: Tensor) -> Tensor:
    """Advantages with mean 0 and deviation 1 over the batch's completion tokens; 0 where they are all equal.

    Args:
        advantages: float[batch, seq].
        completion_mask: bool[batch, seq].

    Source: no equation of 1707.06347, but of its code, and of those for language models ever since (detail
    7 of "The 37 implementation details of PPO", 2022). Deviation: over the whole rollout, not each
    minibatch.
    """
    flat = advantages[completion_mask]
    if not len(flat) or flat.amax() == flat.amin():
        return torch.zeros_like(advantages)
    scaled = (advantages - flat.mean()) / (flat.std() + _STD_FLOOR)
    return torch.where(completion_mask, scaled, 0.0)


def kl_in_reward(
    outcomes: Tensor, divergences: Tensor, *, completion_mask: Tensor, coefficient: float
) -> Tensor:
    """Rewards of tokens: −β · KL_t everywhere, plus the outcome at the last token of the completion.

    Args:
        outcomes: float[batch].
        divergences: float[batch, seq], k1 of the sampled tokens, weighted or not.
        completion_mask: bool[batch, seq], True on a prefix of each row.
        coefficient: β ≥ 0.

    Source: 1909.08593 eq. 2, whose sum over tokens is R − β log π/π_ref.
    """
    rewards = torch.where(completion_mask, -coefficient * divergences, 0.0)
    lengths = completion_mask.sum(dim=1)
    rows = (lengths > 0).nonzero(as_tuple=True)[0]
    rewards[rows, lengths[rows] - 1] += outcomes[rows]
    return rewards


def divergence_weights(
    logprobs: Tensor,
    old_logprobs: Tensor,
    *,
    completion_mask: Tensor,
    scale: float,
    alpha: float,
    control: WeightControl,
    generator: torch.Generator | None,
) -> Tensor:
    """w_t = 1 + s(σ(α · KL_t) − ½), the factor on the advantage of token t; detached.

    KL_t is k3 of the sampled token between the policy and the *rollout* policy. On the first minibatch after
    a rollout both are the same and every weight is 1, so one update per rollout makes this inert.

    Args:
        logprobs: float[batch, seq] of the policy now.
        old_logprobs: float[batch, seq] of the behaviour policy.
        completion_mask: bool[batch, seq].
        scale: s; weights lie within 1 ± s/2.
        alpha: α; > 0 stresses tokens that have moved, < 0 those that have not.
        control: `mean-normalised` divides by the mean weight, because a mean other than 1 acts like another
            learning rate; `shuffled` deals the same weights out to other tokens at random.
        generator: Source of the shuffle; only `shuffled` needs it.

    Returns:
        float[batch, seq], 0 at padding.

    Source: 2603.22446. Deviations: α and s are not published (ours: s = .3, α = ±1); both controls are ours.
    """
    moved = torch.where(completion_mask, (logprobs - old_logprobs).detach(), 0.0)
    weights = 1 + scale * (torch.sigmoid(alpha * k3(moved, torch.zeros_like(moved))) - 0.5)
    flat = weights[completion_mask]
    if control == "mean-normalised":
        flat = flat / flat.mean()
    elif control == "shuffled":
        flat = flat[torch.randperm(len(flat), generator=generator)]
    return torch.zeros_like(weights).masked_scatter(completion_mask, flat)


def entropy_selected(entropies: Tensor, *, completion_mask: Tensor, share: float) -> Tensor:
    """The `share` of completion tokens with the highest entropy of the policy; ties at the cut are all kept.

    The loss is multiplied by this mask while its normalisation still counts every token.

    Args:
        entropies: float[batch, seq], in nats, of the policy that is being trained.
        completion_mask: bool[batch, seq].
        share: ρ in (0, 1].

    Returns:
        bool[batch, seq].

    Source: 2506.01939, ρ = .2, the quantile taken over the minibatch.
    """
    ranked = entropies[completion_mask].sort(descending=True).values
    if not len(ranked):
        return completion_mask
    cut = ranked[max(1, round(share * len(ranked))) - 1]
    return completion_mask & (entropies >= cut)


def implicit_process_rewards(logprobs: Tensor, ref_logprobs: Tensor, *, beta: float) -> Tensor:
    """q_t = β(log π_φ − log π_ref) of the sampled token: the dense reward of PRIME.

    Args:
        logprobs: float[batch, seq] of the implicit reward model π_φ; a gradient flows when it has one.
        ref_logprobs: float[batch, seq] of the reference policy.
        beta: β > 0; .05 in the paper.

    Source: 2502.01456, the implicit process reward.
    """
    return beta * (logprobs - ref_logprobs)


def prime_advantages(
    process_rewards: Tensor, outcomes: Tensor, *, completion_mask: Tensor, group_size: int
) -> Tensor:
    """A_t = Σ_{s≥t} (q_s − LOO of the mean q) + r − LOO of r: two rewards, two leave-one-out baselines.

    Args:
        process_rewards: float[batch, seq], q_t.
        outcomes: float[batch], r.
        completion_mask: bool[batch, seq].
        group_size: Samples of one prompt, ≥ 2.

    Source: 2502.01456, RLOO with implicit process rewards, γ = 1; the baseline of the dense reward is the
    mean over the other samples of their mean token reward. Deviations: the authors' code multiplies q_t by
    k/(k − 1) as if it were that mean, and whitens the sum over the batch; the equation does neither, nor do
    we.
    """
    dense = torch.where(completion_mask, process_rewards.detach(), 0.0)
    means = (dense.sum(dim=1) / completion_mask.sum(dim=1).clamp(min=1)).view(-1, group_size)
    baseline = ((means.sum(dim=1, keepdim=True) - means) / (group_size - 1)).reshape(-1, 1)
    centred = torch.where(completion_mask, dense - baseline, 0.0)
    to_come = centred.flip(1).cumsum(dim=1).flip(1)
    outcome = leave_one_out_advantages(outcomes, group_size=group_size).unsqueeze(1)
    return torch.where(completion_mask, to_come + outcome, 0.0)


def within_accuracy(outcomes: Tensor, *, group_size: int, low: float, high: float) -> Tensor:
    """bool[batch]: the prompt's share of correct samples lies in [low, high] (PRIME keeps [.2, .8])."""
    accuracy = outcomes.view(-1, group_size).mean(dim=1)
    return ((accuracy >= low) & (accuracy <= high)).repeat_interleave(group_size)


def _varies(groups: Tensor) -> Tensor:
    return (groups.amax(dim=1) > groups.amin(dim=1)).unsqueeze(1)
