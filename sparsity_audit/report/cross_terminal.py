"""Cross-samplings on a terminal: headline, then each direction with its rules and controls."""

from __future__ import annotations

from pathlib import Path

from sparsity_audit.report.cross import CrossReport
from sparsity_audit.report.cross_tables import (
    CROSS_HEAD,
    DIRECTION_NAMES,
    cross_facts,
    cross_headline,
    cross_rows,
)
from sparsity_audit.report.overlap_terminal import new_console, print_table, say

__all__ = ["print_cross"]

_ROWS = 8


def print_cross(report: CrossReport, *, output: Path | None) -> None:
    """Print the record to stdout."""
    console = new_console()
    say(console, f"{cross_headline(report)}.\n", style="bold")
    for direction in report.directions:
        say(console, DIRECTION_NAMES[direction], style="bold")
        print_table(console, CROSS_HEAD, cross_rows(report, direction))
        console.print()
    for line in (*cross_facts(report), *report.notes):
        say(console, f"• {line}")
    for lost in report.failed[:_ROWS]:
        say(console, f"• left out: prompt {lost.name}: {lost.reason}")
    for one in report.unjudged[:_ROWS]:
        say(console, f"• no score: {one.point}, prompt {one.name}, completion {one.sample}: {one.reason}")
    if output is not None:
        say(console, f"points, record, tables and figure written to {output}")
