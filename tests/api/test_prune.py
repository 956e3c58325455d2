"""A base with a part of an update: every entry against numpy, and the file system's side of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from addition_runs import load, values
from coded_checkpoint import blocks_config, write
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

import sparsity_audit as sa
from sparsity_audit.api import prune as api
from sparsity_audit.checkpoint.opening import open_checkpoint
from sparsity_audit.compare.numpy_kernel import NumpyKernel
from sparsity_audit.errors import MaskError, OutputError, UnsupportedFormatError, UsageError
from sparsity_audit.passes import execute, plan
from sparsity_audit.passes import prune as passes
from sparsity_audit.report.prune import prune_json_schema, prune_to_json

BF16, FP32 = ("base-bf16", "grpo-bf16-seed0"), ("base-fp32", "grpo-fp32-seed0")


def _codes(folder: Path) -> dict[str, np.ndarray]:
    """Stored codes of a checkpoint, read without the code under test."""
    found = {}
    catalogue = open_checkpoint(folder)
    for name, spec in catalogue.tensors.items():
        raw = catalogue.files[spec.file].path.read_bytes()[spec.extent.start : spec.extent.stop]
        found[name] = np.frombuffer(raw, dtype=f"u{spec.dtype.itemsize}").reshape(spec.shape)
    return found


def _same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def _flat(arrays: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([arrays[name].reshape(-1) for name in sorted(arrays)])


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(("base", "tuned"), [BF16, FP32])
def test_all_is_the_tuned_side_bit_for_bit_and_none_is_the_base(addition, tmp_path, base, tuned) -> None:
    written = sa.prune(
        addition / base, addition / tuned, tmp_path / "out", keep=["all", "none", "random:100%"]
    )
    everything, nothing, random = (_codes(checkpoint.path) for checkpoint in written)
    assert _same(everything, _codes(addition / tuned))
    assert _same(nothing, _codes(addition / base))
    assert _same(random, _codes(addition / tuned))
    assert [c.record.square_share for c in written] == [1.0, 0.0, 1.0]


def test_top_and_bottom_are_those_of_a_sort(addition, tmp_path) -> None:
    base, tuned = (load(name) for name in FP32)
    delta = np.abs(_flat(tuned).astype(np.float64) - _flat(base).astype(np.float64))
    written = sa.prune(
        addition / FP32[0], addition / FP32[1], tmp_path / "out", keep=["top:5%", "bottom:95%", "bottom:1000"]
    )
    order = np.sort(delta)
    for checkpoint, count in zip(written, (7446, round(0.95 * len(delta)), 1000), strict=True):
        kept = _flat(_codes(checkpoint.path)) == _flat(_codes(addition / FP32[1]))
        assert checkpoint.record.kept == kept.sum() == count
        wanted = order[-count:] if checkpoint.record.keep.startswith("top") else order[:count]
        assert np.array_equal(np.sort(delta[kept]), wanted)
        share = np.sum(delta[kept] ** 2) / np.sum(delta**2)
        assert abs(checkpoint.record.square_share - share) < 1e-12  # sums of 1.5e5 squares in another order
        rest = _flat(_codes(checkpoint.path))[~kept]
        assert np.array_equal(rest, _flat(_codes(addition / FP32[0]))[~kept])


def test_top_and_bottom_with_ties_share_the_entries_that_moved(addition, tmp_path) -> None:
    """On a bf16 pair hundreds of |Δ| are equal; the two selections still never meet."""
    moved = (_flat(load(BF16[0])) != _flat(load(BF16[1]))).sum()
    keep = ["top:20000", f"bottom:{moved - 20000}"]
    top, bottom = sa.prune(addition / BF16[0], addition / BF16[1], tmp_path / "out", keep=keep)
    kept = [_flat(_codes(c.path)) != _flat(_codes(addition / BF16[0])) for c in (top, bottom)]
    assert top.record.selections[0].ties_at_cut > 400
    assert not (kept[0] & kept[1]).any()
    assert (kept[0] | kept[1]).sum() == moved == top.record.moved
    assert bottom.record.selections[0].criterion == f"bottom:{moved - 20000}"


@pytest.mark.parametrize("text", ["value", "top:5%", "top:1%:tensor"])
def test_diff_of_base_and_result_is_the_mask_that_was_asked_for(addition, tmp_path, text) -> None:
    base, tuned = addition / BF16[0], addition / BF16[1]
    sa.mask_export(base, tuned, tmp_path / "asked", criterion=text)
    keep = f"mask:{tmp_path / 'asked'}"
    (pruned,) = sa.prune(base, tuned, tmp_path / "out", keep=[keep])
    info = sa.mask_export(base, pruned.path, tmp_path / "found")
    assert info.selected == pruned.record.kept == sa.mask_info(tmp_path / "asked").selected
    assert (
        sa.mask_ops(
            "xor", [tmp_path / "asked", tmp_path / "found"], tmp_path / "x", force=True
        ).result.selected
        == 0
    )
    if text.startswith("top"):
        (direct,) = sa.prune(base, tuned, tmp_path / "direct", keep=[text])
        assert _same(_codes(direct.path), _codes(pruned.path))


def test_the_complement_has_what_the_selection_has_not(addition, tmp_path) -> None:
    base, tuned = addition / FP32[0], addition / FP32[1]
    for keep in ("top:5%", "bottom:30%", "random:5%"):
        folder = tmp_path / keep.partition(":")[0]
        (part,) = sa.prune(base, tuned, folder / "part", keep=[keep], seed=3)
        (rest,) = sa.prune(base, tuned, folder / "rest", keep=[keep], seed=3, complement=True)
        old, new = _flat(_codes(base)), _flat(_codes(tuned))
        chosen = _flat(_codes(part.path)) != old
        assert np.array_equal(_flat(_codes(rest.path)), np.where(chosen, old, new))
        assert part.record.kept + rest.record.kept == part.record.compared


def test_random_selections_differ_by_seed_alone(addition, tmp_path) -> None:
    base, tuned = addition / FP32[0], addition / FP32[1]
    found = [
        _files(sa.prune(base, tuned, tmp_path / f"{n}", keep=["random:5%"], seed=seed)[0].path)
        for n, seed in enumerate((1, 1, 2))
    ]
    assert found[0] == found[1]
    assert found[0]["model.safetensors"] != found[2]["model.safetensors"]
    assert json.loads(found[2]["prune.json"])["seed"] == 2


def test_shares_within_each_tensor(addition, tmp_path) -> None:
    written = sa.prune(
        addition / FP32[0],
        addition / FP32[1],
        tmp_path / "o",
        keep=["top:10%", "random:10%"],
        per_tensor=True,
    )
    for checkpoint in written:
        for tensor in checkpoint.record.tensors:
            assert tensor.kept == round(0.1 * tensor.entries), tensor.name
    assert len(written[0].record.selections) == 30


_SPECIAL = [0x0000, 0x8000, 0x7FC1, 0xFF81, 0x7F80, 0xFF80, 0x0001, 0x3F80]


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(["BF16", "F32", "F16", "I32", "F8_E4M3", "BOOL"]),
    cols=st.sampled_from([1, 5, 64, 131]),
    unit_bytes=st.sampled_from([64, 300, 1 << 20]),
    workers=st.integers(1, 3),
    like=st.sampled_from(["base", "tuned"]),
)
def test_every_entry_is_the_one_side_or_the_other_as_numpy_says(
    tmp_path_factory, seed, dtype, cols, unit_bytes, workers, like
) -> None:
    rng, folder = np.random.default_rng(seed), tmp_path_factory.mktemp("prune")
    width = {"F32": 4, "I32": 4, "BF16": 2, "F16": 2}.get(dtype, 1)
    shapes = {"a": (3, 4, cols), "b": (cols,), "c": (), "d": (0, cols), "e": (7, cols)}
    sides, mask = [], {}
    for _ in range(2):
        side = {}
        for name, shape in shapes.items():
            codes = rng.integers(0, 2 if dtype == "BOOL" else 256**width, shape).astype(f"u{width}")
            if dtype == "BF16":
                codes = np.where(rng.random(shape) < 0.5, rng.choice(_SPECIAL, shape), codes).astype(
                    np.uint16
                )
            side[name] = (dtype, codes)
        sides.append(side)
    mask = {name: ("BOOL", (rng.random(shape) < 0.4).astype(np.uint8)) for name, shape in shapes.items()}
    paths = [write(folder / name, side) for name, side in zip(("base", "tuned"), sides, strict=True)]
    sa.mask_convert(write(folder / "bits", mask), folder / "mask")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "_UNIT_BYTES", unit_bytes)
        patch.setattr(plan, "BLOCK_BYTES", 256)
        patch.setattr(plan.blocks_of, "__kwdefaults__", {"block_bytes": 256})
        keep = [f"mask:{folder / 'mask'}", "all", "none", "top:30%"]
        options = {"force": True, "workers": workers, "like": like, "max_shard_bytes": 500}
        written = sa.prune(*paths, folder / "out", keep=keep, **options)
    for name in shapes:
        old, new, chosen = sides[0][name][1], sides[1][name][1], mask[name][1].astype(bool)
        for checkpoint, wanted in zip(written[:3], (np.where(chosen, new, old), new, old), strict=True):
            assert np.array_equal(_codes(checkpoint.path)[name], wanted), (checkpoint.path, name)
    record = written[0].record
    assert record.kept == sum(int(bits.sum()) for _, bits in mask.values())
    assert record.changed == sum(int((sides[0][n][1] != sides[1][n][1]).sum()) for n in shapes)
    assert record.kept_changed == sum(
        int(((sides[0][n][1] != sides[1][n][1]) & (mask[n][1] == 1)).sum()) for n in shapes
    )


def test_bytes_do_not_depend_on_workers_units_or_how_the_inputs_are_sharded(
    addition, tmp_path, monkeypatch
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    base, tuned = addition / FP32[0], addition / FP32[1]
    keep = ["top:5%", "bottom:10%", "random:5%"]
    sa.prune(base, tuned, tmp_path / "one", keep=keep, workers=1)
    monkeypatch.setattr(api, "_UNIT_BYTES", 1 << 14)
    sa.prune(base, tuned, tmp_path / "two", keep=keep, workers=3)
    one, two = _files(tmp_path / "one"), _files(tmp_path / "two")
    for name, data in one.items():
        if not name.endswith("prune.json"):
            assert data == two[name], name
    monkeypatch.setattr(api, "_UNIT_BYTES", 1 << 26)
    sa.prune(base, tuned, tmp_path / "again", keep=keep, workers=3)
    assert _files(tmp_path / "again") == one  # sums of Δ² too, which depend on the size of blocks alone
    tensors = load_file(tuned / "model.safetensors")
    (tmp_path / "sharded").mkdir()
    for number, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), start=1):
        part = {name: tensors[name] for name in names}
        save_file(part, tmp_path / "sharded" / f"model-0000{number}-of-00002.safetensors")
    written = sa.prune(base, tmp_path / "sharded", tmp_path / "three", keep=keep)
    for checkpoint in written:
        first = load_file(tmp_path / "one" / checkpoint.path.name / "model.safetensors")
        found = load_file(checkpoint.path / "model.safetensors")
        assert all(torch.equal(first[name], found[name]) for name in first)


def test_shards_have_an_index_and_load_as_transformers_loads_them(addition, tmp_path) -> None:
    from safetensors.torch import load_file

    out = tmp_path / "out"
    sa.prune(addition / BF16[0], addition / BF16[1], out, keep=["all"], max_shard_bytes=60_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(shards) > 3
    assert set(index["weight_map"].values()) == set(shards)
    assert index["metadata"] == {"total_size": 2 * 148928}
    found = {name: tensor for shard in shards for name, tensor in load_file(out / shard).items()}
    wanted = load_file(addition / BF16[1] / "model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(bool((found[n] == wanted[n]).all()) for n in wanted)
    assert (out / "config.json").read_bytes() == (addition / BF16[1] / "config.json").read_bytes()


def test_a_single_file_is_called_as_transformers_calls_it(addition, tmp_path) -> None:
    from safetensors import safe_open

    sa.prune(addition / BF16[0], addition / BF16[1], tmp_path / "out", keep=["top:1%"])
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
        "prune.json",
    ]
    with safe_open(tmp_path / "out" / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.fixture
def resized(tmp_path) -> tuple[Path, Path]:
    """A fused base with 7 rows of vocabulary; a split tuned side with 9, and a tensor of its own each."""
    rng, block = np.random.default_rng(5), "model.layers.0.self_attn."
    base = {
        f"{block}qkv_proj.weight": ("F32", rng.integers(0, 2**30, (16, 12), dtype=np.uint32)),
        f"{block}qkv_proj.bias": ("F32", rng.integers(0, 2**30, 16, dtype=np.uint32)),
        "model.embed_tokens.weight": ("F32", rng.integers(0, 2**30, (7, 12), dtype=np.uint32)),
        "only.base": ("F32", rng.integers(0, 2**30, 3, dtype=np.uint32)),
    }
    tuned = {
        "model.embed_tokens.weight": ("F32", rng.integers(0, 2**30, (9, 12), dtype=np.uint32)),
        "only.tuned": ("BF16", rng.integers(0, 2**15, 4, dtype=np.uint16)),
    }
    for part, rows in (("q_proj", 8), ("k_proj", 4), ("v_proj", 4)):
        tuned[f"{block}{part}.weight"] = ("F32", rng.integers(0, 2**30, (rows, 12), dtype=np.uint32))
        tuned[f"{block}{part}.bias"] = ("F32", rng.integers(0, 2**30, rows, dtype=np.uint32))
    return write(tmp_path / "base", base), write(tmp_path / "tuned", tuned, {"from": "tuned"})


def _split(codes: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A fused checkpoint with the names of a split one."""
    found = {}
    for name, array in codes.items():
        if "qkv_proj" in name:
            for part, rows in zip(("q_proj", "k_proj", "v_proj"), np.split(array, [8, 12]), strict=True):
                found[name.replace("qkv_proj", part)] = rows
        else:
            found[name] = array
    return found


