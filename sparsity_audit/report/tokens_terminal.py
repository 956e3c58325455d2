"""A token divergence on a terminal: headline, figures of all sets, tokens and positions that moved."""

from __future__ import annotations

from pathlib import Path

from sparsity_audit.report.overlap_terminal import new_console, print_table, say
from sparsity_audit.report.tokens import TokensReport
from sparsity_audit.report.tokens_tables import (
    SET_NAMES,
    TOKEN_HEAD,
    facts,
    failed_lines,
    figure_head,
    figure_rows,
    headline,
    shifted_head,
    shifted_rows,
    token_rows,
)

__all__ = ["print_tokens"]

_ROWS = 8


def print_tokens(report: TokensReport, *, output: Path | None) -> None:
    """Print the record to stdout."""
    console = new_console()
    say(console, f"{headline(report)}.\n", style="bold")
    print_table(console, figure_head(report), figure_rows(report))
    for one in report.sets:
        say(console, f"\ntokens that hold the divergence: {SET_NAMES[one.name]}", style="bold")
        print_table(console, TOKEN_HEAD, token_rows(one, most=_ROWS))
        say(console, f"\nmost divergent positions, one a completion: {SET_NAMES[one.name]}", style="bold")
        print_table(console, shifted_head(), shifted_rows(one, most=_ROWS))
    console.print()
    for line in (*facts(report), *report.notes, *failed_lines(report, most=_ROWS)):
        say(console, f"• {line}")
    if output is not None:
        say(console, f"record, positions, tables, figures and page written to {output}")
