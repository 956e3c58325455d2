"""Patchings on a terminal: headline, then what each part adds and takes away."""

from __future__ import annotations

from pathlib import Path

from sparsity_audit.report.overlap_terminal import new_console, print_table, say
from sparsity_audit.report.tokens_patch import PatchReport
from sparsity_audit.report.tokens_patch_tables import (
    DIRECTION_TITLES,
    patch_facts,
    patch_head,
    patch_headline,
    patch_rows,
)

__all__ = ["print_patch"]

_MAX_ROWS = 60


def print_patch(report: PatchReport, *, output: Path | None) -> None:
    """Print the record to stdout."""
    console = new_console()
    say(console, f"{patch_headline(report)}.\n", style="bold")
    for direction, title in DIRECTION_TITLES.items():
        rows = patch_rows(report, direction)
        if rows:
            say(console, title, style="bold")
            print_table(console, patch_head(report, direction), rows[:_MAX_ROWS])
            console.print()
    for line in (*patch_facts(report), *report.notes):
        say(console, f"• {line}")
    for lost in report.failed:
        say(console, f"• left out: prompt {lost.name}: {lost.reason}")
    if output is not None:
        say(console, f"record, table and figure written to {output}")
