"""What many runs say together as CSV, and as sections that Markdown, LaTeX and the terminal share.

Contract: pure functions of the record. CSV holds exact counts and floats that read back equal; a printed
figure of chance has the name of its null beside it, and a p that is missing its reason.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from sparsity_audit.report.across_runs import Cells, FactorRecord, FactorTable, OverlapMatrix, OverRuns
from sparsity_audit.report.overlap import OverlapReport
from sparsity_audit.report.overlap_text import digits, expected_entries, markdown_table, share
from sparsity_audit.stats.consensus import Consensus
from sparsity_audit.stats.factors import Contrast, FactorEffect
from sparsity_audit.stats.overlap import NULL_ORDER

__all__ = [
    "Section",
    "across_csv",
    "across_markdown",
    "across_sections",
    "consensus_section",
    "factors_section",
    "linkage_text",
    "matrix_sections",
]

_ALL, _MATCHED, _ALONE = "all pairs", "others matched", "this alone"
_FACTOR_SCOPES = (
    f"{_MATCHED}: among pairs that differ in the same other factors, labels permuted among runs alike in "
    f"all of them; {_ALONE}: pairs that differ in no other factor"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A table with a title and lines about it.

    Args:
        title: Its title.
        lines: Sentences before the table.
        head: Names of the columns; empty where there is no table.
        rows: Cells.
        notes: Sentences after it.
    """

    title: str
    lines: tuple[str, ...] = ()
    head: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    notes: tuple[str, ...] = ()


def across_sections(report: OverlapReport) -> list[Section]:
    """Factors first, then all pairs, means over runs and the consensus; what there is of them."""
    found = []
    if report.factors is not None:
        found.append(factors_section(report.factors))
    if report.matrix is not None:
        found += matrix_sections(report.matrix)
    if report.over_runs is not None and len(report.over_runs.runs) > 1:
        found.append(_over_runs(report.over_runs))
    if report.consensus is not None:
        found.append(consensus_section(report.consensus))
    return found


def across_markdown(report: OverlapReport) -> list[str]:
    """The sections for `summary.md`."""
    lines: list[str] = []
    for section in across_sections(report):
        lines += ["", f"## {section.title}", "", *[f"{line}." for line in section.lines]]
        if section.head:
            lines += ["", *markdown_table(section.head, section.rows)]
        lines += ["", *[f"- {note}" for note in section.notes]] if section.notes else []
    return lines


def factors_section(table: FactorTable) -> Section:
    """Three rows a factor: all pairs, pairs matched by the other factors, pairs that differ in it alone."""
    rows, notes = [], []
    for record in table.factors:
        for compared, excess, jaccard in _contrasts(record):
            rows.append((record.factor, compared, *_contrast_cells(excess, jaccard)))
            if excess.permutation.reason is not None:
                notes.append(f"{record.factor}, {compared}: no p: {excess.permutation.reason}")
            elif excess.permutation.draws is not None:
                draws, of = excess.permutation.draws, excess.permutation.arrangements
                notes.append(f"{record.factor}, {compared}: p from {draws:,} of {of:,} arrangements")
        rows.append((record.factor, _ALONE, "", "", "", *_alone_cells(record), "", ""))
    return Section(
        title=f"Factors: do runs that agree on one overlap more (excess share over {table.null})?",
        lines=(_factor_method(table), _FACTOR_SCOPES),
        head=(
            *("factor", "compared", "pairs alike", "excess share", "Jaccard"),
            *("pairs unlike", "excess share", "Jaccard", "difference", "p"),
        ),
        rows=tuple(rows),
        notes=(*notes, *table.notes),
    )


def _factor_method(table: FactorTable) -> str:
    return (
        f"{len(table.runs)} runs; difference: of the excess shares; p: one-sided, labels of runs permuted; "
        f"statistic: {table.statistic}"
    )


def _contrasts(record: FactorRecord) -> Iterator[tuple[str, Contrast, Contrast]]:
    yield _ALL, record.excess_share.marginal, record.jaccard.marginal
    yield _MATCHED, record.excess_share.controlled, record.jaccard.controlled


def _contrast_cells(excess: Contrast, jaccard: Contrast) -> tuple[str, ...]:
    return (
        *(f"{excess.same_pairs:,}", share(excess.same), share(jaccard.same)),
        *(f"{excess.differ_pairs:,}", share(excess.differ), share(jaccard.differ)),
        *(share(excess.difference), digits(excess.permutation.p)),
    )


def _alone_cells(record: FactorRecord) -> tuple[str, str, str]:
    excess = record.excess_share
    return f"{excess.only_pairs:,}", share(excess.only), share(record.jaccard.only)


def matrix_sections(matrix: OverlapMatrix) -> list[Section]:
    """Observed below and chance above the diagonal; then the excess share."""
    places = range(len(matrix.runs))
    mixed = tuple(tuple((matrix.jaccard if q < r else matrix.chance)[r][q] for q in places) for r in places)
    head = ("run", *(str(place + 1) for place in places))
    return [
        Section(
            title=f"Jaccard, observed below the diagonal, {matrix.null} chance above it",
            lines=(linkage_text(matrix),),
            head=head,
            rows=_matrix_rows(matrix.runs, mixed),
        ),
        Section(
            title=f"Excess share over {matrix.null}",
            head=head,
            rows=_matrix_rows(matrix.runs, matrix.excess_share),
        ),
    ]


