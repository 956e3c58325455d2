"""A trajectory as CSV, Markdown, LaTeX and rows for a terminal, pure functions of the record."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from sparsity_audit.report.latex import escape
from sparsity_audit.report.overlap_text import markdown_table, share
from sparsity_audit.report.series import PartTrajectory, SeriesReport
from sparsity_audit.stats.trajectory import StepRecord

__all__ = [
    "PARTS_HEAD",
    "fact_lines",
    "headline",
    "part_rows",
    "series_csv",
    "series_latex",
    "series_markdown",
    "step_head",
    "step_rows",
]

PARTS_HEAD = ("part", "entries", "never changed", "changed and cancelled", "final")
_COLUMNS = (
    *("changed", "sparsity", "born", "died", "seen", "kept", "coverage", "precision", "jaccard"),
    *("patch_bytes", "dense_bytes"),
)


def headline(report: SeriesReport) -> str:
    """The run in one sentence."""
    run = report.overall
    return (
        f"{len(report.steps)} saved steps: {share(run.never_frac)} of {run.entries:,} entries never changed, "
        f"{share(run.cancelled_frac)} changed and came back, {share(run.final_frac)} are changed at the end"
    )


def fact_lines(report: SeriesReport) -> list[str]:
    """What was asked, and what a reader must know."""
    asked = f"criterion {report.criterion}, {report.view} view, against {report.base}"
    lost = [f"left out: {part.name}: {part.reason}" for part in report.left_out]
    return [f"{asked}; step to step: bitwise, stored codes", *report.notes, *lost]


def step_head(report: SeriesReport) -> list[str]:
    """Head of `step_rows`."""
    lags = [f"S_{lag}" for lag in report.lags]
    return ["step", "changed", "sparsity", *lags, "born", "died", "coverage", "precision", "patch / dense"]


def step_rows(report: SeriesReport) -> list[list[str]]:
    """One row a saved step."""
    return [
        [
            step.label,
            f"{step.changed:,}",
            share(step.sparsity),
            *[share(_lag(step, lag)) for lag in report.lags],
            f"{step.born:,}",
            f"{step.died:,}",
            share(step.coverage),
            share(step.precision),
            f"{size(step.patch_bytes)} / {size(step.dense_bytes)}",
        ]
        for step in report.overall.steps
    ]


def _lag(step: StepRecord, lag: int) -> float | None:
    return next((found.sparsity for found in step.lags if found.lag == lag), None)


def size(num_bytes: int) -> str:
    """A size to three digits: `1.23 MB`."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.3g} {unit}"
    return f"{num_bytes} B"


def part_rows(parts: Sequence[PartTrajectory]) -> list[list[str]]:
    """Cells under `PARTS_HEAD`."""
    return [
        [
            part.key,
            f"{part.trajectory.entries:,}",
            share(part.trajectory.never_frac),
            share(part.trajectory.cancelled_frac),
            share(part.trajectory.final_frac),
        ]
        for part in parts
    ]


def series_csv(report: SeriesReport) -> bytes:
    """One line for each part of the model and saved step; exact counts, and floats that read back equal."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    moved = [f"{name}_{lag}" for lag in report.lags for name in ("moved", "s")]
    writer.writerow(["level", "key", "entries", "step", *_COLUMNS, *moved])
    for level, key, trajectory in _parts(report):
        for step in trajectory.steps:
            lags = {found.lag: found for found in step.lags}
            cells = [
                cell
                for lag in report.lags
                for cell in ((lags[lag].moved, lags[lag].sparsity) if lag in lags else (None, None))
            ]
            columns = [getattr(step, name) for name in _COLUMNS]
            writer.writerow([level, key, trajectory.entries, step.label, *columns, *cells])
    return text.getvalue().encode()


def _parts(report: SeriesReport):
    yield "overall", "", report.overall
    for level, parts in (
        ("layer", report.by_layer),
        ("module", report.by_module),
        ("tensor", report.by_tensor),
    ):
        for part in parts:
            yield level, part.key, part.trajectory


def series_markdown(report: SeriesReport) -> bytes:
    """`summary.md`: the headline, the steps, then parts of the model."""
    lines = ["# Along a run", "", f"**{headline(report)}.**", ""]
    lines += [f"- {line}" for line in fact_lines(report)]
    lines += ["", "## Saved steps", "", *markdown_table(step_head(report), step_rows(report))]
    for title, parts in (("module", report.by_module), ("layer", report.by_layer)):
        if parts:
            lines += ["", f"## By {title}", "", *markdown_table(PARTS_HEAD, part_rows(parts))]
    return ("\n".join(lines) + "\n").encode()


def series_latex(report: SeriesReport) -> bytes:
    """A booktabs table with one row a saved step."""
    head = step_head(report)
    caption = f"{headline(report)}. {fact_lines(report)[0]}"
    lines = [
        r"% needs \usepackage{booktabs}",
        r"\begin{table}",
        r"  \centering",
        rf"  \caption{{{escape(caption)}.}}",
        rf"  \begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
        r"    \toprule",
        rf"    {' & '.join(escape(cell) for cell in head)} \\",
        r"    \midrule",
        *[rf"    {' & '.join(escape(cell) for cell in row)} \\" for row in step_rows(report)],
        r"    \bottomrule",
        r"  \end{tabular}",
        r"\end{table}",
        "",
    ]
    return "\n".join(lines).encode()
