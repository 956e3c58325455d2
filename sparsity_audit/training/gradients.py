"""Gradients that no step is taken with: sparse layouts, and NaN among the entries that are trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from sparsity_audit.errors import UsageError
from sparsity_audit.training.parameters import local

__all__ = ["refuse_nan", "refuse_sparse"]


def refuse_sparse(name: str, gradient: torch.Tensor) -> None:
    """Raise UsageError for a gradient in a sparse layout."""
    if gradient.layout is not torch.strided:
        raise UsageError(
            f"gradient of parameter {name!r}",
            f"has layout {gradient.layout}",
            expected="a strided gradient",
            remedy="make the embedding with sparse=False",
        )


def refuse_nan(
    gradients: Sequence[tuple[str, torch.Tensor]],
    *,
    trained: Callable[[int, torch.Tensor], torch.Tensor] = lambda _, gradient: gradient,
) -> None:
    """Raise UsageError when a gradient holds NaN among the entries that are trained.

    Args:
        gradients: Name and gradient of each parameter.
        trained: Position in `gradients` and gradient → the entries that are trained; asked only where the
            whole gradient holds NaN.
    """
    peaks = [_peak(local(gradient)) for _, gradient in gradients]
    # One question a device, not one a tensor: each is a synchronisation.
    devices = dict.fromkeys(peak.device for peak in peaks)
    stacks = (torch.stack([peak for peak in peaks if peak.device == device]) for device in devices)
    if not any(bool(stack.isnan().any()) for stack in stacks):
        return
    for number, (name, gradient) in enumerate(gradients):
        if bool(peaks[number].isnan()):
            count = int(trained(number, local(gradient)).isnan().sum())
            if count:
                raise UsageError(
                    f"gradient of parameter {name!r}",
                    f"holds {count} NaN among the entries that are trained; the step was not taken",
                    expected="finite gradients",
                    remedy="look at this batch's loss; a norm clip spreads one NaN or Inf to every gradient",
                )


def _peak(gradient: torch.Tensor) -> torch.Tensor:
    """A float32 scalar that is NaN where the gradient holds one."""
    return gradient.amax().float() if gradient.numel() else gradient.new_zeros((), dtype=torch.float32)