def linkage_text(matrix: OverlapMatrix) -> str:
    """What put the runs in their order."""
    if matrix.distance is None:
        return "Runs in the order given: a pair without an overlap cannot be clustered"
    what = f"excess share over {matrix.null}" if matrix.distance == "excess_share" else "observed Jaccard"
    return f"Runs in the order of average linkage on 1 − {what}"


def _matrix_rows(runs: Sequence[str], cells: Cells) -> tuple[tuple[str, ...], ...]:
    return tuple(
        (
            f"{r + 1} {run}",
            *("" if q == r else share(value) for q, value in enumerate(row)),
        )
        for r, (run, row) in enumerate(zip(runs, cells, strict=True))
    )


def _over_runs(over: OverRuns) -> Section:
    figures = {"observed Jaccard": over.jaccard}
    figures |= {f"excess share over {null}": found for null, found in over.excess_share.items()}
    pairs = len(over.runs) * (len(over.runs) - 1) // 2
    rows = tuple(
        (
            name,
            share(found.mean),
            share(found.standard_error),
            "–" if found.low is None else f"{share(found.low)} … {share(found.high)}",
        )
        for name, found in figures.items()
    )
    reasons = dict.fromkeys(found.reason for found in figures.values() if found.reason is not None)
    return Section(
        title=f"Means over {pairs:,} pairs of {len(over.runs):,} runs",
        lines=("95 % intervals for another run of this kind: jackknife, leaving out one run with its pairs",)
        if over.jaccard.standard_error is not None
        else (),
        head=("figure", "mean", "standard error", "95 % interval"),
        rows=rows,
        notes=tuple(f"no interval: {reason}" for reason in reasons),
    )


def consensus_section(found: Consensus) -> Section:
    """One row for each number of runs."""
    runs, nulls = len(found.cores), list(found.expected)
    core, top = found.cores[-1], nulls[-1]
    rows = []
    for k, count in enumerate(found.observed):
        expected = [expected_entries(found.expected[null][k]) for null in nulls]
        least = found.cores[k - 1] if k else None
        tail = ["", ""] if least is None else [f"{least.observed:,}", expected_entries(least.expected[top])]
        rows.append((str(k), f"{count:,}", *expected, *tail))
    chances = ", ".join(f"{null} {expected_entries(core.expected[null])}" for null in nulls)
    return Section(
        title=f"Consensus of {runs:,} runs",
        lines=(
            f"Changed in all {runs:,} runs: {core.observed:,} entries",
            f"Expected if runs were independent: {chances}",
            f"Excess share over {top}: {share(core.excess_share[top])}",
        ),
        head=(
            *("runs k", "changed in exactly k", *(f"{null} expects" for null in nulls)),
            *("in at least k", f"{top} expects"),
        ),
        rows=tuple(rows),
    )


def across_csv(report: OverlapReport) -> dict[str, bytes]:
    """File name → table, for what there is."""
    files = {}
    if report.matrix is not None:
        files["matrix.csv"] = _csv(_matrix_lines(report, report.matrix.runs))
    if report.factors is not None:
        files["factors.csv"] = _csv(_factor_lines(report.factors))
    if report.consensus is not None:
        files["consensus.csv"] = _csv(_consensus_lines(report.consensus))
    return files


def _matrix_lines(report: OverlapReport, runs: Sequence[str]) -> Iterator[list[object]]:
    """Each pair both ways round, so that a pivot of one null gives a whole matrix."""
    yield ["run_a", "run_b", "jaccard", "null", "chance", "excess_share"]
    pairs = {frozenset((pair.a, pair.b)): pair.overall for pair in report.pairs}
    for a in runs:
        for b in runs:
            if a == b:
                continue
            found = pairs[frozenset((a, b))]
            for null in (found.nulls[name] for name in NULL_ORDER if name in found.nulls):
                yield [a, b, found.jaccard, null.null, null.jaccard, null.excess_share]


def _factor_lines(table: FactorTable) -> Iterator[list[object]]:
    """One line for each factor, way to compare, and figure."""
    yield [
        *("factor", "compared", "figure", "null", "pairs_same", "pairs_differ", "same", "differ"),
        *("difference", "p", "arrangements", "draws", "reason"),
    ]
    for record in table.factors:
        figures: tuple[tuple[str, str | None, FactorEffect], ...] = (
            ("excess_share", table.null, record.excess_share),
            ("jaccard", None, record.jaccard),
        )
        for figure, null, effect in figures:
            for compared, found in (("marginal", effect.marginal), ("controlled", effect.controlled)):
                test = found.permutation
                yield [
                    *(
                        record.factor,
                        compared,
                        figure,
                        null,
                        found.same_pairs,
                        found.differ_pairs,
                        found.same,
                    ),
                    *(found.differ, found.difference, test.p, test.arrangements, test.draws, test.reason),
                ]
            alone: list[object] = [
                record.factor,
                "only",
                figure,
                null,
                None,
                effect.only_pairs,
                None,
                effect.only,
            ]
            yield alone + [None] * 5


def _consensus_lines(found: Consensus) -> Iterator[list[object]]:
    """Exactly and at least k runs, one line a null."""
    yield ["count", "runs", "observed", "null", "expected", "excess_share"]
    for k, count in enumerate(found.observed):
        for null, row in found.expected.items():
            yield ["exactly", k, count, null, row[k], None]
    for core in found.cores:
        for null, expected in core.expected.items():
            yield ["at least", core.runs, core.observed, null, expected, core.excess_share[null]]


def _csv(rows: Iterable[Sequence[object]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()
