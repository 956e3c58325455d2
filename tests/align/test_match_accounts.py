"""Whatever two checkpoints hold, every entry stands in one place and the sides are interchangeable."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsity_audit.align.match import match
from sparsity_audit.align.records import Alignment, LeftoverReason, TensorSlice
from sparsity_audit.errors import AlignmentError
from sparsity_audit.passes.mask_sink import mask_tensors
from sparsity_audit.types import DType

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WRAPPERS = ("", "module.", "_orig_mod.", "base_model.model.")
DTYPES = st.sampled_from([DType.BF16, DType.F32, DType.U8, DType.F8_E8M0, DType.F8_E4M3, DType.F8_E4M3])


@st.composite
def sides(draw):
    """One side: random layers, fused or split, resized, tied, wrapped, shapes that may differ."""
    fused = draw(st.booleans())
    root = draw(st.sampled_from(["model.", "", "model.language_model.", "transformer."]))
    wrapper = draw(st.sampled_from(WRAPPERS))
    hidden = draw(st.sampled_from([4, 4, 4, 6]))
    vocab = draw(st.sampled_from([8, 8, 10, 0]))
    shapes, aliases = {}, {}
    for layer in draw(st.sets(st.integers(0, 3))):
        block = f"{root}layers.{layer}."
        infix = draw(st.sampled_from(["", "_checkpoint_wrapped_module."]))
        attention = f"{block}{infix}self_attn."
        module = draw(st.sampled_from(["qkv_proj", "qkv_proj", "query_key_value"]))
        if fused:
            shapes[f"{attention}{module}.weight"] = (hidden + 4, hidden)
        else:
            for part, rows in (("q_proj", hidden), ("k_proj", 2), ("v_proj", 2)):
                if draw(st.integers(0, 9)):
                    shapes[f"{attention}{part}.weight"] = (rows, hidden)
        if fused:
            shapes[f"{block}mlp.gate_up_proj.weight"] = (10, hidden)
        else:
            shapes[f"{block}mlp.gate_proj.weight"] = (5, hidden)
            shapes[f"{block}mlp.up_proj.weight"] = (5, hidden)
        experts = f"{block}mlp.experts."
        if draw(st.booleans()):
            stack = draw(st.sampled_from([(2, 6, hidden), (2, hidden, 6), (3, 6, hidden)]))
            shapes[f"{experts}gate_up_proj"] = stack
            shapes[f"{experts}down_proj"] = (2, hidden, 3)
            shapes[f"{experts}down_proj_scale_inv"] = (2, 1, 1)
        else:
            for expert in range(2):
                for part, shape in (("gate", (3, hidden)), ("up", (3, hidden)), ("down", (hidden, 3))):
                    if draw(st.integers(0, 9)):
                        shapes[f"{experts}{expert}.{part}_proj.weight"] = shape
                shapes[f"{experts}{expert}.down_proj.weight_scale_inv"] = (1, 1)
        shapes[f"{block}norm.weight"] = (hidden,)
        shapes[f"{block}step"] = ()
        if draw(st.booleans()):
            shapes[f"{block}conv.weight"] = draw(st.sampled_from([(2, 3), (3, 2), (3, 3), (0, 3)]))
    ties = draw(st.sampled_from(["none", "untied", "embed", "head", "embed+alias", "head+alias"]))
    embed = root + "embed_tokens.weight"
    if ties in ("untied", "embed", "embed+alias"):
        shapes[embed] = (vocab, hidden)
    if ties in ("untied", "head", "head+alias"):
        shapes[HEAD] = (vocab, hidden)
    if ties.endswith("+alias"):
        stored, other = (embed, HEAD) if ties.startswith("embed") else (HEAD, embed)
        aliases[wrapper + other] = wrapper + stored
    shapes = {wrapper + name: shape for name, shape in shapes.items()}
    if shapes and draw(st.integers(0, 7)) == 0:
        doubled = draw(st.sampled_from(sorted(shapes)))
        shapes["module." + doubled] = shapes[doubled]
    dtypes = {name: draw(DTYPES) for name in shapes} if draw(st.booleans()) else {}
    config = draw(st.sampled_from([{}, {"tie_word_embeddings": True}, {"tie_word_embeddings": False}]))
    config = config | draw(st.sampled_from([{}, {"num_attention_heads": 4}, {"num_attention_heads": 2}]))
    return {"shapes": shapes, "dtypes": dtypes, "aliases": aliases, "config": config}


def _entries(alignment: Alignment, side: str) -> Counter:
    """(tensor, entry) → places it stands in; leftovers take the entries that no slice has."""
    places: Counter = Counter()
    for pair in (*alignment.pairs, *alignment.skipped):
        run: TensorSlice = getattr(pair, side)
        places.update((run.spec.name, entry) for start, stop in run.runs for entry in range(start, stop))
    return places


def _mirrored(alignment: Alignment):
    flip = {"base": "tuned", "tuned": "base"}
    return (
        {(p.tuned, p.base, p.rule) for p in alignment.pairs},
        {(p.tuned, p.base) for p in alignment.skipped},
        {(flip[left.side], left.name, left.num_entries, left.reason) for left in alignment.leftovers},
    )


def _plain(alignment: Alignment):
    return (
        {(p.base, p.tuned, p.rule) for p in alignment.pairs},
        {(p.base, p.tuned) for p in alignment.skipped},
        {(left.side, left.name, left.num_entries, left.reason) for left in alignment.leftovers},
    )


@settings(deadline=None, max_examples=300)
@given(one=sides(), other=sides())
def test_every_entry_stands_in_one_place_and_swapping_mirrors(make_catalogue, one, other):
    base, tuned = make_catalogue(**one), make_catalogue(**other)
    try:
        result = match(base, tuned)
    except AlignmentError:
        with pytest.raises(AlignmentError):
            match(tuned, base)
        return
    result.verify_accounts()
    for side, catalogue in (("base", base), ("tuned", tuned)):
        account = result.account(side)
        assert account.total == catalogue.num_entries
        assert account.compared + account.skipped + account.leftover == account.total
        places = _entries(result, side)
        assert set(places.values()) <= {1}
        left = {x.name: x.num_entries for x in result.leftovers if x.side == side}
        assert len(left) == sum(x.side == side for x in result.leftovers)
        matched = Counter(name for name, _ in places)
        for name, spec in catalogue.tensors.items():
            assert matched[name] + left.get(name, 0) == spec.num_entries
    assert sum(t.num_compared for t in mask_tensors(base, result)) == result.account("base").compared
    names = [pair.name for pair in (*result.pairs, *result.skipped)]
    assert len(names) == len(set(names))
    assert [p.name for p in result.pairs] == sorted(p.name for p in result.pairs)
    assert _mirrored(match(tuned, base)) == _plain(result)


@settings(deadline=None, max_examples=60)
@given(one=sides())
def test_a_checkpoint_matches_itself_entirely(make_catalogue, one):
    catalogue = make_catalogue(**one)
    result = match(catalogue, catalogue)
    assert {pair.rule for pair in result.pairs} <= {"exact"}
    assert (result.skipped, result.leftovers) == ((), ())


def _result(make_catalogue):
    return match(make_catalogue({"a": (4,), "b": (2,)}), make_catalogue({"a": (4,), "c": (3,)}))


def test_a_lost_leftover_is_noticed(make_catalogue):
    with pytest.raises(AlignmentError, match="4 entries accounted for, 6 in storage"):
        replace(_result(make_catalogue), leftovers=()).verify_accounts()


def test_a_tensor_compared_twice_is_noticed(make_catalogue):
    result = _result(make_catalogue)
    with pytest.raises(AlignmentError, match="compared twice"):
        replace(result, pairs=result.pairs * 2).verify_accounts()


def test_a_leftover_listed_twice_is_noticed(make_catalogue):
    result = _result(make_catalogue)
    with pytest.raises(AlignmentError, match="leftover twice"):
        replace(result, leftovers=result.leftovers * 2).verify_accounts()


def test_a_matched_tensor_that_is_also_left_over_is_noticed(make_catalogue):
    result = _result(make_catalogue)
    extra = replace(result.leftovers[0], name="a", num_entries=4, reason=LeftoverReason.SHAPE)
    with pytest.raises(AlignmentError, match="8 entries of 'a', which has 4"):
        replace(result, leftovers=(extra,)).verify_accounts()


def test_slices_past_the_end_of_a_tensor_are_noticed(make_catalogue):
    result = _result(make_catalogue)
    pair = result.pairs[0]
    shifted = replace(pair, base=replace(pair.base, start_entry=2))
    with pytest.raises(AlignmentError, match="entries of 'a'"):
        replace(result, pairs=(shifted,)).verify_accounts()
