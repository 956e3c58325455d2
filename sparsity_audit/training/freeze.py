"""Freeze every entry outside an update mask in any training loop, whatever the optimizer does.

Contract: gradients are masked when they are accumulated, so that norm clipping sees the masked gradient;
before each step they are masked again (something may have assigned them) and refused when they hold NaN;
after each step, entries outside get back the bits of one kept copy, and optimizer state of the parameter's
shape is zero there. Weight decay, momentum and second moments may do what they like: frozen means
bit-identical, and `verify_frozen` proves it. Selection is `torch.where`: `p − 0·u` can flip −0.0, and a
product keeps NaN.

Source: 2505.11711 trains with masked gradients, which alone do not freeze: decoupled weight decay and
momentum move masked-out entries, and a norm clip before the mask uses the dense norm.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Final, Self

import torch
from torch.optim import Optimizer

from sparsity_audit.errors import FrozenEntryChangedError, UsageError
from sparsity_audit.seams import reached
from sparsity_audit.training.fingerprints import fingerprint
from sparsity_audit.training.gradients import refuse_nan, refuse_sparse
from sparsity_audit.training.parameters import NamedParameter, codes, local, name_parameters
from sparsity_audit.training.selection import keep_selected, zero_outside
from sparsity_audit.training.update_masks import BaseCheck, Unmasked, UpdateMask, bind_mask, frozen_parts
from sparsity_audit.training.verify import FrozenPart, FrozenProof, prove

__all__ = ["FrozenOutside", "freeze_outside"]

_STATE_VERSION: Final = 1


def freeze_outside(
    model: torch.nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    update_mask: UpdateMask,
    *,
    unmasked: Unmasked | None = None,
    base: BaseCheck = "verify",
    resumed_from: Mapping[str, Any] | None = None,
) -> FrozenOutside:
    """From now on, steps of these optimizers change `model` only where `update_mask` is 1.

    Call it once, when the model has its weights, lies on its device and is wrapped (`torch.compile`, DDP,
    `fully_shard`), and the optimizer exists. The handle is also a context manager: leaving it proves that
    everything outside kept its bits, and removes the hooks.

    Args:
        model: The model that is trained.
        optimizer: Every optimizer that updates it.
        update_mask: A mask directory of this tool, or name → torch.bool (True = may be updated).
        unmasked: What becomes of trained parameters that the mask does not speak of. Without it, such
            parameters are refused. `freeze` covers all other parameters of the model too.
        base: `verify` compares the mask's base fingerprints with the weights; `trust` takes your word.
        resumed_from: `state_dict()` of an earlier handle: the weights outside must be those it froze,
            which replaces the check of the base.

    Raises:
        MaskError: The mask does not belong to this model; see `bind_mask`.
        UsageError: Nothing would be frozen, a parameter has no policy, the model is sharded in a way whose
            entries cannot be told apart, or `resumed_from` is not this model's.
        FrozenEntryChangedError: The weights are not those that `resumed_from` froze.
    """
    parameters = name_parameters(model)
    optimizers = [_unwrapped(each) for each in _listed(optimizer)]
    trained = {
        id(p) for each in optimizers for g in each.param_groups for p in g["params"] if p.requires_grad
    }
    strangers = trained - {id(named.parameter) for named in parameters}
    if strangers:
        raise UsageError(
            "optimizer",
            f"trains {len(strangers)} parameters that the model does not have",
            expected="an optimizer of this model's parameters",
            remedy="make the optimizer after the model is wrapped, moved and cast",
        )
    mask = bind_mask(parameters, update_mask, base="trust" if resumed_from is not None else base)
    held = frozen_parts(parameters, mask, trained, unmasked=unmasked)
    density = mask.num_selected / mask.num_entries
    return FrozenOutside(model, held, optimizers, density=density, resumed_from=resumed_from)


def _listed(optimizer: Optimizer | Sequence[Optimizer]) -> list[Optimizer]:
    return list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]


def _unwrapped(optimizer: Any) -> Optimizer:
    # Accelerate's wrapper is an Optimizer by inheritance, but its hooks never run.
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


class FrozenOutside:
    """Keeps entries outside a mask as they are until `remove`; made by `freeze_outside`.

    Attributes:
        density: Selected entries ÷ entries the mask speaks of.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        held: Iterable[tuple[NamedParameter, torch.Tensor | None]],
        optimizers: Sequence[Optimizer],
        *,
        density: float,
        resumed_from: Mapping[str, Any] | None,
    ) -> None:
        self._model, self.density = model, density
        self._names = {id(named.parameter): named.name for named in name_parameters(model)}
        self._parts: dict[int, FrozenPart] = {}
        for named, selected in held:
            kept = codes(local(named.parameter)).clone()
            self._parts[id(named.parameter)] = FrozenPart(
                name=named.name, tensor=named.parameter, selected=selected, kept=kept
            )
        if resumed_from is not None:
            self._check_resumed(resumed_from)
        self._hooks: list[Any] = []
        self._known = [{id(p) for g in each.param_groups for p in g["params"]} for each in optimizers]
        for part in self._parts.values():
            if part.tensor.requires_grad:
                self._hooks.append(part.tensor.register_post_accumulate_grad_hook(_mask_gradient_of(part)))
        for number, each in enumerate(optimizers):
            self._zero_state(each)
            self._hooks.append(each.register_step_pre_hook(partial(self._before_step, number)))
            self._hooks.append(each.register_step_post_hook(self._after_step))

    def verify_frozen(self) -> FrozenProof:
        """Every entry outside has the bits it was frozen with. Raises FrozenEntryChangedError."""
        present = {id(named.parameter) for named in name_parameters(self._model)}
        for key, part in self._parts.items():
            if key not in present:
                raise FrozenEntryChangedError(
                    f"tensor {part.name!r}",
                    "was replaced in the model by another tensor, which nothing restores",
                    remedy="change the model first, then call freeze_outside",
                )
        return prove(self._parts.values())

    def count_changed(self) -> tuple[int, int]:
        """Selected entries whose bits differ from those at the start, and selected entries; on this rank."""
        changed = selected = 0
        for part in self._parts.values():
            if part.selected is not None:
                moved = codes(local(part.tensor)) != part.kept
                changed += int((moved & part.selected).sum())
                selected += int(part.selected.sum())
        return changed, selected

    def state_dict(self) -> dict[str, Any]:
        """Fingerprints of what is frozen (on this rank), to prove after a restart that it still is."""
        return {
            "version": _STATE_VERSION,
            "frozen": {part.name: f"{_outside_fingerprint(part):016x}" for part in self._parts.values()},
        }

    def remove(self) -> None:
        """Take the hooks away and drop the kept copy; later steps update everything."""
        while self._hooks:
            self._hooks.pop().remove()
        self._parts.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.verify_frozen()
        finally:
            self.remove()

    def _check_resumed(self, state: Mapping[str, Any]) -> None:
        recorded = state.get("frozen")
        if state.get("version") != _STATE_VERSION or not isinstance(recorded, Mapping):
            raise UsageError("resumed_from", "is no state of freeze_outside", expected="handle.state_dict()")
        names = {part.name for part in self._parts.values()}
        odd = sorted(names ^ recorded.keys())
        if odd:
            raise UsageError(
                f"resumed_from: tensor {odd[0]!r}",
                "was not frozen then" if odd[0] in names else "is not frozen now",
                expected="the same mask, model and policy as in the run that is resumed",
            )
        for part in self._parts.values():
            found = f"{_outside_fingerprint(part):016x}"
            if found != recorded[part.name]:
                raise FrozenEntryChangedError(
                    f"tensor {part.name!r}",
                    f"its frozen entries have fingerprint {found}",
                    expected=f"{recorded[part.name]}, as when they were frozen",
                    remedy="load the weights that belong to this state, with the same mask",
                )

    def _before_step(self, number: int, optimizer: Optimizer, *_: Any) -> None:
        present = [p for group in optimizer.param_groups for p in group["params"]]
        new = [p for p in present if id(p) not in self._known[number]]
        if new:
            name = self._names.get(id(new[0]), f"of shape {list(new[0].shape)}")
            raise UsageError(
                f"parameter {name!r}",
                "was added to the optimizer after freeze_outside, so nothing restores it",
                remedy="call remove() and freeze_outside again, with a mask for it",
            )
        for parameter in present:
            part = self._parts.get(id(parameter))
            if part is not None:
                _check_place(part)
                _mask_gradient(part)
        if getattr(optimizer, "found_inf", None) is None:  # a gradient scaler judges by itself
            refuse_nan([(self._names[id(p)], p.grad) for p in present if p.grad is not None])

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        reached("parameters stepped")
        with torch.no_grad():
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    part = self._parts.get(id(parameter))
                    if part is not None:
                        _restore(part)
        self._zero_state(optimizer)

    def _zero_state(self, optimizer: Optimizer) -> None:
        for parameter, state in optimizer.state.items():
            part = self._parts.get(id(parameter))
            if part is None:
                continue
            for value in state.values():
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape and value.dim():
                    zero_outside(local(value), part.selected)


def _mask_gradient_of(part: FrozenPart) -> Any:
    def hook(_: torch.Tensor) -> None:
        _mask_gradient(part)

    return hook


def _mask_gradient(part: FrozenPart) -> None:
    gradient = part.tensor.grad
    if gradient is not None:
        refuse_sparse(part.name, gradient)
        zero_outside(local(gradient), part.selected)


def _restore(part: FrozenPart) -> None:
    keep_selected(local(part.tensor), part.selected, part.kept)


def _check_place(part: FrozenPart) -> None:
    now = codes(local(part.tensor))
    if (now.device, now.shape, now.dtype) != (part.kept.device, part.kept.shape, part.kept.dtype):
        raise UsageError(
            f"parameter {part.name!r}",
            f"is now {8 * now.element_size()} bits wide on {now.device}, shape {list(now.shape)}",
            expected=f"{8 * part.kept.element_size()} bits on {part.kept.device}, {list(part.kept.shape)}",
            remedy="move, cast and wrap the model first, then call freeze_outside",
        )


def _outside_fingerprint(part: FrozenPart) -> int:
    if part.selected is None:
        return fingerprint(part.kept)
    return fingerprint(torch.where(part.selected, part.kept.new_zeros(()), part.kept))
