"""Prove that entries outside an update mask kept their bits, or name the first that did not.

Contract: codes are compared, not values: −0.0 is not +0.0, and NaN payloads count. Nothing is rounded and no
tolerance exists. Tensors are compared in order, entries in row-major order, in pieces of bounded memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

import torch

from sparsity_audit.errors import FrozenEntryChangedError, UsageError
from sparsity_audit.training.parameters import NamedParameter, codes, local, name_parameters
from sparsity_audit.training.update_masks import Unmasked, UpdateMask, bind_mask, frozen_parts

__all__ = ["FrozenPart", "FrozenProof", "Weights", "prove", "verify_frozen"]

Weights: TypeAlias = torch.nn.Module | Mapping[str, torch.Tensor]
"""A model, or its state dict."""

_CHUNK_ENTRIES: Final = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenProof:
    """What was compared, bit for bit, and found unchanged.

    Args:
        num_tensors: Tensors with frozen entries.
        num_frozen: Entries that kept their bits; of this rank's shards where the model is sharded.
        num_trainable: Entries of the same tensors that were allowed to change.
    """

    num_tensors: int
    num_frozen: int
    num_trainable: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenPart:
    """One tensor of which some entries must not change.

    Args:
        name: For messages.
        tensor: Its present values.
        selected: Entries that may change; None where none may.
        kept: The codes it had.
    """

    name: str
    tensor: torch.Tensor
    selected: torch.Tensor | None
    kept: torch.Tensor


def prove(parts: Iterable[FrozenPart]) -> FrozenProof:
    """Compare every part with what was kept. Raises FrozenEntryChangedError at the first difference."""
    tensors = frozen = trainable = 0
    for part in parts:
        now = codes(local(part.tensor))
        if now.shape != part.kept.shape or now.dtype != part.kept.dtype:
            raise FrozenEntryChangedError(
                f"tensor {part.name!r}",
                f"is {part.tensor.dtype} of shape {list(part.tensor.shape)}",
                expected="the dtype and shape it was frozen in",
            )
        _compare(part, now.reshape(-1), part.kept.reshape(-1))
        chosen = 0 if part.selected is None else int(part.selected.sum())
        tensors, frozen, trainable = tensors + 1, frozen + now.numel() - chosen, trainable + chosen
    return FrozenProof(num_tensors=tensors, num_frozen=frozen, num_trainable=trainable)


def _compare(part: FrozenPart, now: torch.Tensor, kept: torch.Tensor) -> None:
    free = None if part.selected is None else part.selected.reshape(-1)
    for start in range(0, now.numel(), _CHUNK_ENTRIES):
        stop = min(start + _CHUNK_ENTRIES, now.numel())
        moved = now[start:stop] != kept[start:stop]
        if free is not None:
            moved &= ~free[start:stop]
        if bool(moved.any()):
            raise _changed(part, start + int(moved.nonzero()[0]), now, kept)


def _changed(part: FrozenPart, entry: int, now: torch.Tensor, kept: torch.Tensor) -> FrozenEntryChangedError:
    shape = local(part.tensor).shape
    place = [int(axis) for axis in torch.unravel_index(torch.tensor(entry), shape)]
    dtype = part.tensor.dtype
    was, found = (_describe(side[entry], dtype) for side in (kept, now))
    return FrozenEntryChangedError(
        f"tensor {part.name!r}, entry {place}",
        f"lies outside the update mask and changed: {was} -> {found}",
        expected="the same bits as when it was frozen",
        remedy="something wrote to the weights after the restore, or past the optimizer that was given",
    )


def _describe(code: torch.Tensor, dtype: torch.dtype) -> str:
    digits = 2 * code.element_size()
    bits = int(code) % (1 << 8 * code.element_size())
    return f"{code.view(dtype).item()!r} (0x{bits:0{digits}x})"


def verify_frozen(
    tuned: Weights, base: Weights, update_mask: UpdateMask, *, unmasked: Unmasked = "freeze"
) -> FrozenProof:
    """Every entry of `tuned` outside the mask has the bits it has in `base`, or an error names the first.

    Args:
        tuned: After training; a model or a state dict of one.
        base: What training started from, in the same dtypes.
        update_mask: A mask directory, whose base fingerprints are checked against `base`, or bool tensors.
        unmasked: `train` leaves out the tensors that the mask does not speak of.

    Raises:
        FrozenEntryChangedError: An entry changed.
        MaskError: The mask is no mask of `base`.
        UsageError: A tensor of `base` is missing in `tuned`, or the mask freezes nothing.
    """
    sides = [name_parameters(_named(side)) for side in (base, tuned)]
    mask = bind_mask(sides[0], update_mask)
    found = {name: named.parameter for named in sides[1] for name in named.names}
    trained = {id(named.parameter) for named in sides[0]}
    parts = []
    for named, selected in frozen_parts(sides[0], mask, trained, unmasked=unmasked):
        parts.append(_part(named, selected, found))
    return prove(parts)


def _named(side: Weights) -> list[tuple[str, torch.Tensor]]:
    if isinstance(side, torch.nn.Module):
        return list(side.named_parameters(remove_duplicate=False))
    # A state dict holds a tied tensor as several objects on one memory.
    first: dict[tuple[object, ...], torch.Tensor] = {}
    named = []
    for name, tensor in side.items():
        place = (tensor.device, local(tensor).data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        named.append((name, first.setdefault(place, tensor) if tensor.numel() else tensor))
    return named


def _part(
    named: NamedParameter, selected: torch.Tensor | None, found: Mapping[str, torch.Tensor]
) -> FrozenPart:
    present = [found[name] for name in named.names if name in found]
    if not present:
        raise UsageError(
            f"tensor {named.name!r}", "is not in the tuned weights", expected="the tensors of the base"
        )
    kept = codes(local(named.parameter))
    return FrozenPart(name=named.name, tensor=present[0].to(kept.device), selected=selected, kept=kept)