@pytest.mark.parametrize("like", ["tuned", "base"])
@pytest.mark.parametrize("keep", ["all", "none", "random:30%", "top:20%", "bottom:20%"])
def test_fused_tensors_and_added_rows(resized, tmp_path, like, keep) -> None:
    (pruned,) = sa.prune(*resized, tmp_path / "out", keep=[keep], like=like)
    base, tuned = (_codes(folder) for folder in resized)
    side = base if like == "base" else tuned
    found = _codes(pruned.path)
    assert {n: a.shape for n, a in found.items()} == {n: a.shape for n, a in side.items()}
    old, new, got = _split(base), _split(tuned), _split(found)
    kept = 0
    for name in got:
        common = min(len(a[name]) for a in (old, new) if name in a)
        assert np.array_equal(got[name][common:], _split(side)[name][common:]), "added rows are the side's"
        if name in old and name in new:
            before, after, now = old[name][:common], new[name][:common], got[name][:common]
            is_new = (now == after) & (before != after)
            kept += int(is_new.sum())
            assert np.array_equal(np.where(is_new, after, before), now)
        else:
            assert np.array_equal(got[name], side[name])
    assert kept == pruned.record.kept_changed
    assert pruned.record.compared == 16 * 12 + 16 + 7 * 12
    config = json.loads((pruned.path / "config.json").read_text())
    assert config == ({} if like == "base" else {"from": "tuned"})


