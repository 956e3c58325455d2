"""`inspect` says what the headers say, and where config.json says otherwise."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest

import sparsity_audit
from sparsity_audit.api.inspect import inspect, tensor_rows
from sparsity_audit.errors import CheckpointNotFoundError

DATA = Path(__file__).parents[1] / "data" / "addition"
WIDTH = {"F32": 4, "BF16": 2, "I64": 8, "F8_E4M3": 1}


def write(
    folder: Path, files: dict[str, dict[str, tuple[str, list[int]]]], config: dict | None = None
) -> Path:
    for file, tensors in files.items():
        header, end = {}, 0
        for name, (dtype, shape) in tensors.items():
            begin, count = end, 1
            for size in shape:
                count *= size
            end += count * WIDTH[dtype]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        (folder / file).write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_real_checkpoint_is_described_from_its_headers():
    found = inspect(DATA / "base-bf16")
    assert (found.num_parameters, found.num_entries, found.num_bytes) == (148_928, 148_928, 297_856)
    assert found.num_tensors == len(found.tensors) == 30
    assert [(d.dtype, d.num_tensors) for d in found.dtypes] == [("bf16", 30)]
    assert [(f.name, f.num_tensors) for f in found.files] == [("model.safetensors", 30)]
    assert (found.config.model_type, found.config.dtype) == ("llama", "bfloat16")
    assert found.config.tie_word_embeddings is False
    assert found.ties == {}
    assert found.warnings == ()
    assert found.resolved == str((DATA / "base-bf16").resolve())


def test_tensors_carry_dtype_shape_and_their_shard(tmp_path):
    files = {
        "model-00001-of-00002.safetensors": {"b": ("F32", [2, 3]), "ids": ("I64", [1, 4])},
        "model-00002-of-00002.safetensors": {"a": ("BF16", []), "empty": ("BF16", [0, 5])},
    }
    found = inspect(write(tmp_path, files))
    assert [(t.name, t.dtype, t.shape, t.num_entries, t.num_bytes, t.file[6:11]) for t in found.tensors] == [
        ("a", "bf16", (), 1, 2, "00002"),
        ("b", "fp32", (2, 3), 6, 24, "00001"),
        ("empty", "bf16", (0, 5), 0, 0, "00002"),
        ("ids", "int64", (1, 4), 4, 32, "00001"),
    ]
    assert (found.num_entries, found.num_parameters) == (11, 7)
    assert [(d.dtype, d.num_entries) for d in found.dtypes] == [("fp32", 6), ("int64", 4), ("bf16", 1)]


def test_totals_agree_with_their_parts(tmp_path):
    found = inspect(DATA / "grpo-fp32-seed0")
    assert found.num_entries == sum(t.num_entries for t in found.tensors)
    assert found.num_entries == sum(d.num_entries for d in found.dtypes)
    assert (
        found.num_bytes == sum(t.num_bytes for t in found.tensors) == sum(d.num_bytes for d in found.dtypes)
    )
    assert found.num_tensors == sum(f.num_tensors for f in found.files)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_a_claimed_dtype_that_is_not_the_stored_one_is_a_warning(tmp_path, key):
    write(tmp_path, {"model.safetensors": {"w": ("F32", [4]), "norm": ("BF16", [2])}}, {key: "bfloat16"})
    found = inspect(tmp_path)
    assert found.config.dtype == "bfloat16"
    assert found.warnings == ("config.json claims bf16, but 4 fp32 and 2 bf16 entries are stored",)


def test_integer_tensors_do_not_contradict_a_claimed_float_dtype(tmp_path):
    write(
        tmp_path, {"model.safetensors": {"w": ("F32", [4]), "ids": ("I64", [2])}}, {"dtype": "torch.float32"}
    )
    assert inspect(tmp_path).warnings == ()


def test_an_unknown_claimed_dtype_is_shown_as_it_is_written(tmp_path):
    write(tmp_path, {"model.safetensors": {"w": ("F32", [4])}}, {"torch_dtype": "auto"})
    assert inspect(tmp_path).warnings == ("config.json claims dtype 'auto', which is not known here",)


def test_claims_of_a_language_tower_and_a_quantisation_are_found(tmp_path):
    config = {
        "model_type": "vlm",
        "text_config": {"dtype": "float8_e4m3fn", "tie_word_embeddings": True},
        "quantization_config": {"quant_method": "fp8"},
    }
    write(tmp_path, {"model.safetensors": {"w": ("F8_E4M3", [4])}}, config)
    found = inspect(tmp_path)
    assert (found.config.dtype, found.config.quantization) == ("float8_e4m3fn", "fp8")
    assert (found.config.tie_word_embeddings, found.warnings) == (True, ())


def test_embeddings_that_are_claimed_tied_and_stored_twice_are_a_warning(tmp_path):
    tensors = {"lm_head.weight": ("F32", [2]), "model.embed_tokens.weight": ("F32", [2])}
    write(tmp_path, {"model.safetensors": tensors}, {"tie_word_embeddings": True})
    (warning,) = inspect(tmp_path).warnings
    assert "model.embed_tokens.weight and lm_head.weight are both stored" in warning


@pytest.mark.parametrize("config", [{"dtype": 5, "text_config": [1], "model_type": None}, {}])
def test_a_strange_config_claims_nothing(tmp_path, config):
    write(tmp_path, {"model.safetensors": {"w": ("F32", [4])}}, config)
    claims = inspect(tmp_path).config
    assert (claims.model_type, claims.dtype, claims.tie_word_embeddings, claims.quantization) == (None,) * 4


def test_tied_names_of_a_torch_file_are_listed_once_with_their_storage(tmp_path):
    import torch

    shared = torch.arange(6.0).reshape(2, 3)
    torch.save({"embed": shared, "head": shared, "other": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    found = inspect(tmp_path)
    assert dict(found.ties) == {"head": "embed"}
    assert found.num_entries == 8
    assert tensor_rows(found)[-1] == ("head", "tied", "= embed", "0", "0", "")


def test_rows_are_text_in_name_order(tmp_path):
    write(tmp_path, {"model.safetensors": {"b": ("F32", [1000, 2]), "a": ("BF16", [])}})
    assert tensor_rows(inspect(tmp_path)) == [
        ("a", "bf16", "scalar", "1", "2", "model.safetensors"),
        ("b", "fp32", "1000 × 2", "2,000", "8,000", "model.safetensors"),
    ]


def test_the_json_form_is_plain_versioned_and_complete(tmp_path):
    write(tmp_path, {"model.safetensors": {"w": ("F32", [4])}}, {"dtype": "bfloat16"})
    record = json.loads(json.dumps(inspect(tmp_path).to_json(), allow_nan=False))
    assert (record["format"], record["version"]) == ("sparsity-audit/inspection", 1)
    assert record["tensors"][0] == {
        "name": "w",
        "dtype": "fp32",
        "shape": [4],
        "num_entries": 4,
        "num_bytes": 16,
        "file": "model.safetensors",
    }
    assert record["warnings"] == ["config.json claims bf16, but 4 fp32 entries are stored"]


def test_it_is_a_public_name_and_a_missing_checkpoint_is_an_error(tmp_path):
    assert sparsity_audit.inspect is inspect
    with pytest.raises(CheckpointNotFoundError):
        inspect(tmp_path / "absent")


def run_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sparsity_audit.cli.main", "inspect", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_prints_the_table_on_stdout_and_warnings_on_stderr(tmp_path):
    write(tmp_path, {"model.safetensors": {"w": ("F32", [4])}}, {"dtype": "bfloat16"})
    done = run_cli(str(tmp_path))
    assert done.returncode == 0
    assert "4 parameters; 4 entries in 1 tensors, 16 bytes, 0 tied names" in done.stdout
    assert done.stdout.splitlines()[-1].split() == ["w", "fp32", "4", "4", "16", "model.safetensors"]
    assert done.stderr == "warning: config.json claims bf16, but 4 fp32 entries are stored\n"


def test_the_command_prints_one_json_object_or_nothing(tmp_path):
    write(tmp_path, {"model.safetensors": {"w": ("F32", [4])}})
    assert json.loads(run_cli(str(tmp_path), "--json").stdout)["num_entries"] == 4
    assert run_cli(str(tmp_path), "--format", "quiet").stdout == ""


def test_the_command_ends_with_two_and_one_message_for_a_missing_checkpoint(tmp_path):
    done = run_cli(str(tmp_path / "absent"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {tmp_path / 'absent'}: no such file or directory")
    assert "Traceback" not in done.stderr
