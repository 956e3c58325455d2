"""Heads and experts: counts by brute force over known layouts, and reasons where a layout is not known."""

import numpy as np
import pytest

from sparsity_audit.align.roles import role_of
from sparsity_audit.stats.structure import StructuredTensor, by_expert, by_head, head_layout, mixture_groups
from sparsity_audit.stats.tally import AxisCounts

GQA = {"model_type": "llama", "hidden_size": 12, "num_attention_heads": 4, "num_key_value_heads": 2}


def tensor(name: str, mask: np.ndarray) -> StructuredTensor:
    """A tensor whose changed entries are `mask`."""
    matrix = mask.reshape(-1, mask.shape[-1])
    empty = np.zeros(len(matrix), dtype=np.int64)
    axes = AxisCounts(rows=matrix.sum(axis=1), cols=matrix.sum(axis=0), band=empty, outside=empty)
    role = role_of(name, {})
    layer = None if role.layer is None else str(role.layer)
    return StructuredTensor(name=name, role=role, layer=layer, shape=mask.shape, axes=axes)


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape) < 0.3


def heads(name: str, mask: np.ndarray, config: dict) -> list[tuple[str, int, int, int]]:
    found, notes = by_head([tensor(name, mask)], config)
    assert notes == ()
    assert all(h.layer == "3" and h.density == h.changed / h.entries for h in found)
    return [(h.module, h.head, h.entries, h.changed) for h in found]


@pytest.mark.parametrize(
    ("module", "count"), [("q_proj", 4), ("k_proj", 2), ("v_proj", 2)], ids=["query", "key", "value"]
)
def test_rows_of_q_k_and_v_are_heads_under_grouped_queries(module, count):
    mask = draw(count * 3, 12)
    expected = [(module, h, 36, int(mask[3 * h : 3 * h + 3].sum())) for h in range(count)]
    assert heads(f"model.layers.3.self_attn.{module}.weight", mask, GQA) == expected


def test_columns_of_o_are_heads():
    mask = draw(12, 12)
    expected = [("o_proj", h, 36, int(mask[:, 3 * h : 3 * h + 3].sum())) for h in range(4)]
    assert heads("model.layers.3.self_attn.o_proj.weight", mask, GQA) == expected


def test_a_head_size_of_its_own_and_a_value_size_of_its_own_are_used():
    config = {**GQA, "head_dim": 5, "v_head_dim": 2}
    q, o = draw(20, 12), draw(12, 8)
    assert heads("layers.3.self_attn.q_proj.weight", q, config)[3] == ("q_proj", 3, 60, int(q[15:].sum()))
    assert heads("layers.3.self_attn.o_proj.weight", o, config)[1] == ("o_proj", 1, 24, int(o[:, 2:4].sum()))


def test_a_part_of_a_fused_tensor_is_cut_like_its_own_matrix():
    mask = draw(6, 12)
    expected = [("k_proj", h, 36, int(mask[3 * h : 3 * h + 3].sum())) for h in range(2)]
    assert heads("model.layers.3.self_attn.qkv_proj.weight:k_proj", mask, GQA) == expected


def test_a_whole_fused_tensor_is_cut_into_query_key_and_value_heads():
    mask = draw(24, 12)
    starts = [("q_proj", h, 3 * h) for h in range(4)]
    starts += [("k_proj", h, 12 + 3 * h) for h in range(2)]
    starts += [("v_proj", h, 18 + 3 * h) for h in range(2)]
    expected = [(module, h, 36, int(mask[s : s + 3].sum())) for module, h, s in starts]
    assert heads("model.layers.3.self_attn.qkv_proj.weight", mask, GQA) == expected


