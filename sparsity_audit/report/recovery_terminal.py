"""Recoveries on a terminal: verdict, warnings, scores, agreement inside and outside, modules."""

from __future__ import annotations

from pathlib import Path

from sparsity_audit.report.overlap_terminal import new_console, print_table, say
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
    console = new_console()
    say(console, f"{report.verdict}.\n", style="bold")
    for line in report.warnings:
        say(console, f"! {line}")
    console.print()
    for line in facts(report):
        say(console, line)
    console.print()
    if report.full_score is not None:
        print_table(console, score_head(report), score_rows(report))
        console.print()
    for part in PARTS:
        print_table(console, agreement_head(part), agreement_rows(report, part))
        console.print()
    for line in frozen_lines(report):
        say(console, line)
    console.print()
    groups = report.sub.by_module
    say(console, "sub by module, inside the mask", style="bold")
    print_table(console, group_head("module"), group_rows(report, groups)[:_MAX_ROWS])
    for line in (*report.notes, *[f"left out: {lost.name}: {lost.reason}" for lost in report.left_out]):
        say(console, f"• {line}")
    if output is not None:
        say(console, f"record, tables and figure written to {output}")
