"""The losses of the lab: pure functions of tensors, each with its source, its equation and our deviations.

Contract: nothing here samples, holds state or knows a model. `logprobs[b, t]` is the natural logarithm of
the probability the policy gives to token t of completion b; prompts are not in these arrays. Padding (weight
0, `completion_mask` False) may hold anything, NaN included, and reaches neither a loss nor a gradient; only
the elementwise estimators k1, k2 and k3 want finite numbers everywhere. A loss is Σ weights · (loss of a
token): `token_weights` names the normalisation, and because weights are given from outside, rows without a
gradient can be dropped while the others keep their share.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

__all__ = [
    "Normalisation",
    "clipped_policy_loss",
    "clipped_share",
    "dpo_loss",
    "exact_kl",
    "implicit_reward_loss",
    "k1",
    "k2",
    "k3",
    "kto_loss",
    "kto_reference_point",
    "max_probability_certainty",
    "orpo_loss",
    "policy_gradient_loss",
    "sequence_logprobs",
    "sft_loss",
    "shannon_certainty",
    "simpo_loss",
    "token_weights",
    "value_loss",
    "weighted_sum",
]

Normalisation = Literal["token-mean", "sequence-mean"]


def token_weights(completion_mask: Tensor, *, normalisation: Normalisation) -> Tensor:
    """Weights of the tokens in a loss; they sum to 1 over the minibatch.

    `sequence-mean`, 1/(batch · |o_i|): every completion counts the same, so a token of a long one counts less
    (GRPO, 2402.03300 eq. 3). `token-mean`, 1/Σ|o_i|: every token counts the same (DAPO, 2503.14476 eq. 8).

    Args:
        completion_mask: bool[batch, seq], True at tokens of the completion.
        normalisation: Which of the two.

    Returns:
        float32[batch, seq]; 0 at padding. An empty completion has no weight, but counts as a sequence.
    """
    mask = completion_mask.float()
    if normalisation == "token-mean":
        return mask / mask.sum().clamp(min=1)
    return mask / mask.sum(dim=1, keepdim=True).clamp(min=1) / len(mask)


def weighted_sum(per_token: Tensor, weights: Tensor) -> Tensor:
    """Σ weights · per_token, where a weight of 0 silences whatever stands there."""
    return torch.where(weights != 0, per_token, 0.0).mul(weights).sum()


# Policy gradients


def policy_gradient_loss(logprobs: Tensor, advantages: Tensor, *, weights: Tensor) -> Tensor:
    """REINFORCE: −Σ w · A · log π, whose gradient is that of the expected return when π made the data.

    With a learned value as baseline this is the policy part of A2C (2502.06533 §3), the one-epoch case of PPO
    (2205.09123); with the mean of the other samples it is RLOO (2402.14740).

    Args:
        logprobs: float[batch, seq] of the policy.
        advantages: float[batch], one a completion, or float[batch, seq]; no gradient flows into them.
        weights: float[batch, seq] from `token_weights`.
    """
    return -weighted_sum(logprobs * _masked(_per_token(advantages).detach(), weights), weights)


def clipped_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, clip: float, weights: Tensor
) -> Tensor:
    """PPO and GRPO: −Σ w · min(ρA, clip(ρ, 1 − ε, 1 + ε)A) with ρ = π/π_old.

    At ρ = 1 its gradient is that of `policy_gradient_loss`, so with one update per rollout the clip does
    nothing. Above 1 + ε a token with A > 0 has no gradient, below 1 − ε one with A < 0 has none.

    Args:
        logprobs: float[batch, seq] of the policy.
        old_logprobs: float[batch, seq] of the behaviour policy, the one that made the completions.
        advantages: float[batch] or float[batch, seq]; no gradient flows into them.
        clip: ε > 0.
        weights: float[batch, seq] from `token_weights`.

    Source: PPO, 1707.06347 eq. 7; GRPO, 2402.03300 eq. 3 (its KL term is `k3`, added by the caller).
    """
    ratio = _masked(logprobs - old_logprobs.detach(), weights).exp()
    advantages = _masked(_per_token(advantages).detach(), weights)
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return -weighted_sum(torch.minimum(ratio * advantages, clipped * advantages), weights)


def clipped_share(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, clip: float, completion_mask: Tensor
) -> float:
    """Share of completion tokens whose gradient the clip takes away; 0 for an empty minibatch."""
    ratio = _masked(logprobs.detach() - old_logprobs, completion_mask).exp()
    advantages = _per_token(advantages)
    silent = ((advantages > 0) & (ratio > 1 + clip)) | ((advantages < 0) & (ratio < 1 - clip))
    return int((silent & completion_mask).sum()) / max(1, int(completion_mask.sum()))


def value_loss(values: Tensor, returns: Tensor, *, weights: Tensor) -> Tensor:
    """½ Σ w · (V − G)², the fit of the value head to the returns.

    Source: 1707.06347 eq. 9. Deviation: no clipping of values (2005.12729 and 2006.05990 find no gain).

    Args:
        values: float[batch, seq], V of the state in which token t is chosen.
        returns: float[batch, seq], advantage + value at the time of the rollout; no gradient.
        weights: float[batch, seq] from `token_weights`.
    """
    return 0.5 * weighted_sum(_masked(values - returns.detach(), weights) ** 2, weights)


# KL(policy ‖ reference): three estimators on the sampled token, and the sum over the vocabulary


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The log ratio log π − log π_ref: unbiased for KL(π‖π_ref) under samples of π, of either sign.

    As a loss it is inert: E_π[∇k1] = 0. It belongs into the reward (`advantages.kl_in_reward`).
    Source: Schulman, "Approximating KL divergence" (2020), for k1, k2 and k3.
    """
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """½(log π − log π_ref)²: biased as a value, but E_π[∇k2] is the gradient of KL(π‖π_ref)."""
    return 0.5 * (logprobs - ref_logprobs) ** 2


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """π_ref/π − 1 − log(π_ref/π): unbiased, never negative; E_π[∇k3] is the gradient of KL(π_ref‖π).

    The penalty of GRPO (2402.03300 eq. 4).
    """
    logratio = ref_logprobs - logprobs
    return logratio.exp() - 1 - logratio


