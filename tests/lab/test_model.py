"""The Llama: its size, its causality, and that cache and padding change no result."""

from __future__ import annotations

import pytest
import torch

from sparsity_audit.errors import UsageError
from sparsity_audit.lab.model import SIZES, KVCache, Llama, LlamaConfig, initialise, round_to_bf16
from sparsity_audit.lab.names import SIZE_NAMES

TOLERANCE = 2e-5
"""Logits of order 10 in fp32, summed in another order: about ten ULP."""


def small(seed: int = 0) -> Llama:
    config = LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    model = initialise(config, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():  # a head, so that logits differ
        model.lm_head.weight.normal_(generator=torch.Generator().manual_seed(seed + 1))
    return model


def tokens(batch: int, seq: int) -> torch.Tensor:
    return torch.randint(3, 20, (batch, seq), generator=torch.Generator().manual_seed(7))


def test_sizes_have_the_parameters_they_are_said_to_have() -> None:
    assert tuple(SIZES) == SIZE_NAMES
    counts = [sum(weight.numel() for weight in Llama(config).parameters()) for config in SIZES.values()]
    assert counts == [148_928, 784_512, 3_125_504]


def test_a_new_model_predicts_every_token_alike() -> None:
    model = initialise(SIZES["tiny"], generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(tokens(2, 5)), torch.zeros(2, 5, 20))


def test_building_a_model_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    small()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_same_seed_gives_the_same_weights() -> None:
    first, again, other = (dict(small(seed).state_dict()) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(
        first["model.layers.0.mlp.up_proj.weight"], other["model.layers.0.mlp.up_proj.weight"]
    )


def test_a_later_token_changes_no_earlier_logit() -> None:
    model, text = small(), tokens(1, 8)
    changed = text.clone()
    changed[0, 5] = (changed[0, 5] - 2) % 17 + 3
    first, second = model(text), model(changed)
    assert torch.equal(first[:, :5], second[:, :5])
    assert not torch.equal(first[:, 5], second[:, 5])


def test_padding_on_both_sides_changes_logits_by_rounding_only() -> None:
    model, text = small(), tokens(3, 6)
    padded = torch.cat((torch.zeros(3, 4, dtype=torch.int64), text, torch.zeros(3, 2, dtype=torch.int64)), 1)
    mask = torch.tensor([[False] * 4 + [True] * 6 + [False] * 2]).expand(3, -1)
    assert (model(padded, mask)[:, 4:10] - model(text)).abs().max() < TOLERANCE
    assert torch.isfinite(model(padded, mask)).all()


def test_what_stands_in_the_padding_does_not_matter() -> None:
    model, text = small(), tokens(2, 6)
    mask = torch.tensor([[False, False, True, True, True, True]]).expand(2, -1)
    other = text.clone()
    other[:, :2] = 5
    assert torch.equal(model(text, mask)[:, 2:], model(other, mask)[:, 2:])


def test_logits_with_a_cache_are_those_without_one_up_to_rounding() -> None:
    model, text = small(), tokens(2, 9)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, :3] = False
    cache = KVCache(model.config, batch=2, capacity=9)
    with torch.no_grad():
        parts = [model(text[:, :4], mask[:, :4], cache=cache)]
        parts += [model(text[:, i : i + 1], mask[:, : i + 1], cache=cache) for i in range(4, 9)]
        whole = model(text, mask)
    assert (torch.cat(parts, 1) - whole)[mask].abs().max() < TOLERANCE
    assert cache.length == 9


def test_a_sequence_longer_than_the_positions_is_refused() -> None:
    model = small()
    limit = model.config.max_position_embeddings
    assert model(tokens(1, limit)).shape == (1, limit, 20)
    with pytest.raises(UsageError, match=f"{limit + 1} tokens"):
        model(tokens(1, limit + 1))


def test_rounding_to_bf16_is_to_nearest_even_and_idempotent() -> None:
    layer = torch.nn.Linear(1, 4, bias=False)
    # 1 + 2⁻⁸ lies between 1 and 1 + 2⁻⁷ and goes to the even one, as does 1 + 3·2⁻⁸, upwards.
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1 + 2**-8], [1 + 3 * 2**-8], [-0.0], [1 + 2**-8 + 2**-20]]))
    round_to_bf16(layer)
    expected = torch.tensor([[1.0], [1 + 2**-6], [-0.0], [1 + 2**-7]])
    assert torch.equal(layer.weight, expected)
    assert torch.signbit(layer.weight[2])
    round_to_bf16(layer)
    assert torch.equal(layer.weight, expected)
