"""A small mixture of experts in block-scaled fp8: stacked on one side, expert by expert on the other."""

from __future__ import annotations

import numpy as np
import pytest
from coded_checkpoint import write

from sparsity_audit import SparsityAuditError, diff
from sparsity_audit.checkpoint.opening import open_checkpoint
from sparsity_audit.masks.reader import MaskReader, open_mask
from sparsity_audit.masks.sampling import UniformGrouping
from sparsity_audit.passes.base_strata import StrataGrouping

EXPERTS, INNER, HIDDEN, BLOCK, HEADS, GROUPS = 3, 8, 8, 4, 4, 2
LAYER = "model.layers.0."
STACKS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
CONFIG = {
    "model_type": "made_up_moe",
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "tie_word_embeddings": False,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]},
}


def _base() -> dict[str, tuple[str, np.ndarray]]:
    """Experts stacked, query, key and value in groups."""
    rng = np.random.default_rng(11)
    side = {
        f"{LAYER}input_layernorm.weight": ("BF16", rng.integers(0x3F00, 0x4000, HIDDEN, dtype=np.uint16)),
        f"{LAYER}mlp.gate.weight": ("BF16", rng.integers(0x3C00, 0x4000, (EXPERTS, HIDDEN), dtype=np.uint16)),
        f"{LAYER}self_attn.query_key_value.weight": (
            "BF16",
            rng.integers(0x3C00, 0x4000, (2 * HIDDEN, HIDDEN), dtype=np.uint16),
        ),
    }
    side[f"{LAYER}self_attn.query_key_value.bias"] = (
        "BF16",
        rng.integers(0x3C00, 0x4000, 2 * HIDDEN, dtype=np.uint16),
    )
    for name, rows in (("gate_up_proj", 2 * INNER), ("down_proj", HIDDEN)):
        codes = rng.integers(0x10, 0x70, (EXPERTS, rows, HIDDEN), dtype=np.uint8)
        scales = rng.uniform(0.001, 0.01, (EXPERTS, rows // BLOCK, HIDDEN // BLOCK)).astype(np.float32)
        side[f"{LAYER}mlp.experts.{name}"] = ("F8_E4M3", codes)
        side[f"{LAYER}mlp.experts.{name}_scale_inv"] = ("F32", scales)
    return side


def _move(side: dict) -> tuple[dict, dict[str, np.ndarray]]:
    """A tuned copy in the base's layout, and which values of each tensor moved."""
    tuned = {name: (dtype, codes.copy()) for name, (dtype, codes) in side.items()}
    moved = {name: np.zeros(codes.shape, dtype=bool) for name, (_, codes) in side.items()}

    def step(name: str, place: tuple) -> None:
        tuned[LAYER + name][1][place] += 1
        moved[LAYER + name][place] = True

    step("input_layernorm.weight", (5,))
    step("mlp.gate.weight", (1, slice(2, 4)))
    step("self_attn.query_key_value.weight", (slice(3, 14, 2), 1))
    step("self_attn.query_key_value.bias", (slice(3, 14, 3),))
    step("mlp.experts.gate_up_proj", (0, slice(6, 10), 3))
    step("mlp.experts.gate_up_proj", (2, 15, slice(None)))
    step("mlp.experts.down_proj", (1, 0, 0))
    # One factor doubles: all 16 values of its block move, no code does.
    tuned[f"{LAYER}mlp.experts.down_proj_scale_inv"][1][2, 1, 0] *= 2
    moved[f"{LAYER}mlp.experts.down_proj_scale_inv"][2, 1, 0] = True
    moved[f"{LAYER}mlp.experts.down_proj"][2, BLOCK:, :BLOCK] = True
    return tuned, moved


def _qkv(codes: np.ndarray) -> dict[str, np.ndarray]:
    size = HIDDEN // HEADS
    grouped = codes.reshape(GROUPS, -1, size, *codes.shape[1:])
    queries = HEADS // GROUPS
    parts = {"q_proj": grouped[:, :queries], "k_proj": grouped[:, queries], "v_proj": grouped[:, queries + 1]}
    return {name: part.reshape(-1, *codes.shape[1:]) for name, part in parts.items()}


def _split(side: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same arrays with every expert and projection by itself."""
    result = {}
    for name, codes in side.items():
        path, _, last = name.rpartition(".")
        module, suffix = last.removesuffix("_scale_inv"), "_scale_inv" * last.endswith("_scale_inv")
        if module in STACKS:
            for expert in range(EXPERTS):
                pieces = np.split(codes[expert], len(STACKS[module]))
                for part, piece in zip(STACKS[module], pieces, strict=True):
                    result[f"{path}.{expert}.{part}.weight{suffix}"] = np.ascontiguousarray(piece)
        elif "query_key_value" in name:
            for part, piece in _qkv(codes).items():
                result[name.replace("query_key_value", part)] = np.ascontiguousarray(piece)
        else:
            result[name] = codes
    return result


def _split_side(side: dict) -> dict[str, tuple[str, np.ndarray]]:
    arrays = _split({name: codes for name, (_, codes) in side.items()})
    names = {"uint8": "F8_E4M3", "uint16": "BF16", "float32": "F32"}
    return {name: (names[str(codes.dtype)], codes) for name, codes in arrays.items()}


def _checkpoints(tmp_path, stacked: str):
    base = _base()
    tuned, moved = _move(base)
    if stacked == "base":
        tuned = _split_side(tuned)
    else:
        base, moved = _split_side(base), _split(moved)
    return write(tmp_path / "base", base, CONFIG), write(tmp_path / "tuned", tuned, CONFIG), moved


@pytest.mark.parametrize("stacked", ["base", "tuned"])
def test_every_entry_is_compared_and_the_mask_is_in_base_coordinates(tmp_path, stacked) -> None:
    base, tuned, moved = _checkpoints(tmp_path, stacked)
    report = diff(base, tuned, mask=tmp_path / "mask", output=tmp_path / "out")
    assert (report.leftovers, report.skipped) == ((), ())
    total = sum(array.size for array in moved.values())
    assert report.accounts.base.compared == report.accounts.tuned.compared == total
    changed = {t.name: t.summary.native.counts for t in report.tensors}
    value = {n: next(c.changed for c in counts if c.criterion == "value") for n, counts in changed.items()}
    assert sum(value.values()) == sum(int(array.sum()) for array in moved.values())
    with MaskReader(open_mask(tmp_path / "mask")) as mask:
        assert mask.tensors.keys() == moved.keys()
        for name, array in moved.items():
            tensor = mask.tensors[name]
            assert tensor.num_compared == tensor.num_entries
            flat = array.reshape(-1, array.shape[-1])
            bits = np.unpackbits(mask.read_packed(name), axis=-1, count=flat.shape[1], bitorder="little")
            assert np.array_equal(bits.reshape(flat.shape), flat), name


def test_counts_rolls_and_findings_name_codes_scales_routers_and_experts(tmp_path) -> None:
    base, tuned, _ = _checkpoints(tmp_path, "base")
    report = diff(base, tuned)
    counts = {
        t.name.removeprefix(LAYER): {c.criterion: c.changed for c in t.summary.native.counts}
        for t in report.tensors
    }
    down = "mlp.experts.down_proj"
    assert (counts[f"{down}:1.down_proj"]["bitwise"], counts[f"{down}:1.down_proj"]["value"]) == (1, 1)
    assert (counts[f"{down}:2.down_proj"]["bitwise"], counts[f"{down}:2.down_proj"]["value"]) == (0, 16)
    assert counts[f"{down}_scale_inv:2.down_proj"]["value"] == 1
    assert counts["mlp.experts.gate_up_proj:0.gate_proj"]["value"] == 2
    assert counts["mlp.experts.gate_up_proj:0.up_proj"]["value"] == 2
    assert counts["mlp.experts.gate_up_proj:2.up_proj"]["value"] == 8
    totals = {
        rollup.key: {c.total.criterion: c.total.changed for c in rollup.counts}["value"]
        for rollup in report.rollups[0].totals
    }
    assert totals["routers"] == 2
    assert totals["norms"] == 1
    assert totals["other"] == 1
    assert totals["matrices"] == 4 + 8 + 1 + 16 + 6
    text = "\n".join(report.findings)
    assert "values de-scaled by weight_scale_inv" in text
    assert "compared by value, code × block scale" in text
    assert "2 groups" in text
    unchanged = next(line for line in report.findings if "did not change at all" in line)
    assert f"{down}:2.down_proj" not in unchanged


def test_the_record_does_not_depend_on_units_workers_or_kernel(tmp_path) -> None:
    base, tuned, _ = _checkpoints(tmp_path, "tuned")
    records = []
    for number, (unit_bytes, workers, kernel) in enumerate(
        ((1 << 20, 1, "numpy"), (64, 2, "numpy"), (128, 1, "reference"))
    ):
        out, mask = tmp_path / f"out{number}", tmp_path / f"mask{number}"
        diff(base, tuned, output=out, mask=mask, unit_bytes=unit_bytes, workers=workers, kernel=kernel)
        files = [out / "report.json", *sorted(mask.glob("*.safetensors"))]
        records.append([file.read_bytes() for file in files])
    assert records[1:] == records[:1] * 2


def test_fingerprints_of_tensors_compared_in_pieces_are_not_known_rather_than_wrong(tmp_path) -> None:
    base, tuned, _ = _checkpoints(tmp_path, "base")
    diff(base, tuned, mask=tmp_path / "mask")
    with MaskReader(open_mask(tmp_path / "mask")) as mask:
        prints = {name.removeprefix(LAYER): tensor.fingerprints for name, tensor in mask.tensors.items()}
        assert prints["mlp.experts.gate_up_proj"] == prints["self_attn.query_key_value.weight"] == (0, 0)
        assert prints["mlp.experts.down_proj"] != (0, 0)
        with pytest.raises(SparsityAuditError, match="does not record"):
            StrataGrouping(mask, open_checkpoint(base))
        assert isinstance(StrataGrouping(mask, open_checkpoint(base), force=True), UniformGrouping)
