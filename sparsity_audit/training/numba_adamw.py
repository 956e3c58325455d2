"""The compiled loops around the square root of AdamW: fp32, int32 positions, blocks that stay in cache.

Contract: what torch's kernels do, with a fused multiply-add exactly where they have one. The square root
itself is torch's, which takes it from a vector library that does not round correctly.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from sparsity_audit.compare.numba_generic import OPTIONS

__all__ = ["BLOCK", "after_root", "before_root"]

BLOCK: Final = 512


def _declare_fma(typing_context: Any, x: Any, y: Any, z: Any) -> Any:  # noqa: ARG001 - numba's signature
    """x·y + z with one rounding."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001 - same
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), generate


_fma: Any = intrinsic(_declare_fma)


@njit(**OPTIONS)
def before_root(
    weights, gradient, positions, mean, square, held, block, decay, one_minus_beta1, beta2, one_minus_beta2
):
    """Gather and decay the weights into `held`, advance both moments; `block` is scratch of BLOCK entries."""
    for first in range(0, len(positions), BLOCK):
        p, w = positions[first : first + BLOCK], held[first : first + BLOCK]
        m, v = mean[first : first + BLOCK], square[first : first + BLOCK]
        for i in range(len(p)):
            place = np.uint64(np.uint32(p[i]))
            w[i], block[i] = weights[place], gradient[place]
        for i in range(len(p)):
            w[i] *= decay
            m[i] = _fma(one_minus_beta1, block[i] - m[i], m[i])
        for i in range(len(p)):
            v[i] = _fma(one_minus_beta2 * block[i], block[i], v[i] * beta2)


@njit(**OPTIONS)
def after_root(weights, positions, mean, held, root, correction, eps, negative_step):
    """Move the held weights by the step and scatter them."""
    for first in range(0, len(positions), BLOCK):
        p, w = positions[first : first + BLOCK], held[first : first + BLOCK]
        m, d = mean[first : first + BLOCK], root[first : first + BLOCK]
        for i in range(len(p)):
            w[i] += (negative_step * m[i]) / (d[i] / correction + eps)
        for i in range(len(p)):
            weights[np.uint64(np.uint32(p[i]))] = w[i]
