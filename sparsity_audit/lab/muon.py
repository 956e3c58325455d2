"""Muon: momentum whose step is an orthogonal matrix.

Contract: each matrix W moves by lr · sqrt(max(1, rows / cols)) · UVᵀ, where USVᵀ is its Nesterov momentum and
UVᵀ is approximated by five Newton–Schulz iterations in fp32. For matrices only; deterministic.

Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks", with its coefficients.
The original iterates in bf16, which saves time on a GPU and costs digits; on a CPU fp32 is the faster one.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["Muon", "orthogonalised"]

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


def orthogonalised(matrix: Tensor) -> Tensor:
    """The matrix with all singular values near 1 (between about .7 and 1.2), its singular vectors kept."""
    a, b, c = _COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """The optimizer.

    Args:
        matrices: Parameters of two dimensions.
        lr: Step size, in units of the operator norm.
        momentum: Share of the momentum that is kept each step.
    """

    def __init__(self, matrices: Iterable[torch.nn.Parameter], *, lr: float, momentum: float) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride] - there is no closure
        """Move all matrices that have a gradient."""
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(matrix)
                average = state["momentum"].lerp_(matrix.grad, 1 - group["momentum"])
                nesterov = matrix.grad.lerp(average, group["momentum"])
                rows, cols = matrix.shape
                scale = max(1.0, rows / cols) ** 0.5
                matrix.add_(orthogonalised(nesterov), alpha=-group["lr"] * scale)
