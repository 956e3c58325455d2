"""Critical tokens on a terminal: both groups, then the largest drops."""

from __future__ import annotations

from pathlib import Path

from sparsity_audit.report.critical import TokensCritical
from sparsity_audit.report.critical_files import CRITICAL_HEAD, critical_facts, critical_rows, top_positions
from sparsity_audit.report.overlap_terminal import new_console, print_table, say

__all__ = ["print_tokens_critical"]

_ROWS = 10


def print_tokens_critical(report: TokensCritical, *, output: Path | None) -> None:
    """Print the record to stdout."""
    console = new_console()
    print_table(console, CRITICAL_HEAD, critical_rows(report))
    say(console, "\nlargest drops", style="bold")
    head = ("prompt", "position", "before", "token", "another", "ΔJ", "drop")
    print_table(console, head, top_positions(report, most=_ROWS))
    console.print()
    for line in (*critical_facts(report), *report.notes):
        say(console, f"• {line}")
    for lost in report.failed[:_ROWS]:
        say(console, f"• left out: prompt {lost.name}, {lost.completion}: {lost.reason}")
    if output is not None:
        say(console, f"record, table and figure written to {output}")
