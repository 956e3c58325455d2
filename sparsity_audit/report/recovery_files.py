"""The files of a recovery's output directory."""

from __future__ import annotations

from sparsity_audit.report.recovery import RecoveryReport, recovery_to_json
from sparsity_audit.report.recovery_tables import recovery_csv, recovery_latex, recovery_markdown
from sparsity_audit.report.style import FORMATS

__all__ = ["FILE_NAMES", "render_recovery"]

FILE_NAMES = (
    *("recovery.json", "recovery.csv", "summary.md", "tables/recovery.tex"),
    *(f"figures/recovery.{suffix}" for suffix in (*FORMATS, "txt")),
)


def render_recovery(report: RecoveryReport, *, figures: bool) -> dict[str, bytes]:
    """Name → content; the record comes last, so that a directory with one is complete."""
    files = {
        "recovery.csv": recovery_csv(report),
        "summary.md": recovery_markdown(report),
        "tables/recovery.tex": recovery_latex(report),
    }
    if figures:
        from sparsity_audit.report.recovery_figure import render_figure

        files |= {f"figures/{name}": data for name, data in render_figure(report).items()}
    return files | {"recovery.json": recovery_to_json(report)}
