"""Bind an update mask to the parameters of a model, or refuse it before anything is trained.

Contract: 1 = may be updated. Every tensor of the mask finds exactly one parameter, by its name without
wrappers, else by its name without the roots frameworks add; shapes and devices agree; the base's
fingerprint, where the mask records it, is that of the weights. A mask that selects nothing, or leaves
nothing frozen, is refused: both are what an inverted or misread mask looks like, and the second would be a
dense run under another name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import torch

from sparsity_audit.align.rules import normalise
from sparsity_audit.errors import MaskError, UsageError
from sparsity_audit.masks.metadata import MaskTensor
from sparsity_audit.masks.reader import open_encoded
from sparsity_audit.masks.shards import INDEX_NAME
from sparsity_audit.masks.sources import PT_METADATA_NAME, StoredMask, open_source
from sparsity_audit.training.fingerprints import fingerprint, stored_forms, whole_of
from sparsity_audit.training.parameters import NamedParameter, shard_like, strip_wrappers

__all__ = ["BaseCheck", "BoundMask", "Unmasked", "UpdateMask", "bind_mask", "frozen_parts", "mask_folder"]

UpdateMask: TypeAlias = str | Path | Mapping[str, torch.Tensor]
"""A mask directory of this tool, or name → torch.bool of the parameter's shape, True = may be updated."""

BaseCheck: TypeAlias = Literal["verify", "trust"]
"""Whether the base's fingerprints must be those of the weights, or the caller vouches for the base."""

