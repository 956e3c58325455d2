"""Freezing in the loops people write, its proof, and what it refuses before the first step."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
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
from torch.utils.checkpoint import checkpoint

import sparsity_audit
from sparsity_audit.errors import FrozenEntryChangedError, MaskError, UsageError
from sparsity_audit.training import freeze
from sparsity_audit.training.freeze import freeze_outside

each_device = pytest.mark.parametrize(
    "device", [d if d == "cpu" else pytest.param(d, marks=pytest.mark.gpu) for d in DEVICES]
)


def adamw(model: torch.nn.Module, **options) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), **({"lr": 0.05, "weight_decay": 0.5} | options))


def take_steps(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, *, count: int = 3, first: int = 0
) -> None:
    for step in range(first, first + count):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def test_public_names_lead_here() -> None:
    assert sparsity_audit.freeze_outside is freeze_outside
    assert sparsity_audit.verify_frozen.__module__ == "sparsity_audit.training.verify"
    assert sparsity_audit.SubnetworkAdamW.__module__ == "sparsity_audit.training.optim"
    assert sparsity_audit.SubnetworkSGD.__module__ == "sparsity_audit.training.optim"


@each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_context_trains_inside_proves_outside_and_lets_go(device, dtype) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    model = token_model(0, dtype=dtype).to(device)
    mask, before, optimizer = random_mask(model, 1), snapshot(model), adamw(model)
    with freeze_outside(model, optimizer, mask):
        take_steps(model, optimizer)
    after = snapshot(model)
    assert outside_is_equal(before, after, mask)
    assert changed_inside(before, after, mask) > 30
    take_steps(model, optimizer, first=3)
    assert not outside_is_equal(before, snapshot(model), mask)


def test_weight_decay_alone_moves_frozen_entries_when_only_gradients_are_masked() -> None:
    model = token_model(0)
    mask, before, optimizer = random_mask(model, 1), snapshot(model), adamw(model)
    loss_of(model, 0).backward()
    for name, parameter in model.named_parameters():
        parameter.grad *= mask[name]
    optimizer.step()
    assert not outside_is_equal(before, snapshot(model), mask)


def test_a_freezer_that_does_not_restore_is_caught_with_tensor_entry_and_both_values(monkeypatch) -> None:
    model = token_model(0)
    mask, optimizer = random_mask(model, 1), adamw(model)
    monkeypatch.setattr(freeze, "_restore", lambda part: None)
    frozen = freeze_outside(model, optimizer, mask)
    frozen.verify_frozen()
    row, col = (int(i) for i in (~mask["embed.weight"]).nonzero()[0])
    was = model.embed.weight[row, col].item()
    take_steps(model, optimizer, count=1)
    now = model.embed.weight[row, col].item()
    with pytest.raises(FrozenEntryChangedError) as caught:
        frozen.verify_frozen()
    text = str(caught.value)
    assert text.startswith(f"tensor 'embed.weight', entry [{row}, {col}]: lies outside the update mask")
    assert f"{was!r} (0x" in text
    assert f"-> {now!r} (0x" in text


def test_the_proof_sees_the_sign_of_zero_and_the_payload_of_nan() -> None:
    model = token_model(0, dtype=torch.bfloat16)
    mask, optimizer = random_mask(model, 1), adamw(model)
    mask["down.weight"][2] = False
    codes = model.down.weight.detach().view(torch.int16)
    codes[2, 0], codes[2, 1] = -(1 << 15), 0x7FC1
    frozen = freeze_outside(model, optimizer, mask)
    frozen.verify_frozen()
    codes[2, 0] = 0
    with pytest.raises(FrozenEntryChangedError, match=r"\[2, 0\].*-0\.0 \(0x8000\) -> 0\.0 \(0x0000\)"):
        frozen.verify_frozen()
    codes[2, 0], codes[2, 1] = -(1 << 15), 0x7FC2
    with pytest.raises(FrozenEntryChangedError, match=r"\[2, 1\].*nan \(0x7fc1\) -> nan \(0x7fc2\)"):
        frozen.verify_frozen()


def test_norm_clipping_sees_the_masked_gradient() -> None:
    model = token_model(0)
    mask, optimizer = random_mask(model, 1, density=0.1), adamw(model)
    loss_of(model, 0).backward()
    dense = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    masked = torch.nn.utils.get_total_norm([p.grad * mask[n] for n, p in model.named_parameters()])
    optimizer.zero_grad()
    freeze_outside(model, optimizer, mask)
    loss_of(model, 0).backward()
    assert torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0) == masked < dense


def test_state_from_before_and_state_loaded_later_is_zero_outside() -> None:
    model = token_model(0)
    mask, optimizer = random_mask(model, 1), adamw(model)
    take_steps(model, optimizer)
    dense_state = copy.deepcopy(optimizer.state_dict())
    freeze_outside(model, optimizer, mask)

    def outside_state() -> int:
        return sum(
            int(torch.count_nonzero(optimizer.state[p][key][~mask[n]]))
            for n, p in model.named_parameters()
            for key in ("exp_avg", "exp_avg_sq")
        )

    assert outside_state() == 0
    optimizer.load_state_dict(dense_state)
    assert outside_state() > 0
    take_steps(model, optimizer, count=1)
    assert outside_state() == 0


def test_factored_state_is_left_alone() -> None:
    model = token_model(0)
    mask = random_mask(model, 1)
    optimizer = torch.optim.Adafactor(model.parameters(), lr=0.05)
    with freeze_outside(model, optimizer, mask):
        take_steps(model, optimizer)
    state = optimizer.state[model.up.weight]
    assert state["row_var"].shape == (9, 1)
    assert torch.equal(state["row_var"][:, 0] > 0, mask["up.weight"].any(1))
    assert torch.equal(state["col_var"][0] > 0, mask["up.weight"].any(0))


@pytest.mark.parametrize("name", ["embed.weight", "head.weight"])
def test_a_tied_parameter_is_masked_under_either_name(name) -> None:
    model = token_model(0, tied=True)
    mask, before, optimizer = random_mask(model, 1), snapshot(model), adamw(model)
    given = {name if key == "embed.weight" else key: bits for key, bits in mask.items()}
    with freeze_outside(model, optimizer, given):
        take_steps(model, optimizer)
    assert outside_is_equal(before, snapshot(model), mask)


def test_a_tied_parameter_with_two_different_masks_is_refused() -> None:
    model = token_model(0, tied=True)
    mask = random_mask(model, 1)
    freeze_outside(model, adamw(model), mask | {"head.weight": mask["embed.weight"].clone()}).remove()
    with pytest.raises(MaskError, match=r"'embed.weight' and 'head.weight'.*different entries of one tied"):
        freeze_outside(model, adamw(model), mask | {"head.weight": ~mask["embed.weight"]})


def _compiled(model: torch.nn.Module) -> Callable[..., torch.Tensor]:
    return torch.compile(model, backend="aot_eager")


class Checkpointed(torch.nn.Module):
    """Recomputes the whole forward in the backward pass; puts a wrapper's prefix before names."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self._checkpoint_wrapped_module = module

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return checkpoint(self._checkpoint_wrapped_module, tokens, use_reentrant=False)


