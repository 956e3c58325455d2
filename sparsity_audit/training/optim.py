"""AdamW and SGD that keep state only for a subnetwork.

Contract: without a master and with nearest rounding, weights and moments at masked entries are bit for bit
those of `torch.optim.AdamW(foreach=False, fused=False)` (or `SGD`) given gradients that are zero outside
the mask, and no other entry is written. With an fp32 master, the master is bit for bit the weight of fp32
AdamW, and the 16-bit weight is its rounding to nearest even. Every operation is one of torch's, in torch's
order, or a compiled loop that was seen to give the same bits on this machine; no fast math.

Where they differ: torch's CPU `add(alpha=)` rounds 16-bit tensors otherwise in the last entries of a tensor
(or of a thread's share) than in its vectorised body; `SubnetworkSGD` does everywhere what the body does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sparsity_audit.errors import UsageError
from sparsity_audit.training.compiled_adamw import Constants, applies, step_selected, torch_step
from sparsity_audit.training.subnetwork import NamedParams, Rounding, SubnetworkOptimizer
from sparsity_audit.training.update_masks import BaseCheck, Unmasked, UpdateMask

__all__ = ["SubnetworkAdamW", "SubnetworkSGD"]

_DENSE_ABOVE = 0.8125
"""From here on dense state and a bool mask are smaller than compact state in all forms (13 bytes < 16 d)."""


class SubnetworkAdamW(SubnetworkOptimizer):
    """AdamW whose moments, and fp32 master if asked for, exist only at masked entries.

    Source: 1711.05101 (Loshchilov and Hutter), in the order of operations of torch's single-tensor AdamW.

    Args:
        params: A model, its `named_parameters()`, or groups whose `params` are (name, parameter) pairs.
        update_mask: A mask directory of this tool, or name → torch.bool (True = may be updated).
        lr: ≥ 0; schedulers may change it in the groups.
        betas: Each in [0, 1).
        eps: ≥ 0.
        weight_decay: ≥ 0, decoupled; it moves masked entries alone.
        maximize: Ascend.
        unmasked: `freeze` or `train` for trainable parameters without a mask, which are refused otherwise.
        base: `verify` compares the mask's base fingerprints with the weights; `trust` takes your word.
        fp32_master: Keep fp32 weights of the masked entries of 16-bit parameters.
        rounding: `stochastic` keeps fp32 moments and rounds bf16 weights at random, without a master.
        seed: Of the random roundings.
        dense_above: Density from which a parameter has dense state and a bool mask.
        mask_gradients: Zero gradients outside the mask as they are accumulated, so that norm clipping sees
            only what is trained.

    Raises:
        MaskError: The mask does not belong to these parameters; see `bind_mask`.
        UsageError: An option is out of range, or a parameter cannot be trained this way.
    """

    def __init__(
        self,
        params: NamedParams,
        update_mask: UpdateMask,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        maximize: bool = False,
        unmasked: Unmasked | None = None,
        base: BaseCheck = "verify",
        fp32_master: bool = False,
        rounding: Rounding = "nearest",
        seed: int = 0,
        dense_above: float = _DENSE_ABOVE,
        mask_gradients: bool = True,
    ) -> None:
        _check_options(lr=lr, eps=eps, weight_decay=weight_decay)
        if not all(0 <= beta < 1 for beta in betas):
            raise UsageError("betas", f"{betas}", expected="two numbers in [0, 1)")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        super().__init__(
            params,
            update_mask,
            defaults,
            unmasked=unmasked,
            base=base,
            fp32_master=fp32_master,
            rounding=rounding,
            seed=seed,
            dense_above=dense_above,
            mask_gradients=mask_gradients,
        )

    def _moments(self, group: Mapping[str, Any]) -> tuple[str, ...]:  # noqa: ARG002 - SGD's depend on it
        return "exp_avg", "exp_avg_sq"

    def _update(
        self,
        group: Mapping[str, Any],
        step: int,
        weights: torch.Tensor,
        gradient: torch.Tensor,
        moments: tuple[torch.Tensor, ...],
    ) -> None:
        gradient = -gradient if group["maximize"] else gradient
        torch_step(weights, gradient, moments[0], moments[1], _constants(group, step))

    def _step_compiled(
        self,
        group: Mapping[str, Any],
        step: int,
        weights: torch.Tensor,
        gradient: torch.Tensor,
        positions: torch.Tensor,
        moments: tuple[torch.Tensor, ...],
    ) -> bool:
        if group["maximize"] or not applies(weights, gradient, positions, group["betas"][0]):
            return False
        step_selected(weights, gradient, positions, moments[0], moments[1], _constants(group, step))
        return True


def _constants(group: Mapping[str, Any], step: int) -> Constants:
    lr, (beta1, beta2) = float(group["lr"]), group["betas"]
    return Constants(
        decay=1 - lr * group["weight_decay"],
        beta1=beta1,
        beta2=beta2,
        correction=(1 - beta2**step) ** 0.5,
        eps=group["eps"],
        step_size=lr / (1 - beta1**step),
    )


class SubnetworkSGD(SubnetworkOptimizer):
    """SGD whose momentum exists only at masked entries.

    Arguments are those of `SubnetworkAdamW`, but for:

    Args:
        momentum: ≥ 0; 0 keeps no state but the positions.
        dampening: Of the momentum.
        weight_decay: ≥ 0, coupled: added to the gradient.
        nesterov: Needs momentum > 0 and dampening 0.
    """

    def __init__(
        self,
        params: NamedParams,
        update_mask: UpdateMask,
        *,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        maximize: bool = False,
        unmasked: Unmasked | None = None,
        base: BaseCheck = "verify",
        fp32_master: bool = False,
        rounding: Rounding = "nearest",
        seed: int = 0,
        dense_above: float = _DENSE_ABOVE,
        mask_gradients: bool = True,
    ) -> None:
        _check_options(lr=lr, momentum=momentum, weight_decay=weight_decay)
        if nesterov and (momentum <= 0 or dampening != 0):
            raise UsageError("nesterov", "needs a momentum", expected="momentum > 0 and dampening 0")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
        }
        super().__init__(
            params,
            update_mask,
            defaults,
            unmasked=unmasked,
            base=base,
            fp32_master=fp32_master,
            rounding=rounding,
            seed=seed,
            dense_above=dense_above,
            mask_gradients=mask_gradients,
        )

    def _moments(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] != 0 else ()

    def _update(
        self,
        group: Mapping[str, Any],
        step: int,
        weights: torch.Tensor,
        gradient: torch.Tensor,
        moments: tuple[torch.Tensor, ...],
    ) -> None:
        gradient = -gradient if group["maximize"] else gradient
        if group["weight_decay"] != 0:
            gradient = _add_scaled(gradient.clone(), weights, group["weight_decay"])
        if moments:
            buffer = moments[0]
            if step == 1:
                buffer.copy_(gradient)
            else:
                _add_scaled(buffer.mul_(group["momentum"]), gradient, 1 - group["dampening"])
            if group["nesterov"]:
                gradient = _add_scaled(gradient.clone(), buffer, group["momentum"])
            else:
                gradient = buffer
        _add_scaled(weights, gradient, -float(group["lr"]))


def _add_scaled(target: torch.Tensor, other: torch.Tensor, alpha: float) -> torch.Tensor:
    """Add alpha·other to target as the vectorised body of torch's kernel rounds it at every position."""
    if target.device.type != "cpu" or target.element_size() >= 4:
        return target.add_(other, alpha=alpha)
    # The body rounds alpha to 16 bits and the sum once; the product of two 16-bit floats is exact in fp32.
    rounded = float(torch.tensor(alpha, dtype=target.dtype))
    return target.copy_(target.float().add_(other.float(), alpha=rounded))


def _check_options(**options: float) -> None:
    for name, value in options.items():
        if not value >= 0:
            raise UsageError(name, f"{value}", expected="a number ≥ 0")