def test_what_is_not_matched_is_listed_with_where_it_went(resized, tmp_path) -> None:
    for like in ("tuned", "base"):
        (pruned,) = sa.prune(*resized, tmp_path / "out" / like, keep=["none"], like=like)
        found = [(lost.side, lost.name, lost.entries, lost.written) for lost in pruned.record.unmatched]
        assert found == [
            ("base", "only.base", 3, like == "base"),
            ("tuned", "model.embed_tokens.weight", 24, like == "tuned"),
            ("tuned", "only.tuned", 4, like == "tuned"),
        ]


def test_entries_of_a_mask_that_cannot_be_kept_are_counted(resized, tmp_path, write_checkpoint) -> None:
    base, tuned = resized
    bits = {name: ("BOOL", np.ones(codes.shape, dtype=np.uint8)) for name, codes in _codes(base).items()}
    sa.mask_convert(write(tmp_path / "bits", bits), tmp_path / "mask")
    keep = [f"mask:{tmp_path / 'mask'}"]
    for complement, kept in ((False, 292), (True, 0)):
        (pruned,) = sa.prune(
            base, tuned, tmp_path / f"out{complement}", keep=keep, force=True, complement=complement
        )
        assert (pruned.record.kept, pruned.record.selected_unmatched) == (kept, 3)
        assert any("3 entries where nothing was compared" in note for note in pruned.record.notes)


