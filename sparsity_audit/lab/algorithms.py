"""The algorithms: each makes training data from rollouts, and names the loss that is minimised on it.

Contract: an algorithm holds its settings and nothing else; `prepare` turns the scored rollouts of a step
into a `Batch` without gradients, `loss` is called on parts of it. Three families: policy gradients (GRPO,
RLOO, PPO, A2C, PRIME differ in their advantages), likelihood (SFT, expert iteration differ in where
completions come from) and preferences (DPO, SimPO, KTO, ORPO differ in the loss). The equations are in
`losses` and `advantages`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from sparsity_audit.lab import advantages as adv
from sparsity_audit.lab import losses
from sparsity_audit.lab.batches import Actors, Batch, Loss, Reading, Scored, entropies, read
from sparsity_audit.lab.config import POLICY_GRADIENTS, PREFERENCES, TrainConfig
from sparsity_audit.lab.rollout import Rollouts

__all__ = ["Algorithm", "algorithm_for"]


class Algorithm(Protocol):
    """Data and loss."""

    def prepare(self, actors: Actors, scored: Scored) -> Batch:
        """The step's training data; it may be empty."""
        ...

    def loss(self, actors: Actors, batch: Batch, *, generator: torch.Generator) -> Loss:
        """The loss of a minibatch that is not empty."""
        ...


def algorithm_for(config: TrainConfig) -> Algorithm:
    """The algorithm that a config names."""
    if config.algorithm in POLICY_GRADIENTS:
        return PolicyGradient(config)
    return Preference(config) if config.algorithm in PREFERENCES else Imitation(config)


