"""An adapter merged here is what peft's `merge_and_unload` gives."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("peft", reason="the extra `lab` is not installed")

from safetensors.torch import load_file

from sparsity_audit.checkpoint.opening import open_checkpoint
from sparsity_audit.checkpoint.reading import read_entries

pytestmark = pytest.mark.extras

NAMES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def model(dtype: torch.dtype):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).to(dtype)


def adapted(folder: Path, dtype: torch.dtype, *, exact: bool, **options):
    """Save a base, an adapter and the merged model; with `exact` every fp32 product is exact."""
    from peft import LoraConfig, get_peft_model

    base = model(dtype)
    base.save_pretrained(folder / "base")
    peft = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, **options))
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in peft.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                if exact:
                    value.copy_(torch.randint(-8, 9, value.shape, generator=draw) * 2.0**-8)
                else:
                    value.copy_(torch.randn(value.shape, generator=draw) * 0.02)
            elif value.requires_grad:
                value.add_(0.25)
    peft.save_pretrained(folder / "adapter")
    merged = peft.merge_and_unload()
    return {name: value.detach() for name, value in merged.state_dict().items()}


def read(catalogue, name: str) -> torch.Tensor:
    spec = catalogue.tensors[name]
    out = bytearray(spec.num_bytes)
    read_entries(catalogue.files[spec.file].open(), spec, 0, memoryview(out))
    return torch.frombuffer(out, dtype=NAMES[spec.dtype.value]).reshape(spec.shape)


@pytest.mark.parametrize("dtype", NAMES.values())
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": "all-linear", "use_rslora": True},
        {"target_modules": ["v_proj"], "alpha_pattern": {"layers.1.self_attn.v_proj": 32}},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "bias": "lora_only"},
    ],
    ids=["lora", "rslora", "alpha_pattern", "embedding", "modules_to_save", "bias"],
)
def test_exact_products_are_merged_bit_for_bit(tmp_path, dtype, options):
    wanted = adapted(tmp_path, dtype, exact=True, **options)
    base = load_file(tmp_path / "base" / "model.safetensors")
    found = open_checkpoint(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}")
    assert set(found.tensors) == set(wanted)
    changed = 0
    for name, value in wanted.items():
        assert torch.equal(read(found, name), value), name
        changed += not torch.equal(value.float(), base[name].float())
    assert changed


@pytest.mark.parametrize("dtype", NAMES.values())
@pytest.mark.parametrize("dora", [False, True])
def test_other_products_differ_by_a_rounding_where_peft_rounds_its_product(tmp_path, dtype, dora):
    wanted = adapted(tmp_path, dtype, exact=False, target_modules="all-linear", use_dora=dora)
    found = open_checkpoint(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}")
    differing = entries = 0
    for name, value in wanted.items():
        mine, theirs = read(found, name).double(), value.double()
        entries += mine.numel()
        differing += int((mine != theirs).sum())
        # fp32: three roundings of product and sum, three more for DoRA; 16 bits: one last place.
        unit = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2**-21}[dtype]
        floor = 2**-24 if dtype is torch.float16 else 1e-8
        assert ((mine - theirs).abs() <= unit * theirs.abs() + floor).all(), name
    if dtype is not torch.float32:
        assert differing <= 1e-3 * entries
