"""DTensors in a pickle: which part of which tensor a rank holds, read as data.

Contract: a DTensor becomes a `LocalShard`; every class of torch.distributed that it names stays a record. A
placement or a mesh that cannot be read for certain is refused, never guessed.

Source: torch 2.4 to 2.13: `DTensor.__tensor_flatten__` state (`_local_tensor`, `_spec`), `DTensorSpec`
(`mesh`, `placements`, `tensor_meta`), `DeviceMesh` (`mesh` before 2.9, `_layout` since).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from sparsity_audit.checkpoint.assembly import Box
from sparsity_audit.checkpoint.restricted_pickle import Global, MalformedError, Record
from sparsity_audit.checkpoint.torch_vocabulary import (
    Refused,
    TensorRef,
    load_distributed,
    rebuild_from_type,
)
from sparsity_audit.errors import UnsupportedFormatError

__all__ = ["LocalShard", "load_dtensors"]

_INERT: Final = ("torch.distributed.", "torch._C._distributed_c10d.")
_WRAPPER: Final = "torch._utils._rebuild_wrapper_subclass"
_MAX_MESH_AXES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalShard:
    """The part of a tensor that one rank holds.

    Args:
        local: The part.
        shape: Shape of the whole.
        placements: One for each axis of the mesh: the axis of the tensor that it cuts, None for replicas.
        mesh: Ranks along each axis of the mesh; empty where that is not recorded.
    """

    local: TensorRef
    shape: tuple[int, ...]
    placements: tuple[int | None, ...]
    mesh: tuple[int, ...]

    def box(self, rank: int, num_ranks: int, *, subject: str) -> Box | None:
        """The part of `rank`, None where it is a replica of what another rank holds.

        Raises:
            UnsupportedFormatError: The mesh has another number of ranks than there are files.
        """
        mesh = self.mesh or ((num_ranks,) if len(self.placements) == 1 else ())
        if math.prod(mesh) != num_ranks or len(mesh) != len(self.placements):
            raise UnsupportedFormatError(
                subject,
                f"cut over a mesh of {list(mesh) or 'unknown size'}, by {len(self.placements)} placements",
                expected=f"a mesh of the {num_ranks} ranks that wrote a file",
                remedy="save with one mesh for all ranks, or merge with the trainer's own tool",
            )
        start, size, rest = [0] * len(self.shape), list(self.shape), rank
        for axis_ranks, later, axis in zip(mesh, _strides(mesh), self.placements, strict=True):
            place = rest // later % axis_ranks
            if axis is None:
                if place:
                    return None
                continue
            step = -(-size[axis] // axis_ranks)
            first = min(place * step, size[axis])
            start[axis], size[axis] = start[axis] + first, min(step, size[axis] - first)
        return Box(tuple(start), tuple(size))


def load_dtensors(data: bytes, *, subject: str) -> object:
    """`load_state`, but with a `LocalShard` for every DTensor.

    Raises:
        UnsafePickleError: It names something that is not on the list.
        UnsupportedFormatError: A sharding that is not read.
        CorruptCheckpointError: It is damaged.
    """

    def rebuild(arguments: tuple[object, ...]) -> object:
        function = arguments[0] if arguments else None
        if not isinstance(function, Global) or function.path != _WRAPPER:
            return rebuild_from_type(arguments)
        return _shard(arguments, subject)

    return load_distributed(
        data, subject=subject, calls={"torch._tensor._rebuild_from_type_v2": rebuild}, inert=_INERT
    )


def _shard(arguments: tuple[object, ...], subject: str) -> LocalShard | Refused:
    kind, state = (arguments[1], arguments[3]) if len(arguments) > 3 else (None, None)
    if not isinstance(kind, Global) or kind.path.rpartition(".")[2] != "DTensor":
        name = kind.path if isinstance(kind, Global) else "an unknown class"
        return Refused(f"a {name}", "save a state dict of plain tensors or DTensors")
    holder = Record(kind.path, ())
    holder.state = state
    local, spec = holder.get("_local_tensor"), holder.get("_spec")
    if not isinstance(local, TensorRef) or not isinstance(spec, Record):
        raise MalformedError("holds a DTensor without a local tensor or a spec")
    meta = spec.get("tensor_meta")
    # TensorMeta is a named tuple: its fields are the arguments that it is made with.
    shape = meta.arguments[0] if isinstance(meta, Record) and meta.arguments else None
    if not isinstance(shape, tuple) or not all(type(n) is int and 0 <= n < 2**63 for n in shape):
        raise MalformedError("holds a DTensor without a shape")
    placements = spec.get("placements")
    if not isinstance(placements, tuple) or len(placements) > _MAX_MESH_AXES:
        raise MalformedError("holds a DTensor without placements")
    cuts = tuple(_cut(subject, placement, len(shape)) for placement in placements)
    return LocalShard(local=local, shape=shape, placements=cuts, mesh=_mesh(spec.get("mesh")))


def _cut(subject: str, placement: object, num_axes: int) -> int | None:
    name = placement.path.rpartition(".")[2] if isinstance(placement, Record) else "nothing"
    if name == "Replicate":
        return None
    if name != "Shard":
        raise UnsupportedFormatError(
            subject,
            f"holds a tensor placed by {name}",
            expected="Shard or Replicate",
            remedy="merge with the trainer's own tool, then compare the merged checkpoint",
        )
    assert isinstance(placement, Record)
    axis = placement.get("dim")
    if axis is None and placement.arguments:
        axis = placement.arguments[0]
    if type(axis) is not int or not -num_axes <= axis < num_axes:
        raise MalformedError("cuts a tensor along an axis that it does not have")
    return axis % num_axes


def _mesh(mesh: object) -> tuple[int, ...]:
    if not isinstance(mesh, Record):
        return ()
    layout, stored = mesh.get("_layout"), mesh.get("mesh")
    found: object = ()
    if isinstance(stored, TensorRef):
        found = stored.shape
    elif isinstance(layout, Record):
        axes = layout.get("axes")
        if isinstance(axes, tuple):
            found = tuple(_axis_ranks(axis) for axis in axes)
        else:
            found = layout.get("shape") or (layout.arguments[0] if layout.arguments else ())
            found = (found,) if type(found) is int else found
    sizes = [n for n in found if type(n) is int and 0 < n < 2**31] if isinstance(found, tuple) else []
    return tuple(sizes) if isinstance(found, tuple) and len(sizes) == len(found) else ()


def _axis_ranks(axis: object) -> object:
    shape = axis.get("shape") if isinstance(axis, Record) else None
    if isinstance(shape, tuple) and all(type(n) is int and n > 0 for n in shape):
        return math.prod(shape)
    return shape


def _strides(mesh: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(mesh[axis + 1 :]) for axis in range(len(mesh)))