@dataclass(frozen=True, slots=True)
class PolicyGradient:
    """GRPO, RLOO, PPO, A2C and PRIME: one clipped loss on five kinds of advantages.

    With one update per step the clip does nothing, and A2C (PPO without a clip) is PPO.
    """

    config: TrainConfig

    @torch.no_grad()
    def prepare(self, actors: Actors, scored: Scored) -> Batch:
        """Advantages of every token. PRIME keeps prompts whose accuracy lies within [.2, .8]."""
        config, rollouts = self.config, scored.rollouts
        mask, size = rollouts.completion_mask, config.samples
        batch = Batch(rollouts=rollouts, reference=scored.reference)
        penalty = self._penalty_in_reward(scored)
        if config.algorithm in ("ppo", "a2c"):
            assert actors.value_head is not None
            values = actors.value_head(scored.policy.hidden).squeeze(-1)
            rewards = adv.kl_in_reward(
                rollouts.rewards, penalty, completion_mask=mask, coefficient=config.kl_coefficient
            )
            raw = adv.generalised_advantages(
                rewards, values, completion_mask=mask, gamma=1.0, lam=config.gae_lambda
            )
            return replace(batch, advantages=adv.whitened(raw, completion_mask=mask), returns=raw + values)
        outcomes = rollouts.rewards - config.kl_coefficient * (penalty * mask).sum(dim=1)
        if config.algorithm == "prime":
            assert actors.reward_model is not None
            assert config.beta is not None
            dense = adv.implicit_process_rewards(
                read(actors.reward_model, rollouts).logprobs, scored.reference.logprobs, beta=config.beta
            )
            per_token = adv.prime_advantages(dense, outcomes, completion_mask=mask, group_size=size)
            kept = adv.within_accuracy(rollouts.rewards, group_size=size, low=0.2, high=0.8)
            return replace(batch, advantages=per_token).select(kept.nonzero().squeeze(1))
        if config.algorithm == "rloo":
            per_row = adv.leave_one_out_advantages(outcomes, group_size=size)
        else:
            per_row = adv.group_advantages(
                outcomes, group_size=size, divide_by_std=bool(config.divide_by_std)
            )
        return replace(batch, advantages=torch.where(mask, per_row.unsqueeze(1), 0.0))

    def loss(self, actors: Actors, batch: Batch, *, generator: torch.Generator) -> Loss:
        """The policy loss, its KL penalty, and the loss of the critic."""
        config = self.config
        assert batch.advantages is not None
        weights = losses.token_weights(batch.rollouts.completion_mask, normalisation=config.normalisation)
        num_rows = len(batch.rollouts)
        if config.algorithm in ("grpo", "rloo") and config.kl in ("none", "k1"):
            # Rows without advantage have no other gradient either; their share of the weights stays theirs.
            kept = batch.advantages.any(dim=1).nonzero().squeeze(1)
            batch, weights = batch.select(kept), weights[kept]
        dropped = num_rows - len(batch.rollouts)
        if not len(batch.rollouts):
            return Loss(policy=None, dropped_rows=dropped)
        reading = read(actors.policy, batch.rollouts)
        policy, clipped, weight_mean = self._policy_loss(reading, batch, weights, generator)
        if config.kl in ("exact", "k2", "k3"):
            policy = policy + config.kl_coefficient * losses.weighted_sum(
                _divergence(config.kl, reading, batch.reference) * self._priority(batch.reference), weights
            )
        return Loss(
            policy=policy,
            critic=self._critic_loss(actors, reading, batch, weights),
            dropped_rows=dropped,
            clipped_share=clipped,
            weight_mean=weight_mean,
        )

    def _policy_loss(
        self, reading: Reading, batch: Batch, weights: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, float | None, float | None]:
        """The loss, the share of clipped tokens and the mean divergence weight."""
        config, mask, old = self.config, batch.rollouts.completion_mask, batch.rollouts.logprobs
        advantages, mean = batch.advantages, None
        assert advantages is not None
        if config.divergence_scale:
            factors = adv.divergence_weights(
                reading.logprobs,
                old,
                completion_mask=mask,
                scale=config.divergence_scale,
                alpha=config.divergence_alpha,
                control=config.divergence_control,
                generator=generator,
            )
            advantages, mean = advantages * factors, float(factors[mask].mean())
        if config.entropy_top < 1:
            weights = weights * adv.entropy_selected(
                entropies(reading.logits.detach()), completion_mask=mask, share=config.entropy_top
            )
        if config.algorithm == "a2c":
            return losses.policy_gradient_loss(reading.logprobs, advantages, weights=weights), None, mean
        loss = losses.clipped_policy_loss(
            reading.logprobs, old, advantages, clip=config.clip, weights=weights
        )
        clipped = losses.clipped_share(
            reading.logprobs, old, advantages, clip=config.clip, completion_mask=mask
        )
        return loss, clipped, mean

    def _critic_loss(self, actors: Actors, reading: Reading, batch: Batch, weights: Tensor) -> Tensor | None:
        if actors.value_head is not None and batch.returns is not None:
            values = actors.value_head(reading.hidden.detach()).squeeze(-1)
            return losses.value_loss(values, batch.returns, weights=weights)
        if actors.reward_model is not None and self.config.beta is not None:
            dense = adv.implicit_process_rewards(
                read(actors.reward_model, batch.rollouts).logprobs,
                batch.reference.logprobs,
                beta=self.config.beta,
            )
            return losses.implicit_reward_loss(
                dense, batch.rollouts.rewards, completion_mask=batch.rollouts.completion_mask
            )
        return None

    def _penalty_in_reward(self, scored: Scored) -> Tensor:
        """k1 of each token, weighted by the reference's certainty; 0 where the penalty is in the loss."""
        if self.config.kl != "k1":
            return torch.zeros_like(scored.policy.logprobs)
        return _divergence("k1", scored.policy, scored.reference) * self._priority(scored.reference)

    def _priority(self, reference: Reading) -> Tensor:
        """J^β of each position, or 1."""
        config = self.config
        if config.kl_priority == "none":
            return torch.ones_like(reference.logprobs)
        if config.kl_priority == "shannon":
            return losses.shannon_certainty(reference.logits) ** config.kl_exponent
        logits = reference.logits * config.temperature
        certainty = losses.max_probability_certainty(logits, temperature=config.kl_temperature)
        return certainty**config.kl_exponent


def _divergence(name: str, policy: Reading, reference: Reading) -> Tensor:
    """KL(policy ‖ reference) at each position, by the estimator of that name."""
    if name == "exact":
        return losses.exact_kl(policy.logits, reference.logits)
    estimator = {"k1": losses.k1, "k2": losses.k2, "k3": losses.k3}[name]
    return estimator(policy.logprobs, reference.logprobs)


@dataclass(frozen=True, slots=True)
class Imitation:
    """SFT and expert iteration: the likelihood of completions that were rewarded, each counted once.

    Source of expert iteration: 2504.07912 (k samples a prompt, correct and distinct ones kept, SFT from the
    base in each round); the rounds are the loop's. SFT differs in that the frozen base makes the completions,
    or the task writes them.
    """

    config: TrainConfig

    def prepare(self, actors: Actors, scored: Scored) -> Batch:  # noqa: ARG002 - the protocol's signature
        """Completions of reward 1 that differ from those before them in their group."""
        rows = torch.tensor(_rewarded_and_distinct(scored.rollouts), dtype=torch.long)
        return Batch(rollouts=scored.rollouts, reference=scored.reference).select(rows)

    def loss(self, actors: Actors, batch: Batch, *, generator: torch.Generator) -> Loss:  # noqa: ARG002
        """The cross-entropy of the completions."""
        weights = losses.token_weights(
            batch.rollouts.completion_mask, normalisation=self.config.normalisation
        )
        return Loss(policy=losses.sft_loss(read(actors.policy, batch.rollouts).logprobs, weights=weights))