def exact_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """Σ_v π(v) (log π(v) − log π_ref(v)) at every position, in nats.

    Args:
        logits: float[..., vocab] of the policy.
        ref_logits: float[..., vocab] of the reference policy.

    Returns:
        float[...].
    """
    logs, ref_logs = logits.log_softmax(dim=-1), ref_logits.log_softmax(dim=-1)
    return (logs.exp() * (logs - ref_logs)).sum(dim=-1)


def shannon_certainty(ref_logits: Tensor) -> Tensor:
    """J = (ln|V| − H(π_ref))/ln|V|: 0 where the reference is uniform, 1 where it knows.

    J^β is the weight of a position's KL in the prioritised penalty: with a large β only positions where the
    reference is certain are held.

    Args:
        ref_logits: float[..., vocab] of the reference policy.

    Source: 2502.06533 eq. 1 and 2, as printed.
    """
    logs = ref_logits.log_softmax(dim=-1)
    return (1 + (logs.exp() * logs).sum(dim=-1) / _log_vocabulary(ref_logits)).clamp(0, 1)


def max_probability_certainty(ref_logits: Tensor, *, temperature: float) -> Tensor:
    """J = 1 + ln(max p)/ln|V|: the min-entropy in place of Shannon's, so never below `shannon_certainty`.

    Args:
        ref_logits: float[..., vocab] of the reference policy.
        temperature: Divides the logits for this purpose alone.

    Source: the code published with 2502.06533 (`negentropy_max_prob`, `temperature_weighted_kl`), which is
    not its eq. 1. Deviation: none; the code's intercept is 0 by default and left out.
    """
    logs = (ref_logits / temperature).log_softmax(dim=-1)
    return (1 + logs.amax(dim=-1) / _log_vocabulary(ref_logits)).clamp(0, 1)


# Likelihood and preferences: one number a completion


def sequence_logprobs(logprobs: Tensor, completion_mask: Tensor, *, average: bool) -> Tensor:
    """The log-probability of each completion, float[batch]: the sum over tokens, or their mean."""
    total = _masked(logprobs, completion_mask).sum(dim=1)
    return total / completion_mask.sum(dim=1).clamp(min=1) if average else total


def sft_loss(logprobs: Tensor, *, weights: Tensor) -> Tensor:
    """−Σ w · log π over completions: the cross-entropy, prompts excluded."""
    return -weighted_sum(logprobs, weights)


def dpo_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float) -> Tensor:
    """−mean log σ(β(Δ_chosen − Δ_rejected)) with Δ = log π(y)/π_ref(y).

    Args:
        chosen_logratios: float[pairs], sums over the tokens of the completions that are preferred.
        rejected_logratios: float[pairs], of the others.
        beta: β > 0, the strength of the implied KL penalty.

    Source: 2305.18290 eq. 7.
    """
    return -F.logsigmoid(beta * (chosen_logratios - rejected_logratios)).mean()