def test_sides_of_other_dtypes_are_refused_and_upcast_only_when_told(addition, tmp_path) -> None:
    base, tuned = addition / "base-bf16", addition / "grpo-fp32-seed0"
    with pytest.raises(UsageError, match="--upcast"):
        sa.prune(base, tuned, tmp_path / "out", keep=["top:5%"])
    assert list(tmp_path.iterdir()) == []
    written = sa.prune(base, tuned, tmp_path / "out", keep=["top:5%", "all", "none"], upcast=True)
    old = _flat({name: values(codes) for name, codes in load("base-bf16").items()}).view(np.uint32)
    new = _flat(_codes(tuned))
    top, everything, nothing = (_flat(_codes(c.path)) for c in written)
    assert np.array_equal(everything, new)
    assert np.array_equal(nothing, old)
    assert np.array_equal(top, np.where(top == new, new, old))
    # The wider side may be the base: then the result is wider than the side it is like, and says so.
    (other,) = sa.prune(tuned, base, tmp_path / "other", keep=["all"], upcast=True)
    assert np.array_equal(_flat(_codes(other.path)), old)
    assert any("30 tensors are stored in a wider dtype than in tuned" in note for note in other.record.notes)


def test_zeros_of_another_sign_and_nan_are_no_movement_but_all_takes_them(tmp_path) -> None:
    base = np.array([[0.0, 1.0, np.nan, 2.0, np.inf]], dtype=np.float32).view(np.uint32)
    tuned = np.array([[-0.0, np.nan, 3.0, 5.0, 1.0]], dtype=np.float32).view(np.uint32)
    paths = write(tmp_path / "b", {"w": ("F32", base)}), write(tmp_path / "t", {"w": ("F32", tuned)})
    keep = ["top:100%", "bottom:100%", "all"]
    top, bottom, everything = sa.prune(*paths, tmp_path / "out", keep=keep)
    wanted = np.array([[0.0, 1.0, np.nan, 5.0, 1.0]], dtype=np.float32).view(np.uint32)
    assert np.array_equal(_codes(top.path)["w"], wanted)
    assert np.array_equal(_codes(bottom.path)["w"], wanted)
    assert np.array_equal(_codes(everything.path)["w"], tuned)
    record = top.record
    assert (record.changed, record.moved, record.not_finite, record.kept) == (5, 2, 1, 2)
    assert "top:100% asks for 5 entries, which is more than moved" in record.notes
    assert any("no finite Δ²" in note for note in record.notes)