def _rewarded_and_distinct(rollouts: Rollouts) -> list[int]:
    seen: set[tuple[int, str]] = set()
    rows = []
    for row, key in enumerate(zip(rollouts.group.tolist(), rollouts.texts(), strict=True)):
        if rollouts.rewards[row] > 0 and key not in seen:
            seen.add(key)
            rows.append(row)
    return rows


@dataclass(frozen=True, slots=True)
class Preference:
    """DPO, SimPO and ORPO on pairs from within a group, KTO on all rollouts.

    In each group the i-th rewarded completion is paired with the i-th that is not, as far as both go; a
    group of one kind makes no pair. Completions come from the policy as it is, so the preferences are
    on-policy, unless `sample_from` is `base`, which is how DPO and SimPO were published.
    """

    config: TrainConfig

    @torch.no_grad()
    def prepare(self, actors: Actors, scored: Scored) -> Batch:
        """Pairs as neighbouring rows, chosen first; for KTO all rows, and completions for its KL."""
        batch = Batch(rollouts=scored.rollouts, reference=scored.reference)
        if self.config.algorithm == "kto":
            moved = _behind_other_prompts(scored.rollouts, self.config.samples)
            return replace(batch, mismatched=(moved, read(actors.reference, moved).logprobs))
        rows = torch.tensor(_pairs(scored.rollouts), dtype=torch.long)
        return replace(batch.select(rows), unit=2)

    def loss(self, actors: Actors, batch: Batch, *, generator: torch.Generator) -> Loss:  # noqa: ARG002
        """The algorithm's loss on the log-probabilities of whole completions."""
        config, mask = self.config, batch.rollouts.completion_mask
        assert config.beta is not None
        logprobs = read(actors.policy, batch.rollouts).logprobs
        ratios = losses.sequence_logprobs(logprobs - batch.reference.logprobs, mask, average=False)
        means = losses.sequence_logprobs(logprobs, mask, average=True)
        if config.algorithm == "kto":
            return Loss(policy=self._kto(actors, batch, ratios))
        if config.algorithm == "dpo":
            return Loss(policy=losses.dpo_loss(ratios[::2], ratios[1::2], beta=config.beta))
        if config.algorithm == "simpo":
            assert config.margin is not None
            return Loss(
                policy=losses.simpo_loss(means[::2], means[1::2], beta=config.beta, margin=config.margin)
            )
        weights = losses.token_weights(mask[::2], normalisation=config.normalisation)
        nll = losses.sft_loss(logprobs[::2], weights=weights)
        return Loss(policy=losses.orpo_loss(means[::2], means[1::2], chosen_nll=nll, weight=config.beta))

    def _kto(self, actors: Actors, batch: Batch, ratios: Tensor) -> Tensor:
        assert batch.mismatched is not None
        assert self.config.beta is not None
        moved, reference = batch.mismatched
        with torch.no_grad():
            elsewhere = read(actors.policy, moved).logprobs - reference
        point = losses.kto_reference_point(
            losses.sequence_logprobs(elsewhere, moved.completion_mask, average=False)
        )
        return losses.kto_loss(
            ratios,
            batch.rollouts.rewards > 0,
            reference_point=point,
            beta=self.config.beta,
            desirable_weight=1.0,
            undesirable_weight=1.0,
        )


def _pairs(rollouts: Rollouts) -> list[int]:
    """Rows of pairs, chosen and rejected in turn."""
    good: dict[int, list[int]] = {}
    bad: dict[int, list[int]] = {}
    for row, group in enumerate(rollouts.group.tolist()):
        (good if rollouts.rewards[row] > 0 else bad).setdefault(group, []).append(row)
    both = [zip(good[group], bad.get(group, []), strict=False) for group in good]
    return [row for pairs in both for pair in pairs for row in pair]


def _behind_other_prompts(rollouts: Rollouts, samples: int) -> Rollouts:
    """Each completion behind the prompt of the group before its own; with one group behind its own."""
    return replace(
        rollouts,
        completions=rollouts.completions.roll(samples, dims=0),
        completion_mask=rollouts.completion_mask.roll(samples, dims=0),
    )
