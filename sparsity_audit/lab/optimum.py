"""The policy that KL-regularised RL would end at, and how far a policy is from it.

Contract: pure functions of tensors. For one prompt with a reward r in {0, 1} and a reference π₀ that mixes
formats, π₀ = Σ α_i π_i, the maximiser of E r − β KL(π‖π₀) is

    π* = π₀ e^{r/β} / Z = Σ α_i e^{r/β} π_i / Z,    Z = E₀ e^{r/β} = 1 + p (e^{1/β} − 1),

with p the reference's accuracy on the prompt. Two distances follow: of whole policies,
KL(π‖π*) = KL(π‖π₀) − E r / β + ln Z, and of format shares, since π* gives format i the share
α_i (1 + p_i (e^{1/β} − 1)) / Z, with p_i the accuracy within the format.

Source: 2504.07912 (the mixture argument), 2305.18290 eq. 4 (the optimum). Departure: p, α and p_i are
estimated from samples of the reference, so ln Z is biased downwards (Jensen), by about (1 − p) / (2 n p) for
p e^{1/β} ≫ 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["kl_to_optimum", "log_partition", "optimal_shares"]


def log_partition(accuracy: Tensor, *, beta: float) -> Tensor:
    """The logarithm ln Z = ln(1 − p + p e^{1/β}) for each accuracy p of the reference, without overflow.

    Args:
        accuracy: float[prompts], in [0, 1].
        beta: Coefficient of the KL term, > 0.
    """
    return torch.logaddexp(torch.log1p(-accuracy), accuracy.log() + 1 / beta)


def kl_to_optimum(
    kl_to_reference: Tensor, rewards: Tensor, reference_accuracy: Tensor, *, beta: float
) -> float:
    """Mean over prompts of KL(π‖π*), in nats a completion.

    Args:
        kl_to_reference: float[prompts], KL(π‖π₀) of completions.
        rewards: float[prompts], the policy's accuracy.
        reference_accuracy: float[prompts], the reference's.
        beta: Coefficient of the KL term, > 0.
    """
    partition = log_partition(reference_accuracy.double(), beta=beta)
    return float((kl_to_reference.double() - rewards.double() / beta + partition).mean())


def optimal_shares(shares: Tensor, accuracies: Tensor, *, beta: float) -> Tensor:
    """The format shares of π*: float64[formats].

    Args:
        shares: float[formats], α_i: how often the reference takes each format.
        accuracies: float[formats], p_i; 0 where the share is 0.
        beta: Coefficient of the KL term, > 0.
    """
    return torch.softmax(shares.double().log() + log_partition(accuracies.double(), beta=beta), dim=0)
