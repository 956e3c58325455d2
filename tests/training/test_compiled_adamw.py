"""The compiled AdamW step gives the bits of torch's operations, or is not taken."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import bits_of

from sparsity_audit.training import compiled_adamw
from sparsity_audit.training.compiled_adamw import Constants, agrees, applies, step_selected, torch_step
from sparsity_audit.training.optim import SubnetworkAdamW

exact_here = pytest.mark.skipif(
    not compiled_adamw._is_exact_here(), reason="torch rounds otherwise here; its operations are used"
)


@exact_here
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    selected=st.integers(1, 3000),
    exponent=st.integers(-40, 20),
    beta1=st.floats(0.51, 0.999),
    beta2=st.floats(0.0, 0.9999),
    weight_decay=st.sampled_from([0.0, 0.1]),
    threads=st.sampled_from([1, 3]),
    steps=st.integers(1, 4),
)
def test_compiled_steps_equal_torchs_operations_bit_for_bit(
    seed, selected, exponent, beta1, beta2, weight_decay, threads, steps
) -> None:
    generator = torch.Generator().manual_seed(seed)
    size = 4000
    positions = torch.randperm(size, generator=generator)[:selected].sort().values.int()
    weights = torch.randn(size, generator=generator) * 0.02
    weights[::17], weights[1::501] = -0.0, float("nan")
    twin, place = weights.clone(), positions.long()
    state = [torch.zeros(selected), torch.zeros(selected)]
    twin_state = [tensor.clone() for tensor in state]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled_adamw, "_PIECE_ENTRIES", 256)
        patch.setattr(torch, "get_num_threads", lambda: threads)
        for step in range(1, steps + 1):
            gradient = torch.randn(size, generator=generator) * 10.0**exponent
            gradient[::19] = 0.0
            constants = Constants(
                decay=1 - 1e-3 * weight_decay,
                beta1=beta1,
                beta2=beta2,
                correction=(1 - beta2**step) ** 0.5,
                eps=1e-8,
                step_size=1e-3 / (1 - beta1**step),
            )
            step_selected(weights, gradient, positions, *state, constants)
            held = twin[place]
            torch_step(held, gradient[place], *twin_state, constants)
            twin[place] = held
    real = ~twin.isnan()
    assert torch.equal(bits_of(weights)[real], bits_of(twin)[real])
    assert torch.equal(weights.isnan(), twin.isnan())
    for mine, theirs in zip(state, twin_state, strict=True):
        assert torch.equal(bits_of(mine), bits_of(theirs))


@exact_here
def test_the_optimizer_takes_it_and_ends_in_the_same_bits(monkeypatch) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn((200, 100), generator=generator) * 0.02
    mask = torch.rand(values.shape, generator=generator) < 0.5
    taken = []
    real = compiled_adamw._step_run
    monkeypatch.setattr(compiled_adamw, "_step_run", lambda *a: (taken.append(1), real(*a)))
    ends = []
    for limit in (0, 1 << 40):
        monkeypatch.setattr(compiled_adamw, "_FROM_ENTRIES", limit)
        weight = torch.nn.Parameter(values.clone())
        optimizer = SubnetworkAdamW([("w", weight)], {"w": mask}, lr=1e-3, weight_decay=0.1)
        for step in range(100):
            weight.grad = torch.randn(values.shape, generator=torch.Generator().manual_seed(step)) * 1e-3
            optimizer.step()
        ends.append(
            [bits_of(weight), *(bits_of(optimizer.state[weight][k]) for k in ("exp_avg", "exp_avg_sq"))]
        )
        assert bool(taken) is (limit == 0)
        taken.clear()
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*ends, strict=True))


def test_a_step_that_rounds_otherwise_is_noticed() -> None:
    def honest(weights, gradient, positions, mean, square, constants) -> None:
        torch_step(weights, gradient, mean, square, constants)

    def without_contraction(weights, gradient, positions, mean, square, constants) -> None:
        start = mean.clone()
        torch_step(weights, gradient, mean, square, constants)
        mean.copy_(start + (1 - constants.beta1) * (gradient - start))

    assert agrees(honest)
    assert not agrees(without_contraction)


def test_it_is_for_large_fp32_cpu_tensors_with_int32_positions_alone(monkeypatch) -> None:
    monkeypatch.setattr(compiled_adamw, "_is_exact_here", lambda: True)
    weights, positions = torch.zeros(1 << 14), torch.arange(1 << 13, dtype=torch.int32)
    assert applies(weights, weights, positions, 0.9)
    assert not applies(weights, weights, positions[1:], 0.9)
    assert not applies(weights, weights, positions.long(), 0.9)
    assert not applies(weights.bfloat16(), weights.bfloat16(), positions, 0.9)
    assert not applies(weights, weights.double(), positions, 0.9)
    assert not applies(weights, weights, positions, 0.5)
    assert not applies(weights.to("meta"), weights.to("meta"), positions, 0.9)
    monkeypatch.setattr(compiled_adamw, "_is_exact_here", lambda: False)
    assert not applies(weights, weights, positions, 0.9)
