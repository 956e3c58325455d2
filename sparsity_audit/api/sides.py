"""Open both sides of a comparison.

Contract: light; the command line calls it before it imports what compares, so that a mistyped path is
answered at once and headers are read while nothing heavy is loaded.
"""

from __future__ import annotations

from pathlib import Path

from sparsity_audit.checkpoint.opening import MASTER, open_checkpoint
from sparsity_audit.checkpoint.store import Catalogue
from sparsity_audit.errors import UsageError

__all__ = ["open_sides"]


def open_sides(base: str | Path | Catalogue, tuned: str | Path | Catalogue) -> tuple[Catalogue, Catalogue]:
    """Both catalogues; one that is open already is taken as it is.

    Raises:
        UsageError: Both lead to the same checkpoint.
        SparsityAuditError: As `open_checkpoint` raises it.
    """
    sides = [side if isinstance(side, Catalogue) else open_checkpoint(side) for side in (base, tuned)]
    if _is_one_checkpoint(*sides):
        raise UsageError(
            sides[1].reference,
            "base and tuned are the same checkpoint",
            expected="two different ones, BASE first",
        )
    return sides[0], sides[1]


def _is_one_checkpoint(base: Catalogue, tuned: Catalogue) -> bool:
    """Whether both sides are one place; two Hub revisions may share files and are two checkpoints."""
    if any(side.resolved.startswith("hf://") for side in (base, tuned)):
        return base.resolved == tuned.resolved
    files = [{file.path.resolve() for file in side.files} for side in (base, tuned)]
    masters = [side.resolved.endswith(MASTER) for side in (base, tuned)]
    return files[0] == files[1] and masters[0] == masters[1]
