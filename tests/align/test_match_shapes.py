import pytest

from sparsity_audit.align.match import match
from sparsity_audit.align.records import LeftoverReason
from sparsity_audit.errors import AlignmentError
from sparsity_audit.types import DType


def _left(alignment):
    return {(left.side, left.name): left for left in alignment.leftovers}


def test_llama_and_tulu_vocabularies_are_compared_on_the_common_rows(make_catalogue):
    base = make_catalogue({"model.embed_tokens.weight": (128256, 64), "lm_head.weight": (128256, 64)})
    tuned = make_catalogue({"model.embed_tokens.weight": (128264, 64), "lm_head.weight": (128264, 64)})
    result = match(base, tuned)
    assert [(p.name, p.rule, p.base.shape, p.tuned.start_entry) for p in result.pairs] == [
        ("lm_head.weight", "resized", (128256, 64), 0),
        ("model.embed_tokens.weight", "resized", (128256, 64), 0),
    ]
    assert {
        (left.side, left.name, left.num_entries, left.reason, left.detail) for left in result.leftovers
    } == {
        ("tuned", name, 512, LeftoverReason.ADDED_ROWS, "rows 128256 to 128263")
        for name in ("lm_head.weight", "model.embed_tokens.weight")
    }
    assert "128256 rows in base and 128264 in tuned" in result.findings[0]
    back = match(tuned, base)
    assert {left.side for left in back.leftovers} == {"base"}


@pytest.mark.parametrize(
    "name",
    [
        "transformer.wte.weight",
        "gpt_neox.embed_in.weight",
        "embed_out.weight",
        "output.weight",
        "shared.weight",
        "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.weight",
        "language_model.lm_head.weight",
    ],
)
def test_vocabulary_tensors_are_known_by_many_names(make_catalogue, name):
    result = match(make_catalogue({name: (10, 4)}), make_catalogue({name: (12, 4)}))
    assert result.pairs[0].rule == "resized"


def test_a_head_bias_is_resized_with_its_head(make_catalogue):
    result = match(make_catalogue({"lm_head.bias": (10,)}), make_catalogue({"lm_head.bias": (7,)}))
    assert result.pairs[0].base.shape == (7,)
    assert _left(result)["base", "lm_head.bias"].num_entries == 3


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.weight",
        "bert.encoder.layer.0.output.dense.weight",
        "model.layers.0.output.weight",
        "transformer.wpe.weight",
        "score.weight",
    ],
)
def test_other_first_axes_are_leftovers_on_both_sides(make_catalogue, name):
    result = match(make_catalogue({name: (10, 4)}), make_catalogue({name: (12, 4)}))
    assert result.pairs == ()
    assert {left.side for left in result.leftovers} == {"base", "tuned"}
    assert {left.reason for left in result.leftovers} == {LeftoverReason.SHAPE}
    assert {left.detail for left in result.leftovers} == {"[10, 4] in base, [12, 4] in tuned"}


def test_a_transposed_matrix_is_called_so(make_catalogue):
    result = match(
        make_catalogue({"h.0.mlp.c_fc.weight": (4, 16)}), make_catalogue({"h.0.mlp.c_fc.weight": (16, 4)})
    )
    assert {left.reason for left in result.leftovers} == {LeftoverReason.TRANSPOSED}


def test_embeddings_with_another_width_are_not_resized(make_catalogue):
    result = match(make_catalogue({"wte.weight": (10, 4)}), make_catalogue({"wte.weight": (12, 8)}))
    assert {left.reason for left in result.leftovers} == {LeftoverReason.SHAPE}


def test_phi3_fused_base_is_compared_in_slices(make_catalogue, llama):
    base, tuned = make_catalogue(llama(fused=True)), make_catalogue(llama())
    result = match(base, tuned)
    assert result.leftovers == ()
    slices = {
        p.name: (p.base.start_entry, p.base.shape, p.tuned.spec.name, p.tuned.is_whole)
        for p in result.pairs
        if p.name.startswith("model.layers.1.self_attn.qkv")
    }
    fused, split = "model.layers.1.self_attn.qkv_proj.weight", "model.layers.1.self_attn."
    assert slices == {
        f"{fused}:q_proj": (0, (8, 8), f"{split}q_proj.weight", True),
        f"{fused}:k_proj": (64, (4, 8), f"{split}k_proj.weight", True),
        f"{fused}:v_proj": (96, (4, 8), f"{split}v_proj.weight", True),
    }
    assert "2 gate_up_proj of base compared in parts with gate_proj, up_proj" in result.findings


