"""The files of a cross-sampling's output directory, beside its points."""

from __future__ import annotations

from sparsity_audit.report.cross import CrossReport, cross_to_json
from sparsity_audit.report.cross_tables import cross_csv, cross_latex, cross_markdown
from sparsity_audit.report.style import FORMATS

__all__ = ["CROSS_FILES", "render_cross"]

CROSS_FILES = (
    *("cross.json", "cross.csv", "summary.md", "tables/cross.tex"),
    *(f"figures/cross.{suffix}" for suffix in (*FORMATS, "txt")),
)


def render_cross(report: CrossReport, *, figures: bool) -> dict[str, bytes]:
    """Name → content; the record comes last, so that a directory with one is complete."""
    files = {
        "cross.csv": cross_csv(report),
        "summary.md": cross_markdown(report),
        "tables/cross.tex": cross_latex(report),
    }
    if figures:
        from sparsity_audit.report.cross_figure import render_cross_figure

        files |= {f"figures/{name}": data for name, data in render_cross_figure(report).items()}
    return files | {"cross.json": cross_to_json(report)}
