"""What each algorithm makes of the same rollouts: which rows, which advantages, which loss."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lab_runs import base, config
from torch import Tensor

from sparsity_audit.lab import advantages as adv
from sparsity_audit.lab import losses
from sparsity_audit.lab.algorithms import algorithm_for
from sparsity_audit.lab.batches import Actors, Batch, Loss, Scored, read, score
from sparsity_audit.lab.config import TrainConfig
from sparsity_audit.lab.loop import Training
from sparsity_audit.lab.rollout import Rollouts, sample
from sparsity_audit.lab.tasks import TASKS

TASK = TASKS["addition"]


def _rollouts(temperature: float = 1.0) -> Rollouts:
    """4 groups of 4 at 4 digits, where the base solves about a third."""
    generator = torch.Generator().manual_seed(5)
    problems = TASK.sample(4, lengths={4: 1.0}, generator=generator)
    return sample(
        base(),
        problems,
        task=TASK,
        num_samples=4,
        max_new_tokens=35,
        temperature=temperature,
        generator=generator,
    )


ROLLOUTS = _rollouts()


def _actors(settings: TrainConfig) -> Actors:
    """Policy, reference and critic, the policy moved a little away from the reference."""
    actors = Training(settings, base()).actors
    with torch.no_grad():
        for parameter in actors.policy.parameters():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
            parameter.add_(0.02 * noise * parameter.std())
    return actors


def _prepared(settings: TrainConfig, rollouts: Rollouts = ROLLOUTS) -> tuple[Actors, Scored, Batch]:
    actors = _actors(settings)
    scored = score(actors, rollouts)
    return actors, scored, algorithm_for(settings).prepare(actors, scored)


def _loss(settings: TrainConfig, actors: Actors, batch: Batch) -> Loss:
    return algorithm_for(settings).loss(actors, batch, generator=torch.Generator().manual_seed(0))


def _gradient(loss: Tensor, actors: Actors) -> Tensor:
    actors.policy.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in actors.policy.parameters()])


def test_the_rollouts_of_these_tests_have_groups_with_and_without_signal() -> None:
    counts = ROLLOUTS.rewards.view(4, 4).sum(1)
    assert ((counts > 0) & (counts < 4)).sum() >= 2
    assert ROLLOUTS.completion_mask.sum(1).unique().numel() > 1


def test_reading_the_rollouts_again_gives_the_log_probabilities_they_were_drawn_with() -> None:
    warm = _rollouts(temperature=0.7)
    for rollouts in (ROLLOUTS, warm):
        again = read(base(), rollouts).logprobs
        assert (again - rollouts.logprobs)[rollouts.completion_mask].abs().max() < 1e-4


# Policy gradients


@pytest.mark.parametrize("divide", [True, False])
def test_grpo_gives_each_token_its_groups_advantage(divide) -> None:
    _, _, batch = _prepared(config("grpo", divide_by_std=divide))
    expected = adv.group_advantages(ROLLOUTS.rewards, group_size=4, divide_by_std=divide)
    assert torch.equal(batch.advantages, torch.where(ROLLOUTS.completion_mask, expected[:, None], 0.0))


def test_rloo_gives_each_token_the_leave_one_out_advantage() -> None:
    _, _, batch = _prepared(config("rloo"))
    expected = adv.leave_one_out_advantages(ROLLOUTS.rewards, group_size=4)
    assert torch.equal(batch.advantages[:, 0], expected)


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_dropping_rows_without_advantage_changes_no_gradient(algorithm) -> None:
    """A KL penalty with coefficient 0 keeps all rows: the same loss without dropping."""
    actors, _, batch = _prepared(config(algorithm))
    dropped = _loss(config(algorithm), actors, batch)
    whole = _loss(config(algorithm, kl="k3"), actors, batch)
    assert dropped.dropped_rows == int((~batch.advantages.any(1)).sum()) > 0
    assert whole.dropped_rows == 0
    difference = _gradient(dropped.policy, actors) - _gradient(whole.policy, actors)
    assert difference.abs().max() < 1e-6


def test_a_batch_without_any_signal_asks_for_no_update() -> None:
    same = replace(ROLLOUTS, rewards=torch.ones(16))
    for algorithm in ("grpo", "rloo"):
        actors, _, batch = _prepared(config(algorithm), same)
        loss = _loss(config(algorithm), actors, batch)
        assert loss.policy is None
        assert loss.dropped_rows == 16
    for algorithm in ("prime", "dpo", "simpo", "orpo"):
        assert _prepared(config(algorithm), same)[2].num_units == 0
    nothing = replace(ROLLOUTS, rewards=torch.zeros(16))
    for algorithm in ("sft", "expert-iteration"):
        assert _prepared(config(algorithm), nothing)[2].num_units == 0


def test_the_gradient_of_grpo_is_that_of_its_definition() -> None:
    settings = config("grpo")
    actors, _, batch = _prepared(settings)
    found = _gradient(_loss(settings, actors, batch).policy, actors)
    ratio = (read(actors.policy, ROLLOUTS).logprobs - ROLLOUTS.logprobs).exp()
    plain = torch.minimum(ratio * batch.advantages, ratio.clamp(0.8, 1.2) * batch.advantages)
    expected = -plain[ROLLOUTS.completion_mask].mean()
    assert (found - _gradient(expected, actors)).abs().max() < 1e-6


def test_ppo_advantages_are_whitened_gae_of_outcome_and_value_head() -> None:
    settings = config("ppo", gae_lambda=0.9)
    actors = _actors(settings)
    with torch.no_grad():
        actors.value_head.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    scored = score(actors, ROLLOUTS)
    batch = algorithm_for(settings).prepare(actors, scored)
    mask = ROLLOUTS.completion_mask
    values = actors.value_head(scored.policy.hidden).squeeze(-1).detach()
    rewards = torch.zeros_like(values)
    rewards[torch.arange(16), mask.sum(1) - 1] = ROLLOUTS.rewards
    raw = adv.generalised_advantages(rewards, values, completion_mask=mask, gamma=1.0, lam=0.9)
    assert torch.equal(batch.advantages, adv.whitened(raw, completion_mask=mask))
    assert torch.equal(batch.returns[mask], (raw + values)[mask])


def test_the_value_loss_moves_the_value_head_and_not_the_policy() -> None:
    settings = config("ppo")
    actors, _, batch = _prepared(settings)
    loss = _loss(settings, actors, batch)
    actors.policy.zero_grad()
    loss.critic.backward()
    assert all(p.grad is None for p in actors.policy.parameters())
    assert actors.value_head.weight.grad.abs().max() > 0


def test_a2c_is_ppo_without_a_clip_and_the_same_at_ratio_one() -> None:
    settings = config("a2c")
    actors = Training(settings, base()).actors
    scored = score(actors, ROLLOUTS)
    on_policy = replace(scored.rollouts, logprobs=scored.policy.logprobs)
    scored = replace(scored, rollouts=on_policy)
    gradients = []
    for name in ("a2c", "ppo"):
        algorithm = algorithm_for(config(name))
        loss = algorithm.loss(actors, algorithm.prepare(actors, scored), generator=torch.Generator())
        gradients.append(_gradient(loss.policy, actors))
        assert (loss.clipped_share is None) == (name == "a2c")
    assert (gradients[0] - gradients[1]).abs().max() < 1e-6


def test_prime_keeps_prompts_of_middling_accuracy_and_adds_its_dense_rewards() -> None:
    settings = config("prime")
    actors, _, batch = _prepared(settings)
    kept = adv.within_accuracy(ROLLOUTS.rewards, group_size=4, low=0.2, high=0.8)
    assert torch.equal(batch.rollouts.group, ROLLOUTS.group[kept])
    # Before its first update the reward model is the base, so that all dense rewards are 0.
    outcome = adv.leave_one_out_advantages(ROLLOUTS.rewards, group_size=4)[kept]
    assert (batch.advantages[:, 0] - outcome).abs().max() < 1e-6
    with torch.no_grad():
        actors.reward_model.lm_head.weight.mul_(1.1)
    moved = algorithm_for(settings).prepare(actors, score(actors, ROLLOUTS))
    assert (moved.advantages - batch.advantages).abs().max() > 1e-4


def test_primes_reward_model_learns_the_outcome_and_leaves_the_policy_alone() -> None:
    settings = config("prime")
    actors, _, batch = _prepared(settings)
    loss = _loss(settings, actors, batch)
    actors.policy.zero_grad()
    loss.critic.backward()
    assert all(p.grad is None for p in actors.policy.parameters())
    assert any(p.grad.abs().max() > 0 for p in actors.reward_model.parameters())


# Options that cross


@pytest.mark.parametrize("estimator", ["exact", "k2", "k3"])
def test_a_kl_penalty_is_added_to_the_loss_over_all_rows(estimator) -> None:
    plain, penalised = config("grpo"), config("grpo", kl=estimator, kl_coefficient=0.5)
    actors, scored, batch = _prepared(plain)
    policy = read(actors.policy, ROLLOUTS)
    if estimator == "exact":
        per_token = losses.exact_kl(policy.logits, scored.reference.logits)
    else:
        per_token = getattr(losses, estimator)(policy.logprobs, scored.reference.logprobs)
    expected = 0.5 * per_token[ROLLOUTS.completion_mask].mean().item()
    found = _loss(penalised, actors, batch).policy.item() - _loss(plain, actors, batch).policy.item()
    assert expected > 1e-5
    assert found == pytest.approx(expected, rel=1e-3)


def test_k1_goes_into_the_reward_and_not_into_the_loss() -> None:
    settings = config("rloo", kl="k1", kl_coefficient=0.5)
    _, scored, batch = _prepared(settings)
    k1 = (scored.policy.logprobs - scored.reference.logprobs) * ROLLOUTS.completion_mask
    outcomes = ROLLOUTS.rewards - 0.5 * k1.sum(1)
    expected = adv.leave_one_out_advantages(outcomes, group_size=4)
    assert (batch.advantages[:, 0] - expected).abs().max() < 1e-6


@pytest.mark.parametrize("priority", ["shannon", "max-prob"])
@pytest.mark.parametrize("estimator", ["exact", "k3"])
def test_the_prioritised_penalty_weights_each_position_by_the_bases_certainty(priority, estimator) -> None:
    settings = config(
        "grpo", kl=estimator, kl_coefficient=1.0, kl_priority=priority, kl_exponent=10.0, kl_temperature=2.0
    )
    actors, scored, batch = _prepared(settings)
    certainty = (
        losses.shannon_certainty(scored.reference.logits)
        if priority == "shannon"
        else losses.max_probability_certainty(scored.reference.logits, temperature=2.0)
    )
    policy = read(actors.policy, ROLLOUTS)
    divergence = (
        losses.exact_kl(policy.logits, scored.reference.logits)
        if estimator == "exact"
        else losses.k3(policy.logprobs, scored.reference.logprobs)
    )
    expected = (certainty**10 * divergence)[ROLLOUTS.completion_mask].mean().item()
    found = _loss(settings, actors, batch).policy.item() - _loss(config("grpo"), actors, batch).policy.item()
    assert 0 < expected < divergence[ROLLOUTS.completion_mask].mean().item()
    assert found == pytest.approx(expected, rel=1e-3)


def test_an_exponent_of_zero_is_the_standard_penalty() -> None:
    standard = config("grpo", kl="k3", kl_coefficient=1.0)
    zero = config("grpo", kl="k3", kl_coefficient=1.0, kl_priority="shannon", kl_exponent=0.0)
    actors, _, batch = _prepared(standard)
    assert _loss(zero, actors, batch).policy.item() == _loss(standard, actors, batch).policy.item()


def test_divergence_weights_scale_the_advantages_of_tokens_that_moved() -> None:
    settings = config("grpo", divergence_scale=0.3, divergence_alpha=50.0)
    actors, _, batch = _prepared(settings)
    weighted = _loss(settings, actors, batch)
    assert 1 < weighted.weight_mean < 1.15
    assert weighted.policy.item() != _loss(config("grpo"), actors, batch).policy.item()
    normalised = config(
        "grpo", divergence_scale=0.3, divergence_alpha=50.0, divergence_control="mean-normalised"
    )
    assert _loss(normalised, actors, batch).weight_mean == pytest.approx(1)


def test_divergence_weights_are_inert_before_the_policy_has_moved() -> None:
    settings = config("grpo", divergence_scale=0.3)
    actors = Training(settings, base()).actors
    batch = algorithm_for(settings).prepare(actors, score(actors, ROLLOUTS))
    weighted = _loss(settings, actors, batch)
    assert weighted.weight_mean == pytest.approx(1, abs=1e-7)
    plain = _loss(config("grpo"), actors, batch)
    assert weighted.policy.item() == pytest.approx(plain.policy.item(), abs=1e-7)


def test_entropy_selection_takes_the_loss_on_the_most_uncertain_tokens_alone() -> None:
    settings = config("grpo", entropy_top=0.2, kl="k3")
    actors, _, batch = _prepared(settings)
    reading = read(actors.policy, ROLLOUTS)
    logs = reading.logits.log_softmax(-1)
    entropies = -(logs.exp() * logs).sum(-1).detach()
    selected = adv.entropy_selected(entropies, completion_mask=ROLLOUTS.completion_mask, share=0.2)
    assert 0.19 < selected.sum() / ROLLOUTS.completion_mask.sum() < 0.22
    ratio = (reading.logprobs - ROLLOUTS.logprobs).exp()
    plain = torch.minimum(ratio * batch.advantages, ratio.clamp(0.8, 1.2) * batch.advantages)
    expected = -(plain * selected).sum() / ROLLOUTS.completion_mask.sum()
    assert _loss(settings, actors, batch).policy.item() == pytest.approx(expected.item(), abs=1e-6)


# Likelihood and preferences


@pytest.mark.parametrize("algorithm", ["sft", "expert-iteration"])
def test_imitation_keeps_each_right_completion_once(algorithm) -> None:
    doubled = ROLLOUTS.select(torch.arange(16).repeat_interleave(2))
    _, _, batch = _prepared(config(algorithm), doubled)
    kept = list(zip(batch.rollouts.group.tolist(), batch.rollouts.texts(), strict=True))
    right = {
        (group, text)
        for group, text, reward in zip(
            ROLLOUTS.group.tolist(), ROLLOUTS.texts(), ROLLOUTS.rewards.tolist(), strict=True
        )
        if reward
    }
    assert len(kept) == len(set(kept))
    assert set(kept) == right


def test_imitation_minimises_the_cross_entropy_of_completions() -> None:
    settings = config("sft")
    actors, _, batch = _prepared(settings)
    expected = -read(actors.policy, batch.rollouts).logprobs[batch.rollouts.completion_mask].mean()
    assert _loss(settings, actors, batch).policy.item() == pytest.approx(expected.item(), rel=1e-6)


def test_pairs_are_neighbours_of_one_group_the_rewarded_one_first() -> None:
    _, _, batch = _prepared(config("dpo"))
    rewards, groups = batch.rollouts.rewards, batch.rollouts.group
    assert batch.unit == 2
    assert (rewards[::2] == 1).all()
    assert (rewards[1::2] == 0).all()
    assert torch.equal(groups[::2], groups[1::2])
    right = ROLLOUTS.rewards.view(4, 4).sum(1)
    assert batch.num_units == torch.minimum(right, 4 - right).sum()


@pytest.mark.parametrize("algorithm", ["dpo", "simpo", "orpo"])
def test_minibatches_of_pairs_never_part_them(algorithm) -> None:
    settings = config(algorithm)
    actors, _, batch = _prepared(settings)
    units = torch.tensor([batch.num_units - 1, 0])
    part = batch.select(units)
    assert part.num_units == 2
    assert part.rollouts.rewards.tolist() == [1, 0, 1, 0]
    assert _loss(settings, actors, part).policy.requires_grad


def test_preference_losses_are_those_of_their_pairs() -> None:
    actors, _, batch = _prepared(config("dpo"))
    mask = batch.rollouts.completion_mask
    logprobs = read(actors.policy, batch.rollouts).logprobs * mask
    ratios = (logprobs - batch.reference.logprobs * mask).sum(1)
    means = logprobs.sum(1) / mask.sum(1)
    nll = -logprobs[::2].sum() / mask[::2].sum()
    expected = {
        "dpo": losses.dpo_loss(ratios[::2], ratios[1::2], beta=0.1),
        "simpo": losses.simpo_loss(means[::2], means[1::2], beta=2.0, margin=0.5),
        "orpo": losses.orpo_loss(means[::2], means[1::2], chosen_nll=nll, weight=0.1),
    }
    for name, value in expected.items():
        found = _loss(config(name), actors, batch).policy
        assert found.item() == pytest.approx(value.item(), rel=1e-5)


def test_kto_takes_its_reference_point_from_completions_behind_other_prompts() -> None:
    settings = config("kto")
    actors, scored, batch = _prepared(settings)
    moved, reference = batch.mismatched
    assert torch.equal(moved.prompts, ROLLOUTS.prompts)
    assert torch.equal(moved.completions[4:8], ROLLOUTS.completions[:4])
    elsewhere = ((read(actors.policy, moved).logprobs - reference) * moved.completion_mask).sum(1)
    ratios = (read(actors.policy, ROLLOUTS).logprobs - scored.reference.logprobs) * ROLLOUTS.completion_mask
    expected = losses.kto_loss(
        ratios.sum(1),
        ROLLOUTS.rewards > 0,
        reference_point=losses.kto_reference_point(elsewhere),
        beta=0.1,
        desirable_weight=1.0,
        undesirable_weight=1.0,
    )
    assert _loss(settings, actors, batch).policy.item() == pytest.approx(expected.item(), rel=1e-5)
    part = batch.select(torch.tensor([3, 9]))
    assert torch.equal(part.mismatched[0].completions, moved.completions[[3, 9]])


@pytest.mark.parametrize(
    "algorithm", ["grpo", "rloo", "ppo", "a2c", "prime", "sft", "dpo", "simpo", "kto", "orpo"]
)
def test_a_small_step_against_the_gradient_makes_rewarded_completions_more_probable(algorithm) -> None:
    settings = config(algorithm)
    actors = Training(settings, base()).actors
    scored = score(actors, ROLLOUTS)
    loss = _loss(settings, actors, algorithm_for(settings).prepare(actors, scored))
    actors.policy.zero_grad()
    loss.policy.backward()
    mixed = [g for g in range(4) if 0 < ROLLOUTS.rewards.view(4, 4)[g].sum() < 4]
    rows = torch.tensor([r for r in range(16) if ROLLOUTS.group[r] in mixed])
    good = ROLLOUTS.rewards[rows] > 0

    def margin() -> float:
        """Mean log-probability of rewarded completions over that of the others, in mixed groups."""
        with torch.no_grad():
            sums = losses.sequence_logprobs(
                read(actors.policy, ROLLOUTS).logprobs, ROLLOUTS.completion_mask, average=True
            )[rows]
        return float(sums[good].mean() - sums[~good].mean())

    before = margin()
    with torch.no_grad():
        for parameter in actors.policy.parameters():
            parameter.sub_(0.01 * parameter.grad)
    assert margin() > before
