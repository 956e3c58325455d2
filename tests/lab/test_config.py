"""A config that exists can be run, and every option in it is read."""

from __future__ import annotations

import pytest
from lab_runs import config

from sparsity_audit.errors import UsageError
from sparsity_audit.lab.config import ALGORITHMS, named_algorithm


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_has_a_config_with_its_own_defaults(name) -> None:
    assert config(name).algorithm == name


@pytest.mark.parametrize(
    ("name", "near"), [("grp", "grpo"), ("PPO", "ppo"), ("expert_iteration", "expert-iteration")]
)
def test_an_unknown_algorithm_is_refused_with_the_nearest_name(name, near) -> None:
    with pytest.raises(UsageError, match=f"{name}.* is not known(.|\n)*did you mean '{near}'"):
        named_algorithm(name)


def test_a_name_that_resembles_none_is_refused_with_the_list() -> None:
    with pytest.raises(UsageError, match=r"one of grpo, rloo(?!(.|\n)*did you mean)"):
        named_algorithm("xyz")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.0}, "--lr: 0.0(.|\n)*more than 0"),
        ({"samples": 1}, "--samples: 1(.|\n)*at least 2"),
        ({"steps": 0}, "--steps"),
        ({"epochs": 0}, "--epochs"),
        ({"clip": 0.0}, "--clip"),
        ({"gae_lambda": 1.5}, "--gae-lambda(.|\n)*from 0 to 1"),
        ({"entropy_top": 0.0}, "--entropy-top"),
        ({"divergence_scale": 3.0}, "--divergence-scale"),
        ({"weight_decay": -0.1}, "--weight-decay"),
        ({"temperature": 0.0}, "--temperature"),
        ({"lengths": {}}, "--lengths: the mixture is empty"),
        ({"task": "chess"}, "chess"),
        ({"kl_priority": "shannon"}, "there is none(.|\n)*add --kl"),
        ({"kl_coefficient": 0.1}, "there is none(.|\n)*add --kl"),
        ({"divergence_control": "shuffled"}, "there are none(.|\n)*add --divergence-weight"),
    ],
)
def test_a_value_out_of_range_is_refused_by_its_flag(changes, message) -> None:
    with pytest.raises(UsageError, match=message):
        config("grpo", **changes)


@pytest.mark.parametrize(
    ("algorithm", "changes", "message"),
    [
        ("dpo", {"kl": "k3", "kl_coefficient": 0.1}, "--kl: k3 with dpo"),
        ("sft", {"divergence_scale": 0.3}, "--divergence-scale"),
        ("simpo", {"entropy_top": 0.2}, "--entropy-top"),
        ("grpo", {"rounds": 2}, "expert-iteration only"),
        ("grpo", {"beta": 0.1}, "--beta: 0.1 with grpo"),
        ("dpo", {"margin": 0.5}, "simpo only"),
        ("ppo", {"divide_by_std": True}, "grpo only"),
        ("grpo", {"sample_from": "base"}, "--sample-from: base with grpo"),
        ("grpo", {"solutions": "written"}, "sft only"),
        ("a2c", {"epochs": 2}, "2 updates a step, but a2c is the case of one(.|\n)*use ppo"),
        ("sft", {"formats": {"S": 1.0}}, "add --solutions written"),
        ("sft", {"solutions": "written", "formats": {"X": 1.0}}, "'X' is not known"),
        ("sft", {"solutions": "written", "formats": {}}, "the mixture is empty"),
        ("expert-iteration", {"rounds": 9}, "--rounds: 9"),
    ],
)
def test_an_option_the_algorithm_would_not_read_is_refused(algorithm, changes, message) -> None:
    with pytest.raises(UsageError, match=message):
        config(algorithm, **changes)


@pytest.mark.parametrize(
    ("steps", "saved"),
    [(1, (0, 1)), (2, (0, 1, 2)), (5, (0, 1, 2, 4, 5)), (40, (0, 1, 2, 4, 8, 16, 32, 40))],
)
def test_checkpoints_are_log_spaced_and_end_with_the_last_step(steps, saved) -> None:
    assert config("grpo", steps=steps).saved_steps() == saved
    assert config("grpo", steps=steps, checkpoints="last").saved_steps() == (steps,)


def test_the_plain_form_differs_wherever_the_config_does() -> None:
    assert config("grpo").to_json() == config("grpo").to_json()
    assert config("grpo").to_json() != config("grpo", seed=1).to_json()
