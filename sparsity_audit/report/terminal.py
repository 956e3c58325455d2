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
from sparsity_audit.report.spectral_rows import (
    OVERLAP_HEAD,
    SPECTRAL_HEAD,
    overlap_rows,
    refusal_lines,
    spectral_rows,
)
from sparsity_audit.report.structure import STRIPE_HEAD, stripe_rows
from sparsity_audit.report.tables import headline_rows, rollup_row, share_text, shown_view
from sparsity_audit.stats.precision import ExponentRate
from sparsity_audit.types import View

__all__ = ["print_plan", "print_report"]

_MAX_ROWS = 48


def print_report(report: DiffReport, *, output: Path | None, mask: Path | None) -> None:
    """Print the audit of one pair to stdout."""
    console = _console()
    for side, record in (("base", report.base), ("tuned", report.tuned)):
        console.print(Text(f"{side:<6}{_describe(record)}"), soft_wrap=True)
    console.print()
    rows = headline_rows(report)
    head = ["", "compared", *report.criteria]
    _print_table(console, "Update sparsity (share of compared entries that did not change)", head, rows)
    _print_accounts(console, report)
    _print_rollups(console, report)
    _print_rates(console, report)
    _print_law(console, report)
    _print_decay(console, report)
    _print_spectral(console, report)
    _print_stripes(console, report)
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
    console.print(
        f"expected: {summary.expected_s:,.0f} s of one core ({summary.rate_bytes_s / 1e9:.2g} GB/s, where "
        "storage gives as much); cores and nodes divide it",
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
    if summary.spectral_cost:
        console.print(Text(summary.spectral_cost), soft_wrap=True)
    for line in (*summary.findings, *summary.leftovers):
        console.print(Text(f"  • {line}"), soft_wrap=True)


def _console() -> Console:
    # A pipe has no width: give tables room instead of cutting names at 80 columns.
    width = None if sys.stdout.isatty() else 240
    return Console(file=sys.stdout, highlight=False, width=width)


def _describe(record: CheckpointRecord) -> str:
    dtypes = ", ".join(f"{count:,} {dtype}" for dtype, count in record.entries_by_dtype.items())
    return f"{record.resolved}  {record.num_tensors:,} tensors, {record.num_bytes:,} bytes: {dtypes}"


def _print_table(console: Console, title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for number, name in enumerate(head):
        table.add_column(name, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*[Text(cell) for cell in row])
    console.print(Text(title, style="bold"), soft_wrap=True)
    console.print(table)
    console.print()


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


def _print_rates(console: Console, report: DiffReport) -> None:
    """Change rate by magnitude; both views on one line where the served view is of the very same tensors."""
    served = next((r for r in report.precision if r.view is View.SERVED), None)
    for record in report.precision:
        if record.view is View.SERVED:
            continue
        has_both = served is not None and served.num_tensors == record.num_tensors
        shown = _condense(record.rates, record.entries)
        head = ["|w_base|", "entries", "changed (value)", "of these by 1 ULP"]
        rows = [
            [name, f"{entries:,}", share_text(changed, entries), share_text(one_ulp, changed)]
            for name, _, entries, changed, one_ulp in shown
        ]
        if has_both and served is not None:
            head += ["changed as served"]
            for row, (_, keys, *_) in zip(rows, shown, strict=True):
                matching = [rate for rate in served.rates if _key(rate) in keys]
                row.append(share_text(sum(r.changed for r in matching), sum(r.entries for r in matching)))
        _print_table(
            console, f"Change rate by magnitude of the base weight ({record.dtype.label})", head, rows
        )


_TAIL_SHARE = 0.001


def _key(rate: ExponentRate) -> tuple[str, int | None]:
    return rate.kind, rate.exponent


def _condense(
    rates: Sequence[ExponentRate], total: int
) -> list[tuple[str, set[tuple[str, int | None]], int, int, int]]:
    """Rows (name, keys, entries, changed, by 1 ULP); thin tails of the exponents become one row each."""
    normal = [r for r in rates if r.exponent is not None and r.entries]
    low, high, limit = 0, len(normal), _TAIL_SHARE * total
    while low < high and sum(r.entries for r in normal[: low + 1]) < limit:
        low += 1
    while high > low and sum(r.entries for r in normal[high - 1 :]) < limit:
        high -= 1
    groups = [(r.kind, [r]) for r in rates if r.exponent is None and r.entries]
    if low:
        groups.append((f"below 2^{(normal[low - 1].exponent or 0) + 1}", normal[:low]))
    groups += [(f"from 2^{r.exponent}", [r]) for r in normal[low:high]]
    if high < len(normal):
        groups.append((f"from 2^{normal[high].exponent} up", normal[high:]))
    return [
        (
            name,
            {_key(r) for r in members},
            sum(r.entries for r in members),
            sum(r.changed for r in members),
            sum(r.one_ulp for r in members),
        )
        for name, members in groups
    ]


def _print_law(console: Console, report: DiffReport) -> None:
    law = next((record.half_ulp for record in report.precision if record.half_ulp is not None), None)
    if law is None:
        return
    if law.lower is None or law.upper is None or law.at_lr is None:
        console.print(Text(f"Half-ULP law: not applicable: {law.reason}\n"), soft_wrap=True)
        return
    console.print(
        f"Half-ULP law at lr {law.lr:g}, weights stored in bf16: {100 * law.at_lr:.1f} % frozen "
        f"(interval over one octave either way: {100 * law.lower:.1f}–{100 * law.upper:.1f} %)\n",
        soft_wrap=True,
    )


def _print_spectral(console: Console, report: DiffReport) -> None:
    rows, overlaps = spectral_rows(report.spectral), overlap_rows(report.spectral)
    if rows:
        title = "Spectrum of the update, beside its entries in random places (mean ± sd)"
        _print_table(console, title, SPECTRAL_HEAD, rows[: 2 * _MAX_ROWS])
    if overlaps:
        title = f"Share of the changed entries ({report.spectral[0].criterion}) in masks made from the base"
        _print_table(console, title, OVERLAP_HEAD, overlaps[: 3 * _MAX_ROWS])
    if len(rows) > 2 * _MAX_ROWS:
        console.print(f"  … and {len(rows) // 2 - _MAX_ROWS:,} more, all in report.json\n")
    for line in refusal_lines(report.spectral):
        console.print(Text(f"no spectrum of {line}"), soft_wrap=True)


def _print_decay(console: Console, report: DiffReport) -> None:
    rows = [
        [
            tensor.name,
            f"{verdict.shrink:.2g}",
            share_text(verdict.unchanged, verdict.entries),
            share_text(verdict.band, verdict.entries),
            share_text(verdict.mirror, verdict.entries),
            share_text(verdict.moved, verdict.entries),
            "–" if verdict.decay_only_rows is None else f"{verdict.decay_only_rows:,}",
        ]
        for tensor in report.tensors
        if (verdict := tensor.decay) is not None and verdict.verdict == "decay"
    ]
    if rows:
        head = ["tensor", "shrink c", "unchanged", "c/2 … 2c", "mirror", "moved", "decay-only rows"]
        title = "Weight decay: entries shrunk by about (1 − c), beside those that grew as much (mirror)"
        _print_table(console, title, head, rows)


def _print_stripes(console: Console, report: DiffReport) -> None:
    if report.structure is None or not report.structure.stripes:
        return
    record = report.structure
    title = (
        f"Stripe scores: variance of row and column densities ÷ that of independent entries, beside what "
        f"magnitudes give ({record.criterion}, {record.view}; most uneven of {len(record.stripes):,})"
    )
    _print_table(console, title, STRIPE_HEAD, stripe_rows(record))
    if record.stripes_note:
        console.print(Text(record.stripes_note + "\n"), soft_wrap=True)
