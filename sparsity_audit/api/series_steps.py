"""The saved steps of a run: folders such as `checkpoint-500` in the order of their numbers.

Contract: names alone are looked at. Steps that are given one by one keep their order; those of a folder are
ordered by number, so that `checkpoint-900` comes before `checkpoint-1000`. Weights beside numbered folders
may be a step of their own or repeat the last one; they are not taken, and `weights_beside` names them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from sparsity_audit.errors import UsageError

__all__ = ["SavedStep", "saved_steps", "weights_beside"]

_NUMBERED = re.compile(r"(?:checkpoint|ckpt|step|global_step|iter)[-_]?(\d+)", re.IGNORECASE)
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedStep:
    """A step to read.

    Args:
        reference: Where it is.
        label: What it is called.
        number: Its number; None where its name has none.
    """

    reference: str
    label: str
    number: int | None


def saved_steps(given: Sequence[str | Path]) -> tuple[SavedStep, ...]:
    """The steps in order; a folder of numbered folders stands for these.

    Raises:
        UsageError: A step is given twice, two folders have one number, or there is none.
    """
    found: list[SavedStep] = []
    for step in map(str, given):
        found += _inside(Path(step).expanduser(), step)
    places: dict[str, str] = {}
    for step in found:
        path = Path(step.reference).expanduser()
        place = str(path.resolve()) if path.exists() else step.reference
        if place in places:
            raise UsageError(step.reference, "given twice", expected="each saved step once")
        places[place] = step.reference
    if not found:
        raise UsageError("series", "no saved step", expected="BASE and one or more checkpoints")
    labels = [step.label for step in found]
    return tuple(
        step if labels.count(step.label) == 1 else replace(step, label=step.reference) for step in found
    )


def weights_beside(given: Sequence[str | Path]) -> tuple[str, ...]:
    """Weights in a given folder, or in its `final`, when its numbered folders were taken in its place."""
    folders = [Path(step).expanduser() for step in given]
    return tuple(
        str(place)
        for folder in folders
        if _numbered(folder)
        for place in (folder, folder / "final")
        if any(next(place.glob(pattern), None) for pattern in _WEIGHTS)
    )


def _inside(folder: Path, given: str) -> list[SavedStep]:
    numbered = _numbered(folder)
    for (first, one), (second, other) in pairwise(numbered):
        if first == second:
            raise UsageError(
                str(folder),
                f"{one.name} and {other.name} are both step {first}",
                expected="one folder a step",
                remedy="give the steps one by one, in their order",
            )
    return [_named(str(child)) for _, child in numbered] or [_named(given)]


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    """Numbered folders in a folder, by number."""
    found = [
        (int(match[1]), child)
        for child in (folder.iterdir() if folder.is_dir() else ())
        if child.is_dir() and (match := _NUMBERED.fullmatch(child.name))
    ]
    return sorted(found, key=lambda pair: (pair[0], pair[1].name))


def _named(reference: str) -> SavedStep:
    name = Path(reference).name or reference
    match = _NUMBERED.fullmatch(name)
    number = int(match[1]) if match else None
    return SavedStep(reference=reference, label=name if number is None else str(number), number=number)
