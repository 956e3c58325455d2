"""Parts of an update in a model: they go in, they come out, and their divergence is counted once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from token_models import random_llama, random_model

from sparsity_audit.errors import UsageError
from sparsity_audit.lab.language_model import LabModel
from sparsity_audit.models.score import Resident, Scored
from sparsity_audit.tokens.patching import Part, js_to_tuned, parts_of, put, verify_same_shapes

SEQUENCES = (Scored(prompt=(1, 5), completion=(7, 8, 9)), Scored(prompt=(1, 4, 4), completion=(3,)))


def bits(module: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def distance(model, tuned) -> np.ndarray:
    found = js_to_tuned(
        model, Resident(tuned), SEQUENCES, vocab_size=20, batch_tokens=100, chunk_bytes=1 << 20
    )
    assert found.sequence.tolist() == [0, 0, 0, 1]
    return found.js


@pytest.mark.parametrize("kind", ["layer", "module"])
def test_parts_cover_every_parameter_once(kind) -> None:
    module = random_llama(0)
    parts = parts_of(module, kind)
    names = [name for part in parts for name in part.tensors]
    assert sorted(names) == sorted(name for name, _ in module.named_parameters())
    if kind == "layer":
        assert [part.name for part in parts] == ["embed", "layer 0", "layer 1", "norm", "head"]
    else:
        assert {part.name for part in parts} >= {"embed", "q_proj", "down_proj", "norm", "head"}


def test_all_parts_together_are_the_other_model_and_leave_no_trace() -> None:
    base, tuned = random_model(1), random_model(2)
    before = bits(base.module)
    everything = Part(
        kind="mask", name="all", tensors={n: None for p in parts_of(base.module, "layer") for n in p.tensors}
    )
    assert distance(base, tuned).min() > 0
    with put(base.module, tuned.module, everything):
        assert distance(base, tuned).tolist() == [0.0] * 4
    assert all(torch.equal(a, b) for a, b in zip(before, bits(base.module), strict=True))


def test_a_patch_leaves_no_trace_when_something_fails_inside() -> None:
    base, tuned = random_llama(1), random_llama(2)
    before = bits(base)
    with pytest.raises(RuntimeError), put(base, tuned, parts_of(base, "layer")[1]):
        raise RuntimeError
    assert all(torch.equal(a, b) for a, b in zip(before, bits(base), strict=True))


def test_a_mask_takes_its_entries_alone() -> None:
    base, tuned = random_llama(1), random_llama(2)
    name = "model.layers.0.mlp.up_proj.weight"
    own, other = dict(base.named_parameters())[name], dict(tuned.named_parameters())[name]
    kept = own.detach().clone()
    selected = torch.rand(own.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    with put(base, tuned, Part(kind="mask", name="m", tensors={name: selected})):
        assert torch.equal(own[selected], other[selected])
        assert torch.equal(own[~selected], kept[~selected])


def test_models_of_other_shapes_are_refused_with_the_first_difference() -> None:
    small, wide = random_model(1), random_model(1)
    wide.llama.lm_head.weight = torch.nn.Parameter(torch.zeros(21, 16))
    with pytest.raises(UsageError, match=r"lm_head.weight.*\[20, 16\] in base, \[21, 16\] in tuned"):
        verify_same_shapes(small, LabModel(wide.llama, name="wide"))
