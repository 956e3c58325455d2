"""Model folders: bit-exact, deterministic, whole or absent, readable by the audit; and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sparsity_audit as sa
from sparsity_audit.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    OutputError,
    SparsityAuditError,
    UnsupportedFormatError,
)
from sparsity_audit.lab.folder import load_model, resolve_base, save_model
from sparsity_audit.lab.model import SIZES, Llama, initialise
from sparsity_audit.lab.names import BASES

FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture
def model() -> Llama:
    return initialise(SIZES["tiny"], generator=torch.Generator().manual_seed(0))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_frozen_checkpoints_load_and_are_written_again_to_the_same_bytes(
    addition: Path, tmp_path: Path
) -> None:
    for name, dtype in (("base-bf16", "bf16"), ("grpo-fp32-seed0", "fp32")):
        save_model(load_model(addition / name), tmp_path / name, dtype=dtype)
        written = (tmp_path / name / "model.safetensors").read_bytes()
        assert written == (addition / name / "model.safetensors").read_bytes()
        frozen = json.loads((addition / name / "config.json").read_text())
        assert json.loads((tmp_path / name / "config.json").read_text()).items() >= frozen.items()


def test_fp32_weights_survive_bit_for_bit_and_bf16_rounds_to_nearest_even(
    model: Llama, tmp_path: Path
) -> None:
    save_model(model, tmp_path / "fp32", dtype="fp32")
    save_model(model, tmp_path / "bf16", dtype="bf16")
    full, rounded = load_model(tmp_path / "fp32").state_dict(), load_model(tmp_path / "bf16").state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(full[name].view(torch.int32), weight.view(torch.int32))
        assert torch.equal(rounded[name], weight.bfloat16().float())


def test_the_same_weights_give_the_same_folder(model: Llama, tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_model(model, tmp_path / "deep" / name, dtype="bf16")
    assert contents(tmp_path / "deep" / "a") == contents(tmp_path / "deep" / "b")
    assert set(contents(tmp_path / "deep" / "a")) == FILES


def test_the_audit_reads_the_folder(model: Llama, addition: Path, tmp_path: Path) -> None:
    save_model(model, tmp_path / "new", dtype="bf16")
    found = sa.inspect(tmp_path / "new")
    assert (found.num_parameters, found.warnings) == (148_928, ())
    assert found.config.dtype == "bfloat16"
    report = sa.diff(addition / "base-bf16", tmp_path / "new")
    assert sum(tensor.entries for tensor in report.tensors) == 148_928


def test_a_folder_that_holds_something_is_refused_unless_it_may_be_replaced(
    model: Llama, tmp_path: Path
) -> None:
    folder = tmp_path / "taken"
    folder.mkdir()
    save_model(model, folder, dtype="bf16")
    with pytest.raises(OutputError, match="exists and is not empty"):
        save_model(model, folder, dtype="fp32")
    (folder / "model.safetensors").write_bytes(b"")
    save_model(model, folder, dtype="bf16", overwrite=True, beside={"note.txt": b"x"})
    assert set(contents(folder)) == FILES | {"note.txt"}
    load_model(folder)


def test_an_interrupted_write_leaves_no_folder(
    model: Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OutputError, match="No space left"):
        save_model(model, tmp_path / "x", dtype="bf16")
    assert list(tmp_path.iterdir()) == []


def test_shipped_bases_are_known_by_name_and_lie_on_the_bf16_grid() -> None:
    for name in BASES:
        folder = resolve_base(name)
        assert contents(folder).keys() >= FILES | {"pretrain.json", "metrics.csv", "metrics.jsonl"}
        stored = load_file(folder / "model.safetensors")
        assert {weight.dtype for weight in stored.values()} == {torch.bfloat16}
        assert load_model(folder).config == SIZES["tiny"]
    assert resolve_base("some/path") == Path("some/path")


def broken(tmp_path: Path, **changes: object) -> Path:
    """The shipped base with other values in its config."""
    folder = tmp_path / "broken"
    shutil.copytree(resolve_base("single"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model_type": "qwen2"}, UnsupportedFormatError, "model_type is 'qwen2'"),
        ({"tie_word_embeddings": True}, UnsupportedFormatError, "tie_word_embeddings is True"),
        ({"num_key_value_heads": 2}, UnsupportedFormatError, "num_key_value_heads is 2"),
        ({"rope_scaling": {"factor": 2.0}}, UnsupportedFormatError, "rope_scaling is"),
        ({"hidden_act": "gelu"}, UnsupportedFormatError, "hidden_act is 'gelu'"),
        ({"vocab_size": 32000}, UnsupportedFormatError, "vocab_size is 32000"),
        ({"eos_token_id": 3}, UnsupportedFormatError, "eos_token_id is 3"),
        ({"hidden_size": "64"}, CorruptCheckpointError, "hidden_size is '64'"),
        ({"hidden_size": True}, CorruptCheckpointError, "hidden_size is True"),
        ({"num_hidden_layers": -1}, CorruptCheckpointError, "num_hidden_layers is -1"),
        ({"hidden_size": 66}, CorruptCheckpointError, "hidden_size 66 for 4 heads"),
        ({"hidden_size": 64.5}, CorruptCheckpointError, "hidden_size is 64.5"),
        ({"hidden_size": 10**9}, CorruptCheckpointError, "hidden_size is 1000000000"),
        ({"intermediate_size": 160}, CorruptCheckpointError, "down_proj.weight: shape"),
        ({"num_hidden_layers": 2}, CorruptCheckpointError, "is not part of such a model"),
        ({"num_hidden_layers": 4}, CorruptCheckpointError, "is missing"),
    ],
)
def test_a_config_that_asks_for_something_else_is_refused(
    tmp_path: Path, changes: dict[str, object], error: type[SparsityAuditError], message: str
) -> None:
    with pytest.raises(error, match=message):
        load_model(broken(tmp_path, **changes))


@pytest.mark.parametrize("text", ["", "[]", "{", "null"])
def test_a_config_that_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    folder = broken(tmp_path)
    (folder / "config.json").write_text(text)
    with pytest.raises(CorruptCheckpointError, match=r"config\.json"):
        load_model(folder)


def test_missing_files_and_broken_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"no config\.json\n.*one of mix, single"):
        load_model(tmp_path / "nowhere")
    folder = broken(tmp_path)
    (folder / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    with pytest.raises(CorruptCheckpointError, match=r"model\.safetensors"):
        load_model(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointNotFoundError, match=r"no model\.safetensors"):
        load_model(folder)


def test_rotations_in_the_newer_place_of_the_config_are_read(tmp_path: Path) -> None:
    folder = broken(tmp_path, rope_parameters={"rope_theta": 500.0, "rope_type": "default"})
    assert load_model(folder).config.rope_theta == 500.0
    other = broken(tmp_path / "other", rope_parameters={"rope_theta": 500.0, "rope_type": "llama3"})
    with pytest.raises(UnsupportedFormatError, match="rope_type"):
        load_model(other)


def test_a_foreign_tensor_is_refused(tmp_path: Path) -> None:
    folder = broken(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "model.rotary_emb.inv_freq": torch.zeros(8)}, folder / "model.safetensors")
    with pytest.raises(CorruptCheckpointError, match="rotary_emb"):
        load_model(folder)
