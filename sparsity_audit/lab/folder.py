"""Models as ordinary Hugging Face folders: config, tokenizer files, `model.safetensors`.

Contract: a folder is complete or absent (it is written beside its place and renamed), its bytes are a
function of weights and dtype alone, and `transformers` loads it as it is. Loading refuses what the lab's
Llama does not compute (another architecture, tied heads, grouped keys, scaled rotations) and names the first
tensor that is missing, left over or of another shape.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from sparsity_audit.checkpoint.spelling import verify_local
from sparsity_audit.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    OutputError,
    UnsupportedFormatError,
)
from sparsity_audit.lab.model import Llama, LlamaConfig
from sparsity_audit.lab.names import BASES
from sparsity_audit.lab.vocabulary import BOS, EOS, PAD, TOKENS, tokenizer_files

__all__ = ["StoredDType", "load_model", "resolve_base", "save_model", "write_file"]

StoredDType = Literal["bf16", "fp32"]

_TORCH_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_LARGEST = {int: 65_536, float: 1e9}
"""Of the numbers in a config: a bound before anything is allocated."""

_FIXED = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}


def resolve_base(reference: str | Path) -> Path:
    """The folder of a shipped base by its name, else the path itself."""
    if str(reference) in BASES:
        return Path(__file__).parent / "bases" / str(reference)
    return Path(reference)


def save_model(
    model: Llama,
    path: Path,
    *,
    dtype: StoredDType,
    overwrite: bool = False,
    beside: Mapping[str, bytes] | None = None,
) -> None:
    """Write a model as a Hugging Face folder.

    Args:
        model: The model; fp32 weights are rounded to nearest even where `dtype` is bf16.
        path: The folder; its parents are made.
        dtype: Dtype of the stored weights.
        overwrite: Replace a folder that is there.
        beside: Further files of the folder, by name.

    Raises:
        OutputError: Something is there already, or the folder cannot be written.
    """
    verify_local(path)
    if path.exists() and not overwrite and (not path.is_dir() or any(path.iterdir())):
        raise OutputError(str(path), "exists and is not empty", remedy="choose another -o")
    partial = path.with_name(path.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, content in {**_files(model, dtype), **(beside or {})}.items():
            _write_synced(partial / name, content)
        if path.exists():
            shutil.rmtree(path)
        partial.rename(path)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OutputError(str(path), error.strerror or "cannot be written") from error


def write_file(path: Path, content: bytes) -> None:
    """Write one file so that it is complete or absent; its parents are made. Raises OutputError."""
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_synced(partial, content)
        partial.replace(path)
    except OSError as error:
        raise OutputError(str(path), error.strerror or "cannot be written") from error


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _files(model: Llama, dtype: StoredDType) -> dict[str, bytes]:
    stored = _TORCH_DTYPES[dtype]
    tensors = {name: weight.detach().to(stored) for name, weight in model.state_dict().items()}
    texts = {
        "config.json": _json(config_json(model.config, dtype=dtype)),
        "generation_config.json": _json(
            {name: _FIXED[name] for name in _FIXED if name.endswith("_token_id")}
        ),
        **tokenizer_files(),
    }
    return {name: text.encode() for name, text in texts.items()} | {
        "model.safetensors": save(tensors, metadata={"format": "pt"})
    }


def config_json(config: LlamaConfig, *, dtype: StoredDType) -> dict[str, Any]:
    """The content of `config.json`."""
    return {
        **_FIXED,
        **asdict(config),
        "num_key_value_heads": config.num_attention_heads,
        "torch_dtype": {"bf16": "bfloat16", "fp32": "float32"}[dtype],
    }


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=1) + "\n"


def load_model(path: Path) -> Llama:
    """The model of a folder, its weights in fp32 (exactly, whatever they are stored in).

    Raises:
        CheckpointNotFoundError: The folder, its config or its weights are missing.
        UnsupportedFormatError: The model is not one the lab computes.
        CorruptCheckpointError: A file cannot be read, or the tensors are not those the config promises.
    """
    model = Llama(_read_config(path))
    try:
        stored = load_file(path / "model.safetensors")
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(
            str(path), "no model.safetensors", expected="a folder that `lab pretrain` or `lab train` wrote"
        ) from error
    except (OSError, SafetensorError) as error:
        raise CorruptCheckpointError(str(path / "model.safetensors"), str(error)) from error
    _check_tensors(path, stored, model.state_dict())
    model.load_state_dict({name: weight.float() for name, weight in stored.items()})
    return model


def _check_tensors(
    path: Path, stored: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]
) -> None:
    for name in sorted({*stored, *wanted}):
        if name not in stored:
            raise CorruptCheckpointError(str(path), f"tensor {name} is missing")
        if name not in wanted:
            raise CorruptCheckpointError(str(path), f"tensor {name} is not part of such a model")
        if stored[name].shape != wanted[name].shape:
            raise CorruptCheckpointError(
                f"{path}: {name}",
                f"shape {list(stored[name].shape)}",
                expected=f"{list(wanted[name].shape)}, from config.json",
            )


def _read_config(path: Path) -> LlamaConfig:
    """The shape that `config.json` claims, once nothing in it asks for other arithmetic."""
    subject = str(path / "config.json")
    try:
        found = json.loads((path / "config.json").read_bytes())
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(
            str(path), "no config.json", expected=f"a model folder, or one of {', '.join(BASES)}"
        ) from error
    except (OSError, ValueError) as error:
        raise CorruptCheckpointError(subject, f"cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise CorruptCheckpointError(subject, "is not a JSON object")
    return _shape(subject, _checked(subject, found))


def _checked(subject: str, found: dict[str, Any]) -> dict[str, Any]:
    """The config with the rotations where older ones have them. Raises where it asks for other arithmetic."""
    rope = found.get("rope_parameters")
    merged = {**found, **(rope if isinstance(rope, dict) else {})}
    wanted = {
        **_FIXED,
        "vocab_size": len(TOKENS),
        "num_key_value_heads": found.get("num_attention_heads"),
        "rope_scaling": None,
        "rope_type": "default",
    }
    for key, value in wanted.items():
        if merged.get(key, value) != value:
            raise UnsupportedFormatError(subject, f"{key} is {merged[key]!r}", expected=repr(value))
    return merged


def _shape(subject: str, found: Mapping[str, Any]) -> LlamaConfig:
    values: dict[str, Any] = {}
    for name, kind in get_type_hints(LlamaConfig).items():
        value = found.get(name)
        if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
            raise CorruptCheckpointError(
                subject, f"{name} is {value!r}", expected=f"a number ({kind.__name__})"
            )
        if not 0 < value <= _LARGEST[kind]:
            raise CorruptCheckpointError(
                subject, f"{name} is {value!r}", expected=f"above 0, at most {_LARGEST[kind]}"
            )
        values[name] = kind(value)
    config = LlamaConfig(**values)
    if config.hidden_size % (2 * config.num_attention_heads):
        raise CorruptCheckpointError(
            subject,
            f"hidden_size {config.hidden_size} for {config.num_attention_heads} heads",
            expected="heads of an even width",
        )
    return config
