"""Δ = tuned − base of float tensors, in the view that is asked for.

Contract: float64, subtracted after exact widening (native) or after rounding both sides to bf16 (served);
never rounded in between. Inf − Inf and NaN give NaN, which callers count or set aside.
"""

from __future__ import annotations

import numpy as np

from sparsity_audit.compare.convert import widen
from sparsity_audit.compare.numpy_kernel import NumpyKernel, to_float64
from sparsity_audit.compare.pair import PairSpec
from sparsity_audit.types import DType, View

__all__ = ["codes_in_view", "float_deltas"]


def codes_in_view(
    base: np.ndarray, tuned: np.ndarray, spec: PairSpec, view: View
) -> tuple[np.ndarray, np.ndarray, DType]:
    """Both sides' codes in one dtype: the common one, or bf16 where the view rounds."""
    if view is View.SERVED and spec.has_served_view:
        kernel, rounded = NumpyKernel(), []
        for codes, stored in ((base, spec.base), (tuned, spec.tuned)):
            out = np.empty(codes.shape, dtype=np.uint16)
            kernel.to_bf16(codes, stored, out)
            rounded.append(out)
        return rounded[0], rounded[1], DType.BF16
    dtype = spec.native_dtype
    return widen(base, spec.base, dtype), widen(tuned, spec.tuned, dtype), dtype


def float_deltas(base: np.ndarray, tuned: np.ndarray, dtype: DType) -> np.ndarray:
    """Δ of codes of one float dtype, float64, shaped like the codes."""
    assert dtype.kind == "float", dtype
    with np.errstate(invalid="ignore", over="ignore"):
        return to_float64(tuned, dtype) - to_float64(base, dtype)
