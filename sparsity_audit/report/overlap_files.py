"""The files of an overlap's output directory."""

from __future__ import annotations

from pathlib import Path

from sparsity_audit.errors import OutputError
from sparsity_audit.report.across_latex import ACROSS_TABLES, across_latex
from sparsity_audit.report.across_tables import across_csv
from sparsity_audit.report.output import write_below
from sparsity_audit.report.overlap import OverlapReport, overlap_to_json
from sparsity_audit.report.overlap_tables import overlap_csv, overlap_latex, overlap_markdown
from sparsity_audit.report.style import FORMATS

__all__ = ["FILE_NAMES", "render_overlap", "write_overlap"]

_FIGURES = ("ladder", "matrix", "parts", "consensus")

FILE_NAMES = (
    *("overlap.json", "overlap.csv", "matrix.csv", "factors.csv", "consensus.csv", "summary.md"),
    *(f"tables/{name}.tex" for name in ("overlap", *ACROSS_TABLES)),
    *(f"figures/{name}.{suffix}" for name in _FIGURES for suffix in (*FORMATS, "txt")),
)


def render_overlap(report: OverlapReport, *, figures: bool) -> dict[str, bytes]:
    """Name → content; the record comes last, so that a directory with one is complete."""
    files = {
        "overlap.csv": overlap_csv(report),
        **across_csv(report),
        "summary.md": overlap_markdown(report),
        "tables/overlap.tex": overlap_latex(report),
        **{f"tables/{name}": data for name, data in across_latex(report).items()},
    }
    if figures:
        from sparsity_audit.report.overlap_consensus_figure import render_consensus
        from sparsity_audit.report.overlap_figure import render_ladder
        from sparsity_audit.report.overlap_matrix_figure import render_matrix
        from sparsity_audit.report.overlap_parts_figure import render_parts

        for render in (render_ladder, render_matrix, render_parts, render_consensus):
            files |= {f"figures/{name}": data for name, data in render(report).items()}
    return files | {"overlap.json": overlap_to_json(report)}


def write_overlap(report: OverlapReport, folder: Path, *, figures: bool) -> None:
    """Write the files, and remove those that an earlier run left and this one has not. Raises OutputError."""
    files = render_overlap(report, figures=figures)
    try:
        for name in FILE_NAMES:
            if name not in files or name == "overlap.json":
                (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(str(folder), error.strerror or "cannot be written") from error
    for name, data in files.items():
        write_below(folder, name, data)
