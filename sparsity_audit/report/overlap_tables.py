"""Overlaps as CSV, Markdown, LaTeX and rows for a terminal, pure functions of the record.

Contract: CSV holds exact counts and floats that read back equal. Printed shares have three decimals, and are
never 0 or 1 when they are neither; no figure of chance is printed without the name of its null.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence

from sparsity_audit.report.across_tables import across_markdown
from sparsity_audit.report.overlap import GroupOverlap, OverlapReport, PairRecord
from sparsity_audit.report.overlap_text import figure_text as _figure
from sparsity_audit.report.overlap_text import latex_table as _latex
from sparsity_audit.report.overlap_text import markdown_table as _table
from sparsity_audit.report.overlap_text import share_text as _share
from sparsity_audit.stats.overlap import PairOverlap

__all__ = [
    "NULL_HEAD",
    "group_head",
    "group_rows",
    "null_rows",
    "overlap_csv",
    "overlap_latex",
    "overlap_markdown",
    "pair_line",
    "run_lines",
]

_COUNTS = (*("entries", "a", "b", "both", "jaccard", "o1", "o2", "o1_ceiling", "o2_ceiling", "phi"),)
_NULL = ("expected", "variance", "jaccard", "o1", "o2", "excess_share", "lift", "odds_ratio", "z")
NULL_HEAD = ("null", "expected both", "Jaccard", "excess share", "lift", "odds ratio", "z")


def overlap_csv(report: OverlapReport) -> bytes:
    """One line for each pair, part of the model and null."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run_a", "run_b", "level", "key", *_COUNTS, "null", *[f"null_{name}" for name in _NULL]])
    for pair in report.pairs:
        for level, key, overlap in _parts(pair):
            counts = [getattr(overlap, name) for name in _COUNTS]
            for null in overlap.nulls.values():
                cells = [getattr(null, name) for name in _NULL]
                writer.writerow([pair.a, pair.b, level, key, *counts, null.null, *cells])
    return text.getvalue().encode()


def _parts(pair: PairRecord) -> Iterator[tuple[str, str, PairOverlap]]:
    yield "overall", "", pair.overall
    for level, groups in (("layer", pair.by_layer), ("module", pair.by_module), ("tensor", pair.by_tensor)):
        for group in groups:
            yield level, group.key, group.overlap


def run_lines(report: OverlapReport) -> list[str]:
    """What was compared, one line a fact."""
    base = "no base given" if report.base is None else f"base {report.base}"
    lines = [f"criterion {report.criterion}, {report.view} view, {report.compared:,} entries, {base}"]
    for run in report.runs:
        mark = ", the reference run" if run.is_reference else ""
        lines.append(
            f"{run.label}: {run.changed:,} changed, density {_share(run.density)} ({run.kind}{mark})"
        )
    return lines


def pair_line(pair: PairRecord) -> str:
    """Counts and one-sided overlaps of a pair."""
    found = pair.overall
    return (
        f"|A| {found.a:,}, |B| {found.b:,}, |A∩B| {found.both:,}; "
        f"of A in B {_share(found.o1)} (ceiling {_share(found.o1_ceiling)}), "
        f"of B in A {_share(found.o2)} (ceiling {_share(found.o2_ceiling)})"
    )


def null_rows(overlap: PairOverlap) -> list[list[str]]:
    """Cells under `NULL_HEAD`: observed, then each null."""
    rows = [["observed", f"{overlap.both:,}", _share(overlap.jaccard), "", "", "", ""]]
    return rows + [
        [
            null.null,
            f"{null.expected:,.1f}",
            _share(null.jaccard),
            _share(null.excess_share),
            _figure(null.lift),
            _figure(null.odds_ratio),
            _figure(null.z),
        ]
        for null in overlap.nulls.values()
    ]


def group_head(title: str, pair: PairRecord) -> list[str]:
    """Head of `group_rows`."""
    chances = [f"{null} chance" for null in pair.overall.nulls]
    return [title, "entries", "density A", "density B", "Jaccard", *chances, _excess_head(pair)]


def group_rows(groups: Sequence[GroupOverlap], pair: PairRecord) -> list[list[str]]:
    """One row a part of the model; the excess share is over the ladder's highest rung."""
    rows = []
    for group in groups:
        found = group.overlap
        n = found.entries
        rows.append(
            [
                group.key,
                f"{n:,}",
                _share(found.a / n if n else None),
                _share(found.b / n if n else None),
                _share(found.jaccard),
                *[_share(null.jaccard) for null in found.nulls.values()],
                _share(found.nulls[pair.ladder.residual_null].excess_share),
            ]
        )
    return rows


def _excess_head(pair: PairRecord) -> str:
    return f"excess share over {pair.ladder.residual_null}"


def overlap_markdown(report: OverlapReport) -> bytes:
    """`summary.md`: the headline, then every pair against every null, then the parts of the headline pair."""
    lines = [
        "# Overlap against chance",
        "",
        f"**{report.headline.name}.** {report.headline.ladder.sentence}.",
        "",
    ]
    lines += [f"- {line}" for line in (*run_lines(report), *report.notes)]
    lines += [f"- left out: {lost.name}: {lost.reason}" for lost in report.left_out]
    lines += across_markdown(report)
    for pair in report.pairs:
        lines += ["", f"## {pair.name}", "", f"{pair.ladder.sentence}.", "", pair_line(pair), ""]
        lines += _table(NULL_HEAD, null_rows(pair.overall))
        lines += ["", *[f"- warning: {warning}" for warning in pair.ladder.warnings]]
    first = report.headline
    for title, groups in (("module", first.by_module), ("layer", first.by_layer)):
        if groups:
            lines += ["", f"## {first.name} by {title}", ""]
            lines += _table(group_head(title, first), group_rows(groups, first))
    return ("\n".join(lines) + "\n").encode()


def overlap_latex(report: OverlapReport) -> bytes:
    """A booktabs table with one row a pair: observed, each null, excess share over the highest rung."""
    first = report.headline
    nulls = list(first.overall.nulls)
    head = ["Pair", "Jaccard", *nulls, _excess_head(first)]
    rows = [
        [
            pair.name,
            _share(pair.overall.jaccard),
            *[_share(pair.overall.nulls[null].jaccard) for null in nulls],
            _share(pair.ladder.residual),
        ]
        for pair in report.pairs
    ]
    caption = "Jaccard overlap of the changed entries, observed and expected under each null. " + "; ".join(
        run_lines(report)
    )
    return _latex(caption, head, rows)
