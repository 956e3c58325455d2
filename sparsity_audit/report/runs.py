"""Finished audits side by side: their labels, and what a caption must say about each.

Contract: a label is short and unlike the others'; the caption names what a label stands for: both
references with their revision, the stored dtypes, the criterion, the view and the entries compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sparsity_audit.errors import UsageError
from sparsity_audit.report.schema import CheckpointRecord, DiffReport
from sparsity_audit.report.tables import shown_view

__all__ = [
    "Run",
    "describe_runs",
    "label_runs",
    "question",
    "shared_question",
    "short_percent",
    "short_share",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A finished audit under the name that figures and tables give it."""

    label: str
    report: DiffReport


def label_runs(reports: Sequence[DiffReport], labels: Sequence[str] = ()) -> tuple[Run, ...]:
    """Name each report: as asked, or by the shortest end of the tuned reference that tells them apart.

    Raises:
        UsageError: The labels are fewer or more than the reports, or one occurs twice.
    """
    if labels and len(labels) != len(reports):
        raise UsageError("labels", f"{len(labels)} for {len(reports)} reports", expected="one each, in order")
    if len(set(labels)) < len(labels):
        raise UsageError("labels", f"occur twice: {', '.join(labels)}", expected="different ones")
    names = labels or _short_names([report.tuned.resolved for report in reports])
    return tuple(Run(label=name, report=report) for name, report in zip(names, reports, strict=True))


def _short_names(references: Sequence[str]) -> list[str]:
    paths = [_split_revision(reference)[0].rstrip("/").split("/") for reference in references]
    for depth in range(1, max(len(path) for path in paths) + 1):
        names = ["/".join(path[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    names = [
        f"{path[-1]}@{revision[:7]}" if (revision := _split_revision(reference)[1]) else path[-1]
        for path, reference in zip(paths, references, strict=True)
    ]
    if len(set(names)) == len(names):
        return names
    return [f"{name} ({number})" for number, name in enumerate(names, start=1)]


def _split_revision(reference: str) -> tuple[str, str]:
    """Path or repository, and the commit of a Hub reference."""
    if not reference.startswith("hf://"):
        return reference, ""
    name, _, revision = reference.removeprefix("hf://").partition("@")
    return name, revision


def question(report: DiffReport) -> str:
    """Criterion and view that decide the report's densities, as `value, native`."""
    return f"{report.mask_criterion}, {shown_view(report)}"


def shared_question(runs: Sequence[Run]) -> str | None:
    """The question of all runs, or None where they differ and each must say its own."""
    asked = {question(run.report) for run in runs}
    return asked.pop() if len(asked) == 1 else None


def short_percent(part: int, whole: int) -> str:
    """A percentage for a bar or a cell, with one decimal; never 0 or 100 when it is neither."""
    text = f"{100 * part / whole:.1f}"
    if text == "0.0" and part:
        return "<0.1"
    return ">99.9" if text == "100.0" and part < whole else text


def describe_runs(runs: Sequence[Run]) -> list[str]:
    """One line a run, for captions."""
    lines = []
    for run in runs:
        report = run.report
        lines.append(
            f"{run.label}: base {_describe(report.base)}, tuned {_describe(report.tuned)}; criterion "
            f"{report.mask_criterion}, {shown_view(report)} view; {report.accounts.base.compared:,} entries "
            f"in {len(report.tensors):,} tensors compared; {report.tool}."
        )
    return lines


def _describe(record: CheckpointRecord) -> str:
    dtypes = " + ".join(record.entries_by_dtype)
    return f"{record.resolved} ({dtypes})"


def short_share(fraction: float) -> str:
    """The same for a fraction that is no quotient of counts, such as a mean."""
    text = f"{100 * fraction:.1f}"
    if text == "0.0" and fraction > 0:
        return "<0.1"
    return ">99.9" if text == "100.0" and fraction < 1 else text
