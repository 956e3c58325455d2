"""Query, key and value whose rows alternate per group: split only when a configuration says how."""

import numpy as np
import pytest

from sparsity_audit.align.interleaving import count_groups
from sparsity_audit.align.match import match
from sparsity_audit.align.records import LeftoverReason

HEADS, SIZE, HIDDEN = 4, 3, 5


def _sides(groups, kind="weight", module="query_key_value"):
    inner = (HIDDEN,) if kind == "weight" else ()
    rows = {"q_proj": HEADS * SIZE, "k_proj": groups * SIZE, "v_proj": groups * SIZE}
    path = "gpt_neox.layers.0.attention."
    fused = {f"{path}{module}.{kind}": (sum(rows.values()), *inner)}
    return fused, {f"{path}{part}.{kind}": (count, *inner) for part, count in rows.items()}


def _megatron(groups, inner):
    """Entry numbers of query, key and value in the fused tensor, group by group, by reshaping."""
    per_group = HEADS // groups
    entries = np.arange((HEADS + 2 * groups) * SIZE * inner).reshape(groups, per_group + 2, SIZE, inner)
    return [entries[:, :per_group].ravel(), entries[:, per_group].ravel(), entries[:, per_group + 1].ravel()]


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kind", ["weight", "bias"])
@pytest.mark.parametrize("fused_side", ["base", "tuned"])
def test_rows_are_split_as_megatron_groups_them(make_catalogue, groups, kind, fused_side):
    fused, split = _sides(groups, kind)
    config = {"num_attention_heads": HEADS, "num_key_value_heads": groups, "head_dim": SIZE}
    sides = make_catalogue(fused, config=config), make_catalogue(split)
    result = match(*(sides if fused_side == "base" else sides[::-1]))
    assert result.leftovers == ()
    expected = _megatron(groups, HIDDEN if kind == "weight" else 1)
    for part, entries in zip(("q_proj", "k_proj", "v_proj"), expected, strict=True):
        (pair,) = (p for p in result.pairs if part in p.name)
        run = getattr(pair, fused_side)
        assert np.array_equal(np.concatenate([np.arange(*r) for r in run.runs]), entries)
        assert pair.rule == ("fused" if groups == 1 else "interleaved")
    if groups > 1:
        assert any(f"{groups} groups" in finding for finding in result.findings)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, "no configuration gives num_attention_heads"),
        ({"num_attention_heads": 5}, "5 query heads"),
        ({"num_attention_heads": HEADS, "num_key_value_heads": 4}, "num_key_value_heads"),
        ({"num_attention_heads": HEADS, "head_dim": 6}, "head_dim"),
        ({"num_attention_heads": 2, "text_config": {"num_attention_heads": 4}}, "disagree"),
        ({"num_attention_heads": HEADS, "model_type": "chatglm"}, "chatglm"),
    ],
)
def test_without_sizes_that_agree_it_stays_a_leftover_that_says_why(make_catalogue, config, words):
    fused, split = _sides(2)
    result = match(make_catalogue(fused, config=config), make_catalogue(split))
    assert {left.reason for left in result.leftovers} == {LeftoverReason.INTERLEAVED}
    assert words in result.leftovers[0].detail


def test_groups_follow_from_the_shapes_once_the_heads_are_known():
    assert count_groups([{}, {"n_head": 8}], (64, 16, 16)) == 2
    assert count_groups([{"text_config": {"num_attention_heads": 8}}], (64, 64, 64)) == 8
    assert isinstance(count_groups([{"n_head": 8}], (64, 24, 24)), str)
