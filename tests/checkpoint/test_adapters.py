"""An adapter is merged as LoRA, rsLoRA and DoRA say; what is not merged is refused by name."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from sparsity_audit import diff
from sparsity_audit.api.sides import open_sides
from sparsity_audit.checkpoint import merged_file
from sparsity_audit.checkpoint.opening import open_checkpoint
from sparsity_audit.checkpoint.reading import read_entries
from sparsity_audit.errors import CorruptCheckpointError, UnsupportedFormatError, UsageError
from sparsity_audit.types import DType, View

Q, NORM, EMBED = "model.layers.0.q_proj.weight", "model.norm.weight", "model.embed_tokens.weight"
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "base_model_name_or_path": "org/other"}


def grid(*shape: int, seed: int = 0, step: float = 2**-6) -> torch.Tensor:
    """Multiples of a power of two, few bits: products and sums of them are exact in fp32."""
    return torch.randint(-15, 16, shape, generator=torch.Generator().manual_seed(seed)) * step


def base_weights(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    shapes = {Q: (6, 8), NORM: (8,), EMBED: (10, 8)}
    return {name: grid(*shape, seed=n).to(dtype) for n, (name, shape) in enumerate(shapes.items())}


def factors(module: str = "model.layers.0.q_proj", rows: int = 6, cols: int = 8) -> dict[str, torch.Tensor]:
    stem = f"base_model.model.{module}"
    return {
        f"{stem}.lora_A.weight": grid(2, cols, seed=8, step=2**-5),
        f"{stem}.lora_B.weight": grid(rows, 2, seed=9, step=2**-7),
    }


def write(folder: Path, base: dict, adapter: dict, **config) -> tuple[Path, Path]:
    for name, tensors, file in (("base", base, "model"), ("adapter", adapter, "adapter_model")):
        (folder / name).mkdir(exist_ok=True)
        save_file(tensors, folder / name / f"{file}.safetensors")
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    return folder / "base", folder / "adapter"


def read(catalogue, name: str, *, step: int = 1000) -> torch.Tensor:
    spec = catalogue.tensors[name]
    out = bytearray(spec.num_bytes)
    source = catalogue.files[spec.file].open()
    for first in range(0, spec.num_entries, step):
        stop = min(first + step, spec.num_entries)
        size = spec.dtype.itemsize
        read_entries(source, spec, first, memoryview(out)[first * size : stop * size])
    dtype = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
    return torch.frombuffer(out, dtype=dtype[spec.dtype.value]).reshape(spec.shape)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("root", [False, True])
def test_a_merged_weight_is_the_rounded_sum(tmp_path, dtype, root):
    base, adapter = write(tmp_path, base_weights(dtype), factors(), use_rslora=root)
    one, two = (t.double() for t in factors().values())
    scale = 3 / 2**0.5 if root else 1.5
    update = ((two @ one) * scale).float()
    wanted = (base_weights(dtype)[Q].to(torch.promote_types(dtype, torch.float32)) + update).to(dtype)
    sides = open_sides(base, adapter)
    assert torch.equal(read(sides[1], Q), wanted)
    assert torch.equal(read(sides[1], NORM), base_weights(dtype)[NORM])
    assert torch.equal(read(open_checkpoint(f"{base}+{adapter}"), Q), wanted)


def test_rows_are_the_same_whatever_is_read_together(tmp_path, monkeypatch):
    monkeypatch.setattr(merged_file, "_TILE_ENTRIES", 16)
    base, adapter = write(tmp_path, base_weights(), factors())
    merged = open_checkpoint(f"{base}+{adapter}")
    whole = read(merged, Q)
    assert all(torch.equal(read(merged, Q, step=step), whole) for step in (1, 3, 7, 16, 40))


def test_an_unrounded_merge_shows_what_bf16_hides(tmp_path):
    small = {name: tensor / 64 for name, tensor in factors().items()}
    base, adapter = write(tmp_path, base_weights(), small)
    exact = open_checkpoint(f"{base}+{adapter}#master")
    assert exact.tensors[Q].dtype is DType.F32
    assert exact.tensors[NORM].dtype is DType.BF16
    one, two = (t.double() for t in small.values())
    update = ((two @ one) * 1.5).float()
    assert torch.equal(read(exact, Q), base_weights()[Q].float() + update)
    report = diff(base, f"{adapter}#master")
    native, served = (report.headline("value", view) for view in View)
    rounded = diff(base, adapter).headline("value", View.NATIVE)
    assert native.changed == int((update != 0).sum())
    assert served.changed == rounded.changed < native.changed


def test_dora_rows_have_the_learned_length(tmp_path):
    lengths = torch.tensor([1.0, 2.0, 0.5, 1.5, 3.0, 0.25])
    name = "base_model.model.model.layers.0.q_proj.lora_magnitude_vector"
    base, adapter = write(tmp_path, base_weights(torch.float32), factors() | {name: lengths}, use_dora=True)
    found = read(open_checkpoint(f"{base}+{adapter}"), Q).double()
    one, two = (t.double() for t in factors().values())
    plain = base_weights()[Q].double() + two @ one * 1.5
    wanted = plain / plain.norm(dim=1, keepdim=True) * lengths[:, None]
    # fp32: half an ulp each of the length, the quotient and the product.
    assert ((found - wanted).abs() <= 2e-7 * wanted.abs()).all()


def test_an_embedding_and_a_transposed_weight_are_adapted_the_other_way_round(tmp_path):
    stem = "base_model.model.model.embed_tokens"
    pair = {f"{stem}.lora_embedding_A": grid(2, 10, seed=3), f"{stem}.lora_embedding_B": grid(8, 2, seed=4)}
    base, adapter = write(tmp_path, base_weights(), pair)
    one, two = (t.double() for t in pair.values())
    update = ((two @ one).T * 1.5).bfloat16()
    wanted = (base_weights()[EMBED].float() + update.float()).bfloat16()
    assert torch.equal(read(open_checkpoint(f"{base}+{adapter}"), EMBED), wanted)
    swapped = factors(rows=8, cols=6)
    base, adapter = write(tmp_path, base_weights(), swapped, fan_in_fan_out=True)
    one, two = (t.double() for t in swapped.values())
    wanted = (base_weights()[Q].double() + (two @ one).T * 1.5).bfloat16()
    assert torch.equal(read(open_checkpoint(f"{base}+{adapter}"), Q), wanted)


def test_alpha_patterns_and_whole_tensors_are_taken(tmp_path):
    whole = {"base_model.model.model.norm.weight": torch.arange(8.0)}
    base, adapter = write(
        tmp_path, base_weights(), factors() | whole, alpha_pattern={"q_proj": 8}, modules_to_save=["norm"]
    )
    catalogue = open_checkpoint(f"{base}+{adapter}")
    one, two = (t.double() for t in factors().values())
    assert torch.equal(read(catalogue, Q), (base_weights()[Q].double() + two @ one * 4).bfloat16())
    assert torch.equal(read(catalogue, NORM), torch.arange(8.0))
    assert any("1 whole tensors replace" in note for note in catalogue.notes)
    assert any("'org/other'" in note for note in catalogue.notes)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("peft_type", "IA3"),
        ("use_qalora", True),
        ("use_new_thing", True),
        ("layer_replication", [[0, 1]]),
        ("trainable_token_indices", [3]),
        ("target_parameters", ["experts.down_proj"]),
        ("lora_bias", True),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
    ],
)
def test_what_is_not_merged_is_refused_by_name(tmp_path, option, value):
    base, adapter = write(tmp_path, base_weights(), factors(), **{option: value})
    with pytest.raises(UnsupportedFormatError, match=value if option == "peft_type" else option):
        open_checkpoint(f"{base}+{adapter}")


def test_an_adapter_of_another_base_is_refused(tmp_path):
    base, adapter = write(tmp_path, base_weights(), factors("model.layers.7.q_proj"))
    with pytest.raises(UsageError, match=r"layers\.7"):
        open_sides(base, adapter)
    base, adapter = write(tmp_path, base_weights(), factors(cols=4))
    with pytest.raises(UsageError, match=r"expected: \[6, 8\]"):
        open_sides(base, adapter)
    stray = {"base_model.model.score.weight": torch.ones(3)}
    base, adapter = write(tmp_path, base_weights(), factors() | stray)
    with pytest.raises(UsageError, match=r"score\.weight"):
        open_sides(base, adapter)


def test_a_factor_without_its_partner_or_of_another_rank_is_refused(tmp_path):
    one, two = factors().items()
    base, adapter = write(tmp_path, base_weights(), dict([one]))
    with pytest.raises(UnsupportedFormatError, match="no pair of matrices"):
        open_sides(base, adapter)
    base, adapter = write(tmp_path, base_weights(), {one[0]: one[1], two[0]: grid(6, 3)})
    with pytest.raises(CorruptCheckpointError, match="one rank"):
        open_sides(base, adapter)
    base, adapter = write(tmp_path, base_weights(), factors(), use_dora=True)
    with pytest.raises(CorruptCheckpointError, match="no DoRA lengths"):
        open_sides(base, adapter)


def test_an_adapter_is_no_base_and_can_be_inspected_as_it_is(tmp_path):
    base, adapter = write(tmp_path, base_weights(), factors())
    with pytest.raises(UsageError, match=r"BASE\+"):
        open_sides(adapter, base)
    assert len(open_checkpoint(adapter).tensors) == 2


def test_a_tied_weight_is_adapted_under_either_name_and_refused_under_both(tmp_path):
    base, adapter = write(tmp_path, base_weights(), factors("lm_head", rows=10))
    weights = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    torch.save(weights | {"lm_head.weight": weights[EMBED]}, base / "pytorch_model.bin")
    catalogue = open_checkpoint(f"{base}+{adapter}")
    assert not torch.equal(read(catalogue, EMBED), weights[EMBED])
    both = factors("lm_head", rows=10) | factors("model.embed_tokens", rows=10)
    save_file(both, adapter / "adapter_model.safetensors")
    with pytest.raises(UnsupportedFormatError, match="both names of the tied"):
        open_checkpoint(f"{base}+{adapter}")


@settings(max_examples=200)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50))
def test_rounding_to_bf16_is_torchs(codes):
    values = np.array(codes, dtype=np.uint32).view(np.float32)
    found = merged_file._encode(values, DType.BF16)
    wanted = torch.from_numpy(values.copy()).bfloat16().view(torch.int16).numpy().view(np.uint16)
    kept = ~np.isnan(values)
    assert (found[kept] == wanted[kept]).all()
    assert ((found[~kept] & 0x7FFF) > 0x7F80).all()


def test_gguf_is_refused_with_the_reason(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(60))
    for reference in (tmp_path, tmp_path / "model.gguf"):
        with pytest.raises(UnsupportedFormatError, match="quantises"):
            open_checkpoint(reference)
