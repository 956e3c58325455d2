import time

import pytest

from sparsity_audit.align.match import match
from sparsity_audit.align.records import LeftoverReason
from sparsity_audit.errors import AlignmentError


def _rules(alignment):
    return {pair.rule for pair in alignment.pairs}


def _renamed(shapes, change):
    return {change(name): shape for name, shape in shapes.items()}


def test_equal_names_match_exactly_and_without_findings(make_catalogue, llama):
    one = make_catalogue(llama(attention_bias=True))
    result = match(one, one)
    assert _rules(result) == {"exact"}
    assert (result.skipped, result.leftovers, result.findings) == ((), (), ())
    assert [pair.name for pair in result.pairs] == sorted(one.tensors)
    account = result.account("tuned")
    assert (account.total, account.compared, account.skipped, account.leftover) == (
        one.num_entries,
        one.num_entries,
        0,
        0,
    )


def test_scalars_empty_tensors_and_buffers_are_ordinary_tensors(make_catalogue):
    one = make_catalogue(
        {
            "step": (),
            "empty": (0, 4),
            "embeddings.position_ids": (1, 512),
            "model.layers.0.self_attn.rotary_emb.inv_freq": (64,),
        }
    )
    result = match(one, one)
    assert [pair.name for pair in result.pairs] == sorted(one.tensors)
    assert result.account("base").compared == 1 + 512 + 64


@pytest.mark.parametrize(
    "change",
    [
        lambda n: "module." + n,
        lambda n: "_fsdp_wrapped_module." + n,
        lambda n: "_orig_mod." + n,
        lambda n: "_orig_mod.module." + n,
        lambda n: "base_model.model." + n,
        lambda n: n.replace(".self_attn", "._orig_mod.self_attn"),
        lambda n: n.replace("layers.0.", "layers.0._fsdp_wrapped_module._checkpoint_wrapped_module."),
        lambda n: n.replace("q_proj.weight", "q_proj.base_layer.weight"),
        lambda n: n.removeprefix("model."),
        lambda n: "transformer." + n.removeprefix("model."),
        lambda n: "model.model." + n.removeprefix("model."),
        lambda n: "model.language_model." + n.removeprefix("model.") if n.startswith("model.") else n,
        lambda n: "language_model." + n,
        lambda n: "pretrained_model." + n,
    ],
)
def test_wrappers_and_roots_are_looked_through_in_both_directions(make_catalogue, llama, change):
    base = make_catalogue(llama())
    tuned = make_catalogue(_renamed(llama(), change))
    for one, other in ((base, tuned), (tuned, base)):
        result = match(one, other)
        assert result.leftovers == ()
        assert len(result.pairs) == len(base.tensors)
        for pair in result.pairs:
            assert pair.name == pair.base.spec.name
            assert {change(pair.base.spec.name), change(pair.tuned.spec.name)} & {
                pair.base.spec.name,
                pair.tuned.spec.name,
            }
        assert "prefix" in _rules(result)


def test_a_finding_counts_what_each_rule_renamed(make_catalogue, llama):
    base = make_catalogue(llama())
    tuned = make_catalogue(_renamed(llama(), lambda n: "language_model." + n))
    assert match(base, tuned).findings == (
        "1 tensor matched under another name: leading 'language_model.' of tuned dropped",
        (
            "18 tensors matched under another name: "
            "leading 'model.' of base taken for 'language_model.model.' of tuned"
        ),
    )
    wrapped = make_catalogue(_renamed(llama(), lambda n: "module." + n))
    assert match(base, wrapped).findings == (
        "19 tensors matched under another name: tuned wrapper 'module.' dropped",
    )


def test_a_vision_language_model_matches_its_reorganised_self(make_catalogue, llama):
    tower = {"vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight": (6, 4)}
    old = make_catalogue(
        _renamed(llama(), lambda n: "language_model." + n)
        | tower
        | {"multi_modal_projector.linear_1.bias": (8,)}
    )
    new = make_catalogue(
        {"lm_head.weight": (32, 8), "model.multi_modal_projector.linear_1.bias": (8,)}
        | {"model." + name: shape for name, shape in tower.items()}
        | _renamed(llama(head=False), lambda n: "model.language_model." + n.removeprefix("model."))
    )
    result = match(old, new)
    assert result.leftovers == ()
    assert len(result.pairs) == len(old.tensors)


@pytest.mark.parametrize("doubled", ["base", "tuned"])
def test_one_name_wrapped_and_bare_on_one_side_is_refused_with_both(make_catalogue, doubled):
    both = make_catalogue({"model.x": (4,), "module.model.x": (4,)})
    one = make_catalogue({"model.x": (4,)})
    with pytest.raises(AlignmentError) as caught:
        match(both, one) if doubled == "base" else match(one, both)
    assert "'model.x' and 'module.model.x'" in str(caught.value)
    assert f"in {doubled}" in str(caught.value)
    assert "--map" in str(caught.value)


def test_a_doubled_name_is_no_problem_when_both_sides_have_both(make_catalogue):
    both = make_catalogue({"model.x": (4,), "module.model.x": (4,)})
    assert _rules(match(both, both)) == {"exact"}


def test_a_doubled_name_that_the_other_side_lacks_is_a_leftover(make_catalogue):
    both = make_catalogue({"model.x": (4,), "module.model.x": (4,), "y": (1,)})
    result = match(both, make_catalogue({"y": (1,)}))
    assert {left.reason for left in result.leftovers} == {LeftoverReason.ONLY_HERE}


