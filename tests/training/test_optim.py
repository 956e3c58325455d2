"""Subnetwork optimizers equal torch's, bit for bit, where they train, and hold no other state."""

from __future__ import annotations

import copy
import gc
import io
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import (
    DEVICES,
    bits_of,
    changed_inside,
    loss_of,
    outside_is_equal,
    random_mask,
    snapshot,
    token_model,
)

from sparsity_audit.errors import MaskError, UsageError
from sparsity_audit.masks import encodings
from sparsity_audit.training import entries
from sparsity_audit.training.freeze import freeze_outside
from sparsity_audit.training.optim import SubnetworkAdamW, SubnetworkSGD
from sparsity_audit.training.rounding import round_stochastically
from sparsity_audit.types import DType

each_device = pytest.mark.parametrize(
    "device", [d if d == "cpu" else pytest.param(d, marks=pytest.mark.gpu) for d in DEVICES]
)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch) -> None:
    """So that a few hundred entries make several pieces."""
    monkeypatch.setattr(entries, "_PIECE_ENTRIES", {"cpu": 300})
    monkeypatch.setattr(entries, "_DEVICE_PIECE_ENTRIES", 300)


def weights_and_masks(
    dtype: torch.dtype, device: str, density: float, *, shapes=((37, 19), (320,), (3, 5, 7))
) -> tuple[dict[str, torch.nn.Parameter], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    weights, masks = {}, {}
    for number, shape in enumerate(shapes):
        values = torch.randn(shape, generator=generator) * 0.1
        values.view(-1)[::11] = -0.0
        weights[f"w{number}"] = torch.nn.Parameter(values.to(device, dtype))
        masks[f"w{number}"] = (torch.rand(shape, generator=generator) < density).to(device)
    return weights, masks


def gradients(weights: dict[str, torch.nn.Parameter], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scale = 10.0 ** ((seed % 7) - 4)
    return {
        name: (torch.randn(p.shape, generator=generator) * scale).to(p.device, p.dtype)
        for name, p in weights.items()
    }


def assert_state_equal(mine, theirs, mask, weights, twins, keys) -> None:
    for name, parameter in weights.items():
        for key in keys:
            got, want = mine.state[parameter][key], theirs.state[twins[name]][key]
            chosen = want[mask[name]]
            dense = got.numel() == want.numel()
            held = got.view(want.shape)[mask[name]] if dense else got
            assert torch.equal(bits_of(held), bits_of(chosen)), (name, key)


def needs(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@each_device
@pytest.mark.parametrize("density", [0.05, 0.3, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_adamw_is_bit_for_bit_torchs_on_masked_gradients_for_120_steps(
    device, dtype, weight_decay, density
) -> None:
    needs(device)
    weights, masks = weights_and_masks(dtype, device, density)
    twins = copy.deepcopy(weights)
    before = {name: bits_of(p) for name, p in weights.items()}
    mine = SubnetworkAdamW(weights.items(), masks, lr=3e-3, weight_decay=weight_decay)
    theirs = torch.optim.AdamW(twins.values(), lr=3e-3, weight_decay=weight_decay, foreach=False, fused=False)
    for step in range(120):
        for optimizer in (mine, theirs):
            optimizer.param_groups[0]["lr"] = 3e-3 * (1 + math.cos(step / 40))
        for name, gradient in gradients(weights, step).items():
            weights[name].grad = gradient
            twins[name].grad = torch.where(masks[name], gradient, torch.zeros_like(gradient))
        mine.step()
        theirs.step()
    for name, bits in masks.items():
        inside, now = bits.cpu(), bits_of(weights[name])
        assert torch.equal(now[inside], bits_of(twins[name])[inside]), name
        assert torch.equal(now[~inside], before[name][~inside]), name
        assert (now != before[name])[inside].float().mean() > 0.9
    assert_state_equal(mine, theirs, masks, weights, twins, ("exp_avg", "exp_avg_sq"))


SGD_OPTIONS = [
    {"momentum": 0.0, "weight_decay": 0.0},
    {"momentum": 0.9, "weight_decay": 0.1},
    {"momentum": 0.8, "weight_decay": 0.0, "dampening": 0.3, "maximize": True},
    {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
]


@each_device
@pytest.mark.parametrize("options", SGD_OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sgd_is_bit_for_bit_torchs_on_masked_gradients_for_100_steps(device, dtype, options) -> None:
    needs(device)
    # 16-bit tensors of a multiple of 64 entries: see the module docstring of training.optim.
    shapes = ((37, 29), (3, 5)) if dtype is torch.float32 else ((32, 30), (3, 64))
    weights, masks = weights_and_masks(dtype, device, 0.3, shapes=shapes)
    twins = copy.deepcopy(weights)
    mine = SubnetworkSGD(weights.items(), masks, lr=1e-2, **options)
    theirs = torch.optim.SGD(twins.values(), lr=1e-2, foreach=False, fused=False, **options)
    for step in range(100):
        for name, gradient in gradients(weights, 7 * step + 3).items():
            weights[name].grad = gradient
            twins[name].grad = torch.where(masks[name], gradient, torch.zeros_like(gradient))
        mine.step()
        theirs.step()
    for name, bits in masks.items():
        inside = bits.cpu()
        assert torch.equal(bits_of(weights[name])[inside], bits_of(twins[name])[inside]), name
    if options["momentum"]:
        assert_state_equal(mine, theirs, masks, weights, twins, ("momentum_buffer",))


@each_device
@pytest.mark.parametrize("density", [0.2, 0.95])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_with_a_master_weights_are_fp32_training_rounded_to_nearest_even(
    device, dtype, kind, density
) -> None:
    needs(device)
    weights, masks = weights_and_masks(dtype, device, density)
    twins = {name: torch.nn.Parameter(p.detach().float()) for name, p in weights.items()}
    if kind == "adamw":
        mine = SubnetworkAdamW(weights.items(), masks, lr=1e-3, weight_decay=0.1, fp32_master=True)
        theirs = torch.optim.AdamW(twins.values(), lr=1e-3, weight_decay=0.1, foreach=False, fused=False)
    else:
        mine = SubnetworkSGD(weights.items(), masks, lr=1e-3, momentum=0.9, fp32_master=True)
        theirs = torch.optim.SGD(twins.values(), lr=1e-3, momentum=0.9, foreach=False)
    for step in range(100):
        for name, gradient in gradients(weights, step).items():
            weights[name].grad = gradient
            twins[name].grad = torch.where(masks[name], gradient, torch.zeros_like(gradient)).float()
        mine.step()
        theirs.step()
        for name, bits in masks.items():
            inside = bits.cpu()
            rounded = twins[name].detach().to(dtype)
            assert torch.equal(bits_of(weights[name])[inside], bits_of(rounded)[inside]), (step, name)
    assert all(state["master"].dtype is torch.float32 for state in mine.state.values())


@given(
    seed=st.integers(0, 1000),
    density=st.floats(0.05, 1.0),
    dense_above=st.sampled_from([0.0, 0.5, 1.0]),
    fp32_master=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=30, deadline=None)
def test_compact_and_dense_state_take_the_same_steps(seed, density, dense_above, fp32_master, dtype) -> None:
    model = token_model(seed, dtype=dtype)
    mask = random_mask(model, seed, density=density)
    before, ends = snapshot(model), []
    for threshold in (1.0, dense_above):
        twin = copy.deepcopy(model)
        optimizer = SubnetworkAdamW(twin, mask, lr=0.05, fp32_master=fp32_master, dense_above=threshold)
        for step in range(3):
            optimizer.zero_grad()
            loss_of(twin, step).backward()
            torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
            optimizer.step()
        ends.append(snapshot(twin))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in before)
    assert outside_is_equal(before, ends[0], mask)


def test_it_takes_the_steps_of_dense_adamw_under_freeze_outside_clipping_included() -> None:
    ends = []
    for kind in ("subnetwork", "frozen"):
        model = token_model(3, tied=True)
        mask = random_mask(model, 4)
        if kind == "subnetwork":
            optimizer = SubnetworkAdamW(model, mask, lr=0.05, weight_decay=0.1)
        else:
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1, foreach=False)
            freeze_outside(model, optimizer, mask)
        for step in range(20):
            for part in range(2):
                loss_of(model, 2 * step + part, scale=10.0).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        ends.append(snapshot(model))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize(
    ("dtype", "options", "per_entry"),
    [
        (torch.float32, {}, 12),
        (torch.bfloat16, {}, 8),
        (torch.bfloat16, {"fp32_master": True}, 16),
        (torch.bfloat16, {"rounding": "stochastic"}, 12),
    ],
)
def test_state_is_positions_and_moments_of_masked_entries_and_nothing_else(dtype, options, per_entry) -> None:
    weights, masks = weights_and_masks(dtype, "cpu", 0.2)
    optimizer = SubnetworkAdamW(weights.items(), masks, **options)
    for name, gradient in gradients(weights, 1).items():
        weights[name].grad = gradient
    optimizer.step()
    selected = sum(int(bits.sum()) for bits in masks.values())
    assert optimizer.state_bytes() == per_entry * selected
    held = {id(t): t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)}
    assert sum(t.numel() * t.element_size() for t in held.values()) == (per_entry - 4) * selected


@pytest.mark.parametrize(
    ("dtype", "options", "bound"),
    [
        (torch.float32, {}, 12),
        (torch.bfloat16, {}, 12),
        (torch.bfloat16, {"fp32_master": True}, 16),
    ],
)
@pytest.mark.parametrize("density", [0.01, 0.8, 0.82, 0.99])
def test_state_stays_below_12_d_bytes_a_parameter_at_any_density(dtype, options, bound, density) -> None:
    shape = ((200, 50),)
    weights, masks = weights_and_masks(dtype, "cpu", density, shapes=shape)
    optimizer = SubnetworkAdamW(weights.items(), masks, **options)
    for name, gradient in gradients(weights, 1).items():
        weights[name].grad = gradient
    optimizer.step()
    assert optimizer.state_bytes() <= bound * int(masks["w0"].sum())


def test_sgd_without_momentum_keeps_positions_alone() -> None:
    weights, masks = weights_and_masks(torch.float32, "cpu", 0.2)
    optimizer = SubnetworkSGD(weights.items(), masks)
    for name, gradient in gradients(weights, 1).items():
        weights[name].grad = gradient
    optimizer.step()
    assert optimizer.state_bytes() == 4 * sum(int(bits.sum()) for bits in masks.values())


def test_positions_are_int64_where_int32_cannot_reach_and_train_alike(monkeypatch) -> None:
    assert encodings.position_dtype(2**31) is DType.I32
    assert encodings.position_dtype(2**31 + 1) is DType.I64
    ends = []
    for wide in (False, True):
        if wide:
            monkeypatch.setattr(entries, "position_dtype", lambda _: DType.I64)
        model = token_model(0)
        optimizer = SubnetworkAdamW(model, random_mask(model, 1), lr=0.05)
        loss_of(model, 0).backward()
        optimizer.step()
        positions = next(iter(optimizer._parts.values())).positions
        assert positions.dtype is (torch.int64 if wide else torch.int32)
        assert bool((positions.diff() > 0).all())
        ends.append(snapshot(model))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def _saved(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {}),
        (torch.bfloat16, {"fp32_master": True}),
        (torch.bfloat16, {"rounding": "stochastic", "seed": 3}),
        (torch.float32, {"dense_above": 0.1}),
    ],
)
def test_saved_and_resumed_it_ends_where_an_uninterrupted_run_ends(dtype, options) -> None:
    def run(model, optimizer, steps) -> None:
        for step in steps:
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()

    whole = token_model(0, dtype=dtype)
    mask = random_mask(whole, 1)
    optimizer = SubnetworkAdamW(whole, mask, lr=0.01, **options)
    run(whole, optimizer, range(9))

    first = token_model(0, dtype=dtype)
    optimizer = SubnetworkAdamW(first, mask, lr=0.01, **options)
    run(first, optimizer, range(4))
    weights, state = _saved(first.state_dict()), _saved(optimizer.state_dict())
    second = token_model(9, dtype=dtype)
    second.load_state_dict(weights)
    optimizer = SubnetworkAdamW(second, mask, lr=1.0, **options)
    optimizer.load_state_dict(state)
    run(second, optimizer, range(4, 9))
    expected, found = snapshot(whole), snapshot(second)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_state_of_another_mask_or_optimizer_is_refused() -> None:
    model = token_model(0)
    optimizer = SubnetworkAdamW(model, random_mask(model, 1))
    other = SubnetworkAdamW(model, random_mask(model, 2))
    with pytest.raises(UsageError, match=r"state of parameter 'embed.weight': belongs to the entries"):
        other.load_state_dict(optimizer.state_dict())
    dense = torch.optim.AdamW(model.parameters())
    with pytest.raises(UsageError, match=r"was not written by a subnetwork optimizer"):
        optimizer.load_state_dict(dense.state_dict())
    part = {name: bits for name, bits in random_mask(model, 1).items() if name != "head.weight"}
    fewer = SubnetworkAdamW(model, part, unmasked="freeze")
    with pytest.raises(UsageError, match=r"holds 6 parameters\n  expected: 5"):
        fewer.load_state_dict(optimizer.state_dict())


def test_gradients_are_masked_when_accumulated_and_only_while_the_optimizer_lives() -> None:
    model = token_model(0)
    mask = random_mask(model, 1)
    loss_of(model, 0).backward()
    dense = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    optimizer = SubnetworkAdamW(model, mask)
    loss_of(model, 0).backward()
    for name, parameter in model.named_parameters():
        expected = torch.where(mask[name], dense[name], torch.zeros(()))
        assert torch.equal(bits_of(parameter.grad), bits_of(expected)), name
    model.zero_grad()
    del optimizer
    gc.collect()
    loss_of(model, 0).backward()
    assert all(torch.equal(dense[name], p.grad) for name, p in model.named_parameters())


def test_unmasked_parameters_train_or_freeze_as_told() -> None:
    for policy, moves in (("freeze", False), ("train", True)):
        model = token_model(0)
        mask = random_mask(model, 1)
        del mask["up.bias"]
        with pytest.raises(UsageError, match=r"'up.bias': is trained and has no mask"):
            SubnetworkAdamW(model, mask)
        before = snapshot(model)
        optimizer = SubnetworkAdamW(model, mask, lr=0.05, unmasked=policy)
        loss_of(model, 0).backward()
        assert bool(model.up.bias.grad.any()) is moves
        optimizer.step()
        changed = snapshot(model)["up.bias"] != before["up.bias"]
        assert bool(changed.all()) is moves is bool(changed.any())


def test_groups_with_names_keep_their_options() -> None:
    model = token_model(0)
    mask = random_mask(model, 1)
    biases = [(n, p) for n, p in model.named_parameters() if n.endswith("bias")]
    rest = [(n, p) for n, p in model.named_parameters() if not n.endswith("bias")]
    optimizer = SubnetworkAdamW(
        [{"params": rest, "weight_decay": 0.5}, {"params": biases, "lr": 0.0}], mask, lr=0.05
    )
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 1e-2]
    before = snapshot(model)
    loss_of(model, 0).backward()
    optimizer.step()
    after = snapshot(model)
    assert torch.equal(before["up.bias"], after["up.bias"])
    assert changed_inside(before, after, mask) > 30


def test_what_cannot_be_trained_so_is_refused_at_once() -> None:
    model = token_model(0)
    mask = random_mask(model, 1)
    with pytest.raises(UsageError, match=r"params: hold parameters without names"):
        SubnetworkAdamW(list(model.parameters()), mask)
    with pytest.raises(UsageError, match=r"betas: \(0.9, 1.0\)\n  expected: two numbers"):
        SubnetworkAdamW(model, mask, betas=(0.9, 1.0))
    with pytest.raises(UsageError, match=r"lr: nan\n  expected: a number ≥ 0"):
        SubnetworkAdamW(model, mask, lr=float("nan"))
    with pytest.raises(UsageError, match=r"nesterov: needs a momentum"):
        SubnetworkSGD(model, mask, nesterov=True)
    with pytest.raises(UsageError, match=r"'embed.weight': would be rounded at random from an fp32 master"):
        SubnetworkAdamW(model, mask, rounding="stochastic", fp32_master=True)
    with pytest.raises(UsageError, match=r"'embed.weight': is torch.float16\n  expected: bf16"):
        SubnetworkAdamW(token_model(0, dtype=torch.float16), mask, rounding="stochastic")
    with pytest.raises(MaskError, match=r"selects none of 255 entries"):
        SubnetworkAdamW(model, {name: torch.zeros_like(bits) for name, bits in mask.items()})
    with pytest.raises(UsageError, match=r"selects all 255 entries"):
        SubnetworkAdamW(model, {name: torch.ones_like(bits) for name, bits in mask.items()})
    optimizer = SubnetworkAdamW(model, mask)
    with pytest.raises(UsageError, match=r"add_param_group: the optimizer's masks are fixed"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))]})
    weights = {"w": torch.nn.Parameter(torch.randn(4, 5).t())}
    with pytest.raises(UsageError, match=r"'w': is not contiguous"):
        SubnetworkAdamW(weights.items(), {"w": torch.eye(5, 4).bool()})


