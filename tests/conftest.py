"""What tests share: the frozen checkpoints, and a writer for small ones."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

# One thread in every worker, and no look at the network: set before torch or the Hub library is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

ADDITION = Path(__file__).parent / "data" / "addition"


@pytest.fixture(scope="session")
def addition() -> Path:
    """Real RL checkpoints of a 148,928-parameter addition model; see the README beside them."""
    return ADDITION


@pytest.fixture
def write_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Write arrays as a one-file safetensors checkpoint; uint16 arrays are stored as bf16 codes."""

    def write(name: str, tensors: dict[str, np.ndarray], *, bf16: bool = True) -> Path:
        import json

        folder = tmp_path / name
        folder.mkdir()
        names = {"float32": "F32", "float64": "F64", "float16": "F16", "uint16": "BF16" if bf16 else "U16"}
        header, data = {}, b""
        for key, array in tensors.items():
            dtype = names.get(
                str(array.dtype), str(array.dtype).upper().replace("INT", "I").replace("UI", "U")
            )
            header[key] = {
                "dtype": dtype,
                "shape": list(array.shape),
                "data_offsets": [len(data), len(data) + array.nbytes],
            }
            data += array.tobytes()
        text = json.dumps(header).encode()
        (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
        return folder

    return write
