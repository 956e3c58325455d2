"""Recoveries on a terminal: verdict, warnings, scores, agreement inside and outside, modules."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from sparsity_audit.report.overlap_terminal import print_line, print_table
from sparsity_audit.report.recovery import RecoveryReport
from sparsity_audit.report.recovery_tables import (
    agreement_head,
    agreement_rows,
    facts,
    frozen_lines,
    group_head,
    group_rows,
    score_head,
    score_rows,
)
from sparsity_audit.stats.recovery import PARTS

__all__ = ["print_recovery"]

_MAX_ROWS = 48


def print_recovery(report: RecoveryReport, *, output: Path | None) -> None:
    """Print the record to stdout."""
    # A pipe has no width: give tables room instead of cutting names at 80 columns.
    console = Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else 240)
    print_line(console, f"{report.verdict}.\n", style="bold")
    for line in report.warnings:
        print_line(console, f"! {line}")
    console.print()
    for line in facts(report):
        print_line(console, line)
    console.print()
    if report.full_score is not None:
        print_table(console, score_head(report), score_rows(report))
        console.print()
    for part in PARTS:
        print_table(console, agreement_head(part), agreement_rows(report, part))
        console.print()
    for line in frozen_lines(report):
        print_line(console, line)
    console.print()
    groups = report.sub.by_module
    print_line(console, "sub by module, inside the mask", style="bold")
    print_table(console, group_head("module"), group_rows(report, groups)[:_MAX_ROWS])
    for line in (*report.notes, *[f"left out: {lost.name}: {lost.reason}" for lost in report.left_out]):
        print_line(console, f"• {line}")
    if output is not None:
        print_line(console, f"record, tables and figure written to {output}")
