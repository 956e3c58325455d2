"""One update of weights: mask, clip, step, restore, round, in that order.

Contract: gradients are masked *before* the norm clip and so before the moments; entries outside the mask are
restored with `torch.where` after the step, bit for bit, whatever weight decay or −0.0 did to them. In the
`bf16` arm weights are rounded to nearest even after every step while moments and arithmetic stay fp32:
storage is emulated, matmuls are not. A gradient that is zero or not finite moves nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from sparsity_audit.errors import UsageError

__all__ = ["Learner", "UpdateMask", "mask_sha256"]

UpdateMask = Mapping[str, Tensor]
"""bool tensors by parameter name, True where entries may move."""

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def mask_sha256(mask: UpdateMask) -> str:
    """What identifies a mask: names, shapes and bits, in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(mask):
        digest.update(f"{name} {list(mask[name].shape)}\n".encode())
        digest.update(mask[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


class Learner:
    """Parameters with the optimizer that moves them.

    Args:
        parameters: By name; they are changed in place.
        optimizer: `adamw` (betas .9 and .999, ε 1e-8) or `sgd` (no momentum).
        lr: Learning rate.
        weight_decay: Decoupled for AdamW, added to the gradient for SGD.
        grad_clip: Limit of the global gradient norm over all parameters.
        precision: `bf16` rounds the weights after every step.
        update_mask: bool tensors by parameter name, True where entries may move; None where all may.

    Raises:
        UsageError: The mask has other names or shapes than the parameters.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        *,
        optimizer: Literal["adamw", "sgd"],
        lr: float,
        weight_decay: float,
        grad_clip: float,
        precision: Literal["fp32", "bf16"],
        update_mask: UpdateMask | None,
    ) -> None:
        self._parameters = dict(parameters)
        self._grad_clip, self._precision = grad_clip, precision
        self._mask = None if update_mask is None else _checked(update_mask, self._parameters)
        weights = list(self._parameters.values())
        if optimizer == "adamw":
            self._optimizer: torch.optim.Optimizer = torch.optim.AdamW(
                weights, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay
            )
        else:
            self._optimizer = torch.optim.SGD(weights, lr=lr, weight_decay=weight_decay)

    def forget_gradients(self) -> None:
        """Drop what an earlier backward pass left."""
        self._optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def apply(self) -> float:
        """Move the weights along their gradients.

        Returns:
            The gradient's norm before clipping, of the entries that may move. Where it is 0 or not finite
            nothing was moved: neither momentum nor decay acts without a gradient.
        """
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if self._mask is not None:
                parameter.grad = torch.where(self._mask[name], parameter.grad, 0.0)
        norm = torch.nn.utils.clip_grad_norm_(list(self._parameters.values()), self._grad_clip)
        if norm == 0 or not torch.isfinite(norm):
            return float(norm)
        before = None if self._mask is None else {n: p.clone() for n, p in self._parameters.items()}
        self._optimizer.step()
        if self._precision == "bf16":
            for parameter in self._parameters.values():
                parameter.copy_(parameter.to(torch.bfloat16))
        if self._mask is not None and before is not None:
            for name, parameter in self._parameters.items():
                parameter.copy_(torch.where(self._mask[name], parameter, before[name]))
        return float(norm)

    def reset(self, weights: Mapping[str, Tensor]) -> None:
        """Start again from these weights, with empty moments."""
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(weights[name])
        self._optimizer.state.clear()

    def state(self) -> dict[str, Tensor]:
        """Weights and moments by name, enough to go on bit for bit."""
        found = {f"weight.{name}": parameter.detach() for name, parameter in self._parameters.items()}
        for name, parameter in self._parameters.items():
            for key, value in self._optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    found[f"{key}.{name}"] = value
        return found

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state()` of a learner of the same kind."""
        self.reset({name: state[f"weight.{name}"] for name in self._parameters})
        for name, parameter in self._parameters.items():
            moments = {key: state[f"{key}.{name}"] for key in _MOMENTS if f"{key}.{name}" in state}
            if moments:
                self._optimizer.state[parameter] = {key: value.clone() for key, value in moments.items()}


def _checked(mask: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for name in sorted({*mask, *parameters}):
        if name not in mask or name not in parameters:
            lacking = "is not in the mask" if name not in mask else "is in the mask, but not in the model"
            raise UsageError(f"update mask: {name}", lacking, expected="one mask for each parameter")
        if mask[name].dtype != torch.bool or mask[name].shape != parameters[name].shape:
            raise UsageError(
                f"update mask: {name}",
                f"{mask[name].dtype} of shape {list(mask[name].shape)}",
                expected=f"torch.bool of shape {list(parameters[name].shape)}",
            )
    return dict(mask)