def test_a_user_rule_confirms_one_of_two_candidates(make_catalogue):
    both = make_catalogue({"model.x": (4,), "module.model.x": (4,)})
    one = make_catalogue({"model.x": (4,)})
    result = match(one, both, maps=((r"^model\.x$", "model.x"),))
    assert [(pair.name, pair.tuned.spec.name, pair.rule) for pair in result.pairs] == [
        ("model.x", "model.x", "map")
    ]
    assert [left.name for left in result.leftovers] == ["module.model.x"]
    result = match(both, one, maps=((r"^model\.x$", "module.model.x"),))
    assert [(pair.name, pair.tuned.spec.name) for pair in result.pairs] == [("module.model.x", "model.x")]


def test_user_rules_rename_tuned_names_before_all_others(make_catalogue, llama):
    base = make_catalogue(llama())
    tuned = make_catalogue(_renamed(llama(), lambda n: "actor." + n) | {"critic.v_head.weight": (1, 8)})
    result = match(base, tuned, maps=((r"^actor\.(.*)", r"\1"),))
    assert _rules(result) == {"map"}
    assert [left.name for left in result.leftovers] == ["critic.v_head.weight"]
    assert result.findings[0] == rf"--map ^actor\.(.*)=\1 applied to {len(base.tensors)} tuned names"


def test_user_rules_and_wrapper_rules_work_together(make_catalogue):
    base = make_catalogue({"model.layers.0.self_attn.qkv_proj.weight": (16, 8)})
    tuned = make_catalogue(
        {
            f"module.blocks.0.self_attn.{part}.weight": (n, 8)
            for part, n in (("q_proj", 8), ("k_proj", 4), ("v_proj", 4))
        }
    )
    result = match(base, tuned, maps=(("blocks", "layers"),))
    assert result.account("tuned").compared == 128
    assert _rules(result) == {"fused"}


@pytest.mark.parametrize(
    ("maps", "words"),
    [
        ((("[", "x"),), ["--map [", "not a regular expression"]),
        ((("a", r"\7"),), [r"--map a=\7", "replacement cannot be used"]),
        ((("a", r"\g<nobody>"),), ["replacement cannot be used"]),
        ((("zebra", "x"),), ["--map zebra=x", "matches none of the 2 names of tuned", "'a.weight'"]),
        (((r"^[ab]\.", "c."),), ["'c.weight'", "'a.weight' and 'b.weight'"]),
        ((("^a", "b"),), ["'b.weight'", "'a.weight' and 'b.weight'"]),
        ((("^a", "c"), (r"a\.", "d.")), ["'a.weight'", "'c.weight'", "'d.weight'"]),
    ],
)
def test_user_rules_that_cannot_apply_are_refused_with_a_remedy(make_catalogue, maps, words):
    one = make_catalogue({"a.weight": (2,), "b.weight": (2,)})
    with pytest.raises(AlignmentError) as caught:
        match(one, one, maps=maps)
    for word in (*words, "remedy:"):
        assert word in str(caught.value)


def test_two_user_rules_that_agree_are_one(make_catalogue):
    base, tuned = make_catalogue({"c.weight": (2,)}), make_catalogue({"a.weight": (2,)})
    assert len(match(base, tuned, maps=(("^a", "c"), (r"^a\.", "c."))).pairs) == 1


def test_two_rules_for_one_name_do_not_depend_on_their_order(make_catalogue):
    one = make_catalogue({"a.weight": (2,)})
    maps = (("^a", "c"), (r"a\.", "d."))
    for order in (maps, maps[::-1]):
        with pytest.raises(AlignmentError, match="disagree"):
            match(one, one, maps=order)


def test_nothing_in_common_is_said(make_catalogue):
    result = match(make_catalogue({"a": (2,)}), make_catalogue({"b": (3,)}))
    assert "no tensor of one side matches" in result.findings[0]
    assert result.account("base").leftover == 2
    assert result.account("tuned").leftover == 3


def test_mixture_of_experts_names_match_through_a_wrapper(make_catalogue):
    shapes = {
        f"model.layers.{n}.block_sparse_moe.experts.{e}.{w}.weight": (4, 4)
        for n in range(2)
        for e in range(3)
        for w in ("w1", "w2", "w3")
    } | {"model.layers.0.block_sparse_moe.gate.weight": (3, 4)}
    result = match(make_catalogue(shapes), make_catalogue(_renamed(shapes, lambda n: "module." + n)))
    assert len(result.pairs) == len(shapes)


def test_ninety_thousand_tensors_match_in_seconds(make_catalogue):
    def shapes(prefix, split):
        parts = ("q_proj", "k_proj", "v_proj") if split else ("qkv_proj",)
        experts = {
            f"{prefix}model.layers.{n}.mlp.experts.{e}.up_proj.weight": (2, 2)
            for n in range(100)
            for e in range(850)
        }
        rows = 2 if split else 6
        return experts | {
            f"{prefix}model.layers.{n}.self_attn.{p}.weight": (rows, 2) for n in range(1700) for p in parts
        }

    base, tuned = make_catalogue(shapes("", True)), make_catalogue(shapes("module.", False))
    assert len(base.tensors) > 90_000
    start = time.process_time()
    result = match(base, tuned)
    assert time.process_time() - start < 10
    assert result.leftovers == ()
    assert len(result.pairs) == len(base.tensors)
