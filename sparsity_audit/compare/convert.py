"""Exact widening of codes, so that sides of different dtypes meet without rounding.

Contract: `widen` maps codes of one dtype to codes of a wider one; every number, infinity and zero sign
is kept, a NaN stays a NaN. Source of the rules: `types.common_dtype`.
"""

from __future__ import annotations

import numpy as np

from sparsity_audit.compare.accumulate import CODE_DTYPE
from sparsity_audit.compare.numpy_kernel import to_float64
from sparsity_audit.types import DType

__all__ = ["widen"]


def widen(codes: np.ndarray, dtype: DType, target: DType) -> np.ndarray:
    """The codes of `target` for the numbers that `codes` of `dtype` stand for."""
    if dtype is target:
        return codes
    code_dtype = CODE_DTYPE[target.itemsize]
    if dtype.kind == "float":
        if dtype is DType.BF16 and target is DType.F32:
            return codes.astype(np.uint32) << np.uint32(16)
        with np.errstate(invalid="ignore"):  # a signalling NaN becomes quiet
            wide = to_float64(codes, dtype)
            return (wide if target is DType.F64 else wide.astype(np.float32)).view(code_dtype)
    if dtype.kind == "int":
        signed = codes.view(f"i{dtype.itemsize}")
        return signed.astype(f"i{target.itemsize}").view(code_dtype)
    return codes.astype(code_dtype)
