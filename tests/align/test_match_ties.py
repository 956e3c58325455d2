import pytest

from sparsity_audit.align.match import match
from sparsity_audit.align.records import LeftoverReason

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SHAPE = (32, 8)
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}


def _names(alignment):
    return [(pair.base.spec.name, pair.tuned.spec.name, pair.rule) for pair in alignment.pairs]


def _left(alignment):
    return [(left.side, left.name, left.reason) for left in alignment.leftovers]


def test_tied_on_both_sides_is_one_pair(make_catalogue):
    one = make_catalogue({EMBED: SHAPE}, aliases={HEAD: EMBED}, config=TIED)
    result = match(one, one)
    assert _names(result) == [(EMBED, EMBED, "exact")]
    assert result.account("base").total == 256
    assert result.findings == ()


def test_gemma_keeps_one_name_and_needs_no_alias(make_catalogue):
    one = make_catalogue({EMBED: SHAPE}, config={"model_type": "gemma"})
    assert match(one, one).findings == ()


def test_a_storage_named_differently_matches_through_its_alias(make_catalogue):
    base = make_catalogue({HEAD: SHAPE}, aliases={EMBED: HEAD})
    tuned = make_catalogue({EMBED: SHAPE})
    assert _names(match(base, tuned)) == [(HEAD, EMBED, "tied")]
    assert _names(match(tuned, base)) == [(EMBED, HEAD, "tied")]


def test_an_alias_is_found_behind_a_wrapper_too(make_catalogue):
    base = make_catalogue({HEAD: SHAPE}, aliases={EMBED: HEAD})
    tuned = make_catalogue({"module." + EMBED: SHAPE})
    assert _names(match(base, tuned)) == [(HEAD, "module." + EMBED, "prefix")]


@pytest.mark.parametrize("canonical", [EMBED, HEAD])
def test_untied_on_the_other_side_leaves_the_head_over(make_catalogue, canonical):
    alias = HEAD if canonical == EMBED else EMBED
    tied = make_catalogue({canonical: SHAPE}, aliases={alias: canonical}, config=TIED)
    untied = make_catalogue({EMBED: SHAPE, HEAD: SHAPE}, config=UNTIED)
    result = match(tied, untied)
    assert [pair.tuned.spec.name for pair in result.pairs] == [EMBED]
    assert _left(result) == [("tuned", HEAD, LeftoverReason.UNTIED)]
    assert "tied in base only" in result.findings[0]
    assert "save both sides tied" in result.findings[0]
    back = match(untied, tied)
    assert _left(back) == [("base", HEAD, LeftoverReason.UNTIED)]
    assert "tied in tuned only" in back.findings[0]


@pytest.mark.parametrize("config", [{}, TIED, {"model_type": "gemma2"}, {"text_config": TIED}])
def test_a_second_name_dropped_by_the_writer_is_understood(make_catalogue, config):
    tied = make_catalogue({EMBED: SHAPE}, config=config)
    result = match(tied, make_catalogue({EMBED: SHAPE, HEAD: SHAPE}))
    assert _left(result) == [("tuned", HEAD, LeftoverReason.UNTIED)]
    assert EMBED in result.leftovers[0].detail


def test_a_head_that_an_untied_side_lacks_is_only_here(make_catalogue):
    base = make_catalogue({EMBED: SHAPE}, config=UNTIED)
    result = match(base, make_catalogue({EMBED: SHAPE, HEAD: SHAPE}))
    assert _left(result) == [("tuned", HEAD, LeftoverReason.ONLY_HERE)]


def test_one_side_under_the_head_and_one_under_the_embedding(make_catalogue):
    base = make_catalogue({HEAD: SHAPE}, config=TIED)
    tuned = make_catalogue({"module." + EMBED: SHAPE})
    result = match(base, tuned)
    assert _names(result) == [(HEAD, "module." + EMBED, "tied")]
    assert "tied embeddings" in result.findings[0]


def test_head_and_embedding_are_not_paired_without_a_word_that_they_are_tied(make_catalogue):
    for base_config, tuned_config in (({}, {}), (TIED, UNTIED), (UNTIED, {})):
        base = make_catalogue({HEAD: SHAPE}, config=base_config)
        tuned = make_catalogue({EMBED: SHAPE}, config=tuned_config)
        result = match(base, tuned)
        assert result.pairs == ()
        assert "--map" in result.findings[0]


def test_a_tied_resized_vocabulary_is_compared_on_common_rows(make_catalogue):
    base = make_catalogue({HEAD: (32, 8)}, config=TIED)
    tuned = make_catalogue({EMBED: (40, 8)}, config=TIED)
    result = match(base, tuned)
    assert [pair.rule for pair in result.pairs] == ["resized"]
    assert _left(result) == [("tuned", EMBED, LeftoverReason.ADDED_ROWS)]


def test_storage_shared_between_layers_is_counted_once(make_catalogue):
    shared = make_catalogue({"l.0.w": (4, 4)}, aliases={"l.1.w": "l.0.w"})
    own = make_catalogue({"l.0.w": (4, 4), "l.1.w": (4, 4)})
    result = match(shared, own)
    assert _names(result) == [("l.0.w", "l.0.w", "exact")]
    assert _left(result) == [("tuned", "l.1.w", LeftoverReason.UNTIED)]


def test_shared_parts_of_a_fused_tensor_are_left_over(make_catalogue):
    base = make_catalogue({"a.gate_up_proj.weight": (8, 4)})
    tuned = make_catalogue({"a.gate_proj.weight": (4, 4)}, aliases={"a.up_proj.weight": "a.gate_proj.weight"})
    result = match(base, tuned)
    assert {reason for _, _, reason in _left(result)} == {LeftoverReason.UNTIED}


def test_fused_layers_of_which_one_side_shares_all_are_compared_once(make_catalogue):
    base = make_catalogue({"l.0.gate_up_proj.weight": (8, 4), "l.1.gate_up_proj.weight": (8, 4)})
    tuned = make_catalogue(
        {"l.0.gate_proj.weight": (4, 4), "l.0.up_proj.weight": (4, 4)},
        aliases={"l.1.gate_proj.weight": "l.0.gate_proj.weight", "l.1.up_proj.weight": "l.0.up_proj.weight"},
    )
    result = match(base, tuned)
    assert len(result.pairs) == 2
    assert _left(result) == [("base", "l.1.gate_up_proj.weight", LeftoverReason.UNTIED)]
