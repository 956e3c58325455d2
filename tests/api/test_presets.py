"""Presets against a slow re-implementation of the papers' rules, on small stand-ins of published pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from slow_presets import SLOW, Tensors, slow_mukherjee, slow_zhu

from sparsity_audit import diff
from sparsity_audit.api.presets import apply_preset, preset_criteria, preset_named
from sparsity_audit.errors import UsageError


def save(folder: Path, tensors: Tensors, config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(
        json.dumps({"model_type": "tiny", "tie_word_embeddings": False} | (config or {}))
    )
    return folder


def moved(tensors: Tensors, *, scale: float, share: float, seed: int) -> dict[str, torch.Tensor]:
    """Every float tensor with a share of its entries moved by about `scale`."""
    rng = torch.Generator().manual_seed(seed)
    out = {}
    for name, tensor in tensors.items():
        step = torch.randn(tensor.shape, generator=rng) * scale
        step *= torch.rand(tensor.shape, generator=rng) < share
        out[name] = (tensor.float() + step).to(tensor.dtype) if tensor.is_floating_point() else tensor.clone()
    return out


def llama(
    dtype: torch.dtype, *, vocabulary: int = 40, seed: int = 0, scale: float = 1e-3
) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=rng) * scale).to(dtype)

    return {
        "model.embed_tokens.weight": normal(vocabulary, 16),
        "model.layers.0.self_attn.q_proj.weight": normal(16, 16),
        "model.layers.0.mlp.down_proj.weight": normal(16, 48),
        "model.layers.0.input_layernorm.weight": torch.ones(16, dtype=dtype),
        "model.norm.weight": torch.ones(16, dtype=dtype),
        "lm_head.weight": normal(vocabulary, 16),
    }


def result(tmp_path: Path, base: Path, tuned: Path, preset: str, **options: Any):
    report = diff(base, tuned, criteria=preset_criteria(preset), **options)
    return apply_preset(report, preset)


def verify(found, expected: tuple[int, int]) -> None:
    unchanged, compared = expected
    assert (found.compared - found.changed, found.compared) == (unchanged, compared)
    assert found.sparsity == unchanged / compared


@pytest.mark.parametrize("preset", ["mukherjee2025", "zhu2025"])
@pytest.mark.parametrize(
    ("base_dtype", "tuned_dtype"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16),
        (torch.float64, torch.float32),
    ],
)
@pytest.mark.parametrize("scale", [1e-6, 1e-5, 3e-4])
def test_any_mix_of_stored_dtypes_gives_the_papers_counts(tmp_path, preset, base_dtype, tuned_dtype, scale):
    base = llama(base_dtype)
    tuned = {n: t.to(tuned_dtype) for n, t in moved(base, scale=scale, share=0.5, seed=1).items()}
    found = result(tmp_path, save(tmp_path / "b", base), save(tmp_path / "t", tuned), preset)
    verify(found, SLOW[preset](base, tuned, parameters=list(base)))
    assert found.caveats == ()
    assert found.dropped == ()


@pytest.mark.parametrize("preset", ["mukherjee2025", "zhu2025"])
def test_a_resized_vocabulary_is_dropped_whole_although_diff_compares_its_common_rows(tmp_path, preset):
    base = llama(torch.bfloat16, vocabulary=40)
    tuned = moved(llama(torch.bfloat16, vocabulary=43), scale=1e-4, share=0.4, seed=2)
    found = result(tmp_path, save(tmp_path / "b", base), save(tmp_path / "t", tuned), preset)
    verify(found, SLOW[preset](base, tuned, parameters=list(base)))
    assert [(d.name, d.entries, d.reason) for d in found.dropped] == [
        ("lm_head.weight", 640, "shapes differ"),
        ("model.embed_tokens.weight", 640, "shapes differ"),
    ]
    shrunk = result(tmp_path, tmp_path / "t", tmp_path / "b", preset)
    assert [d.entries for d in shrunk.dropped] == [43 * 16, 43 * 16]


def test_other_shapes_missing_and_new_tensors_are_left_out(tmp_path):
    base = llama(torch.bfloat16) | {"model.layers.0.extra.weight": torch.ones(4, 4, dtype=torch.bfloat16)}
    tuned = moved(llama(torch.bfloat16), scale=1e-4, share=0.4, seed=2)
    tuned["model.layers.0.mlp.down_proj.weight"] = torch.zeros(16, 32, dtype=torch.bfloat16)
    tuned["v_head.summary.weight"] = torch.zeros(1, 16, dtype=torch.bfloat16)
    found = result(tmp_path, save(tmp_path / "b", base), save(tmp_path / "t", tuned), "mukherjee2025")
    verify(found, slow_mukherjee(base, tuned, parameters=list(base)))
    assert [(d.name, d.entries) for d in found.dropped] == [
        ("model.layers.0.extra.weight", 16),
        ("model.layers.0.mlp.down_proj.weight", 768),
    ]


def test_buffers_and_integers_are_not_parameters(tmp_path):
    parameters = llama(torch.bfloat16)
    buffers = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.arange(8, dtype=torch.float32),
        "transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4),
        "embeddings.position_ids": torch.arange(9),
        "bn.running_mean": torch.zeros(3),
    }
    base, tuned = parameters | buffers, moved(parameters, scale=1e-4, share=0.4, seed=2) | buffers
    found = result(tmp_path, save(tmp_path / "b", base), save(tmp_path / "t", tuned), "mukherjee2025")
    verify(found, slow_mukherjee(base, tuned, parameters=list(parameters)))
    assert {d.name for d in found.dropped} == set(buffers)
    assert {d.reason for d in found.dropped} == {"a buffer, not a parameter"}


def test_a_bias_of_an_attention_projection_is_a_parameter(tmp_path):
    parameters = llama(torch.bfloat16) | {
        "model.layers.0.self_attn.q_proj.bias": torch.ones(16, dtype=torch.bfloat16)
    }
    tuned = moved(parameters, scale=1e-2, share=0.4, seed=2)
    found = result(tmp_path, save(tmp_path / "b", parameters), save(tmp_path / "t", tuned), "zhu2025")
    verify(found, slow_zhu(parameters, tuned, parameters=list(parameters)))


@pytest.mark.parametrize("stored", [("embed",), ("head",), ("embed", "head")])
def test_tied_embeddings_count_once_however_they_are_stored(tmp_path, stored):
    """transformers ties them on load and `named_parameters` names a shared tensor once."""
    base = llama(torch.bfloat16)
    base["lm_head.weight"] = base["model.embed_tokens.weight"].clone()
    tuned = moved(base, scale=1e-4, share=0.4, seed=2)
    tuned["lm_head.weight"] = tuned["model.embed_tokens.weight"].clone()
    gone = {"embed": "lm_head.weight", "head": "model.embed_tokens.weight"}
    lost = gone[stored[0]] if len(stored) == 1 else None
    sides = [
        save(tmp_path / folder, {n: t for n, t in side.items() if n != lost}, {"tie_word_embeddings": True})
        for folder, side in (("b", base), ("t", tuned))
    ]
    found = result(tmp_path, *sides, "mukherjee2025")
    expected = slow_mukherjee(base, tuned, parameters=[n for n in base if n != "lm_head.weight"])
    verify(found, expected)
    reasons = [d.reason for d in found.dropped]
    assert reasons == ["tied to the embedding by the base's configuration"] * (len(stored) == 2)


def test_a_head_tied_on_the_tuned_side_alone_is_left_out_with_a_caveat(tmp_path):
    base = llama(torch.bfloat16)
    tuned = {n: t for n, t in moved(base, scale=1e-4, share=0.4, seed=2).items() if n != "lm_head.weight"}
    sides = save(tmp_path / "b", base), save(tmp_path / "t", tuned, {"tie_word_embeddings": True})
    found = result(tmp_path, *sides, "mukherjee2025")
    verify(found, slow_mukherjee(base, tuned, parameters=list(tuned)))
    (caveat,) = found.caveats
    assert "lm_head.weight (640 entries) is tied on the tuned side alone" in caveat


def test_parts_of_a_fused_tensor_have_other_names_in_the_papers_program(tmp_path):
    base = llama(torch.bfloat16)
    name = "model.layers.0.self_attn.{}_proj.weight".format
    rng = torch.Generator().manual_seed(3)
    split = {name(p): torch.randn(16, 16, generator=rng).to(torch.bfloat16) for p in "qkv"}
    fused = {name("qkv"): torch.cat([split[name(p)] for p in "qkv"])}
    base = {n: t for n, t in base.items() if "q_proj" not in n}
    sides = save(tmp_path / "b", base | split), save(tmp_path / "t", base | fused)
    for one, other, dropped in ((*sides, 3), (*sides[::-1], 1)):
        found = result(tmp_path, one, other, "mukherjee2025")
        assert found.compared == sum(t.numel() for t in base.values())
        assert (len(found.dropped), sum(d.entries for d in found.dropped)) == (dropped, 3 * 256)


def test_nan_and_infinity_on_both_sides_are_a_caveat_with_their_number(tmp_path):
    base = llama(torch.bfloat16)
    base["model.norm.weight"][:3] = torch.tensor([float("nan"), float("inf"), float("inf")])
    tuned = {n: t.clone() for n, t in base.items()}
    tuned["model.norm.weight"][2] = 1.0
    found = result(tmp_path, save(tmp_path / "b", base), save(tmp_path / "t", tuned), "mukherjee2025")
    unchanged, compared = slow_mukherjee(base, tuned, parameters=list(base))
    assert found.compared == compared
    assert found.compared - found.changed == unchanged + 2
    (caveat,) = found.caveats
    assert caveat.startswith("up to 2 entries")


def test_level_counts_gives_the_same_number_and_says_what_it_cannot_know(tmp_path):
    base = llama(torch.bfloat16)
    sides = save(tmp_path / "b", base), save(tmp_path / "t", moved(base, scale=1e-5, share=0.5, seed=1))
    full = result(tmp_path, *sides, "mukherjee2025")
    quick = result(tmp_path, *sides, "mukherjee2025", stats="counts")
    assert (full.compared, full.changed) == (quick.compared, quick.changed)
    assert "NaN and infinite entries were not counted" in quick.caveats[0]


BF16 = st.integers(0, 2**16 - 1).filter(lambda code: code & 0x7F80 != 0x7F80)
NEAR = st.integers(-400, 400)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(BF16, NEAR), min_size=1, max_size=64))
def test_both_rules_hold_on_any_finite_bf16_codes(tmp_path_factory, pairs):
    """Near neighbours in code distance, over all exponents: rounded differences and ties at the tolerance."""
    codes = torch.tensor([code for code, _ in pairs], dtype=torch.int32)
    sign, magnitude = codes & 0x8000, codes & 0x7FFF
    other = sign | (magnitude + torch.tensor([step for _, step in pairs])).clamp(0, 0x7F7F)
    sides = [c.to(torch.uint16).view(torch.bfloat16) for c in (codes, other)]
    verify_on(tmp_path_factory.mktemp("codes"), *sides)


def test_differences_at_the_rounded_tolerance_are_decided_as_their_program_does(tmp_path):
    """|Δ| = 167 … 170 in units of 2⁻²⁴ from both sides of zero: 168.5 ties to even, 169 does not pass."""
    unit = 2.0**-24
    tuned = torch.tensor([k * unit for k in (167, 168, 168.25, 168.5, 168.75, 169, 170)], dtype=torch.float64)
    base = torch.zeros_like(tuned)
    # Half-units need a base whose codes are fine enough: near 2⁻²⁴ and below.
    small = torch.tensor([-0.25 * unit, -0.5 * unit, -0.75 * unit, 0.25 * unit], dtype=torch.float64)
    grid = torch.cat([torch.stack([b, t])[None] for b in (*base[:1], *small) for t in tuned])
    sides = grid[:, 0].to(torch.bfloat16), grid[:, 1].to(torch.bfloat16)
    verify_on(tmp_path, *sides)
    exact = (sides[1].double() - sides[0].double()).abs()
    assert int((exact <= 1e-5).sum()) < int((exact <= 168.5 * unit).sum())


def verify_on(folder: Path, base: torch.Tensor, tuned: torch.Tensor) -> None:
    sides = [save(folder / name, {"w.weight": side}) for name, side in (("b", base), ("t", tuned))]
    for preset, slow in SLOW.items():
        report = diff(*sides, criteria=preset_criteria(preset), kernel="numpy", workers=1)
        verify(
            apply_preset(report, preset),
            slow({"w.weight": base}, {"w.weight": tuned}, parameters=["w.weight"]),
        )


def test_a_report_that_did_not_count_the_rule_is_refused_with_the_remedy(tmp_path):
    base = llama(torch.bfloat16)
    report = diff(
        save(tmp_path / "b", base), save(tmp_path / "t", moved(base, scale=1e-4, share=0.5, seed=0))
    )
    assert apply_preset(report, "zhu2025").compared
    with pytest.raises(UsageError, match="run diff again with --preset mukherjee2025"):
        apply_preset(report, "mukherjee2025")
    with pytest.raises(UsageError, match="mukherjee2025 or zhu2025"):
        preset_named("smith2020")


def test_a_preset_leaves_the_mask_criterion_as_it_was():
    assert [str(c) for c in preset_criteria("zhu2025")] == ["value", "rel:1e-3"]
    assert [str(c) for c in preset_criteria("zhu2025", ("ulp:1",))] == ["ulp:1", "rel:1e-3"]


def test_fp8_weights_are_a_caveat_with_their_number(tmp_path):
    base = {"w.weight": torch.arange(256, dtype=torch.uint8).view(torch.float8_e5m2)[:64].reshape(8, 8)}
    tuned = {"w.weight": base["w.weight"].clone().view(torch.uint8).add(1).view(torch.float8_e5m2)}
    found = result(tmp_path, save(tmp_path / "b", base), save(tmp_path / "t", tuned), "zhu2025")
    assert found.caveats == (
        "64 entries are stored in fp8: what the program's loader makes of them is not known",
    )
    assert found.changed == 64