class Autocast(torch.nn.Module):
    """Computes in bf16, keeps fp32 weights."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.module(tokens)


@pytest.mark.parametrize("wrap", [_compiled, Checkpointed, Autocast])
def test_wrapped_models_train_as_the_bare_model_does(wrap) -> None:
    model = token_model(0)
    mask, before = random_mask(model, 1), snapshot(model)
    wrapped = wrap(model)
    assert any(name not in mask for name, _ in wrapped.named_parameters())
    optimizer = adamw(wrapped)
    with freeze_outside(wrapped, optimizer, mask):
        take_steps(wrapped, optimizer)
    after = snapshot(model)
    assert outside_is_equal(before, after, mask)
    assert changed_inside(before, after, mask) > 30


def test_a_mask_saved_with_wrapper_prefixes_fits_the_bare_model() -> None:
    model = token_model(0)
    mask, optimizer = random_mask(model, 1), adamw(model)
    prefixed = {f"module._orig_mod.{name}": bits for name, bits in mask.items()}
    with freeze_outside(model, optimizer, prefixed) as frozen:
        take_steps(model, optimizer)
        assert frozen.verify_frozen().num_tensors == 6


def test_parameters_without_a_mask_need_a_policy() -> None:
    model = token_model(0)
    mask = random_mask(model, 1)
    bits = mask.pop("up.bias")
    with pytest.raises(UsageError, match=r"'up.bias': is trained and has no mask \(1 such.*\n.*'freeze' or"):
        freeze_outside(model, adamw(model), mask)
    for policy, moves in (("freeze", False), ("train", True)):
        model = token_model(0)
        before, optimizer = snapshot(model), adamw(model)
        with freeze_outside(model, optimizer, mask, unmasked=policy):
            take_steps(model, optimizer)
        after = snapshot(model)
        changed = before["up.bias"] != after["up.bias"]
        assert bool(changed.all()) is moves is bool(changed.any())
        assert outside_is_equal(before, after | {"up.bias": before["up.bias"]}, mask | {"up.bias": bits})


def test_the_freeze_policy_watches_parameters_that_no_optimizer_has() -> None:
    model = token_model(0)
    mask = random_mask(model, 1)
    mask = {name: mask[name] for name in ("up.weight", "up.bias")}
    optimizer = torch.optim.AdamW(model.up.parameters(), lr=0.1)
    frozen = freeze_outside(model, optimizer, mask, unmasked="freeze")
    take_steps(model, optimizer)
    assert frozen.verify_frozen().num_tensors == 6
    with torch.no_grad():
        model.head.weight[3, 2] += 1
    with pytest.raises(FrozenEntryChangedError, match=r"'head.weight', entry \[3, 2\]"):
        frozen.verify_frozen()


def test_a_grad_scaler_skips_its_step_and_nothing_is_refused() -> None:
    model = token_model(0)
    mask, before, optimizer = random_mask(model, 1), snapshot(model), adamw(model, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with freeze_outside(model, optimizer, mask):
        for step, scale in ((0, 1.0), (1, float("inf")), (2, 1.0)):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, step, scale=scale)).backward()
            scaler.step(optimizer)
            scaler.update()
    after = snapshot(model)
    assert scaler.get_scale() == 2.0
    assert outside_is_equal(before, after, mask)
    assert changed_inside(before, after, mask) > 30


def test_accelerates_wrapper_is_looked_through() -> None:
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

    model = token_model(0)
    mask, before, optimizer = random_mask(model, 1), snapshot(model), adamw(model)
    freeze_outside(model, Wrapper(optimizer), mask)
    take_steps(model, optimizer)
    assert outside_is_equal(before, snapshot(model), mask)


def _refused(match: str, error: type[Exception] = UsageError):
    return pytest.raises(error, match=match)


def test_a_parameter_added_after_freezing_is_refused_before_the_step() -> None:
    model = token_model(0)
    mask = {name: bits for name, bits in random_mask(model, 1).items() if name.startswith("up.")}
    optimizer = torch.optim.AdamW(model.up.parameters(), lr=0.1)
    freeze_outside(model, optimizer, mask)
    optimizer.add_param_group({"params": [model.head.weight]})
    before = snapshot(model)
    loss_of(model, 0).backward()
    with _refused(r"'head.weight': was added to the optimizer after freeze_outside"):
        optimizer.step()
    assert all(torch.equal(before[name], bits) for name, bits in snapshot(model).items())


@pytest.mark.parametrize("accumulated", [True, False])
def test_nan_gradients_are_refused_before_the_step_with_the_parameters_name(accumulated) -> None:
    model = token_model(0)
    mask, optimizer, before = random_mask(model, 1), adamw(model), snapshot(model)
    freeze_outside(model, optimizer, mask)
    loss_of(model, 0, scale=float("nan") if accumulated else 1.0).backward()
    if not accumulated:
        model.down.bias.grad = torch.full_like(model.down.bias, float("nan"))
    found = int(mask["embed.weight" if accumulated else "down.bias"].sum())
    name = r"'embed.weight': holds \d+ NaN" if accumulated else f"'down.bias': holds {found} NaN"
    with _refused(f"gradient of parameter {name} among the entries that are trained"):
        optimizer.step()
    assert all(torch.equal(before[key], bits) for key, bits in snapshot(model).items())
    assert not optimizer.state


def test_nan_outside_the_mask_does_not_come_in() -> None:
    model = token_model(0)
    mask, optimizer, before = random_mask(model, 1), adamw(model), snapshot(model)
    freeze_outside(model, optimizer, mask)
    loss_of(model, 0).backward()
    model.down.weight.grad[~mask["down.weight"]] = float("nan")
    optimizer.step()
    assert outside_is_equal(before, snapshot(model), mask)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_sparse_gradients_are_refused() -> None:
    model = torch.nn.Embedding(5, 3, sparse=True)
    mask = {"weight": torch.eye(5, 3).bool()}
    freeze_outside(model, torch.optim.SGD(model.parameters(), lr=0.1), mask)
    with _refused(r"'weight': has layout torch.sparse_coo"):
        model(torch.tensor([1])).sum().backward()


def test_a_model_moved_cast_or_changed_after_freezing_is_refused() -> None:
    model = token_model(0)
    mask, optimizer = random_mask(model, 1), adamw(model)
    frozen = freeze_outside(model, optimizer, mask)
    model.to(torch.bfloat16)
    loss_of(model, 0).backward()
    with _refused(r"'embed.weight': is now 16 bits wide on cpu, shape \[11, 6\]\n  expected: 32 bits on cpu"):
        optimizer.step()
    with _refused(r"'embed.weight': is torch.bfloat16", FrozenEntryChangedError):
        frozen.verify_frozen()
    model.embed.weight = torch.nn.Parameter(model.embed.weight.detach().clone())
    with _refused(r"'embed.weight': was replaced in the model", FrozenEntryChangedError):
        frozen.verify_frozen()


def test_an_optimizer_of_another_model_is_refused() -> None:
    model = token_model(0)
    with _refused(r"optimizer: trains 6 parameters that the model does not have"):
        freeze_outside(model, adamw(token_model(0)), random_mask(model, 1))


def test_selected_entries_that_nothing_trains_are_refused() -> None:
    model = token_model(0)
    mask = random_mask(model, 1)
    model.up.bias.requires_grad_(requires_grad=False)
    with _refused(r"'up.bias': has selected entries, but is in no optimizer or does not req", MaskError):
        freeze_outside(model, adamw(model), mask)
    mask["up.bias"].zero_()
    freeze_outside(model, adamw(model), mask)


def test_sharded_layouts_without_entries_of_their_own_are_refused() -> None:
    model = token_model(0)
    model.up.weight.ds_id = 3
    with _refused(r"'up.weight': is partitioned by DeepSpeed ZeRO-3(.|\n)*fully_shard"):
        freeze_outside(model, adamw(model), random_mask(model, 1))
    FullyShardedDataParallel = type("FullyShardedDataParallel", (torch.nn.Sequential,), {})
    wrapped = FullyShardedDataParallel(token_model(0))
    with _refused(r"is wrapped by FSDP1(.|\n)*fully_shard"):
        freeze_outside(wrapped, adamw(wrapped), {})


def test_a_resumed_run_must_have_the_weights_that_were_frozen() -> None:
    model = token_model(0)
    mask, optimizer = random_mask(model, 1), adamw(model)
    frozen = freeze_outside(model, optimizer, mask)
    take_steps(model, optimizer)
    state = frozen.state_dict()
    again = copy.deepcopy(model)
    freeze_outside(again, adamw(again), mask, resumed_from=state).remove()
    with pytest.raises(UsageError, match=r"resumed_from: is no state of freeze_outside"):
        freeze_outside(again, adamw(again), mask, resumed_from={})
    part = mask | {"up.bias": torch.ones_like(mask["up.bias"])}
    with pytest.raises(UsageError, match=r"tensor 'up.bias': is not frozen now"):
        freeze_outside(again, adamw(again), part, resumed_from=state)
    with torch.no_grad():
        place = tuple((~mask["up.weight"]).nonzero()[0])
        again.up.weight[place] += 1e-6
    with pytest.raises(FrozenEntryChangedError, match=r"'up.weight': its frozen entries have fingerprint"):
        freeze_outside(again, adamw(again), mask, resumed_from=state)


def test_bits_survive_a_step_that_writes_nan_everywhere() -> None:
    class Vandal(torch.optim.Optimizer):
        def __init__(self, params) -> None:
            super().__init__(params, {})

        def step(self, closure=None) -> None:
            with torch.no_grad():
                for parameter in self.param_groups[0]["params"]:
                    parameter.fill_(float("nan"))

    model = token_model(0)
    mask, before = random_mask(model, 1), snapshot(model)
    optimizer = Vandal(model.parameters())
    with freeze_outside(model, optimizer, mask):
        optimizer.step()
    assert outside_is_equal(before, snapshot(model), mask)
    assert bits_of(model.up.bias)[mask["up.bias"]].unique().tolist() == [0x7FC00000]