def test_fused_tuned_tensors_are_sliced_under_the_names_of_the_base(make_catalogue, llama):
    base = make_catalogue(llama(attention_bias=True))
    tuned = make_catalogue({f"module.{n}": s for n, s in llama(fused=True, attention_bias=True).items()})
    result = match(base, tuned)
    assert result.leftovers == ()
    assert [pair.name for pair in result.pairs] == sorted(base.tensors)
    by_name = {pair.name: pair for pair in result.pairs}
    value = by_name["model.layers.0.self_attn.v_proj.bias"]
    assert (value.rule, value.tuned.start_entry, value.tuned.shape) == ("fused", 12, (4,))
    up = by_name["model.layers.0.mlp.up_proj.weight"]
    assert (up.tuned.spec.name, up.tuned.start_entry) == ("module.model.layers.0.mlp.gate_up_proj.weight", 96)


def test_fused_on_both_sides_is_an_exact_match(make_catalogue, llama):
    one = make_catalogue(llama(fused=True))
    assert {pair.rule for pair in match(one, one).pairs} == {"exact"}


@pytest.mark.parametrize("module", ["qkv_proj", "Wqkv", "c_attn", "qkv"])
def test_concatenating_modules_are_split_by_rows(make_catalogue, module):
    base = make_catalogue({f"h.0.attn.{module}.weight": (12, 5)})
    tuned = make_catalogue({f"h.0.attn.{part}.weight": (4, 5) for part in ("query", "key", "value")})
    result = match(base, tuned)
    assert [(p.name.partition(":")[2], p.base.start_entry) for p in result.pairs] == [
        ("key", 20),
        ("query", 0),
        ("value", 40),
    ]


def test_rows_that_do_not_add_up_are_leftovers_with_the_sum(make_catalogue):
    base = make_catalogue({"a.qkv_proj.weight": (13, 4)})
    tuned = make_catalogue({f"a.{part}.weight": (4, 4) for part in ("q_proj", "k_proj", "v_proj")})
    result = match(base, tuned)
    assert result.pairs == ()
    assert len(result.leftovers) == 4
    assert {left.reason for left in result.leftovers} == {LeftoverReason.SHAPE}
    assert "12 rows in the parts" in result.leftovers[0].detail


def test_a_missing_part_is_named(make_catalogue):
    base = make_catalogue({"a.qkv_proj.weight": (12, 4)})
    tuned = make_catalogue({f"a.{part}.weight": (4, 4) for part in ("q_proj", "k_proj")})
    result = match(base, tuned)
    assert {left.reason for left in result.leftovers} == {LeftoverReason.ONLY_HERE}
    assert "no v_proj" in _left(result)["base", "a.qkv_proj.weight"].detail


@pytest.mark.parametrize("part_shape", [(4, 4), (3, 4)])
def test_conv1d_fusion_is_called_transposed(make_catalogue, part_shape):
    rows = part_shape[0]
    base = make_catalogue({"h.0.attn.c_attn.weight": (4, 3 * rows)})
    tuned = make_catalogue({f"h.0.attn.{part}.weight": part_shape for part in ("q_proj", "k_proj", "v_proj")})
    result = match(base, tuned)
    assert {left.reason for left in result.leftovers} == {LeftoverReason.TRANSPOSED}
    assert len(result.leftovers) == 4


@pytest.mark.parametrize("module", ["query_key_value", "linear_qkv"])
@pytest.mark.parametrize("kind", [("weight", (12, 4), (4, 4)), ("bias", (12,), (4,))])
def test_interleaved_fusion_is_never_compared_as_concatenation(make_catalogue, module, kind):
    suffix, whole, part_shape = kind
    fused = make_catalogue({f"gpt_neox.layers.0.attention.{module}.{suffix}": whole})
    split = make_catalogue(
        {
            f"gpt_neox.layers.0.attention.{part}.{suffix}": part_shape
            for part in ("q_proj", "k_proj", "v_proj")
        }
    )
    for base, tuned in ((fused, split), (split, fused)):
        result = match(base, tuned)
        assert result.pairs == ()
        assert {left.reason for left in result.leftovers} == {LeftoverReason.INTERLEAVED}
        assert all("interleave" in left.detail for left in result.leftovers)
    assert {pair.rule for pair in match(fused, fused).pairs} == {"exact"}


