"""All claims of a full study with their figures, part by part."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sparsity_audit.report.study_full import FullClaim
from sparsity_audit.report.study_full_critical import critical_claims, draw_degrees, draw_operands
from sparsity_audit.report.study_full_divergence import divergence_claims, draw_divergence
from sparsity_audit.report.study_full_facts import FullFacts
from sparsity_audit.report.study_full_formats import draw_mixtures, draw_scale, format_claims
from sparsity_audit.report.study_full_frontier import draw_frontier, frontier_claims
from sparsity_audit.report.study_full_grid import draw_grid, grid_claims
from sparsity_audit.report.study_full_sparsity import draw_sparsity_sweep, sparsity_claims
from sparsity_audit.report.study_full_transfer import draw_transfer, transfer_claim

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["DRAWERS", "full_claims"]

DRAWERS: dict[str, Callable[[FullFacts], Figure]] = {
    "kl-clip": draw_sparsity_sweep,
    "grid-value": draw_grid,
    "transfer": draw_transfer,
    "collapse": draw_mixtures,
    "scale": draw_scale,
    "degree": draw_degrees,
    "operands": draw_operands,
    "frontier-shannon": draw_frontier,
    "divergence": draw_divergence,
}
"""Key of the claim → its figure; a figure belongs to the first claim it serves."""


def full_claims(facts: FullFacts) -> tuple[FullClaim, ...]:
    """All claims, in the order of the parts; those of parts that were not run are `not measured`."""
    return (
        *sparsity_claims(facts),
        *grid_claims(facts),
        transfer_claim(facts),
        *format_claims(facts),
        *critical_claims(facts),
        *frontier_claims(facts),
        *divergence_claims(facts),
    )