def test_block_scaled_fp8_is_refused(tmp_path) -> None:
    def side(name, scale):
        return write(
            tmp_path / name,
            {
                "w.weight": ("F8_E4M3", np.full((4, 4), 0x38, dtype=np.uint8)),
                "w.weight_scale_inv": ("F32", np.full((2, 2), scale, dtype=np.float32)),
            },
            blocks_config(2, 2),
        )

    with pytest.raises(UnsupportedFormatError, match="de-quantise"):
        sa.prune(side("base", 1.0), side("tuned", 2.0), tmp_path / "out", keep=["all"])


def test_torch_files_are_read_and_tied_names_are_said(tmp_path) -> None:
    import torch

    for name, fill in (("base", 1.0), ("tuned", 2.0)):
        (tmp_path / name).mkdir()
        weight = torch.full((3, 4), fill)
        state = {
            "model.embed_tokens.weight": weight,
            "lm_head.weight": weight,
            "t": torch.full((4, 3), fill).T,
        }
        torch.save(state, tmp_path / name / "pytorch_model.bin")
    (pruned,) = sa.prune(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", keep=["all"])
    assert pruned.record.aliases == {
        "model.embed_tokens.weight": "lm_head.weight"
    } or pruned.record.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    assert any("1 tied names are not written" in note for note in pruned.record.notes)
    assert all((codes == 0x40000000).all() for codes in _codes(pruned.path).values())


def test_refusals_leave_nothing_behind(addition, tmp_path) -> None:
    base, tuned = addition / BF16[0], addition / BF16[1]
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("x")
    with pytest.raises(OutputError, match="not empty"):
        sa.prune(base, tuned, tmp_path / "there", keep=["all"])
    with pytest.raises(OutputError, match="inside of the input"):
        sa.prune(base, tuned, tuned / "pruned", keep=["all"])
    with pytest.raises(UsageError, match="nothing is named"):
        sa.prune(base, tuned, tmp_path / "out", keep=[])
    with pytest.raises(UsageError, match="same checkpoint"):
        sa.prune(base, base, tmp_path / "out", keep=["all"])
    sa.mask_export(addition / "sft-bf16", tuned, tmp_path / "mask")
    with pytest.raises(MaskError, match="made from a base with the fingerprint"):
        sa.prune(base, tuned, tmp_path / "out", keep=["all", f"mask:{tmp_path / 'mask'}"])
    with pytest.raises(OutputError, match="inside of the input"):
        sa.prune(base, tuned, tmp_path / "mask" / "out", keep=[f"mask:{tmp_path / 'mask'}"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mask", "there"]


def test_a_full_disk_is_said_and_nothing_is_left(addition, tmp_path, monkeypatch) -> None:
    import errno

    def full(*_arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutputError, match="free space"):
        sa.prune(addition / BF16[0], addition / BF16[1], tmp_path / "out", keep=["all"])
    assert list(tmp_path.iterdir()) == []


KILLED_RUN = """
    import os, signal
    from sparsity_audit import prune, seams
    from sparsity_audit.api import prune as api
    api._UNIT_BYTES = 20000
    left = {count}
    def observer(point):
        global left
        if point == {point!r}:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
    seams.observer = observer
    prune({base!r}, {tuned!r}, {out!r}, keep=["top:5%", "random:5%"], workers=2)
"""


@pytest.mark.parametrize(
    ("point", "count"), [("unit compared", 3), ("unit pruned", 5), ("checkpoints written", 1)]
)
def test_a_killed_run_leaves_no_output_and_the_next_one_is_as_if_it_had_not_been(
    addition, tmp_path, monkeypatch, point, count
) -> None:
    base, tuned, out = addition / BF16[0], addition / BF16[1], tmp_path / "out"
    code = KILLED_RUN.format(count=count, point=point, base=str(base), tuned=str(tuned), out=str(out))
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    sa.prune(base, tuned, out, keep=["top:5%", "random:5%"])
    sa.prune(base, tuned, tmp_path / "whole", keep=["top:5%", "random:5%"])
    assert _files(out) == _files(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def _peak_bytes(folder: Path, rows: int) -> int:
    """Peak of numpy's and Python's memory while a tensor of rows × 4096 entries is pruned."""
    import tracemalloc

    codes = np.arange(rows * 4096, dtype=np.uint32).reshape(rows, 4096)
    paths = [write(folder / name, {"w": ("F32", codes + n)}) for n, name in enumerate(("base", "tuned"))]
    tracemalloc.start()
    sa.prune(*paths, folder / "out", keep=["random:5%"], workers=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_memory_does_not_grow_with_the_tensor(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(api, "load_kernel", lambda *_a, **_k: NumpyKernel())  # numba's own memory would show
    peaks = []
    for rows in (512, 2048):
        (tmp_path / f"{rows}").mkdir()
        peaks.append(_peak_bytes(tmp_path / f"{rows}", rows))
    assert peaks[1] < peaks[0] + (1 << 20), peaks  # the tensor grew by 24 MiB a side


def test_the_record_is_described_by_its_schema(resized, tmp_path) -> None:
    (pruned,) = sa.prune(*resized, tmp_path / "out", keep=["top:5%"])
    record = json.loads((pruned.path / "prune.json").read_bytes())
    Draft202012Validator(prune_json_schema()).validate(record)
    assert record["format"] == "sparsity-audit/prune"
    assert record["version"] == 1
    assert record == json.loads(prune_to_json(pruned.record))
    assert (
        record["kept"] == sum(tensor["kept"] for tensor in record["tensors"]) == asdict(pruned.record)["kept"]
    )


def test_runs_outside_of_all_parts_are_found() -> None:
    from sparsity_audit.align.records import TensorSlice
    from sparsity_audit.types import ByteRange, DType, TensorSpec

    spec = TensorSpec(name="w", dtype=DType.F32, shape=(10, 3), file=0, extent=ByteRange(start=0, stop=120))
    part = TensorSlice(spec=spec, start_entry=3, shape=(4, 3), num_runs=2, step=12)
    assert passes.uncovered_runs(spec, [part]) == [(0, 3), (9, 15), (21, 30)]
    assert passes.uncovered_runs(spec, [TensorSlice.whole(spec)]) == []
    assert passes.uncovered_runs(spec, []) == [(0, 30)]
    assert execute.OpenFiles is passes.OpenFiles
