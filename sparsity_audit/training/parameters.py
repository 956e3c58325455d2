"""Parameters by every name they have, and the part of each that lies in this process.

Contract: a tied parameter is one `NamedParameter` with several names. Names lose the components that wrappers
put into them (`torch.compile`, DDP, activation checkpointing). A parameter of FSDP2 is a DTensor, of which
`local` is this rank's shard, the same memory. Layouts whose entries cannot be told apart by name and position
(FSDP1's flat parameters, DeepSpeed ZeRO-3) are refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import torch

from sparsity_audit.align.rules import WRAPPERS, normalise
from sparsity_audit.errors import UsageError

__all__ = ["NamedParameter", "codes", "local", "name_parameters", "shard_like", "strip_wrappers"]

_CODES: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedParameter:
    """One parameter of a model.

    Args:
        names: Every name it has, without wrappers, in the model's order.
        parameter: The tensor.
    """

    names: tuple[str, ...]
    parameter: torch.Tensor

    @property
    def name(self) -> str:
        """The first name."""
        return self.names[0]

    @property
    def keys(self) -> frozenset[str]:
        """The names, less the roots that frameworks put in front (`model.`, `base_model.`)."""
        return frozenset(normalise(name).key for name in self.names)


def strip_wrappers(name: str) -> str:
    """The name without components such as `_orig_mod` and `module`."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def name_parameters(
    source: torch.nn.Module | Iterable[tuple[str, torch.Tensor]],
) -> tuple[NamedParameter, ...]:
    """The parameters of a model, or of its `named_parameters()`, tied ones once.

    Raises:
        UsageError: The model is wrapped by FSDP1 or partitioned by ZeRO-3, or a name occurs twice.
    """
    if isinstance(source, torch.nn.Module):
        _refuse_flat(source)
        source = source.named_parameters(remove_duplicate=False)
    names: dict[int, list[str]] = {}
    tensors: dict[int, torch.Tensor] = {}
    owner: dict[str, int] = {}
    for raw, parameter in source:
        if hasattr(parameter, "ds_id"):
            raise UsageError(
                f"parameter {raw!r}",
                "is partitioned by DeepSpeed ZeRO-3, which frees it between uses and updates a flat copy",
                expected="parameters that keep their shape during the optimizer step",
                remedy="use FSDP2 (torch.distributed.fsdp.fully_shard), or ZeRO stage 0 on one device",
            )
        name = strip_wrappers(raw)
        if owner.setdefault(name, id(parameter)) != id(parameter):
            raise UsageError(
                f"parameter {name!r}", "two parameters have this name once wrappers are taken off"
            )
        names.setdefault(id(parameter), []).append(name)
        tensors[id(parameter)] = parameter
    return tuple(
        NamedParameter(names=tuple(dict.fromkeys(names[key])), parameter=tensors[key]) for key in names
    )


def _refuse_flat(model: torch.nn.Module) -> None:
    for name, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise UsageError(
                f"module {name or type(model).__name__!r}",
                "is wrapped by FSDP1, whose flat parameters hold entries of many tensors in one",
                expected="parameters with their own names and shapes",
                remedy="wrap it with torch.distributed.fsdp.fully_shard (FSDP2) instead",
            )


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a DTensor, sharing its memory; any other tensor itself."""
    part: Any = tensor.detach()
    return part.to_local() if hasattr(part, "to_local") else part


def shard_like(whole: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """The part of `whole`, shaped like the parameter, that belongs to this rank's shard of it."""
    like: Any = parameter
    if not hasattr(like, "to_local"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None).to_local()


def codes(tensor: torch.Tensor) -> torch.Tensor:
    """The stored codes of a tensor as integers of its width, sharing its memory."""
    return tensor.view(_CODES[tensor.element_size()])
