"""Make a pair of checkpoints for the benchmarks, shaped and changed like a real RL run.

    python benchmarks/pairs.py FOLDER --entries 1000000000 [--dtype bf16] [--copy]

Writes `FOLDER/base`, `FOLDER/tuned` and with --copy `FOLDER/copy` (the base again, for `cmp`), each in two
shards with an index, and last `FOLDER/pair.json`: what was made, and the exact counts that a differ must
find. A folder whose `pair.json` says the same is left as it is. Memory is a few chunks, whatever the size.

Tensors are those of a Llama-like model: embeddings, head, norms, and in each of about twenty layers q, k,
v, o, gate, up and down. Weights are normal with a scale for each tensor. About 15 % of the entries move:
80 % of those by one unit in the last place, 14 % by two, 5 % by three, 0.9 % by four to sixty-four; 0.1 %
change sign.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

SEED = 20261121
CHANGED_SHARE = 0.15
MOVES = {1: 0.80, 2: 0.14, 3: 0.05}
FAR_SHARE, FAR = 0.009, (4, 64)
FLIP_SHARE = 0.001
NUM_SHARDS = 2
SIDES = ("base", "tuned")

_FLIP = 1 << 10  # a step that stands for a change of sign
_DRAWS = 1 << 16
_CHUNK_ENTRIES = 1 << 21
_BYTES = {"bf16": 2, "fp32": 4}
_NAMES = {"bf16": "BF16", "fp32": "F32"}


def shapes_of(entries: int) -> dict[str, tuple[int, ...]]:
    """Tensors of a model of at least `entries` entries; their number hardly depends on the size."""
    hidden = math.sqrt(0.88 * entries / (10.75 * 18))
    step = 256 if hidden >= 1024 else 32
    hidden = max(int(hidden // step) * step, step)
    inner, narrow = hidden * 11 // 4, hidden // 4
    vocabulary = max(int(0.06 * entries / hidden / 64), 1) * 64
    layer = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.k_proj.weight": (narrow, hidden),
        "self_attn.v_proj.weight": (narrow, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    ends = 2 * vocabulary * hidden + hidden
    num_layers = max(math.ceil((entries - ends) / sum(math.prod(s) for s in layer.values())), 1)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for number in range(num_layers):
        shapes |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def step_table() -> np.ndarray:
    """The step in magnitude for each 16-bit draw; most are 0."""
    rng = np.random.default_rng(SEED)
    moved = round(CHANGED_SHARE * _DRAWS)
    steps = [np.full(round(share * moved), size) for size, share in MOVES.items()]
    steps.append(rng.integers(FAR[0], FAR[1] + 1, round(FAR_SHARE * moved)))
    far_or_near = np.concatenate(steps)
    far_or_near *= np.where(np.arange(len(far_or_near)) % 2, 1, -1)
    flips = np.full(max(round(FLIP_SHARE * moved), 1), _FLIP)
    table = np.zeros(_DRAWS, dtype=np.int16)
    table[: len(far_or_near)] = far_or_near
    table[len(far_or_near) : len(far_or_near) + len(flips)] = flips
    return table


def chunks_of(shape: tuple[int, ...], dtype: str, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Stored codes of both sides, chunk by chunk."""
    rng, table = np.random.default_rng([SEED, seed]), step_table()
    is_norm = len(shape) == 1
    scale = np.float32(0.1 if is_norm else rng.uniform(0.5, 2.0) / math.sqrt(shape[-1]))
    offset = np.float32(1.0 if is_norm else 0.0)
    bits = 8 * _BYTES[dtype]
    code = np.dtype(f"uint{bits}").type
    sign, largest = code(1 << (bits - 1)), (0x7F7F if dtype == "bf16" else 0x7F7FFFFF)
    total = math.prod(shape)
    for start in range(0, total, _CHUNK_ENTRIES):
        count = min(_CHUNK_ENTRIES, total - start)
        weights = rng.standard_normal(count, dtype=np.float32) * scale + offset
        base = weights.view(np.uint32)
        if dtype == "bf16":
            base = ((base + np.uint32(0x8000)) >> np.uint32(16)).astype(np.uint16)
        step = table[rng.integers(0, _DRAWS, count, dtype=np.uint16)]
        flips = step == _FLIP
        magnitude = (base & ~sign).astype(np.int32) + np.where(flips, np.int16(0), step)
        tuned = np.clip(magnitude, 0, largest).astype(base.dtype) | (base & sign)
        tuned[flips] ^= sign
        yield base, tuned


