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
from sparsity_audit.report.overlap_text import digits, latex_table, markdown_table, share
from sparsity_audit.stats.ladder import RUNGS
from sparsity_audit.stats.overlap import PairOverlap

__all__ = [
    "CONVERGENCE_HEAD",
    "NULL_HEAD",
    "convergence_rows",
    "group_head",
    "group_rows",
    "null_rows",
    "overlap_csv",
    "overlap_latex",
    "overlap_markdown",
    "pair_facts",
    "pair_line",
    "run_lines",
]

_COUNTS = (*("entries", "a", "b", "both", "jaccard", "o1", "o2", "o1_ceiling", "o2_ceiling", "phi"),)
_NULL = ("expected", "variance", "jaccard", "o1", "o2", "excess_share", "lift", "odds_ratio", "z")
CONVERGENCE_HEAD = (
    *("strata", "number", "median entries", "in small ones", "magnitude chance", "excess share", "z"),
)
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
        lines.append(f"{run.label}: {run.changed:,} changed, density {share(run.density)} ({run.kind}{mark})")
    if report.walk is not None:
        walk = report.walk
        lines.append(
            f"walk of {walk.steps:,} steps of ±{walk.lr:g} rounded to bf16 (seed {walk.seed}): density of "
            f"its own {share(walk.density)}, Jaccard of two walks {share(walk.jaccard)}"
        )
    return lines


def pair_line(pair: PairRecord) -> str:
    """Counts and one-sided overlaps of a pair."""
    found = pair.overall
    return (
        f"|A| {found.a:,}, |B| {found.b:,}, |A∩B| {found.both:,}; "
        f"of A in B {share(found.o1)} (ceiling {share(found.o1_ceiling)}), "
        f"of B in A {share(found.o2)} (ceiling {share(found.o2_ceiling)})"
    )


def pair_facts(report: OverlapReport, pair: PairRecord) -> list[str]:
    """What stands beside a pair's table: densities of its phantoms, heterogeneity, signs and cosines."""
    facts, found = [], pair.overall
    if pair.phantom is not None:
        own = [
            expected / found.entries if found.entries else None
            for expected in (pair.phantom.expected_a, pair.phantom.expected_b)
        ]
        seen = [count / found.entries if found.entries else None for count in (found.a, found.b)]
        facts.append(
            f"phantom: its own densities {share(own[0])} and {share(own[1])}, observed "
            f"{share(seen[0])} and {share(seen[1])}"
        )
    spread = pair.heterogeneity
    if spread is not None and spread.low is not None:
        facts.append(
            f"heterogeneity over {spread.blocks} tensors (no confidence interval): excess share over "
            f"{spread.null} {share(spread.excess_share)}, 95 % of resamples {share(spread.low)} to "
            f"{share(spread.high)}"
        )
    elif spread is not None:
        facts.append(f"no heterogeneity: {spread.reason}")
    if pair.delta is not None:
        delta = pair.delta
        facts.append(
            f"Δ: signs agree on {share(delta.sign_agreement)} of {delta.moving:,} common entries "
            f"({share(delta.independent_signs)} under independent-signs); cosine "
            f"{share(delta.cosine_intersection)} there, {share(delta.cosine_overall)} over all entries"
        )
    if pair is report.headline and not pair.convergence and report.base is not None:
        facts.append("no convergence table: finer strata were not counted")
    return facts


def convergence_rows(pair: PairRecord) -> list[list[str]]:
    """Cells under `CONVERGENCE_HEAD`."""
    return [
        [
            row.scheme,
            f"{row.num_strata:,}",
            f"{row.median_entries:,}",
            share(row.in_small_strata),
            share(row.jaccard),
            share(row.excess_share),
            digits(row.z),
        ]
        for row in pair.convergence
    ]


def null_rows(overlap: PairOverlap) -> list[list[str]]:
    """Cells under `NULL_HEAD`: observed, then each null."""
    rows = [["observed", f"{overlap.both:,}", share(overlap.jaccard), "", "", "", ""]]
    return rows + [
        [
            null.null,
            f"{null.expected:,.1f}",
            share(null.jaccard),
            share(null.excess_share),
            digits(null.lift),
            digits(null.odds_ratio),
            digits(null.z),
        ]
        for null in overlap.nulls.values()
    ]


def group_head(title: str, pair: PairRecord) -> list[str]:
    """Head of `group_rows`."""
    chances = [f"{null} chance" for null in pair.overall.nulls if null in RUNGS]
    return [title, "entries", "density A", "density B", "Jaccard", *chances, _excess_head(pair)]


def group_rows(groups: Sequence[GroupOverlap], pair: PairRecord) -> list[list[str]]:
    """One row a part of the model, against the ladder's rungs; the excess share is over the highest one."""
    rows = []
    for group in groups:
        found = group.overlap
        n = found.entries
        rows.append(
            [
                group.key,
                f"{n:,}",
                share(found.a / n if n else None),
                share(found.b / n if n else None),
                share(found.jaccard),
                *[share(chance.jaccard) for null, chance in found.nulls.items() if null in RUNGS],
                share(found.nulls[pair.ladder.residual_null].excess_share),
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
        lines += markdown_table(NULL_HEAD, null_rows(pair.overall))
        lines += ["", *[f"- {fact}" for fact in pair_facts(report, pair)]]
        lines += [f"- warning: {warning}" for warning in pair.ladder.warnings]
        if pair.convergence:
            lines += ["", "The magnitude null under coarser and finer strata:", ""]
            lines += markdown_table(CONVERGENCE_HEAD, convergence_rows(pair))
    first = report.headline
    for title, groups in (("module", first.by_module), ("layer", first.by_layer)):
        if groups:
            lines += ["", f"## {first.name} by {title}", ""]
            lines += markdown_table(group_head(title, first), group_rows(groups, first))
    return ("\n".join(lines) + "\n").encode()


def overlap_latex(report: OverlapReport) -> bytes:
    """A booktabs table with one row a pair: observed, each null, excess share over the highest rung."""
    first = report.headline
    nulls = list(first.overall.nulls)
    head = ["Pair", "Jaccard", *nulls, _excess_head(first)]
    rows = [
        [
            pair.name,
            share(pair.overall.jaccard),
            *[share(pair.overall.nulls[null].jaccard) for null in nulls],
            share(pair.ladder.residual),
        ]
        for pair in report.pairs
    ]
    caption = "Jaccard overlap of the changed entries, observed and expected under each null. " + "; ".join(
        run_lines(report)
    )
    return latex_table(caption, head, rows)
