"""The files of a series' output directory."""

from __future__ import annotations

from sparsity_audit.report.series import SeriesReport, series_to_json
from sparsity_audit.report.series_tables import series_csv, series_latex, series_markdown
from sparsity_audit.report.style import FORMATS

__all__ = ["SERIES_FILES", "render_series"]

_FIGURES = ("trajectory", "steps", "coverage")
SERIES_FILES = (
    *("series.json", "series.csv", "summary.md", "tables/series.tex"),
    *(f"figures/{name}.{suffix}" for name in _FIGURES for suffix in (*FORMATS, "txt")),
)


def render_series(report: SeriesReport, *, figures: bool) -> dict[str, bytes]:
    """Name → content; the record comes last, so that a directory with one is complete."""
    files = {
        "series.csv": series_csv(report),
        "summary.md": series_markdown(report),
        "tables/series.tex": series_latex(report),
    }
    if figures:
        from sparsity_audit.report.series_figures import render_series_figures

        files |= {f"figures/{name}": data for name, data in render_series_figures(report).items()}
    return files | {"series.json": series_to_json(report)}