def test_a_fused_tensor_whose_rows_alternate_is_cut_group_by_group():
    mask = draw(24, 12)
    grouped = mask.reshape(2, 4, 3, 12)  # group × (two queries, key, value) × head size × inputs
    expected = [("q_proj", h, 36, int(grouped[h // 2, h % 2].sum())) for h in range(4)]
    expected += [("k_proj", g, 36, int(grouped[g, 2].sum())) for g in range(2)]
    expected += [("v_proj", g, 36, int(grouped[g, 3].sum())) for g in range(2)]
    assert heads("gpt_neox.layers.3.attention.query_key_value.weight", mask, GQA) == expected


def test_gpt2_stores_its_matrices_transposed():
    config = {"model_type": "gpt2", "n_embd": 12, "n_head": 4}
    fused, out = draw(12, 36), draw(12, 12)
    found = heads("transformer.h.3.attn.c_attn.weight", fused, config)
    assert found[4] == ("k_proj", 0, 36, int(fused[:, 12:15].sum()))
    assert len(found) == 12
    found = heads("transformer.h.3.attn.c_proj.weight", out, config)
    assert found[2] == ("o_proj", 2, 36, int(out[6:9].sum()))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({}, "the base has no config.json"),
        ({"hidden_size": 12}, "config.json gives no num_attention_heads"),
        ({"num_attention_heads": 5, "hidden_size": 12}, "hidden_size 12 is not in 5 heads"),
        ({**GQA, "head_dim": 4}, "shape [12, 12] is not that of 4 heads of 4 (16 rows expected)"),
    ],
)
def test_heads_that_are_not_known_are_named_with_the_reason_once(config, reason):
    tensors = [tensor(f"model.layers.{i}.self_attn.q_proj.weight", draw(12, 12)) for i in (3, 4)]
    found, notes = by_head(tensors, config)
    assert found == ()
    assert len(notes) == 1
    assert notes[0].startswith("model.layers.3.self_attn.q_proj.weight and 1 more: ")
    assert reason in notes[0]


def test_chatglm_has_an_order_of_its_own():
    _, notes = by_head(
        [tensor("encoder.layers.3.self_attention.query_key_value.weight", draw(24, 12))],
        {**GQA, "model_type": "chatglm"},
    )
    assert "not known for this model" in notes[0]


def test_a_vision_tower_has_its_own_heads():
    config = {"text_config": GQA, "vision_config": {"hidden_size": 12, "num_heads": 6}}
    text, vision = head_layout(config, "language_model.model.layers"), head_layout(config, "visual.blocks")
    assert not isinstance(text, str)
    assert not isinstance(vision, str)
    assert (text.num_heads, vision.num_heads, vision.size) == (4, 6, 2)
    assert isinstance(head_layout(GQA, "vision_tower.encoder.layers"), str), (
        "the text's heads are not the tower's"
    )


def test_biases_norms_and_other_matrices_have_no_heads():
    names = ("self_attn.q_proj.bias", "self_attn.q_norm.weight", "mlp.down_proj.weight")
    tensors = [tensor(f"model.layers.3.{name}", draw(1, 12)) for name in names]
    assert by_head(tensors, GQA) == ((), ())


def test_experts_are_summed_over_their_matrices_and_layers_kept_apart():
    masks = {
        (layer, expert, part): draw(4, 6, seed=17 * layer + 5 * expert + number)
        for layer in (0, 1)
        for expert in range(3)
        for number, part in enumerate(("gate_proj", "up_proj", "down_proj"))
    }
    tensors = [tensor(f"model.layers.{la}.mlp.experts.{e}.{p}.weight", m) for (la, e, p), m in masks.items()]
    found = [(e.layer, e.expert, e.entries, e.changed) for e in by_expert(tensors)]
    assert found == [
        (str(layer), e, 72, sum(int(m.sum()) for (la, x, _), m in masks.items() if (la, x) == (layer, e)))
        for layer in (0, 1)
        for e in range(3)
    ]


def test_stacked_experts_lie_along_the_first_axis():
    up, down = draw(3, 4, 6), draw(3, 6, 2, seed=1)
    tensors = [
        tensor("model.layers.0.mlp.experts.gate_up_proj", up),
        tensor("model.layers.0.mlp.experts.down_proj", down),
    ]
    found = [(e.expert, e.entries, e.changed) for e in by_expert(tensors)]
    assert found == [(e, 36, int(up[e].sum()) + int(down[e].sum())) for e in range(3)]


def test_routers_routed_and_shared_experts_stand_apart():
    masks = [draw(4, 6, seed=seed) for seed in range(5)]
    names = [
        "model.layers.0.mlp.gate.weight",
        "model.layers.0.mlp.experts.0.up_proj.weight",
        "model.layers.0.mlp.experts.1.up_proj.weight",
        "model.layers.0.mlp.shared_expert.up_proj.weight",
        "model.layers.0.self_attn.q_proj.weight",
    ]
    groups = mixture_groups([tensor(n, m) for n, m in zip(names, masks, strict=True)])
    assert [(g.group, g.num_tensors, g.entries, g.changed) for g in groups] == [
        ("routers", 1, 24, int(masks[0].sum())),
        ("routed experts", 2, 48, int(masks[1].sum() + masks[2].sum())),
        ("shared experts", 1, 24, int(masks[3].sum())),
    ]
    assert all(g.density == g.changed / g.entries for g in groups)
    assert mixture_groups([tensor(names[4], masks[4])]) == ()
