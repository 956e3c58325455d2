"""A directory or file is recognised by what it holds; what cannot be read is one clear error."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sparsity_audit.checkpoint.opening import open_checkpoint
from sparsity_audit.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    SparsityAuditError,
    UnsupportedFormatError,
)

A, B = {"a": torch.arange(3.0)}, {"b": torch.ones(2, 2)}


def write_index(folder: Path, weight_map: object, *, name: str = "model.safetensors.index.json") -> None:
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_opening_imports_neither_torch_nor_numpy():
    code = (
        "import sys, sparsity_audit.checkpoint.opening; "
        "assert not {'torch', 'numpy', 'transformers', 'huggingface_hub'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_reading_a_torch_file_never_imports_torch(tmp_path):
    torch.save(A, tmp_path / "m.bin")
    code = (
        "import sys; from sparsity_audit.checkpoint.opening import open_checkpoint; "
        "from sparsity_audit.checkpoint.reading import read_entries; "
        "from sparsity_audit.checkpoint.store import LocalFile; "
        f"c = open_checkpoint({str(tmp_path / 'm.bin')!r}); out = bytearray(12); "
        "read_entries(LocalFile(c.files[0]), c.tensors['a'], 0, memoryview(out)); "
        "assert out[7] == 0x3f and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_safetensors_shards_win_over_torch_files_and_a_note_says_so(tmp_path):
    save_file(A, tmp_path / "model.safetensors")
    torch.save(B, tmp_path / "pytorch_model.bin")
    catalogue = open_checkpoint(tmp_path)
    assert list(catalogue.tensors) == ["a"]
    assert catalogue.notes == (f"{tmp_path}: read model.safetensors; ignored pytorch_model.bin",)


def test_torch_shards_with_an_index_are_read(tmp_path):
    torch.save(A, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save(B, tmp_path / "pytorch_model-00002-of-00002.bin")
    weight_map = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    write_index(tmp_path, weight_map, name="pytorch_model.bin.index.json")
    catalogue = open_checkpoint(tmp_path)
    assert list(catalogue.tensors) == ["a", "b"]
    assert [catalogue.tensors[n].file for n in "ab"] == [0, 1]


def test_an_index_may_name_a_tied_tensor(tmp_path):
    torch.save({"a": A["a"], "tied": A["a"]}, tmp_path / "pytorch_model-00001-of-00001.bin")
    weight_map = dict.fromkeys(("a", "tied"), "pytorch_model-00001-of-00001.bin")
    write_index(tmp_path, weight_map, name="pytorch_model.bin.index.json")
    assert open_checkpoint(tmp_path).aliases == {"tied": "a"}


def test_trainer_state_beside_a_torch_checkpoint_is_not_read(tmp_path):
    torch.save(A, tmp_path / "pytorch_model.bin")
    for name in ("optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state_0.pth"):
        (tmp_path / name).write_bytes(b"not a checkpoint")
    catalogue = open_checkpoint(tmp_path)
    assert list(catalogue.tensors) == ["a"]
    assert catalogue.notes == ()


def test_the_model_is_preferred_over_consolidated_and_adapter_files(tmp_path):
    save_file(A, tmp_path / "model-00001-of-00002.safetensors")
    save_file(B, tmp_path / "model-00002-of-00002.safetensors")
    save_file(A | B, tmp_path / "consolidated.safetensors")
    save_file({"lora": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    catalogue = open_checkpoint(tmp_path)
    assert list(catalogue.tensors) == ["a", "b"]
    assert "ignored adapter_model.safetensors, consolidated.safetensors" in catalogue.notes[0]


def test_torch_shards_without_an_index_are_preferred_over_other_torch_files(tmp_path):
    torch.save(A, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save(B, tmp_path / "pytorch_model-00002-of-00002.bin")
    torch.save({"lora": torch.ones(1)}, tmp_path / "adapter_model.bin")
    assert list(open_checkpoint(tmp_path).tensors) == ["a", "b"]


def test_hidden_files_are_not_checkpoints(tmp_path):
    save_file(A, tmp_path / "weights.safetensors")
    (tmp_path / "._weights.safetensors").write_bytes(b"\0\5\x16\7")
    assert list(open_checkpoint(tmp_path).tensors) == ["a"]


def test_a_tensor_in_two_files_names_both_and_the_remedy(tmp_path):
    save_file(A, tmp_path / "model.safetensors")
    save_file(A, tmp_path / "model-00001-of-00001.safetensors")
    with pytest.raises(CorruptCheckpointError) as caught:
        open_checkpoint(tmp_path)
    message = str(caught.value)
    assert "'a' stands in model-00001-of-00001.safetensors and in model.safetensors" in message
    assert "remedy: name the file to read, or move the other away" in message


def test_a_missing_shard_is_named_with_and_without_an_index(tmp_path):
    save_file(A, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointNotFoundError, match=r"model-00002-of-00002\.safetensors"):
        open_checkpoint(tmp_path)
    write_index(tmp_path, {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"})
    with pytest.raises(CheckpointNotFoundError, match=r"index\.json: names the shard model-00002-of-00002"):
        open_checkpoint(tmp_path)


def test_a_tensor_that_is_not_in_its_shard_contradicts_the_index(tmp_path):
    save_file(A, tmp_path / "x.safetensors")
    write_index(tmp_path, {"a": "x.safetensors", "b": "x.safetensors"})
    with pytest.raises(CorruptCheckpointError, match=r"places 'b' in x\.safetensors, which does not hold it"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "shard",
    ["../x.safetensors", "/etc/passwd", "..", ".", "", "a/b", "a\0b", "\ud800", "x" * 300, 3, [[]], None],
)
def test_an_index_that_leaves_the_directory_is_refused(tmp_path, shard):
    write_index(tmp_path, {"a": shard})
    with pytest.raises(CorruptCheckpointError, match="a file name inside the directory") as caught:
        open_checkpoint(tmp_path)
    str(caught.value).encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"weight_map": ' + b"9" * 5000 + b"}", "not JSON"),
        (b"[]", "not a JSON object"),
        (b"{}", "has no weight_map"),
        (b'{"weight_map": {}}', "has no weight_map"),
        (b'{"weight_map": []}', "has no weight_map"),
    ],
)
def test_a_malformed_index_is_corrupt(tmp_path, content, message):
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert "index.json" in str(caught.value)


@pytest.mark.parametrize("reference", ["x" * 5000, "~nobody-of-this-name/model", "a\0b", "/no/such/place"])
def test_a_path_that_cannot_exist_is_not_found(reference):
    with pytest.raises(SparsityAuditError) as caught:
        open_checkpoint(reference)
    assert len(str(caught.value)) < 8000


def test_directories_without_weights_are_not_found(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match="holds no files"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointNotFoundError, match="1 files, no weights among them"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (b"", CorruptCheckpointError, "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", CorruptCheckpointError, "git lfs pull"),
        (b"GGUF\x03\0\0\0\0\0\0\0", UnsupportedFormatError, "GGUF"),
        (b"<!DOCTYPE html><html>", UnsupportedFormatError, "neither safetensors nor a zip"),
        (b"\x80\x04K\x01.", UnsupportedFormatError, "a bare pickle"),
        (b"x", UnsupportedFormatError, "neither safetensors nor a zip"),
    ],
)
def test_a_file_of_another_kind_is_refused_with_what_it_seems_to_be(tmp_path, content, error, message):
    for name in ("weights", "pytorch_model.bin"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(error, match=message) as caught:
            open_checkpoint(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)


def test_the_content_decides_and_not_the_suffix(tmp_path):
    save_file(A, tmp_path / "really.bin")
    torch.save(B, tmp_path / "other.safetensors")
    torch.save(B, tmp_path / "checkpoint")
    assert list(open_checkpoint(tmp_path / "really.bin").tensors) == ["a"]
    assert list(open_checkpoint(tmp_path / "other.safetensors").tensors) == ["b"]
    assert list(open_checkpoint(tmp_path / "checkpoint").tensors) == ["b"]
