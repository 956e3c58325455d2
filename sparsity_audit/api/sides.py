"""Open both sides of a comparison.

Contract: light; the command line calls it before it imports what compares, so that a mistyped path is
answered at once and headers are read while nothing heavy is loaded.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from sparsity_audit.checkpoint.adapter import merge_adapter
from sparsity_audit.checkpoint.opening import open_checkpoint
from sparsity_audit.checkpoint.spelling import MASTER
from sparsity_audit.checkpoint.store import Catalogue
from sparsity_audit.errors import UsageError

__all__ = ["open_against", "open_base", "open_sides", "verify_distinct"]


def open_sides(base: str | Path | Catalogue, tuned: str | Path | Catalogue) -> tuple[Catalogue, Catalogue]:
    """Both catalogues; one that is open already is taken as it is.

    Raises:
        UsageError: Both lead to the same checkpoint, or the base is an adapter.
        SparsityAuditError: As `open_checkpoint` raises it.
    """
    first = open_base(base)
    second = open_against(first, tuned)
    verify_distinct(first, second)
    return first, second


def verify_distinct(base: Catalogue, tuned: Catalogue) -> None:
    """Raise UsageError when both sides lead to the same checkpoint."""
    if _is_one_checkpoint(base, tuned):
        raise UsageError(
            tuned.reference,
            "base and tuned are the same checkpoint",
            expected="two different ones, BASE first",
        )


def open_base(reference: str | Path | Catalogue) -> Catalogue:
    """The catalogue of a model that stands for itself.

    Raises:
        UsageError: It is an adapter, which has no weights of its own.
        SparsityAuditError: As `open_checkpoint` raises it.
    """
    catalogue = reference if isinstance(reference, Catalogue) else open_checkpoint(reference)
    if catalogue.adapter is not None:
        raise UsageError(
            catalogue.reference,
            "is a PEFT adapter: a change of weights, not weights",
            expected="a model",
            remedy=f"write BASE+{catalogue.reference} for the base with the adapter merged",
        )
    return catalogue


def open_against(base: Catalogue, reference: str | Path | Catalogue) -> Catalogue:
    """The catalogue of a model, or of `base` with the adapter that the reference leads to.

    Raises:
        SparsityAuditError: As `open_checkpoint` and `merge_adapter` raise it.
    """
    catalogue = reference if isinstance(reference, Catalogue) else open_checkpoint(reference)
    if catalogue.adapter is None:
        return catalogue
    merged = merge_adapter(base, catalogue, rounded=not catalogue.reference.endswith(MASTER))
    return replace(merged, reference=catalogue.reference)


def _is_one_checkpoint(base: Catalogue, tuned: Catalogue) -> bool:
    """Whether both sides are one place; two Hub revisions may share files and are two checkpoints."""
    if any(side.resolved.startswith("hf://") for side in (base, tuned)):
        return base.resolved == tuned.resolved
    files = [{file.path.resolve() for file in side.files} for side in (base, tuned)]
    masters = [side.resolved.endswith(MASTER) for side in (base, tuned)]
    return files[0] == files[1] and masters[0] == masters[1]
