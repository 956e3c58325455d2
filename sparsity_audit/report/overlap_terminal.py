"""Overlaps on a terminal: headline, every pair against every null, modules of the headline pair."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparsity_audit.report.across_tables import across_sections
from sparsity_audit.report.overlap import OverlapReport
from sparsity_audit.report.overlap_criteria import CRITERIA_HEAD, criteria_rows
from sparsity_audit.report.overlap_tables import (
    CONVERGENCE_HEAD,
    NULL_HEAD,
    convergence_rows,
    group_head,
    group_rows,
    null_rows,
    pair_facts,
    pair_line,
    run_lines,
)

__all__ = ["new_console", "print_criteria", "print_overlap", "print_table", "say"]

_MAX_PAIRS = 3
_MAX_ROWS = 48
_MAX_COLUMNS = 20


def new_console() -> Console:
    """Stdout; a pipe has no width, so tables get room there instead of names cut at 80 columns."""
    return Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else 240)


def print_overlap(report: OverlapReport, *, output: Path | None) -> None:
    """Print the record to stdout."""
    console = new_console()
    first = report.headline
    say(console, first.name, style="bold")
    say(console, f"{first.ladder.sentence}.\n")
    for line in run_lines(report):
        say(console, line)
    console.print()
    _print_across(console, report)
    for pair in report.pairs[:_MAX_PAIRS]:
        say(console, pair.name, style="bold")
        say(console, pair_line(pair))
        print_table(console, NULL_HEAD, null_rows(pair.overall))
        for fact in (*pair_facts(report, pair), *pair.ladder.warnings):
            say(console, f"  • {fact}")
        console.print()
    if len(report.pairs) > _MAX_PAIRS:
        say(
            console,
            f"… and {len(report.pairs) - _MAX_PAIRS:,} more pairs, all in overlap.json and summary.md\n",
        )
    if first.convergence:
        say(console, f"{first.name}: the magnitude null under coarser and finer strata", style="bold")
        print_table(console, CONVERGENCE_HEAD, convergence_rows(first))
        console.print()
    for title, groups in (("module", first.by_module), ("layer", first.by_layer)):
        if groups:
            say(console, f"{first.name} by {title}", style="bold")
            print_table(console, group_head(title, first), group_rows(groups, first)[:_MAX_ROWS])
            console.print()
    for line in (*report.notes, *[f"left out: {lost.name}: {lost.reason}" for lost in report.left_out]):
        say(console, f"• {line}")
    if output is not None:
        say(console, f"record, tables and figures written to {output}")


def _print_across(console: Console, report: OverlapReport) -> None:
    for section in across_sections(report):
        say(console, section.title, style="bold")
        for line in section.lines:
            say(console, f"{line}.")
        if len(section.head) > _MAX_COLUMNS:
            say(console, f"{len(section.rows):,} rows and columns, all in summary.md and matrix.csv")
        elif section.head:
            print_table(console, section.head, section.rows[:_MAX_ROWS])
        for note in section.notes:
            say(console, f"  • {note}")
        console.print()


def print_criteria(reports: Sequence[OverlapReport], *, output: Path | None) -> None:
    """Print one row a criterion and pair to stdout."""
    console = new_console()
    for report in reports:
        say(console, f"{report.criterion}: {report.headline.name}", style="bold")
        say(console, f"{report.headline.ladder.sentence}.\n")
    densities = slice(2, 4)  # in the files; a terminal is narrow
    head, rows = list(CRITERIA_HEAD), criteria_rows(reports)
    for cells in (head, *rows):
        del cells[densities]
    print_table(console, head, rows)
    for line in dict.fromkeys(note for report in reports for note in report.notes):
        say(console, f"• {line}")
    if output is not None:
        say(console, f"table and figure written to {output}, records to its folders")


def say(console: Console, text: str, *, style: str = "") -> None:
    """A line that is never broken."""
    console.print(Text(text, style=style), soft_wrap=True)


def print_table(console: Console, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table: text to the left, numbers to the right."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for number, name in enumerate(head):
        is_text = number == 0 or name == "pair"
        table.add_column(name, justify="left" if is_text else "right", overflow="fold", no_wrap=is_text)
    for row in rows:
        table.add_row(*[Text(cell) for cell in row])
    console.print(table)
