"""The papers' rules for update sparsity, re-implemented slowly in torch: what presets are tested against."""

from __future__ import annotations

from collections.abc import Mapping

import torch

Tensors = Mapping[str, torch.Tensor]


def slow_mukherjee(
    base: Tensors, tuned: Tensors, *, parameters: list[str], tol: float = 1e-5
) -> tuple[int, int]:
    """(unchanged, compared) as arXiv 2505.11711's program counts them, tensor by tensor in bf16."""
    unchanged = compared = 0
    for name in parameters:
        if name not in tuned:
            continue
        one, other = base[name].to(torch.bfloat16), tuned[name].to(torch.bfloat16)
        if one.shape != other.shape:
            continue
        delta = other - one
        unchanged += int(torch.isclose(delta, torch.zeros_like(delta), atol=tol).sum())
        compared += delta.numel()
    return unchanged, compared


def slow_zhu(base: Tensors, tuned: Tensors, *, parameters: list[str], eta: float = 1e-3) -> tuple[int, int]:
    """(unchanged, compared) by arXiv 2511.08567 Def. 2.1 on bf16 weights, in float64."""
    unchanged = compared = 0
    for name in parameters:
        if name not in tuned or base[name].shape != tuned[name].shape:
            continue
        one, other = (side[name].to(torch.bfloat16).double() for side in (base, tuned))
        within = (other - one).abs() <= eta * torch.maximum(one.abs(), other.abs())
        unchanged += int(within.sum())
        compared += one.numel()
    return unchanged, compared


SLOW = {"mukherjee2025": slow_mukherjee, "zhu2025": slow_zhu}
