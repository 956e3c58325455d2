"""A mask finds its parameters; one of another model, base or polarity is refused before training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import bits_of, module_of, random_mask, token_model

import sparsity_audit as sa
from sparsity_audit.checkpoint.opening import open_checkpoint
from sparsity_audit.compare.numpy_kernel import NumpyKernel
from sparsity_audit.errors import MaskError, UsageError
from sparsity_audit.masks.bitmask import unpack_bits
from sparsity_audit.masks.reader import MaskReader, open_mask
from sparsity_audit.passes.base_strata import base_fingerprint
from sparsity_audit.passes.open_files import OpenFiles
from sparsity_audit.training.fingerprints import fingerprint, stored_forms
from sparsity_audit.training.freeze import freeze_outside
from sparsity_audit.training.parameters import name_parameters
from sparsity_audit.training.update_masks import bind_mask


def save(folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    return folder


@pytest.fixture
def pair(tmp_path) -> tuple[Path, Path]:
    """A bf16 checkpoint and a copy with about a third of the entries changed."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "model.embed_tokens.weight": (19, 8),
        "model.layers.0.mlp.up_proj.weight": (9, 13),
        "model.norm.weight": (5,),
    }
    base = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    tuned = {
        name: torch.where(torch.rand(w.shape, generator=generator) < 0.3, w * 2 + 1, w)
        for name, w in base.items()
    }
    return save(tmp_path / "base", base), save(tmp_path / "tuned", tuned)


@pytest.fixture
def mask(pair, tmp_path) -> Path:
    sa.mask_export(*pair, tmp_path / "mask")
    return tmp_path / "mask"


def model_of(folder: Path, dtype: torch.dtype | None = None) -> torch.nn.Module:
    weights = load_file(folder / "model.safetensors")
    return module_of({name: w if dtype is None else w.to(dtype) for name, w in weights.items()})


