"""Recoveries as CSV, Markdown, LaTeX and rows for a terminal, pure functions of the record.

Contract: CSV holds exact counts and floats that read back equal. Printed shares have three decimals, and are
never 0 or 1 when they are neither. The base against the full run stands in every table of agreement, as its
first row.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence

from sparsity_audit.report.overlap_text import latex_table, markdown_table, share
from sparsity_audit.report.recovery import (
    GroupRecovery,
    PartsRecord,
    RecoveryReport,
    RecoveryRun,
    ScoreRecord,
)
from sparsity_audit.stats.recovery import PARTS, PartRecovery
from sparsity_audit.stats.scores import Interval

__all__ = [
    "SHOWN",
    "agreement_head",
    "agreement_rows",
    "facts",
    "frozen_lines",
    "group_head",
    "group_rows",
    "recovery_csv",
    "recovery_latex",
    "recovery_markdown",
    "score_head",
    "score_rows",
]

SHOWN = ("bitwise", "atol:1e-5", "atol:1e-4", "rel:1e-3")
"""Criteria of the printed tables; the record and the CSV hold `value` as well."""

_UPDATE = ("cosine", "signs agree", "relative L2")


def recovery_csv(report: RecoveryReport) -> bytes:
    """One line for each run, part of the model and side of the mask."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    figures = ("moving", "sign_agreement", "independent_signs", "cosine", "relative_l2", "not_finite")
    equal = [f"equal[{criterion}]" for criterion in report.criteria]
    writer.writerow(["run", "role", "level", "key", "part", "entries", *equal, *figures])
    for run in report.runs:
        for level, key, parts in _levels(run):
            for part in PARTS:
                found: PartRecovery = getattr(parts, part)
                counts = [found.equal[criterion] for criterion in report.criteria]
                rest = [getattr(found, name) for name in figures]
                writer.writerow([run.label, run.role, level, key, part, found.entries, *counts, *rest])
    return text.getvalue().encode()


def _levels(run: RecoveryRun) -> Iterator[tuple[str, str, PartsRecord]]:
    yield "overall", "", run.parts
    for level, groups in (("layer", run.by_layer), ("module", run.by_module), ("tensor", run.by_tensor)):
        for group in groups:
            yield level, group.key, group.parts


def facts(report: RecoveryReport) -> list[str]:
    """What was compared, one line a fact."""
    mask = "what full changed" if report.mask is None else report.mask
    lines = [
        f"base {report.base}, full {report.full}{_training(report.full_seed, report.full_precision)}",
        (
            f"mask: {mask} ({report.criterion}), {report.inside:,} of {report.compared:,} entries, density "
            f"{share(report.density)}; {report.view} view"
        ),
    ]
    lines += [
        f"{run.label}: {run.reference} ({', '.join(run.dtypes)}){_training(run.seed, run.precision)}"
        for run in report.runs[1:]
    ]
    return lines


def _training(seed: int | None, precision: str | None) -> str:
    known = [] if seed is None else [f"seed {seed}"]
    known += [] if precision is None else [f"trained in {precision}"]
    return f", {', '.join(known)}" if known else ""


def agreement_head(part: str) -> list[str]:
    """Head of `agreement_rows`."""
    return [f"equal to full, {part}", *SHOWN, *_UPDATE]


def agreement_rows(report: RecoveryReport, part: str) -> list[list[str]]:
    """One row a run: shares of equal entries under each criterion, then how alike the updates are."""
    return [[run.label, *_cells(getattr(run.parts, part), run)] for run in report.runs]


def _cells(found: PartRecovery, run: RecoveryRun) -> list[str]:
    shares = [share(found.shares[criterion]) for criterion in SHOWN]
    if run.role == "base":
        return [*shares, "–", "–", share(found.relative_l2)]
    return [*shares, share(found.cosine), share(found.sign_agreement), share(found.relative_l2)]


def score_head(report: RecoveryReport) -> list[str]:
    """Head of `score_rows`."""
    return [
        "run",
        report.metric or "",
        "95 % interval",
        "trials",
        "share of the gain",
        "95 % interval",
        "sub − run",
    ]


def score_rows(report: RecoveryReport) -> list[list[str]]:
    """One row a run that has a score, full among them."""
    base, *others = report.runs
    rows = [
        (base.label, base.score),
        ("full", report.full_score),
        *[(run.label, run.score) for run in others],
    ]
    return [_score_cells(label, score) for label, score in rows if score is not None]


