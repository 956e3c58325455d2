"""A patch rebuilds the tuned checkpoint bit for bit, or nothing is written."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from sparsity_audit import patch_apply, patch_info, patch_make
from sparsity_audit.api import patch as api
from sparsity_audit.checkpoint.opening import open_checkpoint
from sparsity_audit.errors import (
    AlignmentError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    OutputError,
    UnsupportedFormatError,
    UsageError,
)
from sparsity_audit.passes.patch_encoding import SEGMENT_ENTRIES

GOLDEN = Path(__file__).parents[1] / "golden" / "patch-v1"
DATA = Path(__file__).parents[1] / "data" / "addition"


def write(folder: Path, tensors: dict[str, torch.Tensor], **files: str) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    for name, text in files.items():
        (folder / f"{name}.json").write_text(text)
    return folder


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    large = torch.randn(5, SEGMENT_ENTRIES // 2 + 3, generator=draw).bfloat16()
    return {
        "large": large,
        "few": torch.randn(300, generator=draw),
        "same": torch.randn(4, 4, generator=draw).half(),
        "all": torch.randint(0, 100, (5, 3), generator=draw),
        "scalar": torch.tensor(1.0),
        "empty": torch.zeros(0, 3),
    }


def tune(tensors: dict[str, torch.Tensor], seed: int = 1) -> dict[str, torch.Tensor]:
    """Some entries of each kind of density; −0 for +0 and another NaN are changes."""
    draw = np.random.default_rng(seed)
    out = {name: tensor.clone() for name, tensor in tensors.items()}
    large = out["large"].view(-1)
    where = torch.from_numpy(np.flatnonzero(draw.random(large.numel()) < 1e-4))
    large[where] = torch.randn(len(where)).bfloat16()
    large[-1] = -0.0 if large[-1] == 0 else 0.0
    out["few"][:9] = torch.tensor([0.0, -0.0, float("nan"), float("inf"), 1, 2, 3, 4, 5])
    out["all"] += 1
    out["scalar"] = torch.tensor(-1.0)
    return out


def same_bytes(one: Path, other: Path) -> None:
    left, right = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype
        raw = (
            t.contiguous().reshape(-1).view(torch.uint8) if t.numel() else t for t in (tensor, right[name])
        )
        assert torch.equal(*raw), name


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("pair")
    base = weights()
    return (
        write(root / "base", base, config='{"a": 1}', tokenizer="{}"),
        write(root / "tuned", tune(base), config='{"a": 2}', tokenizer="{}"),
    )


@pytest.fixture(scope="module")
def made(pair, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("made") / "patch"
    patch_make(pair[0], [pair[1]], target)
    return target


@pytest.mark.parametrize("workers", [1, 3])
def test_applying_a_patch_gives_the_tuned_bytes(pair, made, tmp_path, workers):
    patch_apply(pair[0], [made], tmp_path / "out", workers=workers)
    same_bytes(pair[1], tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == '{"a": 2}'
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert not (made / "files" / "tokenizer.json").exists()


def test_a_patch_has_the_same_bytes_for_any_number_of_workers(pair, made, tmp_path):
    patch_make(pair[0], [pair[1]], tmp_path / "again", workers=4)
    for file in (p for p in made.rglob("*") if p.is_file()):
        assert (tmp_path / "again" / file.relative_to(made)).read_bytes() == file.read_bytes()


def test_info_counts_what_is_stored_and_what_other_encodings_would_take(pair, made):
    (info,) = patch_info(made)
    base, tuned = (load_file(side / "model.safetensors") for side in pair)
    changed = 0
    for name in base:
        width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[base[name].element_size()]
        changed += int((base[name].view(width) != tuned[name].view(width)).sum())
    assert info.changed == changed
    assert info.sizes.dense == sum(t.nbytes for t in tuned.values())
    assert info.sizes.stored == sum(p.stat().st_size for p in made.rglob("*") if p.is_file())
    values = info.sizes.indices - 4 * changed
    assert values == sum(e.changed for e in info.encodings) * 2 + 2 * 10 + 6 * 15
    assert info.sizes.best <= min(info.sizes.indices, info.sizes.mask, info.sizes.gaps)
    assert {e.encoding for e in info.encodings} >= {"none", "dense"}


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_pair_of_checkpoints_is_rebuilt(tmp_path_factory, data):
    root = tmp_path_factory.mktemp("any")
    dtypes = [torch.bfloat16, torch.float32, torch.int8, torch.float64]
    sides: list[dict[str, torch.Tensor]] = [{}, {}]
    for name in "abcd":
        shape = tuple(data.draw(st.lists(st.integers(0, 9), max_size=3)))
        dtype = data.draw(st.sampled_from(dtypes))
        seed = data.draw(st.integers(0, 99))
        tensor = torch.from_numpy(np.random.default_rng(seed).integers(-99, 99, shape)).to(dtype)
        there = data.draw(st.sampled_from(["both", "base", "tuned", "other dtype"]))
        if there != "tuned":
            sides[0][name] = tensor
        if there != "base":
            other = tensor.to(torch.float16) if there == "other dtype" else tensor.clone()
            changes = data.draw(st.integers(0, other.numel()))
            if changes:
                other.view(-1)[:changes] += 1
            sides[1][name] = other
    sides[0]["same"] = sides[1]["same"] = torch.ones(3)
    base, tuned = (write(root / name, side) for name, side in zip(("base", "tuned"), sides, strict=True))
    patch_make(base, [tuned], root / "patch")
    patch_apply(base, [root / "patch"], root / "out")
    same_bytes(tuned, root / "out")


def test_a_tensor_of_which_nearly_every_entry_changed_is_stored_dense_and_rebuilt(tmp_path):
    before = torch.arange(27, dtype=torch.float32).to(torch.bfloat16)
    after = before.clone()
    after[:26] += 1
    base, tuned = write(tmp_path / "base", {"a": before}), write(tmp_path / "tuned", {"a": after})
    patch_make(base, [tuned], tmp_path / "patch")
    (tensor,) = json.loads((tmp_path / "patch" / "patch.json").read_text())["tensors"]
    assert (tensor["encoding"], tensor["changed"]) == ("dense", 26)
    patch_apply(base, [tmp_path / "patch"], tmp_path / "out")
    same_bytes(tuned, tmp_path / "out")


def test_a_series_is_a_chain_that_ends_at_its_last_step(pair, tmp_path):
    steps = [pair[1]]
    for number in (2, 3):
        tensors = tune(load_file(steps[-1] / "model.safetensors"), seed=number)
        tensors[f"new-{number}"] = torch.arange(number)
        tensors.pop("same", None)
        steps.append(write(tmp_path / f"step-{number}", tensors))
    infos = patch_make(pair[0], steps, tmp_path / "chain")
    assert [Path(info.path).name for info in infos] == ["0001", "0002", "0003"]
    patch_apply(pair[0], [tmp_path / "chain"], tmp_path / "out")
    same_bytes(steps[-1], tmp_path / "out")
    patch_apply(pair[0], [tmp_path / "chain" / "0001", tmp_path / "chain" / "0002"], tmp_path / "two")
    same_bytes(steps[1], tmp_path / "two")
    with pytest.raises(UsageError, match="order in which they were made"):
        patch_apply(pair[0], [tmp_path / "chain" / "0001", tmp_path / "chain" / "0003"], tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_one_side_twice_in_a_row_is_refused(pair, tmp_path):
    with pytest.raises(UsageError, match="are the same checkpoint"):
        patch_make(pair[0], [pair[0]], tmp_path / "patch")
    with pytest.raises(UsageError, match="are the same checkpoint"):
        patch_make(pair[0], [pair[1], pair[1]], tmp_path / "patch")
    infos = patch_make(pair[0], [pair[1], pair[0]], tmp_path / "back")  # a way back is no mistake
    assert [info.tuned.rpartition("/")[2] for info in infos] == ["tuned", "base"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back"]


def test_a_patch_in_the_place_of_a_checkpoint_is_called_one(pair, made, tmp_path):
    (tmp_path / "series").mkdir()
    shutil.copytree(made, tmp_path / "series" / "0001")
    for patch in (made, tmp_path / "series"):
        with pytest.raises(UsageError, match=r"is a patch(?s:.*)patch apply BASE PATCH"):
            patch_apply(patch, [pair[0]], tmp_path / "out")
        with pytest.raises(UsageError, match="is a patch"):
            patch_make(pair[0], [patch], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_base_is_refused_and_nothing_is_written(pair, made, tmp_path):
    tensors = load_file(pair[0] / "model.safetensors")
    tensors["same"][0, 0] += 1
    other = write(tmp_path / "other", tensors)
    with pytest.raises(UsageError, match=r"'same': has sha256"):
        patch_apply(other, [made], tmp_path / "out")
    tensors["few"] = torch.zeros(2)
    with pytest.raises(UsageError, match="F32 of shape"):
        patch_apply(write(tmp_path / "shape", tensors), [made], tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "shape"]


def test_a_truncated_or_damaged_patch_never_gives_other_bytes(pair, made, tmp_path):
    file = "patch.safetensors"
    whole = (made / file).read_bytes()
    header = int.from_bytes(whole[:8], "little")
    draw = np.random.default_rng(0)
    refused = 0
    for number in range(25):
        folder = shutil.copytree(made, tmp_path / f"p{number}")
        damaged = bytearray(whole)
        if number == 0:
            damaged = damaged[:-5]
        else:
            damaged[draw.integers(8 + header, len(whole))] ^= 1 << draw.integers(8)
        (folder / file).write_bytes(damaged)
        try:
            patch_apply(pair[0], [folder], tmp_path / "out")
        except CorruptCheckpointError:
            refused += 1
            assert not (tmp_path / "out").exists()
        else:  # a bit that nothing is read from: where the positions of a whole tensor would end
            same_bytes(pair[1], tmp_path / "out")
            shutil.rmtree(tmp_path / "out")
        shutil.rmtree(folder)
    assert refused >= 20


def test_a_manifest_that_is_no_manifest_is_refused(made, tmp_path):
    folder = shutil.copytree(made, tmp_path / "p")
    record = json.loads((made / "patch.json").read_text())
    outside = {"name": "../x", "num_bytes": 1, "sha256": "0" * 64, "stored": True}
    for change, error in (
        ({"version": 2}, UnsupportedFormatError),
        ({"format": "else"}, UnsupportedFormatError),
        ({"codec": "lzma"}, CorruptCheckpointError),
        ({"tensors": [*record["tensors"], record["tensors"][0]]}, CorruptCheckpointError),
        ({"tensors": [record["tensors"][0] | {"shape": [2**70]}]}, CorruptCheckpointError),
        ({"tensors": [record["tensors"][1] | {"changed": 1}]}, CorruptCheckpointError),
        (
            {"files": [outside]},
            CorruptCheckpointError,
        ),
        ({"aliases": {"x": "nowhere"}}, CorruptCheckpointError),
    ):
        (folder / "patch.json").write_text(json.dumps(record | change))
        with pytest.raises(error):
            patch_apply(DATA / "base-bf16", [folder], tmp_path / "out")
    (folder / "patch.json").unlink()
    with pytest.raises(UnsupportedFormatError, match="is no patch"):
        patch_info(folder)


def test_a_missing_shard_is_named(tmp_path):
    base, tuned = DATA / "base-bf16", DATA / "grpo-bf16-seed0"
    patch_make(base, [tuned], tmp_path / "p")
    (tmp_path / "p" / "patch.safetensors").rename(tmp_path / "p" / "patch-00001-of-00002.safetensors")
    with pytest.raises(CheckpointNotFoundError, match="patch-00002-of-00002"):
        patch_apply(base, [tmp_path / "p"], tmp_path / "out")


def test_checkpoints_that_share_no_tensor_are_refused(tmp_path):
    base = write(tmp_path / "base", {"a": torch.ones(2)})
    tuned = write(tmp_path / "tuned", {"b": torch.ones(2)})
    with pytest.raises(AlignmentError, match="none of 1 tensors"):
        patch_make(base, [tuned], tmp_path / "p")
    assert not (tmp_path / "p").exists()
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "mine").touch()
    with pytest.raises(OutputError, match="not empty"):
        patch_make(base, [tuned], tmp_path / "p")


def test_tied_tensors_are_stored_once(tmp_path):
    table = torch.ones(4, 2)
    for name, value in (("base", 1.0), ("tuned", 2.0)):
        (tmp_path / name).mkdir()
        table = torch.full((4, 2), value)
        torch.save({"embed": table, "head": table}, tmp_path / name / "pytorch_model.bin")
    patch_make(tmp_path / "base", [tmp_path / "tuned"], tmp_path / "p")
    notes: list[str] = []
    patch_apply(tmp_path / "base", [tmp_path / "p"], tmp_path / "out", on_note=notes.append)
    assert list(load_file(tmp_path / "out" / "model.safetensors")) == ["embed"]
    assert any("second names of tied" in note for note in notes)


def test_zstd_makes_a_smaller_patch_that_gives_the_same_bytes(pair, made, tmp_path):
    pytest.importorskip("zstandard", reason="the extra `zstd` is not installed")
    patch_make(pair[0], [pair[1]], tmp_path / "p", codec="zstd")
    patch_apply(pair[0], [tmp_path / "p"], tmp_path / "out")
    same_bytes(pair[1], tmp_path / "out")
    file = tmp_path / "p" / "patch.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-3] ^= 255
    file.write_bytes(damaged)
    with pytest.raises(CorruptCheckpointError):
        patch_apply(pair[0], [tmp_path / "p"], tmp_path / "no")


@pytest.mark.parametrize("point", ["tensor encoded", "tensor patched", "checkpoints written"])
def test_a_killed_run_leaves_nothing_under_the_name_and_the_next_one_finishes(pair, made, tmp_path, point):
    target = tmp_path / "out"
    making = point == "tensor encoded"
    call = (
        f"patch_make({str(pair[0])!r}, [{str(pair[1])!r}], {str(target)!r})"
        if making
        else f"patch_apply({str(pair[0])!r}, [{str(made)!r}], {str(target)!r})"
    )
    code = (
        "import os, signal\n"
        "from sparsity_audit import patch_apply, patch_make, seams\n"
        f"seams.observer = lambda p: p == {point!r} and os.kill(os.getpid(), signal.SIGKILL)\n{call}\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert not target.exists()
    if making:
        patch_make(pair[0], [pair[1]], target)
        assert patch_info(target)[0].changed
    else:
        patch_apply(pair[0], [made], target)
        same_bytes(pair[1], target)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def golden_pair(folder: Path) -> None:
    base = {
        "dense": torch.arange(6).reshape(2, 3),
        "gap": torch.arange(900, dtype=torch.float32),
        "indices": torch.zeros(3_000, dtype=torch.int8),
        "mask": torch.arange(64, dtype=torch.float32).bfloat16(),
        "same": torch.ones(2, 2).half(),
    }
    tuned = {name: tensor.clone() for name, tensor in base.items()}
    tuned["dense"] += 1
    tuned["gap"][[3, 4, 700]] = -1.0
    tuned["indices"][2_999] = 1
    tuned["mask"][::2] += 0.5
    write(folder / "base", base, config="{}")
    write(folder / "tuned", tuned, config='{"a": 1}')


def test_making_the_same_patch_gives_the_golden_bytes(tmp_path, monkeypatch):
    golden_pair(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(api, "tool_name", lambda: "sparsity-audit golden")
    patch_make("base", ["tuned"], "patch")
    golden = {p.relative_to(GOLDEN): p.read_bytes() for p in GOLDEN.rglob("*") if p.is_file()}
    found = {p.relative_to("patch"): p.read_bytes() for p in Path("patch").rglob("*") if p.is_file()}
    assert found == golden


def test_a_patch_of_version_1_still_applies(tmp_path):
    golden_pair(tmp_path)
    patch_apply(tmp_path / "base", [GOLDEN], tmp_path / "out")
    same_bytes(tmp_path / "tuned", tmp_path / "out")
    (info,) = patch_info(GOLDEN)
    assert {e.encoding for e in info.encodings} >= {"dense", "mask", "none"}


def test_the_safetensors_library_reads_what_a_patch_stores():
    parts = load_file(GOLDEN / "patch.safetensors")
    assert parts["gap.values"].tolist() == [-1.0, -1.0, -1.0]
    assert parts["mask.values"].dtype == torch.bfloat16


def test_a_patch_applies_to_any_form_of_its_base(tmp_path):
    base, tuned = DATA / "base-bf16", DATA / "grpo-bf16-lr1e-4-seed0"
    patch_make(base, [tuned], tmp_path / "p")
    (tmp_path / "torch").mkdir()
    torch.save(load_file(base / "model.safetensors"), tmp_path / "torch" / "pytorch_model.bin")
    shutil.copy(base / "config.json", tmp_path / "torch")
    patch_apply(tmp_path / "torch", [tmp_path / "p"], tmp_path / "out")
    same_bytes(tuned, tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").config == open_checkpoint(tuned).config
