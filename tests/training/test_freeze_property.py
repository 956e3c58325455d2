"""Any model, mask, optimizer, dtype, clip, accumulation: outside nothing moves, inside nothing differs."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import bits_of, loss_of, random_mask, snapshot, token_model

from sparsity_audit.training.freeze import freeze_outside

Optimizers = list[torch.optim.Optimizer]


def _split(model: torch.nn.Module) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    unique = list(model.parameters())
    return [p for p in unique if p.dim() == 2], [p for p in unique if p.dim() != 2]


def _muon(model: torch.nn.Module) -> Optimizers:
    matrices, rest = _split(model)
    return [
        torch.optim.Muon(matrices, lr=0.05, weight_decay=0.3, momentum=0.9),
        torch.optim.AdamW(rest, lr=0.02, weight_decay=0.2),
    ]


OPTIMIZERS: dict[str, Callable[[torch.nn.Module], Optimizers]] = {
    "sgd": lambda m: [torch.optim.SGD(m.parameters(), lr=0.2, momentum=0.9, nesterov=True, weight_decay=0.1)],
    "adamw": lambda m: [torch.optim.AdamW(m.parameters(), lr=0.05, weight_decay=0.5)],
    "adamw-fused": lambda m: [torch.optim.AdamW(m.parameters(), lr=0.05, weight_decay=0.5, fused=True)],
    "adamw-foreach": lambda m: [
        torch.optim.AdamW(m.parameters(), lr=0.05, weight_decay=0.5, foreach=True, amsgrad=True)
    ],
    "adafactor": lambda m: [torch.optim.Adafactor(m.parameters(), lr=0.05, weight_decay=0.2)],
    "muon": _muon,
}


def _plant_specials(model: torch.nn.Module, mask: dict[str, torch.Tensor], *, nan: bool) -> None:
    """±0 and subnormals among the frozen entries, NaN with a payload in rows of tokens that never occur."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            frozen = (~mask[name]).view(-1).nonzero().view(-1)
            values = parameter.view(-1)
            values[frozen[0::3]] = -0.0
            values[frozen[1::5]] = 0.0
            values[frozen[2::7]] = torch.finfo(parameter.dtype).tiny / 2
        if nan:
            row = model.embed.weight[9:]
            mask["embed.weight"][9:] = False
            codes = row.view(torch.int16 if row.element_size() == 2 else torch.int32)
            codes.fill_(0x7FA5 if row.element_size() == 2 else 0x7FA12345)


def _train(
    model: torch.nn.Module,
    optimizers: Optimizers,
    *,
    steps: int,
    accumulate: int,
    clip: float | None,
    mask_gradients: Callable[[], None],
    after_step: Callable[[], None],
) -> None:
    for step in range(steps):
        for part in range(accumulate):
            loss_of(model, 100 * step + part, scale=30.0).backward()
            mask_gradients()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        after_step()


@pytest.mark.parametrize("name", OPTIMIZERS)
@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    density=st.floats(0.02, 0.95),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    tied=st.booleans(),
    hidden=st.integers(1, 40),
    clip=st.sampled_from([None, 0.5]),
    accumulate=st.integers(1, 3),
    steps=st.integers(1, 5),
)
def test_outside_is_bit_identical_and_inside_is_the_optimizer_on_masked_gradients(
    name, seed, density, dtype, tied, hidden, clip, accumulate, steps
) -> None:
    model = token_model(seed, dtype=dtype, tied=tied, hidden=hidden)
    mask = random_mask(model, seed + 1, density=density)
    # Adafactor scales by the norm of the whole weight, which a NaN would poison; a tied head reads all rows.
    _plant_specials(model, mask, nan=name != "adafactor" and not tied)
    base = snapshot(model)
    twin = copy.deepcopy(model)
    run = {"steps": steps, "accumulate": accumulate, "clip": clip}

    def mask_by_hand() -> None:
        for key, parameter in twin.named_parameters():
            parameter.grad = torch.where(mask[key], parameter.grad, torch.zeros_like(parameter.grad))

    def restore_by_hand() -> None:
        with torch.no_grad():
            for key, parameter in twin.named_parameters():
                codes = bits_of(parameter)
                codes[~mask[key]] = base[key][~mask[key]]
                parameter.copy_(codes.view(parameter.dtype))

    _train(twin, OPTIMIZERS[name](twin), **run, mask_gradients=mask_by_hand, after_step=restore_by_hand)

    optimizers = OPTIMIZERS[name](model)
    frozen = freeze_outside(model, optimizers, mask)
    _train(model, optimizers, **run, mask_gradients=lambda: None, after_step=lambda: None)
    proof = frozen.verify_frozen()

    after, expected = snapshot(model), snapshot(twin)
    assert proof.num_trainable == sum(int(bits.sum()) for bits in mask.values())
    assert proof.num_frozen == sum(int((~bits).sum()) for bits in mask.values())
    for key in base:
        assert torch.equal(after[key][~mask[key]], base[key][~mask[key]]), key
        assert torch.equal(after[key], expected[key]), key
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            key = next(n for n, p in model.named_parameters() if p is parameter)
            for value in state.values():
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape and value.dim():
                    assert not value[~mask[key]].any(), key