def simpo_loss(
    chosen_mean_logprobs: Tensor, rejected_mean_logprobs: Tensor, *, beta: float, margin: float
) -> Tensor:
    """−mean log σ(β/|y_w| log π(y_w) − β/|y_l| log π(y_l) − γ): no reference, lengths divided out.

    Args:
        chosen_mean_logprobs: float[pairs], means over tokens.
        rejected_mean_logprobs: float[pairs].
        beta: β > 0.
        margin: γ ≥ 0, in the units of β · logprob.

    Source: 2405.14734 eq. 6.
    """
    return -F.logsigmoid(beta * (chosen_mean_logprobs - rejected_mean_logprobs) - margin).mean()


def kto_reference_point(mismatched_logratios: Tensor) -> Tensor:
    """z_ref = max(0, mean log π/π_ref of completions put behind *other* prompts); detached.

    Source: 2402.01306 §4.1. Deviation: none; the estimate is biased there too, and on purpose.
    """
    return mismatched_logratios.detach().mean().clamp(min=0)


def kto_loss(
    logratios: Tensor,
    desirable: Tensor,
    *,
    reference_point: Tensor,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> Tensor:
    """Mean of λ(1 − σ(±β(Δ − z_ref))), + for desirable completions and − for the others.

    Args:
        logratios: float[batch], Δ = log π(y)/π_ref(y), sums over tokens.
        desirable: bool[batch].
        reference_point: float[], from `kto_reference_point`.
        beta: β > 0.
        desirable_weight: λ_D; the paper wants λ_D n_D : λ_U n_U between 1 and 4/3 : 1.
        undesirable_weight: λ_U.

    Source: 2402.01306 eq. 7 and 8 (v: 1 − σ replaces the value function up to the constant λ_y).
    """
    sign = torch.where(desirable, 1.0, -1.0)
    weight = torch.where(desirable, desirable_weight, undesirable_weight)
    return (weight * torch.sigmoid(-sign * beta * (logratios - reference_point))).mean()


def orpo_loss(
    chosen_mean_logprobs: Tensor, rejected_mean_logprobs: Tensor, *, chosen_nll: Tensor, weight: float
) -> Tensor:
    """NLL of the chosen completion − λ · mean log σ(log odds(y_w) − log odds(y_l)), odds = P/(1 − P).

    P is the geometric mean of the token probabilities, so that log P is a mean over tokens.

    Args:
        chosen_mean_logprobs: float[pairs], < 0.
        rejected_mean_logprobs: float[pairs], < 0.
        chosen_nll: float[], `sft_loss` of the chosen completions. Deviation: the paper's code takes it over
            prompt and completion; prompts are random digits here, and are left out.
        weight: λ ≥ 0.

    Source: 2403.07691 eq. 6 and 7.
    """
    log_odds = _log_odds(chosen_mean_logprobs) - _log_odds(rejected_mean_logprobs)
    return chosen_nll - weight * F.logsigmoid(log_odds).mean()


def implicit_reward_loss(process_rewards: Tensor, outcomes: Tensor, *, completion_mask: Tensor) -> Tensor:
    """Binary cross-entropy of σ(Σ_t q_t) against the outcome: what trains the implicit reward model of PRIME.

    Args:
        process_rewards: float[batch, seq], q_t from `advantages.implicit_process_rewards`, with gradient.
        outcomes: float[batch], 1 for a correct completion, 0 for a wrong one.
        completion_mask: bool[batch, seq].

    Source: 2502.01456, the online update of the implicit process reward model.
    """
    logits = _masked(process_rewards, completion_mask).sum(dim=1)
    return F.binary_cross_entropy_with_logits(logits, outcomes)


def _per_token(advantages: Tensor) -> Tensor:
    return advantages.unsqueeze(1) if advantages.dim() == 1 else advantages


def _masked(values: Tensor, where: Tensor) -> Tensor:
    """Zero outside: before exp and log, so that padding cannot send NaN back through them."""
    return torch.where(where != 0, values, 0.0)


def _log_vocabulary(logits: Tensor) -> Tensor:
    return torch.tensor(float(logits.shape[-1])).log()


def _log_odds(logprobs: Tensor) -> Tensor:
    """The logit log p − log(1 − p); the complement through expm1, which keeps its digits near p = 1."""
    return logprobs - torch.log(-torch.expm1(logprobs))