def test_nan_gradients_are_refused_before_anything_is_written_unless_they_lie_outside() -> None:
    weights, masks = weights_and_masks(torch.float32, "cpu", 0.2)
    optimizer = SubnetworkAdamW(weights.items(), masks)
    before = {name: bits_of(p) for name, p in weights.items()}
    for name, gradient in gradients(weights, 1).items():
        weights[name].grad = gradient
    inside = tuple(masks["w2"].nonzero()[0])
    weights["w2"].grad[inside] = float("nan")
    with pytest.raises(UsageError, match=r"gradient of parameter 'w2': holds 1 NaN among the entries that"):
        optimizer.step()
    assert all(torch.equal(before[name], bits_of(p)) for name, p in weights.items())
    weights["w2"].grad[inside] = 1.0
    weights["w2"].grad[~masks["w2"]] = float("nan")
    optimizer.step()
    assert all(bool(p.isfinite().all()) for p in weights.values())


def test_a_parameter_with_an_empty_mask_is_left_alone() -> None:
    model = token_model(0)
    mask = random_mask(model, 1)
    mask["up.bias"].zero_()
    before, optimizer = snapshot(model), SubnetworkAdamW(model, mask)
    loss_of(model, 0).backward()
    optimizer.step()
    assert torch.equal(before["up.bias"], snapshot(model)["up.bias"])
    assert model.up.bias not in optimizer.state


