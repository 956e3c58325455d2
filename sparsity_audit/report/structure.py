"""The structure part of a report: heads, experts, stripes; records, and how they are built and shown.

Contract: pure. Everything follows the criterion and view of the row and column counts. What could not be
taken apart, and an expectation that was not counted, is stated with the reason and the remedy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparsity_audit.stats.stripes import MatrixNull, TensorStripes, describe_lines, stripe_findings
from sparsity_audit.stats.structure import (
    ExpertDensity,
    GroupDensity,
    HeadDensity,
    StructuredTensor,
    by_expert,
    by_head,
    mixture_groups,
)
from sparsity_audit.types import View

__all__ = ["STRIPE_HEAD", "StructureRecord", "build_structure", "stripe_rows", "structure_findings"]

STRIPE_HEAD = (
    "tensor",
    "rows: observed",
    "expected",
    "z",
    "columns: observed",
    "expected",
    "z",
)
"""Columns of `stripe_rows`."""

_MAX_STRIPES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class StructureRecord:
    """Where in the model's parts the changes lie.

    Args:
        criterion: The criterion of row and column counts.
        view: The view that was counted; native where a tensor has no served view.
        stripes: Matrices with some but not all entries changed, in base-name order: variance of their row and
            column densities against that of independent entries, beside what magnitudes give.
        stripes_note: Why expectations are missing; empty where none is.
        heads: Attention heads.
        heads_notes: Projections that were not taken apart, with the reason.
        experts: Routed experts of a mixture, all their weight matrices together.
        mixture: Routers, routed and shared experts, each apart; empty without a mixture.
    """

    criterion: str
    view: View
    stripes: tuple[TensorStripes, ...]
    stripes_note: str
    heads: tuple[HeadDensity, ...]
    heads_notes: tuple[str, ...]
    experts: tuple[ExpertDensity, ...]
    mixture: tuple[GroupDensity, ...]


def build_structure(
    tensors: Sequence[StructuredTensor],
    config: Mapping[str, Any],
    *,
    criterion: str,
    view: View,
    nulls: Sequence[MatrixNull | None] | None,
    note: str = "",
) -> StructureRecord:
    """The record.

    Args:
        tensors: The compared pairs with row and column counts.
        config: The base's configuration.
        criterion: Key of the criterion that those counts follow.
        view: The view that was counted.
        nulls: The magnitude null of each tensor; None where the base was not read again.
        note: Why it was not.
    """
    heads, heads_notes = by_head(tensors, config)
    stripes = []
    for number, tensor in enumerate(tensors):
        rows, cols = tensor.axes.rows, tensor.axes.cols
        null = None if nulls is None else nulls[number]
        of_rows = describe_lines(rows, len(cols), None if null is None else null.rows)
        of_cols = describe_lines(cols, len(rows), None if null is None else null.cols)
        if of_rows is not None and of_cols is not None:
            stripes.append(TensorStripes(name=tensor.name, kind=tensor.role.kind, rows=of_rows, cols=of_cols))
    missing = sum(tensor.rows.expected is None for tensor in stripes)
    if nulls is not None and missing:
        note = (
            f"{missing:,} of {len(stripes):,} matrices have no expectation: their changes by magnitude are "
            f"not known under {criterion}."
        )
    return StructureRecord(
        criterion=criterion,
        view=view,
        stripes=tuple(stripes),
        stripes_note=note,
        heads=heads,
        heads_notes=heads_notes,
        experts=by_expert(tensors),
        mixture=mixture_groups(tensors),
    )


def structure_findings(record: StructureRecord) -> tuple[str, ...]:
    """Sentences for the top of a report; see `stats.stripes` for the rule."""
    return stripe_findings(record.stripes)


def stripe_rows(record: StructureRecord, limit: int = _MAX_STRIPES) -> list[list[str]]:
    """The matrices whose score exceeds its expectation (or 1, without one) most, as cells of a table."""

    def excess(tensor: TensorStripes) -> float:
        return max(
            line.observed - (1.0 if line.expected is None else line.expected)
            for line in (tensor.rows, tensor.cols)
        )

    most = sorted(record.stripes, key=lambda tensor: (-excess(tensor), tensor.name))[:limit]
    return [
        [
            tensor.name,
            *(
                cell
                for line in (tensor.rows, tensor.cols)
                for cell in (
                    f"{line.observed:.2f}",
                    "–" if line.expected is None else f"{line.expected:.2f}",
                    "–" if line.z is None else f"{line.z:.1f}",
                )
            ),
        ]
        for tensor in most
    ]