@pytest.mark.parametrize("fused_side", ["base", "tuned"])
@pytest.mark.parametrize("other_has", ["fused", "split"])
def test_whole_or_in_parts_is_refused_with_all_candidates(make_catalogue, fused_side, other_has):
    fused = {"a.qkv_proj.weight": (12, 4)}
    split = {f"a.{part}.weight": (4, 4) for part in ("q_proj", "k_proj", "v_proj")}
    both = make_catalogue(fused | split)
    one = make_catalogue(fused if other_has == "fused" else split)
    with pytest.raises(AlignmentError) as caught:
        match(both, one) if fused_side == "base" else match(one, both)
    assert "qkv_proj.weight" in str(caught.value)
    assert "q_proj.weight" in str(caught.value).replace("qkv_proj.weight", "")


def test_a_user_rule_settles_whether_the_whole_or_the_parts_are_meant(make_catalogue):
    fused = {"a.qkv_proj.weight": (12, 4)}
    split = {f"a.{part}.weight": (4, 4) for part in ("q_proj", "k_proj", "v_proj")}
    base, tuned = make_catalogue(fused), make_catalogue(fused | split)
    whole = match(base, tuned, maps=((r"qkv_proj", "qkv_proj"),))
    assert [pair.rule for pair in whole.pairs] == ["map"]
    assert [left.name for left in whole.leftovers] == sorted(split)
    parts = match(base, tuned, maps=((r"qkv_proj", "unused"),))
    assert [pair.rule for pair in parts.pairs] == ["fused"] * 3
    assert [left.name for left in parts.leftovers] == ["a.qkv_proj.weight"]


def test_two_kinds_of_parts_for_one_fused_tensor_are_refused(make_catalogue):
    base = make_catalogue({"a.qkv.weight": (12, 4)})
    parts = ("q_proj", "k_proj", "v_proj", "query", "key", "value")
    with pytest.raises(AlignmentError, match="query"):
        match(base, make_catalogue({f"a.{part}.weight": (4, 4) for part in parts}))


def test_two_fused_tensors_for_the_same_parts_are_refused(make_catalogue):
    base = make_catalogue({"a.qkv_proj.weight": (12, 4), "a.Wqkv.weight": (12, 4)})
    tuned = make_catalogue({f"a.{part}.weight": (4, 4) for part in ("q_proj", "k_proj", "v_proj")})
    with pytest.raises(AlignmentError) as caught:
        match(base, tuned)
    assert "a.Wqkv.weight" in str(caught.value)
    assert "a.qkv_proj.weight" in str(caught.value)


@pytest.mark.parametrize(
    ("one", "other", "comparable"),
    [
        (DType.BF16, DType.F32, True),
        (DType.F8_E4M3, DType.BF16, True),
        (DType.I32, DType.I64, True),
        (DType.U8, DType.U16, True),
        (DType.BOOL, DType.BOOL, True),
        (DType.F8_E8M0, DType.F8_E8M0, True),
        (DType.F32, DType.I64, False),
        (DType.BOOL, DType.F32, False),
        (DType.BOOL, DType.U8, False),
        (DType.I64, DType.U64, False),
        (DType.I64, DType.U8, True),
        (DType.F8_E8M0, DType.U8, False),
        (DType.F8_E8M0, DType.C64, False),
    ],
)
def test_dtypes_without_common_values_are_skipped_and_counted(make_catalogue, one, other, comparable):
    base = make_catalogue({"x": (3, 5)}, dtypes={"x": one})
    tuned = make_catalogue({"x": (3, 5)}, dtypes={"x": other})
    result = match(base, tuned)
    assert (len(result.pairs), len(result.skipped)) == ((1, 0) if comparable else (0, 1))
    assert result.leftovers == ()
    if not comparable:
        assert one.label in result.skipped[0].reason
        assert other.label in result.skipped[0].reason
        assert result.account("tuned").skipped == 15
        assert "1 matched tensor not compared" in result.findings[0]


def test_one_part_of_a_fused_tensor_may_be_skipped_alone(make_catalogue):
    base = make_catalogue({"a.gate_up_proj.weight": (8, 4)})
    tuned = make_catalogue(
        {"a.gate_proj.weight": (4, 4), "a.up_proj.weight": (4, 4)}, dtypes={"a.up_proj.weight": DType.U8}
    )
    result = match(base, tuned)
    assert [pair.name for pair in result.pairs] == ["a.gate_up_proj.weight:gate_proj"]
    assert [pair.name for pair in result.skipped] == ["a.gate_up_proj.weight:up_proj"]
