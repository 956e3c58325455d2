"""Two sets of weights are compared bit for bit outside a mask; the first difference is named."""

from __future__ import annotations

import copy

import pytest
import torch
from small_models import random_mask, token_model

from sparsity_audit.errors import FrozenEntryChangedError, MaskError, UsageError
from sparsity_audit.training import verify
from sparsity_audit.training.verify import verify_frozen


@pytest.mark.parametrize("chunk", [7, 1 << 22])
def test_changes_inside_pass_and_the_first_one_outside_is_named(chunk, monkeypatch) -> None:
    monkeypatch.setattr(verify, "_CHUNK_ENTRIES", chunk)
    base = token_model(0)
    mask = random_mask(base, 1)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            parameter[mask[name]] = 7.0
    proof = verify_frozen(tuned, base, mask)
    assert (proof.num_tensors, proof.num_frozen + proof.num_trainable) == (6, 255)
    assert proof.num_trainable == sum(int(bits.sum()) for bits in mask.values())
    places = (~mask["down.weight"]).nonzero()
    for place in (places[-1], places[len(places) // 2]):
        with torch.no_grad():
            tuned.down.weight[tuple(place)] *= -1
        with pytest.raises(
            FrozenEntryChangedError, match=rf"'down.weight', entry \[{place[0]}, {place[1]}\]:"
        ):
            verify_frozen(tuned.state_dict(), base.state_dict(), mask)


def test_every_entry_of_a_vector_and_a_scalar_is_seen() -> None:
    base = {"v": torch.arange(5.0), "s": torch.tensor(2.0), "x": torch.zeros(2, 3, 4)}
    mask = {"v": torch.tensor([True, False, False, False, False])}
    for name, place, text in (
        ("v", (3,), r"'v', entry \[3\]"),
        ("s", (), r"'s', entry \[\]"),
        ("x", (1, 2, 3), r"'x', entry \[1, 2, 3\]"),
    ):
        tuned = {key: value.clone() for key, value in base.items()}
        tuned[name][place] = -0.0 if name == "x" else 9.0
        with pytest.raises(FrozenEntryChangedError, match=text):
            verify_frozen(tuned, base, mask)
    assert verify_frozen(base, base, mask).num_frozen == 4 + 1 + 24
    assert verify_frozen(base, base, mask, unmasked="train").num_frozen == 4


def test_state_dicts_with_tied_tensors_need_one_mask_for_both_names() -> None:
    base = token_model(0, tied=True)
    mask = random_mask(base, 1)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.head.weight[mask["embed.weight"]] = 1.0
    assert verify_frozen(tuned.state_dict(), base.state_dict(), mask).num_tensors == 5
    assert verify_frozen(tuned, base, mask).num_tensors == 5


def test_missing_reshaped_and_recast_tensors_are_refused() -> None:
    base = token_model(0)
    mask = random_mask(base, 1)
    state = base.state_dict()
    with pytest.raises(UsageError, match=r"tensor 'up.bias': is not in the tuned weights"):
        verify_frozen({name: t for name, t in state.items() if name != "up.bias"}, base, mask)
    with pytest.raises(FrozenEntryChangedError, match=r"'up.bias': is torch.float32 of shape \[3, 3\]"):
        verify_frozen(state | {"up.bias": state["up.bias"].view(3, 3)}, base, mask)
    with pytest.raises(FrozenEntryChangedError, match=r"'up.bias': is torch.float16 of shape \[9\]"):
        verify_frozen(state | {"up.bias": state["up.bias"].half()}, base, mask)
    with pytest.raises(MaskError, match=r"'nobody': names no parameter"):
        verify_frozen(base, base, mask | {"nobody": torch.ones(1).bool()})
