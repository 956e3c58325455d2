"""The report as plain tables: rows that CSV, Markdown and the terminal share."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence

from sparsity_audit.report.schema import DiffReport, TensorRecord
from sparsity_audit.stats.findings import percent
from sparsity_audit.stats.rollup import Rollup, ViewSummary
from sparsity_audit.types import View

__all__ = [
    "headline_rows",
    "rollup_row",
    "rollups_csv",
    "share_text",
    "shown_view",
    "summary_markdown",
    "tensor_columns",
    "tensors_csv",
]


def tensors_csv(report: DiffReport) -> bytes:
    """One line a tensor and view; counts exact, floats in the shortest form that reads back equal."""
    columns = tensor_columns(report)
    return _csv([[*columns], *zip(*columns.values(), strict=True)])


def tensor_columns(report: DiffReport) -> dict[str, list[object]]:
    """Name → values of each column of the tensors' table, one row a tensor and view."""
    head = [*_CSV_HEAD, *[f"changed[{key}]" for key in report.criteria]]
    rows = [
        _csv_row(report, tensor, view, summary)
        for tensor in report.tensors
        for view, summary in ((View.NATIVE, tensor.summary.native), (View.SERVED, tensor.summary.served))
        if summary is not None
    ]
    return {name: [row[place] for row in rows] for place, name in enumerate(head)}


def rollups_csv(report: DiffReport) -> bytes:
    """One line a view and group: exact counts and the unweighted mean density under every criterion."""
    rows: list[list[object]] = [
        [
            *("view", "grouping", "key", "tensors", "identical_tensors", "entries", "sign_flips", "l2"),
            "relative_l2",
            *[f"{what}[{key}]" for key in report.criteria for what in ("changed", "mean_density")],
        ]
    ]
    for rollups in report.rollups:
        groupings = (
            ("part", rollups.totals),
            ("layer", rollups.by_layer),
            ("module", rollups.by_module),
            ("layer/module", rollups.by_layer_and_module),
        )
        rows += [
            [rollups.view, grouping, *_rollup_cells(report, group)]
            for grouping, groups in groupings
            for group in groups
        ]
    return _csv(rows)


def _rollup_cells(report: DiffReport, group: Rollup) -> list[object]:
    counts = {count.total.criterion: count for count in group.counts}
    cells: list[object] = [
        *(group.key, group.num_tensors, group.num_identical, group.entries, group.sign_flips, group.l2),
        group.relative_l2,
    ]
    for key in report.criteria:
        count = counts.get(key)
        cells += [None, None] if count is None else [count.total.changed, count.mean_density]
    return cells


def _csv(rows: Iterable[Sequence[object]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


_CSV_HEAD = (
    "name",
    "tuned_name",
    "rule",
    "layer",
    "module",
    "kind",
    "shape",
    "base_dtype",
    "tuned_dtype",
    "view",
    "entries",
    "sign_flips",
    "l1",
    "l2",
    "max_abs",
    "relative_l2",
    "rows_touched",
    "cols_touched",
    "decay_only_rows",
    "base_fingerprint",
    "tuned_fingerprint",
)


def _csv_row(report: DiffReport, tensor: TensorRecord, view: View, summary: ViewSummary) -> list[object]:
    counts = {count.criterion: count.changed for count in summary.counts}
    head = tensor.summary
    return [
        tensor.name,
        tensor.tuned_name,
        tensor.rule,
        head.layer,
        head.module,
        head.kind,
        "x".join(str(size) for size in tensor.shape),
        head.base_dtype.label,
        head.tuned_dtype.label,
        view,
        tensor.entries,
        summary.sign_flips,
        summary.l1,
        summary.l2,
        summary.max_abs,
        summary.relative_l2,
        None if head.rows is None else head.rows.touched,
        None if head.cols is None else head.cols.touched,
        head.decay_only_rows,
        tensor.base_fingerprint,
        tensor.tuned_fingerprint,
        *[counts.get(key) for key in report.criteria],
    ]


def share_text(part: int, whole: int) -> str:
    """A percentage that is never rounded to 0 or 100 when it is neither; a dash without a denominator."""
    return percent(part, whole) if whole else "–"


def summary_markdown(report: DiffReport) -> bytes:
    """The headline, the accounts, the roll-ups and the findings, for a pull request or a lab book."""
    lines = [
        f"# Update sparsity of {report.tuned.resolved}",
        "",
        (
            f"Base: `{report.base.resolved}` ({_dtypes(report.base.entries_by_dtype)}); "
            f"tuned: `{report.tuned.resolved}` ({_dtypes(report.tuned.entries_by_dtype)}). {report.tool}."
        ),
        "",
        "Share of compared entries that did **not** change:",
        "",
        *_table(["view", "compared", *report.criteria], headline_rows(report)),
        "",
        *[f"- {finding}" for finding in report.findings],
        "",
        *_table(
            ["side", "compared", "skipped", "leftover", "total"],
            [
                [side, f"{a.compared:,}", f"{a.skipped:,}", f"{a.leftover:,}", f"{a.total:,}"]
                for side, a in (("base", report.accounts.base), ("tuned", report.accounts.tuned))
            ],
        ),
    ]
    rollups = next(r for r in report.rollups if r.view is shown_view(report))
    criterion = report.mask_criterion
    for title, groups in (
        ("part", rollups.totals),
        ("layer", rollups.by_layer),
        ("module", rollups.by_module),
    ):
        if groups:
            head = [
                title,
                "tensors",
                "entries",
                f"sparsity ({criterion}, size-weighted)",
                "mean over tensors",
            ]
            lines += ["", *_table(head, [rollup_row(group, criterion) for group in groups])]
    for gate in report.gates:
        lines += ["", f"- {'passed' if gate.passed else '**FAILED**'}: {gate.gate}: {gate.detail}"]
    return ("\n".join(lines) + "\n").encode()


def shown_view(report: DiffReport) -> View:
    """The run's view, or native where the pair has no served view of its own."""
    return report.view if any(r.view is report.view for r in report.rollups) else View.NATIVE


def rollup_row(group: Rollup, criterion: str) -> list[str]:
    """Key, tensors, entries, size-weighted and unweighted update sparsity."""
    count = next((c for c in group.counts if c.total.criterion == criterion), None)
    head = [group.key, f"{group.num_tensors:,}", f"{group.entries:,}"]
    if count is None:
        return [*head, "–", "–"]
    weighted = share_text(count.total.compared - count.total.changed, count.total.compared)
    mean = "–" if count.mean_sparsity is None else f"{100 * count.mean_sparsity:.1f} %"
    return [*head, weighted, mean]


def headline_rows(report: DiffReport) -> list[list[str]]:
    """View, entries compared, and the update sparsity under each of the report's criteria."""
    rows = []
    for view in dict.fromkeys(row.view for row in report.headlines):
        found = {row.criterion: row for row in report.headlines if row.view is view}
        cells = [
            share_text(found[key].compared - found[key].changed, found[key].compared) if key in found else "–"
            for key in report.criteria
        ]
        rows.append([view.value, f"{next(iter(found.values())).compared:,}", *cells])
    return rows


def _dtypes(entries_by_dtype: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {dtype}" for dtype, count in entries_by_dtype.items())


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(head) + " |",
        "|" + "|".join("---" for _ in head) + "|",
        *["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows],
    ]
