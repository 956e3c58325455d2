"""Overlaps on a terminal: headline, every pair against every null, modules of the headline pair."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

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

__all__ = ["print_criteria", "print_line", "print_overlap", "print_table"]

_MAX_PAIRS = 10
_MAX_ROWS = 48


def print_overlap(report: OverlapReport, *, output: Path | None) -> None:
    """Print the record to stdout."""
    # A pipe has no width: give tables room instead of cutting names at 80 columns.
    console = Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else 240)
    first = report.headline
    print_line(console, first.name, style="bold")
    print_line(console, f"{first.ladder.sentence}.\n")
    for line in run_lines(report):
        print_line(console, line)
    console.print()
    for pair in report.pairs[:_MAX_PAIRS]:
        print_line(console, pair.name, style="bold")
        print_line(console, pair_line(pair))
        print_table(console, NULL_HEAD, null_rows(pair.overall))
        for fact in (*pair_facts(report, pair), *pair.ladder.warnings):
            print_line(console, f"  • {fact}")
        console.print()
    if len(report.pairs) > _MAX_PAIRS:
        print_line(
            console,
            f"… and {len(report.pairs) - _MAX_PAIRS:,} more pairs, all in overlap.json and summary.md\n",
        )
    if first.convergence:
        print_line(console, f"{first.name}: the magnitude null under coarser and finer strata", style="bold")
        print_table(console, CONVERGENCE_HEAD, convergence_rows(first))
        console.print()
    for title, groups in (("module", first.by_module), ("layer", first.by_layer)):
        if groups:
            print_line(console, f"{first.name} by {title}", style="bold")
            print_table(console, group_head(title, first), group_rows(groups, first)[:_MAX_ROWS])
            console.print()
    for line in (*report.notes, *[f"left out: {lost.name}: {lost.reason}" for lost in report.left_out]):
        print_line(console, f"• {line}")
    if output is not None:
        print_line(console, f"record, tables and figure written to {output}")


def print_criteria(reports: Sequence[OverlapReport], *, output: Path | None) -> None:
    """Print one row a criterion and pair to stdout."""
    console = Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else 240)
    for report in reports:
        print_line(console, f"{report.criterion}: {report.headline.name}", style="bold")
        print_line(console, f"{report.headline.ladder.sentence}.\n")
    densities = slice(2, 4)  # in the files; a terminal is narrow
    head, rows = list(CRITERIA_HEAD), criteria_rows(reports)
    for cells in (head, *rows):
        del cells[densities]
    print_table(console, head, rows)
    for line in dict.fromkeys(note for report in reports for note in report.notes):
        print_line(console, f"• {line}")
    if output is not None:
        print_line(console, f"table and figure written to {output}, records to its folders")


def print_line(console: Console, text: str, *, style: str = "") -> None:
    """Print a line as it is; a terminal may wrap it, nothing cuts it."""
    console.print(Text(text, style=style), soft_wrap=True)


def print_table(console: Console, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, text to the left and numbers to the right."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for number, name in enumerate(head):
        is_text = number == 0 or name == "pair"
        table.add_column(name, justify="left" if is_text else "right", overflow="fold", no_wrap=is_text)
    for row in rows:
        table.add_row(*[Text(cell) for cell in row])
    console.print(table)