def _score_cells(label: str, score: ScoreRecord) -> list[str]:
    gain = score.share
    return [
        label,
        share(score.accuracy.value),
        _interval(score.interval),
        f"{score.accuracy.trials:,.0f}",
        "" if gain is None else share(gain.value),
        "" if gain is None else (_interval(gain.interval) if gain.interval else f"none: {gain.reason}"),
        "" if score.lead is None else _interval(score.lead),
    ]


def _interval(found: Interval) -> str:
    return f"{found.low:.3f} to {found.high:.3f}".replace("-", "−")


def frozen_lines(report: RecoveryReport) -> list[str]:
    """The check of frozen entries, one line a run that has a mask of its own."""
    lines = []
    for run in report.runs:
        frozen = run.frozen
        if frozen is None:
            continue
        text = f"{run.label}: {frozen.entries:,} entries outside its mask ({frozen.mask}), "
        if not frozen.entries:
            text = f"{run.label}: no entries outside its mask ({frozen.mask})"
        elif frozen.first is None:
            text += "all bit-identical to the base"
        else:
            first = frozen.first
            text += (
                f"{frozen.moved:,} differ from the base; first {first.tensor!r}, entry {first.entry:,}: "
                f"{first.base!r} is {first.run!r}"
            )
        lines.append(text)
    return lines


def group_head(title: str) -> list[str]:
    """Head of `group_rows`."""
    return [title, "entries inside", *[f"{c}, base" for c in SHOWN[:1]], *SHOWN, "cosine", "signs agree"]


def group_rows(report: RecoveryReport, groups: Sequence[GroupRecovery]) -> list[list[str]]:
    """One row a part of the model: agreement inside the mask, beside that of the base."""
    of_base = {g.key: g.parts.inside for g in (*report.runs[0].by_layer, *report.runs[0].by_module)}
    rows = []
    for group in groups:
        found = group.parts.inside
        rows.append(
            [
                group.key,
                f"{found.entries:,}",
                share(of_base[group.key].shares["bitwise"]),
                *[share(found.shares[criterion]) for criterion in SHOWN],
                share(found.cosine),
                share(found.sign_agreement),
            ]
        )
    return rows


def recovery_markdown(report: RecoveryReport) -> bytes:
    """`summary.md`: verdict, warnings, scores, agreement, frozen check, then parts of the model."""
    lines = ["# Recovery", "", f"**{report.verdict}.**", ""]
    lines += [f"- warning: {warning}" for warning in report.warnings]
    lines += [f"- {line}" for line in (*facts(report), *report.notes)]
    lines += [f"- left out: {lost.name}: {lost.reason}" for lost in report.left_out]
    if report.full_score is not None:
        lines += ["", "## Scores", "", *markdown_table(score_head(report), score_rows(report))]
    lines += ["", "## Agreement with the full run", ""]
    for part in PARTS:
        lines += [*markdown_table(agreement_head(part), agreement_rows(report, part)), ""]
    lines += [
        "Agreement outside the mask holds by construction as far as the full run moved nothing there.",
        "",
    ]
    lines += ["## Frozen entries", "", *[f"- {line}" for line in frozen_lines(report)]]
    for title, groups in (("module", report.sub.by_module), ("layer", report.sub.by_layer)):
        if groups:
            lines += ["", f"## sub by {title}, inside the mask", ""]
            lines += markdown_table(group_head(title), group_rows(report, groups))
    return ("\n".join(lines) + "\n").encode()


def recovery_latex(report: RecoveryReport) -> bytes:
    """A booktabs table with one row a run: score, share of the gain, agreement inside the mask."""
    scores = {row[0]: row for row in score_rows(report)} if report.full_score is not None else {}
    head = ["Run", *(["Score", "Share of gain", "95 % interval"] if scores else []), *SHOWN, *_UPDATE]
    rows = []
    for run in report.runs:
        row = scores.get(run.label, ["", "–", "", "", "–", "", ""])
        cells = [row[1], row[4] or "–", row[5] or "–"] if scores else []
        rows.append([run.label, *cells, *_cells(run.parts.inside, run)])
    caption = (
        "Agreement with the full run inside the mask (share of equal entries), and share of its gain. "
        + "; ".join(facts(report))
    )
    return latex_table(caption, head, rows)