def shards_of(shapes: dict[str, tuple[int, ...]]) -> list[dict[str, tuple[int, ...]]]:
    """Tensors in order, in shards of about equal size."""
    total = sum(math.prod(shape) for shape in shapes.values())
    shards: list[dict[str, tuple[int, ...]]] = [{} for _ in range(NUM_SHARDS)]
    done = 0
    for name, shape in shapes.items():
        shards[min(done * NUM_SHARDS // total, NUM_SHARDS - 1)][name] = shape
        done += math.prod(shape)
    return shards


def header_of(shapes: dict[str, tuple[int, ...]], dtype: str) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * _BYTES[dtype]
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_pair(folder: Path, entries: int, dtype: str) -> dict[str, int]:
    """Write both sides; returns the counts that a differ must find."""
    shapes = shapes_of(entries)
    shards = shards_of(shapes)
    numbers = {name: number for number, name in enumerate(shapes)}
    files = [f"model-{i + 1:05}-of-{NUM_SHARDS:05}.safetensors" for i in range(NUM_SHARDS)]
    counts = {"entries": sum(math.prod(s) for s in shapes.values()), "bitwise": 0, "value": 0}
    for side in SIDES:
        (folder / side).mkdir(parents=True)
        places = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": counts["entries"] * _BYTES[dtype]}, "weight_map": places}
        (folder / side / "model.safetensors.index.json").write_text(json.dumps(index))
    for file, shard in zip(files, shards, strict=True):
        with (folder / "base" / file).open("wb") as base, (folder / "tuned" / file).open("wb") as tuned:
            for stream in (base, tuned):
                stream.write(header_of(shard, dtype))
            for name, shape in shard.items():
                _write_tensor(chunks_of(shape, dtype, numbers[name]), base, tuned, counts)
            for stream in (base, tuned):
                stream.flush()
                os.fsync(stream.fileno())
    return counts


def _write_tensor(
    chunks: Iterator[tuple[np.ndarray, np.ndarray]], base: BinaryIO, tuned: BinaryIO, counts: dict[str, int]
) -> None:
    for base_codes, tuned_codes in chunks:
        base.write(base_codes.data)
        tuned.write(tuned_codes.data)
        differ = base_codes != tuned_codes
        both_zero = ((base_codes | tuned_codes) << base_codes.dtype.type(1)) == 0
        counts["bitwise"] += int(np.count_nonzero(differ))
        counts["value"] += int(np.count_nonzero(differ & ~both_zero))


def copy_side(folder: Path) -> None:
    """The base again; synced, so that its pages can be dropped."""
    shutil.copytree(folder / "base", folder / "copy")
    for path in (folder / "copy").iterdir():
        with path.open("rb") as stream:
            os.fsync(stream.fileno())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--entries", type=float, default=1e9, help="at least so many")
    parser.add_argument("--dtype", choices=sorted(_BYTES), default="bf16")
    parser.add_argument("--copy", action="store_true", help="write the base a second time")
    options = parser.parse_args()
    made = options.folder / "pair.json"
    asked: dict[str, Any] = {
        "dtype": options.dtype,
        "asked_entries": int(options.entries),
        "shards": NUM_SHARDS,
        "seed": SEED,
        "changed_share_aimed_at": CHANGED_SHARE,
        "moves_in_units_in_the_last_place": {
            **{str(k): v for k, v in MOVES.items()},
            f"{FAR[0]} to {FAR[1]}": FAR_SHARE,
            "change of sign": FLIP_SHARE,
        },
        "copy": options.copy,
    }
    if made.exists():
        known = json.loads(made.read_text())
        if asked.items() <= known.items():
            return
    if options.folder.exists():
        shutil.rmtree(options.folder)
    counts = write_pair(options.folder, int(options.entries), options.dtype)
    if options.copy:
        copy_side(options.folder)
    tensors = len(shapes_of(int(options.entries)))
    made.write_text(json.dumps(asked | {"tensors": tensors, "counts": counts}, indent=1) + "\n")


if __name__ == "__main__":
    main()
