"""The record of a published measurement, computed as its paper computes it.

Contract: counts are exact integers; `sparsity` is None when nothing was compared. An empty `caveats` means
that the number is the one the paper's rule gives; each caveat says where, and by how many entries at most,
the two can differ.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsity_audit.types import View

__all__ = ["DroppedTensor", "PresetResult"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DroppedTensor:
    """A tensor of the base that the paper's rule leaves out of the denominator.

    Args:
        name: Base name.
        entries: Its entries in the base.
        reason: Why the rule leaves it out.
    """

    name: str
    entries: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PresetResult:
    """Update sparsity under the rule of one paper.

    Args:
        preset: Name of the preset.
        criterion: Key of the criterion that equals the paper's rule on the compared codes.
        view: The view compared; `native` stands in where a tensor has no served view of its own.
        compared: Entries in the denominator.
        changed: Entries changed under the rule.
        sparsity: (compared − changed) ÷ compared, every entry weighing the same.
        dropped: What the rule leaves out, by base name.
        rule: The rule in words.
        source: Where it is published.
        caveats: Where this number can differ from the paper's program.
    """

    preset: str
    criterion: str
    view: View
    compared: int
    changed: int
    sparsity: float | None
    dropped: tuple[DroppedTensor, ...]
    rule: str
    source: str
    caveats: tuple[str, ...]
