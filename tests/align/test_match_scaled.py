"""fp8 tensors with block scales: which scales belong to which values, and what happens without them."""

import pytest

from sparsity_audit.align.match import match
from sparsity_audit.types import DType

FP8 = DType.F8_E4M3


def _weights(shape=(200, 300), scale=(2, 3), *, scale_dtype=DType.F32, name="weight_scale_inv", dtype=FP8):
    return {
        "shapes": {"a.weight": shape, f"a.{name}": scale},
        "dtypes": {"a.weight": dtype, f"a.{name}": scale_dtype},
    }


def _block(make_catalogue, sides, config=None):
    catalogue = make_catalogue(**sides, config=config)
    result = match(catalogue, catalogue)
    pair = next(pair for pair in result.pairs if pair.name == "a.weight")
    assert (pair.base.scale is None) == (pair.tuned.scale is None)
    return pair.base.scale and pair.base.scale.block, result.findings


@pytest.mark.parametrize(
    ("shape", "scale", "stated", "block"),
    [
        ((200, 300), (2, 3), None, (128, 128)),
        ((200, 300), (2, 3), [128, 128], (128, 128)),
        ((8, 12), (2, 3), [4, 4], (4, 4)),
        ((8, 6), (8, 1), None, (1, 128)),
        ((500, 300), (1, 3), None, (500, 128)),
        ((3, 200, 300), (3, 2, 3), None, (128, 128)),
        ((8, 12), (2, 3), None, (4, None)),
        ((200, 300), (2, 3), [64, 64], None),
        ((3, 200, 300), (2, 2, 3), None, None),
        ((200,), (2,), None, None),
    ],
)
def test_block_sizes_come_from_the_configuration_or_the_shapes(make_catalogue, shape, scale, stated, block):
    config = {"quantization_config": {"weight_block_size": stated}} if stated else {}
    found, findings = _block(make_catalogue, _weights(shape, scale), config)
    if block is None or None in block:
        assert found is None
        assert any("compared as stored codes, without scales: scales" in text for text in findings)
    else:
        assert found == block
        assert any("de-scaled by weight_scale_inv" in text for text in findings)


@pytest.mark.parametrize(
    ("sides", "words"),
    [
        (_weights(scale_dtype=DType.F8_E8M0), "stored as f8_e8m0"),
        (_weights(name="weight_scale"), "under the name weight_scale"),
        ({"shapes": {"a.weight": (4, 4)}, "dtypes": {"a.weight": FP8}}, "no scale tensors"),
    ],
)
def test_fp8_without_usable_scales_is_compared_as_codes_and_says_so(make_catalogue, sides, words):
    found, findings = _block(make_catalogue, sides)
    assert found is None
    assert any("stored codes" in text and words in text for text in findings)


def test_scaled_fp8_is_compared_with_plain_values(make_catalogue):
    result = match(make_catalogue(**_weights()), make_catalogue({"a.weight": (200, 300)}))
    (pair,) = result.pairs
    assert (pair.base.scale.spec.name, pair.tuned.scale, pair.is_scaled) == ("a.weight_scale_inv", None, True)
    assert [left.name for left in result.leftovers] == ["a.weight_scale_inv"]
    assert "make the values of 'a.weight'" in result.leftovers[0].detail


def test_values_whose_scales_cannot_be_used_are_not_compared_with_plain_ones(make_catalogue):
    sides = _weights(name="weight_scale")
    result = match(make_catalogue(**sides), make_catalogue({"a.weight": (200, 300)}))
    assert result.pairs == ()
    assert "need their scales" in result.skipped[0].reason


def test_scales_on_one_side_only_do_not_make_values(make_catalogue):
    plain = {"shapes": {"a.weight": (200, 300)}, "dtypes": {"a.weight": FP8}}
    result = match(make_catalogue(**_weights()), make_catalogue(**plain))
    assert not result.pairs[0].is_scaled
    assert any("only one side" in text for text in result.findings)
    other = {"shapes": {"a.weight": (200, 300)}, "dtypes": {"a.weight": DType.F8_E5M2}}
    assert (
        "need their scales" in match(make_catalogue(**_weights()), make_catalogue(**other)).skipped[0].reason
    )


def test_stacked_experts_keep_their_own_scales_and_the_scales_are_compared_too(make_catalogue):
    path = "model.layers.0.mlp.experts."
    stacked = {f"{path}gate_up_proj": (2, 256, 128), f"{path}gate_up_proj_scale_inv": (2, 2, 1)}
    single = {
        f"{path}{e}.{part}.weight{suffix}": shape
        for e in range(2)
        for part in ("gate_proj", "up_proj")
        for suffix, shape in (("", (128, 128)), ("_scale_inv", (1, 1)))
    }
    sides = [
        make_catalogue(shapes, dtypes={n: DType.F32 if n.endswith("inv") else FP8 for n in shapes})
        for shapes in (stacked, single)
    ]
    result = match(*sides)
    assert result.leftovers == ()
    assert len(result.pairs) == 8
    scaled = [pair for pair in result.pairs if pair.is_scaled]
    assert len(scaled) == 4
    assert {pair.base.scale.spec.name for pair in scaled} == {f"{path}gate_up_proj_scale_inv"}
    assert all(pair.tuned.scale.spec.name == f"{pair.tuned.spec.name}_scale_inv" for pair in scaled)


def test_an_expert_of_which_a_piece_cannot_be_compared_is_skipped_whole(make_catalogue):
    path = "model.layers.0.mlp.experts."
    single = {f"{path}{e}.{part}.weight": (6, 4) for e in range(2) for part in ("gate_proj", "up_proj")}
    base = make_catalogue({f"{path}gate_up_proj": (2, 12, 4)})
    tuned = make_catalogue(single, dtypes={f"{path}1.up_proj.weight": DType.U8})
    result = match(base, tuned)
    assert [pair.name.partition(":")[2] for pair in result.pairs] == ["0.gate_proj", "0.up_proj"]
    assert [pair.name.partition(":")[2] for pair in result.skipped] == ["1.gate_proj", "1.up_proj"]
