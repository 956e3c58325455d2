"""The frozen runs of `tests/data/addition` as numpy arrays, read without the comparison code."""

from pathlib import Path

import numpy as np

from sparsity_audit.checkpoint.opening import open_checkpoint

FOLDER = Path(__file__).parent / "data" / "addition"
_CODES = {"BF16": np.uint16, "F32": np.float32}


def load(name: str) -> dict[str, np.ndarray]:
    """bf16 tensors as codes, fp32 ones as numbers."""
    catalogue = open_checkpoint(FOLDER / name)
    arrays = {}
    for tensor, spec in catalogue.tensors.items():
        raw = catalogue.files[spec.file].path.read_bytes()[spec.extent.start : spec.extent.stop]
        arrays[tensor] = np.frombuffer(raw, dtype=_CODES[spec.dtype.value]).reshape(spec.shape)
    return arrays


def values(codes: np.ndarray) -> np.ndarray:
    """Numbers of bf16 codes."""
    return (codes.astype(np.uint32) << 16).view(np.float32)


def strata_of(codes: np.ndarray) -> np.ndarray:
    """2·exponent + (mantissa = 0) of bf16 codes."""
    return 2 * ((codes >> 7) & 255).astype(np.int64) + ((codes & 127) == 0)