def sgd(model: torch.nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize("encoding", ["packed", "bool", "indices", "pt"])
def test_a_mask_directory_selects_what_the_tuned_checkpoint_changed(pair, mask, tmp_path, encoding) -> None:
    if encoding != "packed":
        sa.mask_convert(mask, tmp_path / encoding, encoding)
        mask = tmp_path / encoding
    model = model_of(pair[0])
    tuned = load_file(pair[1] / "model.safetensors")
    found = bind_mask(name_parameters(model), mask)
    for name, parameter in model.named_parameters():
        assert torch.equal(found.selected[id(parameter)], bits_of(parameter) != bits_of(tuned[name])), name
    assert found.unverified == ()
    assert found.num_entries == 19 * 8 + 9 * 13 + 5
    assert found.num_selected == sum(int(bits.sum()) for bits in found.selected.values())


def test_real_checkpoints_verify_and_the_other_seeds_do_not(addition, tmp_path) -> None:
    base, tuned = addition / "base-bf16", addition / "grpo-bf16-lr1e-4-seed0"
    sa.mask_export(base, tuned, tmp_path / "mask")
    weights = {n: w for f in base.glob("*.safetensors") for n, w in load_file(f).items()}
    model = module_of(weights)
    frozen = freeze_outside(model, sgd(model), tmp_path / "mask", unmasked="freeze")
    proof = frozen.verify_frozen()
    assert proof.num_frozen + proof.num_trainable == 148_928
    weights = {n: w for f in tuned.glob("*.safetensors") for n, w in load_file(f).items()}
    other = module_of(weights)
    with pytest.raises(MaskError, match=r"the weights have fingerprint [0-9a-f]{16} in torch.bfloat16"):
        freeze_outside(other, sgd(other), tmp_path / "mask", unmasked="freeze")


def test_weights_upcast_from_the_stored_dtype_are_recognised(pair, mask) -> None:
    model = model_of(pair[0], torch.float32)
    assert bind_mask(name_parameters(model), mask).unverified == ()


def test_weights_cast_to_less_than_the_stored_dtype_need_your_word(pair, mask) -> None:
    model = model_of(pair[0], torch.float16)
    with pytest.raises(
        MaskError, match=r"in torch.float16\n  expected: [0-9a-f]{16}, of the base(.|\n)*trust"
    ):
        bind_mask(name_parameters(model), mask)
    found = bind_mask(name_parameters(model), mask, base="trust")
    assert len(found.unverified) == 3


def test_the_base_with_one_bit_changed_is_refused(pair, mask) -> None:
    model = model_of(pair[0])
    codes = dict(model.named_parameters())["model.norm.weight"].detach().view(torch.int16)
    codes[4] ^= 1
    with pytest.raises(MaskError, match=r"tensor 'model.norm.weight': the weights have fingerprint"):
        bind_mask(name_parameters(model), mask)


def test_fingerprints_in_memory_are_those_of_files(pair, monkeypatch) -> None:
    catalogue = open_checkpoint(pair[0])
    sa.mask_export(*pair, pair[0].parent / "m")
    with MaskReader(open_mask(pair[0].parent / "m")) as reader:
        for chunk in (8, 64, 1 << 24):
            monkeypatch.setattr("sparsity_audit.training.fingerprints._CHUNK_BYTES", chunk)
            for name, tensor in reader.tensors.items():
                values = load_file(pair[0] / "model.safetensors")[name]
                files = OpenFiles(catalogue)
                stored = base_fingerprint(tensor, catalogue.tensors[name], files, NumpyKernel())
                files.close()
                assert fingerprint(values) == stored == tensor.fingerprints[0]
                ranges = [(0, 2), (2, values.numel())]
                parts = [fingerprint(values.reshape(-1)[a:b]) for a, b in ranges]
                assert fingerprint(values, ranges) == sum(parts) % 2**64


def test_narrower_forms_are_offered_only_where_they_hold_every_code() -> None:
    exact = torch.tensor([1.0, -0.0, 2.0**-100])
    assert [form.dtype for form in stored_forms(exact)] == [torch.float32, torch.bfloat16]
    assert [form.dtype for form in stored_forms(torch.tensor([1 / 3]))] == [torch.float32]
    assert [form.dtype for form in stored_forms(torch.tensor([0.5, -0.0]).half())] == [torch.float16]


def test_rows_that_were_not_compared_are_frozen(tmp_path) -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn((8, 4), generator=generator).bfloat16()
    grown = torch.cat([base + 1, torch.randn((3, 4), generator=generator).bfloat16()])
    other = torch.randn((4, 4), generator=generator).bfloat16()
    name = "model.embed_tokens.weight"
    folders = (
        save(tmp_path / "base", {name: grown, "model.norm.weight": other}),
        save(tmp_path / "tuned", {name: base, "model.norm.weight": other}),
    )
    sa.mask_export(*folders, tmp_path / "mask")
    model = model_of(folders[0])
    found = bind_mask(name_parameters(model), tmp_path / "mask")
    bits = found.selected[id(dict(model.named_parameters())[name])]
    assert bool(bits[:8].all())
    assert not bits[8:].any()


def test_leading_roots_are_dropped_only_when_one_parameter_remains(pair, mask) -> None:
    weights = load_file(pair[0] / "model.safetensors")
    bare = module_of({name.removeprefix("model."): w for name, w in weights.items()})
    assert bind_mask(name_parameters(bare), mask).names["model.norm.weight"] == "norm.weight"
    twice = module_of(
        {name.removeprefix("model."): w for name, w in weights.items()}
        | {f"transformer.{name.removeprefix('model.')}": w for name, w in weights.items()}
    )
    with pytest.raises(MaskError, match=r"may be 'embed_tokens.weight' or 'transformer.embed_tokens.weight'"):
        bind_mask(name_parameters(twice), mask)


def test_a_mask_of_another_model_is_refused_by_name_and_by_shape(mask) -> None:
    model = token_model(0)
    expected = r"'model.embed_tokens.weight': names no parameter of the model \(3 of 3 tensors do not\)\n.*"
    with pytest.raises(MaskError, match=expected + r"'embed.weight', 'up.weight', 'up.bias'"):
        freeze_outside(model, sgd(model), mask, unmasked="train")
    bits = random_mask(model, 1)
    bits["up.weight"] = bits["up.weight"].t()
    with pytest.raises(MaskError, match=r"'up.weight': has shape \[6, 9\]\n  expected: \[9, 6\]"):
        freeze_outside(model, sgd(model), bits)


def test_a_mask_that_is_not_bool_or_lies_elsewhere_is_refused() -> None:
    model = token_model(0)
    bits = random_mask(model, 1)
    with pytest.raises(MaskError, match=r"'up.bias': is torch.uint8\n  expected: torch.bool"):
        freeze_outside(model, sgd(model), bits | {"up.bias": bits["up.bias"].to(torch.uint8)})
    with pytest.raises(MaskError, match=r"'up.bias': lies on meta\n  expected: cpu, where the parameter"):
        freeze_outside(model, sgd(model), bits | {"up.bias": bits["up.bias"].to("meta")})


def test_a_mask_that_freezes_nothing_or_trains_nothing_is_refused() -> None:
    model = token_model(0)
    nothing = {name: torch.zeros_like(bits) for name, bits in random_mask(model, 1).items()}
    everything = {name: ~bits for name, bits in nothing.items()}
    with pytest.raises(
        MaskError, match=r"selects none of 255 entries, so nothing would be trained(.|\n)*inver"
    ):
        freeze_outside(model, sgd(model), nothing)
    with pytest.raises(UsageError, match=r"selects all 255 entries it speaks of, so nothing would be frozen"):
        freeze_outside(model, sgd(model), everything)
    part = {"up.bias": everything["up.bias"]}
    with pytest.raises(UsageError, match=r"selects all 9 entries it speaks of, so nothing would be frozen"):
        freeze_outside(model, sgd(model), part, unmasked="train")
    assert freeze_outside(model, sgd(model), part, unmasked="freeze").verify_frozen().num_frozen == 246
    with pytest.raises(MaskError, match=r"selects none of 0 entries"):
        freeze_outside(model, sgd(model), {}, unmasked="train")


def test_an_inverted_or_unstated_polarity_is_refused(pair, mask, tmp_path) -> None:
    model = model_of(pair[0])
    file = next(mask.glob("mask-*.safetensors"))
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"]["polarity"] = "1=frozen"
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    with pytest.raises(MaskError, match=r"polarity '1=frozen'\n  expected: '1=updated'"):
        freeze_outside(model, sgd(model), mask)
    torch.save({"model.norm.weight": torch.ones(5).bool()}, tmp_path / "theirs.pt")
    with pytest.raises(MaskError, match=r"does not record its polarity(.|\n)*mask convert .*--inverted"):
        freeze_outside(model, sgd(model), tmp_path / "theirs.pt")
    with pytest.raises(MaskError, match=r"is a checkpoint|holds no mask"):
        freeze_outside(model, sgd(model), pair[0])


def test_bits_are_those_of_the_mask_reader(pair, mask) -> None:
    model = model_of(pair[0])
    whole = bind_mask(name_parameters(model), mask).selected
    with MaskReader(open_mask(mask)) as reader:
        for name, parameter in model.named_parameters():
            packed = reader.read_packed(name).reshape(-1)
            expected = unpack_bits(np.ascontiguousarray(packed), tuple(parameter.shape))
            assert np.array_equal(whole[id(parameter)].numpy(), expected)