@each_device
def test_random_rounding_is_unbiased_and_gives_neighbours(device) -> None:
    needs(device)
    generator = torch.Generator(device).manual_seed(0)
    value = torch.tensor([1.0 + 2**-7 * 0.3, -(2.0 + 2**-6 * 0.8), 3e-40, 1.5], device=device)
    draws = round_stochastically(value.repeat(40_000, 1), generator).double()
    low, high = draws.min(0).values, draws.max(0).values
    assert torch.equal((draws == low) | (draws == high), torch.ones_like(draws, dtype=torch.bool))
    gap = torch.tensor([2**-7, 2**-6, 2.0**-133, 0.0], dtype=torch.float64, device=device)
    assert torch.equal(high - low, gap)
    # The mean of n draws of a two-point distribution has a deviation of at most gap / (2 √n); 5 of them.
    assert bool(((draws.mean(0) - value.double()).abs() <= 5 * gap / (2 * 200)).all())


def test_random_rounding_keeps_what_bf16_holds_and_converts_special_values() -> None:
    codes = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    held = codes.view(torch.bfloat16)
    rounded = round_stochastically(held.float(), torch.Generator().manual_seed(0))
    real = ~held.isnan()
    assert torch.equal(bits_of(rounded)[real], codes[real])
    assert bool(rounded[~real].isnan().all())


def test_random_rounding_takes_steps_that_nearest_rounding_loses() -> None:
    moved = {}
    for rounding in ("nearest", "stochastic"):
        weight = torch.nn.Parameter(torch.full((20_000,), 1.0, dtype=torch.bfloat16))
        mask = torch.arange(20_000) % 2 == 0
        optimizer = SubnetworkSGD([("w", weight)], {"w": mask}, lr=2**-12, rounding=rounding, seed=1)
        for _ in range(16):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        moved[rounding] = float((1 - weight.detach().double())[mask].mean())
        assert bool((weight[~mask] == 1).all())
    assert moved["nearest"] == 0.0
    # 16 steps of 2⁻¹² are 2⁻⁸ in expectation. A step ends within a gap of 2⁻⁸ (below 1), so the mean of
    # 10,000 entries after 16 steps deviates by at most 4 · 2⁻⁸ / 2 / 100; five of these.
    assert abs(moved["stochastic"] - 2**-8) < 5 * 4 * 2**-9 / 100
