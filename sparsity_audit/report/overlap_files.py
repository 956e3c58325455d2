"""The files of an overlap's output directory."""

from __future__ import annotations

from sparsity_audit.report.overlap import OverlapReport, overlap_to_json
from sparsity_audit.report.overlap_tables import overlap_csv, overlap_latex, overlap_markdown
from sparsity_audit.report.style import FORMATS

__all__ = ["FILE_NAMES", "render_overlap"]

FILE_NAMES = (
    *("overlap.json", "overlap.csv", "summary.md", "tables/overlap.tex"),
    *(f"figures/ladder.{suffix}" for suffix in (*FORMATS, "txt")),
)


def render_overlap(report: OverlapReport, *, figures: bool) -> dict[str, bytes]:
    """Name → content; the record comes last, so that a directory with one is complete."""
    files = {
        "overlap.csv": overlap_csv(report),
        "summary.md": overlap_markdown(report),
        "tables/overlap.tex": overlap_latex(report),
    }
    if figures:
        from sparsity_audit.report.overlap_figure import render_ladder

        files |= {f"figures/{name}": data for name, data in render_ladder(report).items()}
    return files | {"overlap.json": overlap_to_json(report)}
