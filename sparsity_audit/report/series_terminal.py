"""A trajectory on a terminal: headline, saved steps, modules."""

from __future__ import annotations

from pathlib import Path

from sparsity_audit.report.overlap_terminal import new_console, print_table, say
from sparsity_audit.report.series import SeriesReport
from sparsity_audit.report.series_tables import (
    PARTS_HEAD,
    fact_lines,
    headline,
    part_rows,
    step_head,
    step_rows,
)

__all__ = ["print_series"]


def print_series(report: SeriesReport, *, output: Path | None) -> None:
    """Print the record to stdout."""
    console = new_console()
    say(console, f"{headline(report)}.\n", style="bold")
    print_table(console, step_head(report), step_rows(report))
    for title, parts in (("module", report.by_module), ("layer", report.by_layer)):
        if parts:
            say(console, f"\nby {title}", style="bold")
            print_table(console, PARTS_HEAD, part_rows(parts))
    console.print()
    for line in fact_lines(report):
        say(console, f"• {line}")
    if output is not None:
        say(console, f"record, tables and figures written to {output}")
