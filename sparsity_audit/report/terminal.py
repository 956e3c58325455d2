"""The report on a terminal: headline, accounts, roll-ups, findings. Rich is imported here."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparsity_audit.report.schema import CheckpointRecord, DiffReport, PlanSummary
from sparsity_audit.report.tables import headline_rows, rollup_row, share_text, shown_view

__all__ = ["print_plan", "print_report"]

_MAX_ROWS = 48


def print_report(report: DiffReport, *, output: Path | None, mask: Path | None) -> None:
    """Print the audit of one pair to stdout."""
    console = _console()
    for side, record in (("base", report.base), ("tuned", report.tuned)):
        console.print(Text(f"{side:<6}{_describe(record)}"))
    console.print()
    rows = headline_rows(report)
    head = ["", "compared", *report.criteria]
    _print_table(console, "Update sparsity: share of compared entries that did not change", head, rows)
    _print_accounts(console, report)
    _print_rollups(console, report)
    _print_precision(console, report)
    if report.findings:
        console.print(Text("Findings", style="bold"))
        for finding in report.findings:
            console.print(Text(f"  • {finding}"), soft_wrap=True)
        console.print()
    for gate in report.gates:
        console.print(
            Text(f"{'passed' if gate.passed else 'FAILED'}  {gate.gate}: {gate.detail}"), soft_wrap=True
        )
    for what, path in (("report", output), ("mask", mask)):
        if path is not None:
            console.print(Text(f"{what} written to {path}"), soft_wrap=True)


def print_plan(summary: PlanSummary) -> None:
    """Print what a dry run found."""
    console = _console()
    console.print(Text(f"base   {summary.base}\ntuned  {summary.tuned}"), soft_wrap=True)
    console.print(
        f"would compare {summary.num_entries:,} entries in {summary.num_pairs:,} pairs: "
        f"{summary.num_bytes:,} bytes in {summary.num_units:,} work units",
        soft_wrap=True,
        highlight=False,
    )
    console.print(f"criteria: {', '.join(summary.criteria)}", highlight=False, soft_wrap=True)
    for side, account in (("base", summary.accounts.base), ("tuned", summary.accounts.tuned)):
        console.print(
            f"{side}: compared {account.compared:,} + skipped {account.skipped:,} + leftover "
            f"{account.leftover:,} = {account.total:,}",
            highlight=False,
            soft_wrap=True,
        )
    for line in (*summary.findings, *summary.leftovers):
        console.print(Text(f"  • {line}"), soft_wrap=True)


def _console() -> Console:
    # A pipe has no width: give tables room instead of cutting names at 80 columns.
    width = None if sys.stdout.isatty() else 120
    return Console(file=sys.stdout, highlight=False, width=width)


def _describe(record: CheckpointRecord) -> str:
    dtypes = ", ".join(f"{count:,} {dtype}" for dtype, count in record.entries_by_dtype.items())
    return f"{record.resolved}  {record.num_tensors:,} tensors, {record.num_bytes:,} bytes: {dtypes}"


def _print_table(console: Console, title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, name in enumerate(head):
        table.add_column(name, justify="left" if number == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*[Text(cell) for cell in row])
    console.print(table)


def _print_accounts(console: Console, report: DiffReport) -> None:
    for side, account in (("base", report.accounts.base), ("tuned", report.accounts.tuned)):
        console.print(
            f"{side}: compared {account.compared:,} + skipped {account.skipped:,} + leftover "
            f"{account.leftover:,} = {account.total:,} entries",
            soft_wrap=True,
        )
    lost = [
        f"leftover in {x.side}: {x.name} ({x.num_entries:,} entries): {x.reason}" for x in report.leftovers
    ]
    lost += [f"skipped: {x.name} ({x.num_entries:,} entries): {x.reason}" for x in report.skipped]
    for line in lost[:_MAX_ROWS]:
        console.print(Text(f"  {line}"), soft_wrap=True)
    if len(lost) > _MAX_ROWS:
        console.print(f"  … and {len(lost) - _MAX_ROWS:,} more, all in report.json")
    console.print()


def _print_rollups(console: Console, report: DiffReport) -> None:
    view = shown_view(report)
    rollups = next(r for r in report.rollups if r.view is view)
    question = f"{report.mask_criterion}, {view}"
    groups = (("part", rollups.totals), ("layer", rollups.by_layer), ("module", rollups.by_module))
    for title, members in groups:
        if not members:
            continue
        rows = [rollup_row(group, report.mask_criterion) for group in members]
        shown = rows if len(rows) <= _MAX_ROWS else rows[:_MAX_ROWS]
        head = [title, "tensors", "entries", "sparsity", "mean over tensors"]
        _print_table(console, f"By {title} ({question})", head, shown)
        if len(shown) < len(rows):
            console.print(f"  … and {len(rows) - len(shown):,} more, all in summary.md\n")


def _print_precision(console: Console, report: DiffReport) -> None:
    for record in report.precision:
        rows = [
            [
                f"2^{rate.exponent}" if rate.exponent is not None else rate.kind,
                f"{rate.entries:,}",
                share_text(rate.changed, rate.entries),
                share_text(rate.one_ulp, rate.changed),
            ]
            for rate in record.rates
            if rate.entries
        ]
        head = ["|w_base| from", "entries", "changed (value)", "of these by 1 ULP"]
        title = f"Change rate by magnitude of the base weight ({record.view}, {record.dtype.label})"
        _print_table(console, title, head, rows)
        law = record.half_ulp
        if law is None:
            continue
        if law.reason is not None:
            console.print(Text(f"half-ULP law: not applicable: {law.reason}\n"), soft_wrap=True)
        elif law.lower is not None and law.upper is not None and law.at_lr is not None:
            console.print(
                f"half-ULP law at lr {law.lr:g}, weights stored in bf16: {100 * law.at_lr:.1f} % frozen "
                f"(interval over one octave either way: {100 * law.lower:.1f}–{100 * law.upper:.1f} %)\n",
                soft_wrap=True,
            )
