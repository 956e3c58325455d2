"""Find tensors that one side stores fused and the other in parts.

Contract: a fused tensor is matched only when its rows are exactly the rows of all its parts, in the table's
order; where the rows of the parts alternate, only in the groups that a configuration tells. Stacked experts
are fused tensors whose parts are the matrices of all experts in turn. What looks fused but cannot be taken
apart by rows becomes a reason for the leftovers, with a detail.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TypeAlias

from sparsity_audit.align.interleaving import count_groups
from sparsity_audit.align.linking import Link, Linker, ambiguity
from sparsity_audit.align.naming import Keys, NamedSide
from sparsity_audit.align.records import LeftoverReason, Side
from sparsity_audit.align.rules import EXPERT_PARTS, FUSED, split_experts, split_leaf
from sparsity_audit.errors import AlignmentError

__all__ = ["Fusion", "Fusions", "find_fusions"]

_MAX_LISTED = 6

Tensor: TypeAlias = tuple[Side, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fusion:
    """One fused tensor and its parts on the other side.

    Args:
        side: The side that stores it fused.
        fused: Its name in that side's catalogue.
        module: The last component of its name (`qkv_proj`).
        parts: The parts' names in the other side's catalogue, in row order.
        labels: What the parts are called (`q_proj`, …; of stacked experts `7.gate_proj`, …).
        groups: Groups in which the rows of the parts alternate; 1 where the parts follow one another.
    """

    side: Side
    fused: str
    module: str
    parts: tuple[str, ...]
    labels: tuple[str, ...]
    groups: int = 1

    @property
    def rule(self) -> str:
        """How the parts lie in the fused tensor."""
        return "fused" if self.groups == 1 else "interleaved"

    @property
    def kinds(self) -> str:
        """What the parts are called, without the numbers of experts."""
        return ", ".join(dict.fromkeys(label.rpartition(".")[2] for label in self.labels))

    @property
    def is_stack(self) -> bool:
        """Whether the parts are those of numbered experts."""
        return "." in self.labels[0]


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
            shape = mine.spec(next(iter(my_keys[key]))).shape
            module, options = _options(key, shape, their_keys)
            candidate = _candidate(linker, mine.side, [*my_keys[key]], module, options)
            if candidate is not None:
                _judge(linker, mine, theirs, candidate, fusions)
    return fusions


# Labels of the parts, and the other side's tensors under each.
_Option: TypeAlias = tuple[tuple[str, ...], list[list[str]]]


def _options(key: str, shape: tuple[int, ...], other: Keys) -> tuple[str, list[_Option]]:
    """The module, and the sets of parts of which at least one exists; none for a name that is not fused."""
    module, names = "", list[tuple[tuple[str, ...], list[str]]]()
    if (leaf := split_leaf(key)) is not None and leaf[1] in FUSED:
        path, module, kind = leaf
        names = [(labels, [f"{path}{label}.{kind}" for label in labels]) for labels in FUSED[module].parts]
    elif (experts := split_experts(key)) is not None:
        paths, module, kind = experts
        for path in paths:
            for parts in EXPERT_PARTS[module]:
                count = 0
                while any(f"{path}{count}.{part}.{kind}" in other for part in parts):
                    count += 1
                count = max(count, shape[0] if count and len(shape) == 3 else 0)
                labels = tuple(f"{number}.{part}" for number in range(count) for part in parts)
                names.append((labels, [f"{path}{label}.{kind}" for label in labels]))
    found = [(labels, [[*other.get(name, ())] for name in keys]) for labels, keys in names]
    return module, [option for option in found if any(option[1])]


def _candidate(
    linker: Linker, side: Side, tensors: list[str], module: str, options: list[_Option]
) -> Fusion | None:
    """The parts that exist on the other side, '' for a missing one; None when nothing is left to match."""
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
    label = f"{fusion.module} against {fusion.kinds}"
    if len(parts) < len(fusion.parts):
        if fused_is_open:
            missing = [lab for lab, part in zip(fusion.labels, fusion.parts, strict=True) if not part]
            listed = ", ".join(missing[:_MAX_LISTED]) + (", …" if len(missing) > _MAX_LISTED else "")
            fusions.explain(everyone, LeftoverReason.ONLY_HERE, f"{label}: no {listed}")
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
    verdict = _layout(mine, theirs, fusion)
    if isinstance(verdict, int):
        fusions.members.update(dict.fromkeys(everyone, fusion.fused))
        fusions.found.append(replace(fusion, groups=verdict))
    else:
        fusions.explain(everyone, *verdict)


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


_WhyNot: TypeAlias = tuple[LeftoverReason, str]


def _layout(mine: NamedSide, theirs: NamedSide, fusion: Fusion) -> int | _WhyNot:
    """In how many groups the rows of the parts alternate (1: they do not), or why the tensor stays whole."""
    fused = mine.spec(fusion.fused).shape
    parts = [theirs.spec(part).shape for part in fusion.parts]
    if fusion.is_stack:
        return _stack_layout(mine, fusion, fused, parts)
    listed = (f"{label} {list(shape)}" for label, shape in zip(fusion.labels, parts, strict=True))
    shapes = f"{fusion.module} {list(fused)} against {', '.join(listed)}"
    interleaves = not FUSED[fusion.module].is_concatenation
    groups: int | str = 1
    if interleaves:
        text = f"{shapes}: frameworks that use this name interleave the rows per head or group"
        if len(parts) != 3 or not all(parts):
            return LeftoverReason.INTERLEAVED, text
        rows = (parts[0][0], parts[1][0], parts[2][0])
        groups = count_groups((mine.catalogue.config, theirs.catalogue.config), rows)
        if isinstance(groups, str):
            return LeftoverReason.INTERLEAVED, f"{text}; {groups}"
    if fused and all(len(shape) == len(fused) and shape[1:] == fused[1:] for shape in parts):
        total = sum(shape[0] for shape in parts)
        return groups if total == fused[0] else (LeftoverReason.SHAPE, f"{shapes}: {total} rows in the parts")
    if len(fused) == 2 and all(len(shape) == 2 for shape in parts):
        for axis in (0, 1):
            across = {shape[1 - axis] for shape in parts} == {fused[0]}
            if across and sum(shape[axis] for shape in parts) == fused[1]:
                return LeftoverReason.TRANSPOSED, f"{shapes}: fused along the second axis"
    return LeftoverReason.SHAPE, shapes


def _stack_layout(
    mine: NamedSide, fusion: Fusion, fused: tuple[int, ...], parts: list[tuple[int, ...]]
) -> int | _WhyNot:
    """1 for [experts, rows of all pieces, columns]; stacks that hold transposed matrices are left over."""
    kinds = len(fusion.kinds.split(", "))
    one, count = parts[:kinds], len(parts) // kinds
    listed = f"{count} × {' and '.join(str(list(shape)) for shape in dict.fromkeys(one))}"
    shapes = f"{fusion.module} {list(fused)} against {listed} ({fusion.kinds})"
    is_regular = len(fused) == 3 and all(shape == one[i % kinds] for i, shape in enumerate(parts))
    if not is_regular or {len(shape) for shape in one} != {2} or len({shape[1] for shape in one}) > 1:
        return LeftoverReason.SHAPE, shapes
    if fused[0] != count:
        return LeftoverReason.SHAPE, f"{shapes}: {fused[0]} experts against {count}"
    rows, cols = sum(shape[0] for shape in one), one[0][1]
    if fused[1:] == (rows, cols) == (cols, rows):
        is_plain = _neighbour_is_plain(mine, fusion, one[0])
        if is_plain is None:
            return LeftoverReason.INTERLEAVED, f"{shapes}: square, so that it may be transposed"
    else:
        is_plain = fused[1:] == (rows, cols)
    if is_plain:
        return 1
    if fused[1:] == (cols, rows):
        return LeftoverReason.TRANSPOSED, f"{shapes}: each expert's matrix is transposed"
    return LeftoverReason.SHAPE, shapes


def _neighbour_is_plain(mine: NamedSide, fusion: Fusion, part: tuple[int, ...]) -> bool | None:
    """Whether the same experts' other stack is not transposed; None where that cannot be told.

    A model lays out both stacks alike, and gate_up_proj [2·inner, hidden] and down_proj [hidden, inner] are
    never both square.
    """
    other = "down_proj" if fusion.module == "gate_up_proj" else "gate_up_proj"
    path, _, last = fusion.fused.rpartition(".")
    spec = mine.catalogue.tensors.get(f"{path}.{last.replace(fusion.module, other)}")
    if spec is None or len(spec.shape) != 3:
        return None
    plain = part[::-1] if other == "down_proj" else (2 * part[1], part[0])
    found = spec.shape[1:]
    if plain == plain[::-1] or found not in (plain, plain[::-1]):
        return None
    return found == plain
