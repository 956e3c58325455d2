"""A run repeats and goes on bit for bit, and its step figures are what they say."""

from __future__ import annotations

import math

import pytest
import torch
from lab_runs import base, config
from torch import Tensor

from sparsity_audit.lab.config import ALGORITHMS, TrainConfig
from sparsity_audit.lab.determinism import one_thread
from sparsity_audit.lab.loop import Training
from sparsity_audit.lab.metrics import StepMetrics
from sparsity_audit.lab.pretrain import NotFiniteError


def _train(settings: TrainConfig, **options) -> tuple[Training, list[StepMetrics]]:
    training = Training(settings, base(), **options)
    with one_thread():
        metrics = [training.step() for _ in range(settings.steps)]
    return training, metrics


def _same(a: Training, b: Training) -> bool:
    left, right = a.state(), b.state()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def _moved(training: Training) -> dict[str, Tensor]:
    return {
        name: weight.detach() != before
        for (name, weight), before in zip(
            training.policy.named_parameters(), training.actors.reference.parameters(), strict=True
        )
    }


CROSSED = {
    "several minibatches": config("grpo", epochs=2, minibatches=3, divergence_scale=0.3),
    "shuffled weights": config("grpo", minibatches=2, divergence_scale=0.3, divergence_control="shuffled"),
    "shuffled rewards": config("grpo", shuffle_rewards=True),
    "fp32 and sgd": config("ppo", precision="fp32", optimizer="sgd", lr=0.1, minibatches=2),
    "written": config("sft", solutions="written", formats={"S": 1.0, "C": 1.0}, sample_from="policy"),
    "pairs of the base": config("dpo", sample_from="base", epochs=2),
}
ALL = {**{name: config(name) for name in ALGORITHMS}, **CROSSED}


@pytest.mark.parametrize("name", ALL)
def test_a_run_moves_weights_repeats_itself_and_goes_on_from_any_step_bit_for_bit(name) -> None:
    settings = ALL[name]
    whole, metrics = _train(settings)
    assert [seen.step for seen in metrics] == [1, 2, 3]
    assert any(moved.any() for moved in _moved(whole).values())
    killed = Training(settings, base())
    with one_thread():
        for done in range(settings.steps):
            resumed = Training(settings, base())
            resumed.load_state({key: value.clone() for key, value in killed.state().items()})
            assert resumed.done == done
            assert resumed.step() == metrics[done]
            killed = resumed
    assert killed.finished
    assert _same(whole, killed)


def test_another_seed_is_another_run() -> None:
    assert not _same(_train(config("grpo"))[0], _train(config("grpo", seed=1))[0])


def test_weights_lie_on_the_bf16_grid_in_that_arm_only() -> None:
    for precision, on_grid in (("bf16", True), ("fp32", False)):
        training, _ = _train(config("grpo", precision=precision))
        weights = training.policy.parameters()
        assert all(torch.equal(w.bfloat16().float(), w) for w in weights) == on_grid


def test_the_base_is_rounded_before_a_bf16_run_and_kept_in_an_fp32_run() -> None:
    model = base()
    with torch.no_grad():
        model.lm_head.weight.add_(1e-4)
    rounded = Training(config("grpo"), model).actors.reference.lm_head.weight
    assert torch.equal(rounded, model.lm_head.weight.bfloat16().float())
    assert not torch.equal(rounded, model.lm_head.weight)
    kept = Training(config("grpo", precision="fp32"), model).actors.reference.lm_head.weight
    assert torch.equal(kept, model.lm_head.weight)


def test_the_base_that_is_given_is_not_touched() -> None:
    model = base()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    training = Training(config("grpo"), model)
    with one_thread():
        training.step()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_an_update_mask_keeps_all_other_entries_the_same_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = base().named_parameters()
    mask = {name: torch.rand(weight.shape, generator=generator) < 0.1 for name, weight in weights}
    training, _ = _train(config("grpo", weight_decay=0.1), update_mask=mask)
    moved = _moved(training)
    assert sum(int(entries.sum()) for entries in moved.values()) > 1000
    assert not any((moved[name] & ~mask[name]).any() for name in mask)


def test_step_figures_describe_the_rollouts_before_the_first_update() -> None:
    _, metrics = _train(config("grpo"))
    first, last = metrics[0], metrics[-1]
    assert first.kl_reference == 0
    assert last.kl_reference > 0
    assert (first.rollouts, first.groups, first.rows) == (16, 4, 16)
    assert first.reward == first.accuracy
    assert sum(first.format_shares.values()) == pytest.approx(1)
    assert set(first.format_shares) == {"S", "R", "C", "other"}
    assert 0 < first.entropy < math.log(20)
    assert 5 < first.tokens_per_completion <= 20
    assert first.dropped_rows == 4 * first.zero_signal_groups


