"""Updates touch what they may, in the order mask, clip, step, restore, round."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sparsity_audit.errors import UsageError
from sparsity_audit.lab.update import Learner


def _parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a": nn.Parameter(torch.randn(5, 4, generator=generator)),
        "b": nn.Parameter(torch.randn(6, generator=generator)),
    }


def _learner(parameters: dict[str, nn.Parameter], **changes) -> Learner:
    options = {
        "optimizer": "adamw",
        "lr": 0.01,
        "weight_decay": 0.0,
        "grad_clip": 1.0,
        "precision": "fp32",
        "update_mask": None,
        **changes,
    }
    return Learner(parameters, **options)


def _give_gradients(parameters: dict[str, nn.Parameter], seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters.values():
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)


def _run(learner: Learner, parameters: dict[str, nn.Parameter], steps: int, start: int = 0) -> None:
    for seed in range(start, start + steps):
        _give_gradients(parameters, seed)
        learner.apply()


def _codes(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: p.detach().clone().view(torch.int32) for name, p in parameters.items()}


def test_the_first_adam_step_moves_each_entry_by_the_learning_rate_against_its_gradient() -> None:
    parameters = _parameters()
    before = parameters["a"].detach().clone()
    _give_gradients(parameters, 1)
    sign = parameters["a"].grad.sign()
    _learner(parameters).apply()
    assert ((parameters["a"] - before) + 0.01 * sign).abs().max() < 1e-6


def test_sgd_moves_along_the_clipped_gradient() -> None:
    parameters = _parameters()
    before = parameters["b"].detach().clone()
    _give_gradients(parameters, 1, scale=10)
    gradient = parameters["b"].grad.clone()
    norm = _learner(parameters, optimizer="sgd", grad_clip=0.5).apply()
    assert (parameters["b"] - (before - 0.01 * gradient * 0.5 / norm)).abs().max() < 1e-6


def test_bf16_weights_lie_on_the_grid_after_every_update_and_fp32_weights_do_not() -> None:
    for precision, on_grid in (("bf16", True), ("fp32", False)):
        parameters = _parameters()
        _run(_learner(parameters, precision=precision), parameters, 3)
        assert all(torch.equal(p.bfloat16().float(), p) for p in parameters.values()) == on_grid


def test_rounding_goes_to_the_nearest_even_code() -> None:
    parameters = {"w": nn.Parameter(torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20]))}
    parameters["w"].grad = torch.full((3,), 1e-10)
    _learner(parameters, precision="bf16", optimizer="sgd").apply()
    assert parameters["w"].tolist() == [1.0, 1 + 4 * 2**-8, 1 + 2 * 2**-8]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_entries_outside_the_mask_stay_the_same_bits_even_under_weight_decay(optimizer, precision) -> None:
    parameters = _parameters()
    with torch.no_grad():
        parameters["b"][0] = -0.0
    mask = {name: torch.rand(p.shape, generator=torch.manual_seed(3)) < 0.4 for name, p in parameters.items()}
    mask["b"][0] = False
    before = _codes(parameters)
    learner = _learner(
        parameters, optimizer=optimizer, precision=precision, weight_decay=0.1, update_mask=mask
    )
    _run(learner, parameters, 4)
    for name, codes in _codes(parameters).items():
        assert torch.equal(codes[~mask[name]], before[name][~mask[name]])
        assert (codes[mask[name]] != before[name][mask[name]]).any()


def test_moments_outside_the_mask_stay_zero() -> None:
    parameters = _parameters()
    mask = {name: torch.arange(p.numel()).view(p.shape) % 2 == 0 for name, p in parameters.items()}
    learner = _learner(parameters, update_mask=mask)
    _run(learner, parameters, 3)
    state = learner.state()
    for name in parameters:
        for moment in ("exp_avg", "exp_avg_sq"):
            assert not state[f"{moment}.{name}"][~mask[name]].any()
            assert state[f"{moment}.{name}"][mask[name]].all()


def test_the_norm_is_taken_behind_the_mask() -> None:
    """Clipped by the dense norm, a sparse run would take smaller steps than it should."""
    parameters = _parameters()
    mask = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in parameters.items()}
    mask["b"][:2] = True
    _give_gradients(parameters, 1, scale=3)
    expected = parameters["b"].grad[:2].norm().item()
    assert _learner(parameters, update_mask=mask).apply() == pytest.approx(expected)


def test_a_full_mask_is_no_mask() -> None:
    plain, masked = _parameters(), _parameters()
    full = {name: torch.ones(p.shape, dtype=torch.bool) for name, p in masked.items()}
    _run(_learner(plain), plain, 3)
    _run(_learner(masked, update_mask=full), masked, 3)
    assert all(torch.equal(plain[name], masked[name]) for name in plain)


def test_without_a_gradient_neither_momentum_nor_decay_moves_anything() -> None:
    parameters = _parameters()
    learner = _learner(parameters, weight_decay=0.1)
    _run(learner, parameters, 2)
    before = _codes(parameters)
    learner.forget_gradients()
    assert learner.apply() == 0
    assert all(torch.equal(codes, before[name]) for name, codes in _codes(parameters).items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_moves_nothing_and_is_reported(value) -> None:
    parameters = _parameters()
    before = _codes(parameters)
    _give_gradients(parameters, 1)
    parameters["a"].grad[0, 0] = value
    norm = _learner(parameters).apply()
    assert norm != norm or norm == float("inf")
    assert all(torch.equal(codes, before[name]) for name, codes in _codes(parameters).items())


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_learner_goes_on_from_its_state_bit_for_bit(optimizer) -> None:
    whole, halves, later = _parameters(), _parameters(), _parameters(seed=9)
    _run(_learner(whole, optimizer=optimizer), whole, 6)
    first = _learner(halves, optimizer=optimizer)
    _run(first, halves, 3)
    second = _learner(later, optimizer=optimizer)
    second.load({name: value.clone() for name, value in first.state().items()})
    _run(second, later, 3, start=3)
    assert all(torch.equal(whole[name], later[name]) for name in whole)


def test_a_reset_learner_is_a_new_one() -> None:
    parameters, fresh = _parameters(), _parameters()
    start = {name: p.detach().clone() for name, p in parameters.items()}
    learner = _learner(parameters)
    _run(learner, parameters, 3)
    learner.reset(start)
    _run(learner, parameters, 2)
    _run(_learner(fresh), fresh, 2)
    assert all(torch.equal(parameters[name], fresh[name]) for name in fresh)


def test_a_mask_that_does_not_fit_is_refused_by_the_name_of_its_tensor() -> None:
    parameters = _parameters()
    full = {name: torch.ones(p.shape, dtype=torch.bool) for name, p in parameters.items()}
    with pytest.raises(UsageError, match="b: is not in the mask"):
        _learner(parameters, update_mask={"a": full["a"]})
    with pytest.raises(UsageError, match="c: is in the mask, but not in the model"):
        _learner(parameters, update_mask={**full, "c": full["b"]})
    with pytest.raises(UsageError, match=r"a: torch.bool of shape \[4, 5\]"):
        _learner(parameters, update_mask={**full, "a": full["a"].T})
    with pytest.raises(UsageError, match=r"torch\.float32"):
        _learner(parameters, update_mask={**full, "b": full["b"].float()})
