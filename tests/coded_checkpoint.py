"""Small checkpoints of stored codes: any dtype by its safetensors name, with a configuration."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np


def write(folder: Path, tensors: dict[str, tuple[str, np.ndarray]], config: dict | None = None) -> Path:
    """A checkpoint of arrays of codes under the dtypes named."""
    folder.mkdir()
    header, data = {}, b""
    for name, (dtype, array) in tensors.items():
        end = len(data) + array.nbytes
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [len(data), end]}
        data += array.tobytes()
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    (folder / "config.json").write_text(json.dumps(config or {}))
    return folder


def blocks_config(rows: int, cols: int) -> dict:
    return {"quantization_config": {"weight_block_size": [rows, cols]}}
