"""Round fp32 to bf16 at random, without bias."""

from __future__ import annotations

import torch

__all__ = ["round_stochastically"]


def round_stochastically(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """bf16 neighbours of fp32 values, the farther one with probability distance ÷ gap.

    The expectation is the value itself, so steps below half a ULP are not lost but taken now and then. A
    value that bf16 holds stays as it is; ±Inf and NaN are converted as torch does.

    Source: 2010.06192 (Zamirai et al.): 16 random bits are added below the mantissa, then cut off.

    Args:
        values: float32.
        generator: On the device of `values`.
    """
    noise = torch.randint(
        0, 1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=generator
    )
    code = values.view(torch.int32)
    cut = ((code + noise) & ~0xFFFF).view(torch.float32)
    return torch.where(values.isfinite(), cut, values).to(torch.bfloat16)
