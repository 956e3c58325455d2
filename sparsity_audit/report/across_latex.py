"""LaTeX tables (booktabs) of what many runs say together."""

from __future__ import annotations

from sparsity_audit.report.across_tables import Section, consensus_section, factors_section, matrix_sections
from sparsity_audit.report.overlap import OverlapReport
from sparsity_audit.report.overlap_tables import run_lines
from sparsity_audit.report.overlap_text import latex_table

__all__ = ["ACROSS_TABLES", "across_latex"]

ACROSS_TABLES = ("matrix", "factors", "consensus")


def across_latex(report: OverlapReport) -> dict[str, bytes]:
    """File name → table, for what there is."""
    found: dict[str, Section] = {}
    if report.matrix is not None:
        found["matrix"] = matrix_sections(report.matrix)[0]
    if report.factors is not None:
        found["factors"] = factors_section(report.factors)
    if report.consensus is not None:
        found["consensus"] = consensus_section(report.consensus)
    return {f"{name}.tex": _table(report, section) for name, section in found.items()}


def _table(report: OverlapReport, section: Section) -> bytes:
    """The section's sentences are the caption, and then what was compared; notes on cells are comments."""
    parts = [section.title, *section.lines, "; ".join(run_lines(report))]
    joined = " ".join(part if part.endswith("?") else f"{part}." for part in parts).removesuffix(".")
    notes = "".join(f"% {note}\n" for note in section.notes)
    return notes.encode() + latex_table(joined, section.head, section.rows)
