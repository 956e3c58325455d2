"""Catalogues made by hand: names and shapes, no files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from sparsity_audit.checkpoint.store import Catalogue
from sparsity_audit.types import ByteRange, DType, TensorSpec


def _make(
    shapes: Mapping[str, tuple[int, ...]],
    *,
    dtypes: Mapping[str, DType] | None = None,
    aliases: Mapping[str, str] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Catalogue:
    tensors: dict[str, TensorSpec] = {}
    offset = 0
    for name, shape in shapes.items():
        dtype = (dtypes or {}).get(name, DType.BF16)
        spec = TensorSpec(name=name, dtype=dtype, shape=shape, file=0, extent=ByteRange(start=0, stop=0))
        tensors[name] = TensorSpec(
            name=name,
            dtype=dtype,
            shape=shape,
            file=0,
            extent=ByteRange(start=offset, stop=offset + spec.num_bytes),
        )
        offset += spec.num_bytes
    return Catalogue(
        reference="made/by-hand",
        resolved="made/by-hand",
        files=(),
        tensors=dict(sorted(tensors.items())),
        aliases=aliases or {},
        config=config or {},
    )


def _llama(
    *,
    layers: int = 2,
    hidden: int = 8,
    kv: int = 4,
    inner: int = 12,
    vocab: int = 32,
    root: str = "model.",
    head: bool = True,
    attention_bias: bool = False,
    fused: bool = False,
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a small Llama; `fused` as Phi-3 stores it, `attention_bias` as Qwen2."""
    shapes: dict[str, tuple[int, ...]] = {
        f"{root}embed_tokens.weight": (vocab, hidden),
        f"{root}norm.weight": (hidden,),
    }
    if head:
        shapes["lm_head.weight"] = (vocab, hidden)
    for number in range(layers):
        block = f"{root}layers.{number}."
        shapes[f"{block}input_layernorm.weight"] = (hidden,)
        shapes[f"{block}self_attn.o_proj.weight"] = (hidden, hidden)
        shapes[f"{block}mlp.down_proj.weight"] = (hidden, inner)
        rows = {"q_proj": hidden, "k_proj": kv, "v_proj": kv}
        if fused:
            shapes[f"{block}self_attn.qkv_proj.weight"] = (hidden + 2 * kv, hidden)
            shapes[f"{block}mlp.gate_up_proj.weight"] = (2 * inner, hidden)
            if attention_bias:
                shapes[f"{block}self_attn.qkv_proj.bias"] = (hidden + 2 * kv,)
            continue
        for part, size in rows.items():
            shapes[f"{block}self_attn.{part}.weight"] = (size, hidden)
            if attention_bias:
                shapes[f"{block}self_attn.{part}.bias"] = (size,)
        shapes[f"{block}mlp.gate_proj.weight"] = (inner, hidden)
        shapes[f"{block}mlp.up_proj.weight"] = (inner, hidden)
    return shapes


@pytest.fixture(scope="session")
def make_catalogue() -> Callable[..., Catalogue]:
    """`make_catalogue(shapes, dtypes=…, aliases=…, config=…)`."""
    return _make


@pytest.fixture(scope="session")
def llama() -> Callable[..., dict[str, tuple[int, ...]]]:
    """`llama(layers=…, fused=…, …)`: names → shapes."""
    return _llama