Unmasked: TypeAlias = Literal["freeze", "train"]
"""What becomes of a trained parameter that the mask does not speak of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundMask:
    """A mask on the parameters of one model.

    Args:
        selected: id of a parameter → its bits: torch.bool, shaped like this rank's part, on its device.
        names: Name of a mask's tensor → the parameter's first name.
        num_selected: Entries selected, of whole parameters.
        num_entries: Entries of the parameters that the mask speaks of.
        unverified: Parameters whose base fingerprint the mask does not record, or that were trusted.
    """

    selected: Mapping[int, torch.Tensor]
    names: Mapping[str, str]
    num_selected: int
    num_entries: int
    unverified: tuple[str, ...]


def bind_mask(
    parameters: Sequence[NamedParameter], update_mask: UpdateMask, *, base: BaseCheck = "verify"
) -> BoundMask:
    """The mask's bits for each parameter.

    Args:
        parameters: Of the model, in its present state.
        update_mask: See `UpdateMask`.
        base: `trust` takes the caller's word that the weights descend from the mask's base.

    Raises:
        MaskError: The mask is no mask of this model; the message says which tensor and why.
    """
    if isinstance(update_mask, Mapping):
        subject = "update_mask"
        found = _bind_tensors(parameters, update_mask)
    else:
        subject = str(update_mask)
        found = _bind_directory(parameters, update_mask, base)
    if found.num_selected == 0:
        raise MaskError(
            subject,
            f"selects none of {found.num_entries} entries, so nothing would be trained",
            expected="1 = may be updated",
            remedy="is it inverted? `sparsity-audit mask info` counts; `mask ops not` turns a mask round",
        )
    return found


def frozen_parts(
    parameters: Sequence[NamedParameter],
    mask: BoundMask,
    trained: AbstractSet[int],
    *,
    unmasked: Unmasked | None,
) -> list[tuple[NamedParameter, torch.Tensor | None]]:
    """The parameters of which something must not change, each with its selected entries, None for none.

    Args:
        parameters: Of the model.
        mask: Their bits.
        trained: ids of the parameters that optimizers update.
        unmasked: For trained parameters without bits; None refuses them.

    Raises:
        UsageError: A trained parameter has no bits and no policy; or nothing would be frozen.
        MaskError: Entries are selected that no optimizer trains.
    """
    held: list[tuple[NamedParameter, torch.Tensor | None]] = []
    lost = [p for p in parameters if id(p.parameter) in trained and id(p.parameter) not in mask.selected]
    if lost and unmasked is None:
        raise UsageError(
            f"parameter {lost[0].name!r}",
            f"is trained and has no mask ({len(lost)} such parameters)",
            remedy="say unmasked='freeze' or unmasked='train'",
        )
    for named in parameters:
        key = id(named.parameter)
        selected = mask.selected.get(key)
        if selected is None:
            if unmasked == "freeze":
                held.append((named, None))
            continue
        if key not in trained and bool(selected.any()):
            raise MaskError(
                f"parameter {named.name!r}",
                "has selected entries, but is in no optimizer or does not require gradients",
                expected="every selected entry trained",
                remedy="add it to the optimizer, or clear its bits",
            )
        if not bool(selected.all()):
            held.append((named, selected))
    if not held and not any(hasattr(p.parameter, "to_local") for p in parameters):
        raise UsageError(
            "update_mask",
            f"selects all {mask.num_entries} entries it speaks of, so nothing would be frozen",
            expected="a subnetwork; 1 = may be updated",
            remedy="is it inverted? For a dense run leave the mask out",
        )
    return held


class _Binding:
    """Collects bits by parameter; one parameter under two names must get the same bits twice."""

    def __init__(self, parameters: Sequence[NamedParameter], names: Iterable[str], subject: str) -> None:
        self._subject = subject
        self.owners = _owners(parameters, list(names), subject)
        self.selected: dict[int, torch.Tensor] = {}
        self._whole: dict[int, tuple[str, torch.Tensor]] = {}
        self.num_selected = self.num_entries = 0

    def add(self, name: str, bits: torch.Tensor) -> None:
        parameter = self.owners[name].parameter
        key = id(parameter)
        if key in self._whole:
            first, known = self._whole[key]
            if not torch.equal(known, bits):
                raise MaskError(
                    f"{self._subject}: tensors {first!r} and {name!r}",
                    "select different entries of one tied parameter",
                    expected="the same bits, or one of the two names",
                )
            return
        self._whole[key] = name, bits
        self.num_selected += int(bits.sum())
        self.num_entries += bits.numel()
        self.selected[key] = shard_like(bits, parameter)

    def finish(self, unverified: Iterable[str]) -> BoundMask:
        return BoundMask(
            selected=self.selected,
            names={name: owner.name for name, owner in self.owners.items()},
            num_selected=self.num_selected,
            num_entries=self.num_entries,
            unverified=tuple(dict.fromkeys(unverified)),
        )


def _owners(
    parameters: Sequence[NamedParameter], names: Sequence[str], subject: str
) -> dict[str, NamedParameter]:
    exact = {name: parameter for parameter in parameters for name in parameter.names}
    by_key: dict[str, list[NamedParameter]] = {}
    for parameter in parameters:
        for key in parameter.keys:
            by_key.setdefault(key, []).append(parameter)
    owners: dict[str, NamedParameter] = {}
    lost = []
    for name in names:
        candidates = by_key.get(normalise(name).key, [])
        owner = exact.get(strip_wrappers(name)) or (candidates[0] if len(candidates) == 1 else None)
        if owner is not None:
            owners[name] = owner
        elif len(candidates) > 1:
            raise MaskError(
                f"{subject}: tensor {name!r}",
                f"may be {candidates[0].name!r} or {candidates[1].name!r}",
                expected="one parameter",
            )
        else:
            lost.append(name)
    if lost:
        known = ", ".join(repr(parameter.name) for parameter in parameters[:3])
        raise MaskError(
            f"{subject}: tensor {lost[0]!r}",
            f"names no parameter of the model ({len(lost)} of {len(names)} tensors do not)",
            expected=f"names such as {known}",
            remedy="give the model the mask was made for; a buffer or a removed tensor cannot be trained",
        )
    return owners


def _bind_tensors(parameters: Sequence[NamedParameter], update_mask: Mapping[str, torch.Tensor]) -> BoundMask:
    binding = _Binding(parameters, update_mask, "update_mask")
    for name, bits in update_mask.items():
        parameter = binding.owners[name].parameter
        subject = f"update_mask: tensor {name!r}"
        if bits.dtype is not torch.bool:
            raise MaskError(
                subject,
                f"is {bits.dtype}",
                expected="torch.bool, True = may be updated",
                remedy="mask.bool()",
            )
        _check_shape(subject, bits.shape, parameter)
        if bits.device != parameter.device:
            raise MaskError(
                subject,
                f"lies on {bits.device}",
                expected=f"{parameter.device}, where the parameter lies",
                remedy=f"mask.to({str(parameter.device)!r})",
            )
        binding.add(name, bits.detach().clone())
    return binding.finish(owner.name for owner in binding.owners.values())


def _check_shape(subject: str, shape: Sequence[int], parameter: torch.Tensor) -> None:
    if tuple(shape) != tuple(parameter.shape):
        raise MaskError(
            subject,
            f"has shape {list(shape)}",
            expected=f"{list(parameter.shape)}, the parameter's",
            remedy="give the mask of this model",
        )


def mask_folder(path: str | Path) -> Path:
    """The directory of a mask that says what its ones mean.

    Raises:
        MaskError: It is no mask directory of this tool, or does not record its polarity.
    """
    folder = Path(path).expanduser()
    if not (folder / INDEX_NAME).is_file() and not (folder / PT_METADATA_NAME).is_file():
        if folder.is_file() or any(folder.glob("*.pt")):
            raise MaskError(
                str(path),
                "does not record its polarity",
                expected="a mask directory of this tool",
                remedy=f"sparsity-audit mask convert {path} -o MASK, with --inverted where 1 means frozen",
            )
        open_encoded(folder)  # raises, saying what the directory is instead
    return folder


def _bind_directory(parameters: Sequence[NamedParameter], path: str | Path, base: BaseCheck) -> BoundMask:
    folder = mask_folder(path)
    with closing(open_source(folder)) as source:
        binding = _Binding(parameters, source.tensors, str(path))
        unverified = []
        for name, tensor in source.tensors.items():
            owner = binding.owners[name]
            subject = f"{path}: tensor {name!r}"
            _check_shape(subject, tensor.shape, owner.parameter)
            if base == "trust" or not tensor.fingerprints[0]:
                unverified.append(owner.name)
            else:
                _verify_base(subject, tensor, owner.parameter)
            binding.add(name, _read_bits(source, name).to(owner.parameter.device))
        return binding.finish(unverified)


def _read_bits(source: StoredMask, name: str) -> torch.Tensor:
    tensor = source.tensors[name]
    selected = np.empty(tensor.num_entries, dtype=np.bool_)
    for block, bits in source.blocks(name):
        entries = np.unpackbits(bits, axis=-1, count=block.num_cols, bitorder="little").reshape(-1)
        selected[block.first_entry : block.first_entry + block.num_entries] = entries
    return torch.from_numpy(selected).reshape(tensor.shape)


def _verify_base(subject: str, tensor: MaskTensor, parameter: torch.Tensor) -> None:
    expected = tensor.fingerprints[0]
    found = 0
    for number, form in enumerate(stored_forms(whole_of(parameter))):
        value = fingerprint(form, tensor.entry_ranges)
        if value == expected:
            return
        if number == 0:
            found = value
    raise MaskError(
        subject,
        f"the weights have fingerprint {found:016x} in {parameter.dtype}",
        expected=f"{expected:016x}, of the base the mask was made from",
        remedy=(
            "load that base in the dtype it is stored in; base='trust' takes your word, which is needed "
            "where training resumes or the weights were cast"
        ),
    )
