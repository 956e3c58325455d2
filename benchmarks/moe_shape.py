"""Checkpoints of the shape of a large mixture-of-experts model: real headers, data that is a hole in a file.

Names, shapes and dtypes follow DeepSeek-V3's released fp8 checkpoint without its extra prediction layer: fp8
matrices with one fp32 scale a block of 128 × 128 (`weight_scale_inv`), the rest bf16. `layers` and `experts`
shrink it for tests.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

__all__ = ["Tensor", "moe_tensors", "write_sparse"]

HIDDEN, EXPERT, DENSE, VOCABULARY, HEADS = 7168, 2048, 18432, 129280, 128
Q_RANK, KV_RANK, NOPE, ROPE, VALUE = 1536, 512, 128, 64, 128
DENSE_LAYERS, BLOCK = 3, 128
ITEMSIZE = {"F8_E4M3": 1, "BF16": 2, "F32": 4}

Tensor = tuple[str, str, tuple[int, ...]]


def moe_tensors(*, layers: int = 61, experts: int = 256) -> Iterator[Tensor]:
    """Name, dtype and shape of every tensor."""
    yield "model.embed_tokens.weight", "BF16", (VOCABULARY, HIDDEN)
    for layer in range(layers):
        stem = f"model.layers.{layer}."
        yield f"{stem}input_layernorm.weight", "BF16", (HIDDEN,)
        yield f"{stem}post_attention_layernorm.weight", "BF16", (HIDDEN,)
        yield f"{stem}self_attn.q_a_layernorm.weight", "BF16", (Q_RANK,)
        yield f"{stem}self_attn.kv_a_layernorm.weight", "BF16", (KV_RANK,)
        for name, shape in (
            ("q_a_proj", (Q_RANK, HIDDEN)),
            ("q_b_proj", (HEADS * (NOPE + ROPE), Q_RANK)),
            ("kv_a_proj_with_mqa", (KV_RANK + ROPE, HIDDEN)),
            ("kv_b_proj", (HEADS * (NOPE + VALUE), KV_RANK)),
            ("o_proj", (HIDDEN, HEADS * VALUE)),
        ):
            yield from _scaled(f"{stem}self_attn.{name}", shape)
        if layer < DENSE_LAYERS:
            yield from _gated(f"{stem}mlp.", DENSE)
            continue
        yield f"{stem}mlp.gate.weight", "BF16", (experts, HIDDEN)
        yield f"{stem}mlp.gate.e_score_correction_bias", "F32", (experts,)
        yield from _gated(f"{stem}mlp.shared_experts.", EXPERT)
        for expert in range(experts):
            yield from _gated(f"{stem}mlp.experts.{expert}.", EXPERT)
    yield "model.norm.weight", "BF16", (HIDDEN,)
    yield "lm_head.weight", "BF16", (VOCABULARY, HIDDEN)


def _gated(stem: str, width: int) -> Iterator[Tensor]:
    for name, shape in (
        ("gate_proj", (width, HIDDEN)),
        ("up_proj", (width, HIDDEN)),
        ("down_proj", (HIDDEN, width)),
    ):
        yield from _scaled(stem + name, shape)


def _scaled(stem: str, shape: tuple[int, int]) -> Iterator[Tensor]:
    yield f"{stem}.weight", "F8_E4M3", shape
    yield f"{stem}.weight_scale_inv", "F32", tuple(-(-size // BLOCK) for size in shape)


def write_sparse(folder: Path, tensors: list[Tensor], *, shards: int) -> int:
    """Write the checkpoint; returns its apparent bytes. On the disk it takes its headers."""
    folder.mkdir(parents=True)
    total = sum(_num_bytes(tensor) for tensor in tensors)
    groups: list[list[Tensor]] = [[] for _ in range(shards)]
    done = 0
    for tensor in tensors:
        groups[min(done * shards // total, shards - 1)].append(tensor)
        done += _num_bytes(tensor)
    weight_map = {}
    for number, group in enumerate(groups, start=1):
        name = f"model-{number:05d}-of-{shards:06d}.safetensors"
        header, offset = {}, 0
        for tensor, dtype, shape in sorted(group, key=lambda t: -ITEMSIZE[t[1]]):
            stop = offset + _num_bytes((tensor, dtype, shape))
            header[tensor] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, stop]}
            weight_map[tensor] = name
            offset = stop
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + offset)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"model_type": "deepseek_v3", "quantization_config": {"weight_block_size": [BLOCK, BLOCK]}}
    (folder / "config.json").write_text(json.dumps(config))
    return total


def _num_bytes(tensor: Tensor) -> int:
    size = ITEMSIZE[tensor[1]]
    for length in tensor[2]:
        size *= length
    return size
