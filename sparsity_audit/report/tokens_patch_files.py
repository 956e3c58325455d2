"""The files of a patching's output directory."""

from __future__ import annotations

from sparsity_audit.report.style import FORMATS
from sparsity_audit.report.tokens_patch import PatchReport, patch_to_json
from sparsity_audit.report.tokens_patch_tables import patch_csv, patch_markdown

__all__ = ["PATCH_FILES", "render_patch"]

PATCH_FILES = (
    *("patch.json", "patch.csv", "summary.md"),
    *(f"figures/patch.{suffix}" for suffix in (*FORMATS, "txt")),
)


def render_patch(report: PatchReport, *, figures: bool) -> dict[str, bytes]:
    """Name → content; the record comes last, so that a directory with one is complete."""
    files = {"patch.csv": patch_csv(report), "summary.md": patch_markdown(report)}
    if figures:
        from sparsity_audit.report.tokens_patch_figure import render_patch_figure

        files |= {f"figures/{name}": data for name, data in render_patch_figure(report).items()}
    return files | {"patch.json": patch_to_json(report)}
