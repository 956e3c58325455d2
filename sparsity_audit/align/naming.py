"""Every name of one side, after the user's rules, and the tensor it stands for.

Contract: a user rule is applied to the names as stored, each rule by itself; two rules that disagree about a
name, and two tensors that end under one name, are an `AlignmentError`, never settled by the order of rules.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from sparsity_audit.align.records import Side
from sparsity_audit.align.rules import NormalName, normalise
from sparsity_audit.checkpoint.store import Catalogue
from sparsity_audit.errors import AlignmentError
from sparsity_audit.types import TensorSpec

__all__ = ["Keys", "NamedSide", "name_side"]

# Normalised name → the tensors that have it, each with what was dropped from its name.
Keys: TypeAlias = Mapping[str, Mapping[str, NormalName]]

_REMEDY = "write --map 'REGEX=REPL' so that each tuned name leads to one base name"


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedSide:
    """One checkpoint under the names that matching uses.

    Args:
        side: Which one.
        catalogue: Its tensors.
        owner: Every name, aliases too, after the user's rules → the name in `catalogue.tensors`.
        mapped: The names that a user rule made or confirmed.
        findings: What the user's rules did.
    """

    side: Side
    catalogue: Catalogue
    owner: Mapping[str, str]
    mapped: frozenset[str] = frozenset()
    findings: tuple[str, ...] = ()

    def spec(self, tensor: str) -> TensorSpec:
        """The tensor of that name in the catalogue."""
        return self.catalogue.tensors[tensor]

    def keys(self, exclude: frozenset[str]) -> Keys:
        """The normalised names of all tensors but those in `exclude`."""
        index: dict[str, dict[str, NormalName]] = {}
        for name, tensor in self.owner.items():
            if tensor not in exclude:
                normal = normalise(name)
                tensors = index.get(normal.key)
                if tensors is None:
                    index[normal.key] = {tensor: normal}
                else:
                    tensors.setdefault(tensor, normal)
        return index


def name_side(side: Side, catalogue: Catalogue, maps: tuple[tuple[str, str], ...] = ()) -> NamedSide:
    """The names of a catalogue; `maps` are the user's (REGEX, REPL) rules.

    Raises:
        AlignmentError: A rule is not a regular expression, matches nothing, or contradicts another.
    """
    stored = {name: name for name in catalogue.tensors} | dict(catalogue.aliases)
    if not maps:
        return NamedSide(side=side, catalogue=catalogue, owner=stored)
    rules = [(_compile(regex), repl) for regex, repl in maps]
    counts = [0] * len(rules)
    owner: dict[str, str] = {}
    origin: dict[str, str] = {}
    mapped: set[str] = set()
    for name, tensor in stored.items():
        result = _apply(rules, name, counts)
        target = name if result is None else result
        if owner.get(target, tensor) != tensor:
            raise AlignmentError(
                f"--map to {target!r}",
                f"two tensors of {side} end under this name: {origin[target]!r} and {name!r}",
                expected="one tensor for one name",
                remedy=_REMEDY,
            )
        owner[target], origin[target] = tensor, name
        if result is not None:
            mapped.add(target)
    findings = []
    for (pattern, repl), count in zip(rules, counts, strict=True):
        text = f"--map {pattern.pattern}={repl}"
        if count == 0:
            example = next(iter(stored), None)
            raise AlignmentError(
                text,
                f"matches none of the {len(stored)} names of {side}",
                expected=None if example is None else f"a regular expression for names such as {example!r}",
                remedy="leave the rule out, or look at the names with `sparsity-audit inspect`",
            )
        findings.append(f"{text} applied to {count} tuned name{'s' * (count != 1)}")
    return NamedSide(
        side=side, catalogue=catalogue, owner=owner, mapped=frozenset(mapped), findings=tuple(findings)
    )


def _compile(regex: str) -> re.Pattern[str]:
    try:
        return re.compile(regex)
    except re.error as error:
        raise AlignmentError(
            f"--map {regex}",
            f"not a regular expression: {error}",
            remedy="quote it for the shell; write \\. for a dot",
        ) from error


def _apply(rules: list[tuple[re.Pattern[str], str]], name: str, counts: list[int]) -> str | None:
    """The name that the rules make, None when none of them matches; `counts` is updated."""
    result: str | None = None
    first = ""
    for number, (pattern, repl) in enumerate(rules):
        try:
            renamed, hits = pattern.subn(repl, name)
        except (re.error, IndexError) as error:
            raise AlignmentError(
                f"--map {pattern.pattern}={repl}",
                f"the replacement cannot be used: {error}",
                expected="\\1 or \\g<name> only for groups of the regular expression",
                remedy=_REMEDY,
            ) from error
        if not hits:
            continue
        counts[number] += 1
        if result is not None and renamed != result:
            raise AlignmentError(
                f"tuned tensor {name!r}",
                (
                    f"two --map rules disagree: {first} makes {result!r}, "
                    f"{pattern.pattern}={repl} makes {renamed!r}"
                ),
                expected="one base name",
                remedy=_REMEDY,
            )
        result, first = renamed, f"{pattern.pattern}={repl}"
    return result