def test_the_clip_is_inactive_with_one_update_a_step_and_active_with_several() -> None:
    _, one = _train(config("grpo", lr=1e-3))
    assert [seen.clip_frac for seen in one] == [0, 0, 0]
    _, several = _train(config("grpo", lr=1e-3, epochs=3, minibatches=2, clip=0.05))
    assert all(seen.updates == 6 for seen in several)
    assert max(seen.clip_frac for seen in several) > 0.01


def test_shuffled_rewards_keep_the_mean_and_lose_the_rest() -> None:
    _, plain = _train(config("grpo", steps=1))
    _, shuffled = _train(config("grpo", steps=1, shuffle_rewards=True))
    assert shuffled[0].reward == plain[0].reward
    assert shuffled[0].format_shares == plain[0].format_shares
    assert shuffled[0].grad_norm != plain[0].grad_norm


def test_a_step_without_signal_changes_no_weight_and_is_counted() -> None:
    """No completion of one digit fits into one token: all rewards are 0, everything is truncated."""
    for algorithm in ALGORITHMS:
        if algorithm in ("ppo", "a2c", "kto"):
            continue
        training, metrics = _train(config(algorithm, max_new_tokens=1))
        assert [seen.updates for seen in metrics] == [0, 0, 0]
        assert metrics[0].loss is None
        assert metrics[0].grad_norm is None
        assert metrics[0].truncated_frac == 1
        assert metrics[0].reward == 0
        assert metrics[0].zero_signal_groups == metrics[0].groups > 0
        assert not any(moved.any() for moved in _moved(training).values())


def test_a_reward_that_never_varies_leaves_ppo_without_advantage_once_the_value_is_right() -> None:
    """All outcomes 0 and a value head of 0: whitened advantages are exactly 0, and so is the gradient."""
    training, metrics = _train(config("ppo", max_new_tokens=1))
    assert [(seen.grad_norm, seen.updates) for seen in metrics] == [(0, 0)] * 3
    assert not any(moved.any() for moved in _moved(training).values())


def test_expert_iteration_starts_each_round_from_the_base_with_the_policys_completions() -> None:
    settings = config("expert-iteration", steps=4, rounds=2)
    training = Training(settings, base())
    with one_thread():
        first, second = training.step(), training.step()
        assert (first.rollouts, second.rollouts) == (2 * 16, 0)
        assert second.reward is None
        assert first.rows + second.rows > 0
        assert first.groups == 8
        third = training.step()
    assert third.rollouts == 2 * 16
    assert third.kl_reference > 0
    # One update from the base: every entry moved by at most lr, plus what rounding adds.
    step = max(
        ((w - b).abs() - b.abs() * 2**-8).max().item()
        for w, b in zip(training.policy.parameters(), training.actors.reference.parameters(), strict=True)
    )
    assert step <= 1.01 * settings.lr


@pytest.mark.parametrize(
    ("steps", "rounds", "starts"), [(5, 2, [0, 2]), (5, 3, [0, 1, 3]), (3, 3, [0, 1, 2])]
)
def test_rounds_share_the_steps_and_each_step_trains_on_rows_of_its_own(steps, rounds, starts) -> None:
    _, metrics = _train(config("expert-iteration", steps=steps, rounds=rounds))
    assert [seen.step - 1 for seen in metrics if seen.rollouts] == starts
    assert sum(seen.rollouts for seen in metrics) == 16 * steps


def test_a_learning_rate_that_explodes_stops_the_run_and_names_the_step() -> None:
    with pytest.raises(NotFiniteError, match=r"grpo, step \d(.|\n)*collapsed(.|\n)*below 1e\+30"):
        _train(config("grpo", lr=1e30, grad_clip=1e30, steps=5))


def test_weights_stay_finite_when_a_run_stops() -> None:
    training = Training(config("sft", steps=5), base())
    with torch.no_grad():
        training.policy.lm_head.weight[3, 3] = float("nan")
    with (
        one_thread(),
        pytest.raises(NotFiniteError, match=r"step 1(.|\n)*of a completion is nan"),
    ):
        training.step()
    assert int(torch.isnan(training.policy.lm_head.weight).sum()) == 1
