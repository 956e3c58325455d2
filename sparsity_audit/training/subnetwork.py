"""Optimizer state only where an update mask is 1: gather, step, scatter.

Contract: a parameter whose mask has density d keeps sorted row-major positions (int32; int64 past 2³¹ − 1
entries) and state for d of its entries, nothing else; entries outside are never written, so they need no
restore. Above `dense_above` a parameter keeps whole state and a bool mask instead. The arithmetic is a
subclass's `_update` on contiguous pieces, whose results do not depend on where an entry stands in its
piece, so that compact, dense and torch's own optimizer agree bit for bit.

| | bytes per parameter, fp32 weights | bf16 weights | with an fp32 master |
|---|---|---|---|
| compact, two moments | 12 d | 8 d | 16 d |
| dense, two moments | 9 | 5 | 13 |
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final, Literal, TypeAlias

import torch
from torch.optim import Optimizer

from sparsity_audit.errors import UsageError
from sparsity_audit.seams import reached
from sparsity_audit.training.entries import TrainedEntries
from sparsity_audit.training.gradients import refuse_nan, refuse_sparse
from sparsity_audit.training.parameters import NamedParameter, local, name_parameters
from sparsity_audit.training.rounding import round_stochastically
from sparsity_audit.training.update_masks import BaseCheck, Unmasked, UpdateMask, bind_mask, frozen_parts

__all__ = ["NamedParams", "Rounding", "SubnetworkOptimizer"]

NamedParams: TypeAlias = torch.nn.Module | Iterable[tuple[str, torch.Tensor]] | Iterable[dict[str, Any]]
"""A model, its `named_parameters()`, or parameter groups whose `params` are (name, parameter) pairs."""

Rounding: TypeAlias = Literal["nearest", "stochastic"]

_STATE_VERSION: Final = 1


class SubnetworkOptimizer(Optimizer):
    """What `SubnetworkAdamW` and `SubnetworkSGD` share; see the module docstring.

    Args:
        params: See `NamedParams`. Parameters that do not require gradients are left out.
        update_mask: A mask directory of this tool, or name → torch.bool.
        defaults: Options of a parameter group.
        unmasked: What becomes of parameters without a mask; `train` gives them dense state.
        base: Whether the weights must have the mask's base fingerprints.
        fp32_master: Keep an fp32 copy of the trained entries, of which 16-bit weights are the rounding.
        rounding: `stochastic`: fp32 arithmetic and moments, results rounded at random to bf16 weights.
        seed: For `stochastic`.
        dense_above: Density from which a parameter has dense state.
        mask_gradients: Whether gradients are zeroed outside the mask as they are accumulated, so that norm
            clipping sees what is trained.
    """

    def __init__(
        self,
        params: NamedParams,
        update_mask: UpdateMask,
        defaults: dict[str, Any],
        *,
        unmasked: Unmasked | None,
        base: BaseCheck,
        fp32_master: bool,
        rounding: Rounding,
        seed: int,
        dense_above: float,
        mask_gradients: bool,
    ) -> None:
        groups, parameters = _read_groups(params)
        mask = bind_mask(parameters, update_mask, base=base)
        trained = {id(named.parameter) for named in parameters if named.parameter.requires_grad}
        # Called for its refusals; what it returns is what this optimizer never touches.
        frozen_parts(parameters, mask, trained, unmasked=unmasked)
        self._parts: dict[int, TrainedEntries] = {}
        for named in parameters:
            key = id(named.parameter)
            if key in trained and (key in mask.selected or unmasked == "train"):
                _check_parameter(named, rounding=rounding, fp32_master=fp32_master)
                self._parts[key] = TrainedEntries.choose(
                    named.name,
                    mask.selected.get(key),
                    num_local=local(named.parameter).numel(),
                    dense_above=dense_above,
                )
        self._fp32_master, self._rounding = fp32_master, rounding
        self._generators: dict[torch.device, torch.Generator] = {}
        self._seed = seed
        self._sealed = False
        super().__init__(groups, defaults)
        self._sealed = True
        if mask_gradients:
            mask_one = weakref.WeakMethod(self._mask_gradient)
            for named in parameters:
                if id(named.parameter) not in trained:
                    continue
                named.parameter.register_post_accumulate_grad_hook(_call_while_alive(mask_one))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused once the optimizer exists: a parameter without a mask would train densely."""
        if self._sealed:
            raise UsageError(
                f"{type(self).__name__}.add_param_group",
                "the optimizer's masks are fixed",
                remedy="make a new optimizer with all parameters and a mask that covers them",
            )
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on the trained entries. For NaN gradients raises UsageError, before it writes."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        ready = [
            (group, parameter, self._parts[id(parameter)])
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None and id(parameter) in self._parts
        ]
        for _, parameter, part in ready:
            refuse_sparse(part.name, parameter.grad)
        refuse_nan(
            [(part.name, parameter.grad) for _, parameter, part in ready],
            trained=lambda number, gradient: ready[number][2].trained(gradient.reshape(-1)),
        )
        for group, parameter, part in ready:
            if part.num_entries:
                self._step_parameter(group, parameter, part)
                reached("parameter scattered")
        return loss

    def state_bytes(self) -> int:
        """Bytes of positions, masks and state on this rank, as they are now."""
        held = [value for state in self.state.values() for value in state.values()]
        tensors = sum(v.numel() * v.element_size() for v in held if isinstance(v, torch.Tensor))
        return tensors + sum(part.num_bytes for part in self._parts.values())

    def state_dict(self) -> dict[str, Any]:
        """What `Optimizer.state_dict` holds, and what tells the mask and continues the random numbers."""
        state = super().state_dict()
        state["subnetwork"] = {
            "version": _STATE_VERSION,
            "masks": [[part.name, part.fingerprint] for part in self._in_order()],
            "generators": {str(device): g.get_state() for device, g in self._generators.items()},
        }
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state, bit for bit. Raises UsageError when it belongs to another mask."""
        saved = state_dict.get("subnetwork")
        if not isinstance(saved, Mapping) or saved.get("version") != _STATE_VERSION:
            raise UsageError(
                f"state of {type(self).__name__}",
                "was not written by a subnetwork optimizer of this version",
                expected=f"its own state_dict(), version {_STATE_VERSION}",
            )
        masks = [[part.name, part.fingerprint] for part in self._in_order()]
        for mine, theirs in zip(masks, saved["masks"], strict=False):
            if mine != list(theirs):
                raise UsageError(
                    f"state of parameter {theirs[0]!r}",
                    f"belongs to the entries {theirs[1]}",
                    expected=f"{mine[0]!r} with the entries {mine[1]}, of this optimizer's mask",
                    remedy="resume with the mask and the options of the run that saved it",
                )
        if len(masks) != len(saved["masks"]):
            raise UsageError(
                f"state of {type(self).__name__}",
                f"holds {len(saved['masks'])} parameters",
                expected=f"{len(masks)}",
            )
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        self._copy_exactly(state_dict)
        for device, state in saved["generators"].items():
            self._generator(torch.device(device)).set_state(state.cpu())

    def _copy_exactly(self, state_dict: Mapping[str, Any]) -> None:
        # torch casts state to the parameter's dtype, which would round fp32 moments of bf16 weights.
        present = [p for group in self.param_groups for p in group["params"]]
        numbers = [n for group in state_dict["param_groups"] for n in group["params"]]
        for parameter, number in zip(present, numbers, strict=True):
            for key, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, torch.Tensor):
                    self.state[parameter][key] = value.detach().to(local(parameter).device, copy=True)

    def _in_order(self) -> Iterator[TrainedEntries]:
        for group in self.param_groups:
            for parameter in group["params"]:
                if id(parameter) in self._parts:
                    yield self._parts[id(parameter)]

    def _moments(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        """Names of the state tensors that a group's options ask for."""
        raise NotImplementedError

    def _update(
        self,
        group: Mapping[str, Any],
        step: int,
        weights: torch.Tensor,
        gradient: torch.Tensor,
        moments: tuple[torch.Tensor, ...],
    ) -> None:
        """One step on one piece, in place; `step` counts from 1."""
        raise NotImplementedError

    def _step_compiled(
        self,
        group: Mapping[str, Any],
        step: int,
        weights: torch.Tensor,
        gradient: torch.Tensor,
        positions: torch.Tensor,
        moments: tuple[torch.Tensor, ...],
    ) -> bool:
        """Take a compact parameter's step if there is a faster way to the same bits; whether there was."""
        del group, step, weights, gradient, positions, moments
        return False

    def _step_parameter(
        self, group: Mapping[str, Any], parameter: torch.Tensor, part: TrainedEntries
    ) -> None:
        assert parameter.grad is not None
        weights, gradient = local(parameter).view(-1), local(parameter.grad).reshape(-1)
        state = self.state[parameter]
        if not state:
            self._start(state, group, weights, part)
        state["step"] += 1
        moments = tuple(state[name] for name in self._moments(group))
        if part.positions is not None and self._step_compiled(
            group, state["step"], weights, gradient, part.positions, moments
        ):
            return
        for piece in part.pieces(weights.device):
            w, g = part.gather(weights, piece), part.gather_gradient(gradient, piece)
            if self._wide(weights):
                g = g.float()
                w = state["master"][piece] if self._fp32_master else w.float()
            self._update(group, state["step"], w, g, tuple(moment[piece] for moment in moments))
            part.scatter(weights, piece, self._narrow(w, weights))

    def _start(
        self, state: dict[str, Any], group: Mapping[str, Any], weights: torch.Tensor, part: TrainedEntries
    ) -> None:
        dtype = torch.float32 if self._wide(weights) else weights.dtype
        state["step"] = 0
        for name in self._moments(group):
            state[name] = torch.zeros(part.num_entries, dtype=dtype, device=weights.device)
        if self._fp32_master and self._wide(weights):
            state["master"] = part.gather(weights, slice(0, part.num_entries)).float()

    def _wide(self, weights: torch.Tensor) -> bool:
        """Whether arithmetic and state are wider than the weights."""
        return (self._fp32_master or self._rounding == "stochastic") and weights.element_size() < 4

    def _narrow(self, values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if values.dtype is weights.dtype:
            return values
        if self._rounding == "stochastic":
            return round_stochastically(values, self._generator(values.device))
        return values.to(weights.dtype)

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]

    @torch.no_grad()
    def _mask_gradient(self, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        part = self._parts.get(id(parameter))
        gradient = local(parameter.grad)
        if part is None:
            gradient.zero_()
        else:
            refuse_sparse(part.name, gradient)
            part.mask_gradient(gradient)


def _call_while_alive(method: weakref.WeakMethod[Callable[[torch.Tensor], None]]) -> Any:
    # A strong reference would go on masking the gradients of a model whose optimizer is long gone.
    def hook(parameter: torch.Tensor) -> None:
        alive = method()
        if alive is not None:
            alive(parameter)

    return hook


def _read_groups(params: NamedParams) -> tuple[list[dict[str, Any]], list[NamedParameter]]:
    """Groups as torch wants them, without parameters that need no gradient; and all parameters by name."""
    if isinstance(params, torch.nn.Module):
        named = list(name_parameters(params))
        return [{"params": [p.parameter for p in named if p.parameter.requires_grad]}], named
    listed: list[Any] = list(params)
    if not listed or not isinstance(listed[0], dict):
        listed = [{"params": listed}]
    groups, pairs = [], []
    for group in listed:
        members = list(group["params"])
        if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in members):
            raise UsageError(
                "params",
                "hold parameters without names, and a mask goes by names",
                expected="a model, or (name, parameter) pairs",
                remedy="pass model, or model.named_parameters()",
            )
        trained = {id(p): p for _, p in members if p.requires_grad}
        groups.append({**group, "params": list(trained.values())})
        pairs += members
    return groups, list(name_parameters(pairs))


def _check_parameter(named: NamedParameter, *, rounding: Rounding, fp32_master: bool) -> None:
    parameter = named.parameter
    found = expected = None
    if not local(parameter).is_contiguous():
        found, expected = "is not contiguous", "row-major memory"
    elif not parameter.is_floating_point():
        found, expected = f"is {parameter.dtype}", "real floating-point weights"
    elif rounding == "stochastic" and parameter.dtype not in (torch.bfloat16, torch.float32):
        found, expected = f"is {parameter.dtype}", "bf16 weights for rounding='stochastic'"
    elif rounding == "stochastic" and fp32_master:
        found, expected = "would be rounded at random from an fp32 master", "one of the two"
    if found is not None:
        raise UsageError(f"parameter {named.name!r}", found, expected=expected)
