"""Find tensors that one side stores fused and the other in parts.

Contract: a fused tensor is matched only when its rows are exactly the rows of all its parts, in the table's
order. What looks fused but cannot be taken apart by rows becomes a reason for the leftovers, with a detail.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from sparsity_audit.align.linking import Link, Linker, ambiguity
from sparsity_audit.align.naming import Keys, NamedSide
from sparsity_audit.align.records import LeftoverReason, Side
from sparsity_audit.align.rules import FUSED, split_leaf
from sparsity_audit.errors import AlignmentError

__all__ = ["Fusion", "Fusions", "find_fusions"]

Tensor: TypeAlias = tuple[Side, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fusion:
    """One fused tensor and its parts on the other side.

    Args:
        side: The side that stores it fused.
        fused: Its name in that side's catalogue.
        module: The last component of its name (`qkv_proj`).
        parts: The parts' names in the other side's catalogue, in row order.
        labels: What the parts are called (`q_proj`, …).
    """

    side: Side
    fused: str
    module: str
    parts: tuple[str, ...]
    labels: tuple[str, ...]


@dataclass(slots=True)
class Fusions:
    """What was found: fusions, their members, and why tensors that look fused stay unmatched."""

    found: list[Fusion] = field(default_factory=list)
    members: dict[Tensor, str] = field(default_factory=dict)
    why_not: dict[Tensor, tuple[LeftoverReason, str]] = field(default_factory=dict)

    def explain(self, tensors: list[Tensor], reason: LeftoverReason, detail: str) -> None:
        """Keep the first reason for each tensor."""
        for tensor in tensors:
            self.why_not.setdefault(tensor, (reason, detail))


def find_fusions(linker: Linker, base_keys: Keys, tuned_keys: Keys) -> Fusions:
    """Fused ↔ split matches among the tensors that are not linked yet.

    Args:
        linker: The links so far.
        base_keys: Normalised name → tensors of the base.
        tuned_keys: The same of the tuned side.

    Raises:
        AlignmentError: A tensor could be matched whole or in parts.
    """
    fusions = Fusions()
    for mine, theirs, my_keys, their_keys in (
        (linker.base, linker.tuned, base_keys, tuned_keys),
        (linker.tuned, linker.base, tuned_keys, base_keys),
    ):
        for key in sorted(my_keys):
            leaf = split_leaf(key)
            if leaf is not None and leaf[1] in FUSED:
                candidate = _candidate(linker, mine.side, [*my_keys[key]], leaf, their_keys)
                if candidate is not None:
                    _judge(linker, mine, theirs, candidate, fusions)
    return fusions


def _candidate(
    linker: Linker, side: Side, tensors: list[str], leaf: tuple[str, str, str], other: Keys
) -> Fusion | None:
    """The parts that exist on the other side, '' for a missing one; None when nothing is left to match."""
    path, module, kind = leaf
    options = []
    for labels in FUSED[module].parts:
        found = [[*other.get(f"{path}{label}.{kind}", ())] for label in labels]
        if any(found):
            options.append((labels, found))
    linked, linked_there = linker.links[side], linker.links["tuned" if side == "base" else "base"]
    there = {name for _, found in options for names in found for name in names}
    if not options or (linked.keys() >= {*tensors} and linked_there.keys() >= there):
        return None
    labels, found = options[0]
    if len(tensors) > 1 or len(options) > 1 or any(len(names) > 1 for names in found):
        groups = [", ".join(name for names in found for name in names) for _, found in options]
        raise _ambiguity(side, tensors, next((names for names in found if len(names) > 1), groups))
    parts = tuple(names[0] if names else "" for names in found)
    return Fusion(side=side, fused=tensors[0], module=module, parts=parts, labels=labels)


def _judge(linker: Linker, mine: NamedSide, theirs: NamedSide, fusion: Fusion, fusions: Fusions) -> None:
    """Record the fusion, or why it is none."""
    linked = linker.links[theirs.side]
    parts = [part for part in fusion.parts if part]
    fused_is_open = fusion.fused not in linker.links[mine.side]
    open_parts = [part for part in parts if part not in linked]
    everyone: list[Tensor] = [(mine.side, fusion.fused), *((theirs.side, part) for part in open_parts)]
    label = f"{fusion.module} against {', '.join(fusion.labels)}"
    if len(parts) < len(fusion.parts):
        if fused_is_open:
            missing = [lab for lab, part in zip(fusion.labels, fusion.parts, strict=True) if not part]
            fusions.explain(everyone, LeftoverReason.ONLY_HERE, f"{label}: no {', '.join(missing)}")
        return
    if not fused_is_open or len(open_parts) < len(parts):
        raise _whole_or_parts(linker, fusion, parts)
    if len(set(parts)) < len(parts) or not fusions.members.keys().isdisjoint(everyone):
        rivals = {fusions.members[member] for member in everyone if member in fusions.members}
        if rivals and not (mine.catalogue.aliases or theirs.catalogue.aliases):
            raise _ambiguity(mine.side, [fusion.fused, *rivals], [", ".join(parts)])
        unused = [member for member in everyone if member not in fusions.members]
        fusions.explain(unused, LeftoverReason.UNTIED, f"{label}, which share storage with others")
        return
    reason = _why_not(mine, theirs, fusion)
    if reason is None:
        fusions.members.update(dict.fromkeys(everyone, fusion.fused))
        fusions.found.append(fusion)
    else:
        fusions.explain(everyone, *reason)


def _whole_or_parts(linker: Linker, fusion: Fusion, parts: list[str]) -> AlignmentError:
    """A tensor that is linked already could also be fused with, or be part of, one that is not."""
    side: Side = fusion.side
    other: Side = "tuned" if side == "base" else "base"
    if fusion.fused in linker.links[side]:
        whole = _partner(linker.links[side][fusion.fused], side)
        return _ambiguity(side, [fusion.fused], [whole, ", ".join(parts)])
    part = next(part for part in parts if part in linker.links[other])
    return _ambiguity(side, [_partner(linker.links[other][part], other), fusion.fused], [part])


def _partner(link: Link, side: Side) -> str:
    return link.tuned if side == "base" else link.base


def _ambiguity(side: Side, mine: list[str], theirs: list[str]) -> AlignmentError:
    return ambiguity(mine, theirs) if side == "base" else ambiguity(theirs, mine)


def _why_not(mine: NamedSide, theirs: NamedSide, fusion: Fusion) -> tuple[LeftoverReason, str] | None:
    fused = mine.spec(fusion.fused).shape
    parts = [theirs.spec(part).shape for part in fusion.parts]
    listed = (f"{label} {list(shape)}" for label, shape in zip(fusion.labels, parts, strict=True))
    shapes = f"{fusion.module} {list(fused)} against {', '.join(listed)}"
    if not FUSED[fusion.module].is_concatenation:
        return (
            LeftoverReason.INTERLEAVED,
            f"{shapes}: frameworks that use this name interleave the rows per head or group",
        )
    if fused and all(len(shape) == len(fused) and shape[1:] == fused[1:] for shape in parts):
        rows = sum(shape[0] for shape in parts)
        return None if rows == fused[0] else (LeftoverReason.SHAPE, f"{shapes}: {rows} rows in the parts")
    if len(fused) == 2 and all(len(shape) == 2 for shape in parts):
        for axis in (0, 1):
            across = {shape[1 - axis] for shape in parts} == {fused[0]}
            if across and sum(shape[axis] for shape in parts) == fused[1]:
                return LeftoverReason.TRANSPOSED, f"{shapes}: fused along the second axis"
    return LeftoverReason.SHAPE, shapes
