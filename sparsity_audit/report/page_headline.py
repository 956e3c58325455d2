"""The top of the page: the result in a sentence, views × criteria side by side, and the precision note.

Contract: pure; no number stands without its criterion, its view and its denominator.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsity_audit.report.page_table import share_of, view_label
from sparsity_audit.report.schema import DiffReport
from sparsity_audit.report.svg_charts import power_of_two
from sparsity_audit.stats.precision import hidden_ulps, rel_equals_value
from sparsity_audit.stats.rollup import Headline
from sparsity_audit.types import Criterion, DType, View

__all__ = ["Cell", "headline_cells", "notes", "summary_line"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One headline: update sparsity under a criterion.

    Args:
        criterion: Its key.
        sparsity: As a percentage, or a dash.
        changed: `92,308 of 148,928 changed`.
        width: Unchanged share in user units of 0 … 100, for a bar.
        decides: This criterion and view decide mask and gates.
    """

    criterion: str
    sparsity: str
    changed: str
    width: float
    decides: bool


def headline_cells(report: DiffReport) -> dict[str, tuple[Cell, ...]]:
    """View label → one cell a criterion."""
    views = _views(report)
    deciding = report.view if report.view in views else View.NATIVE
    table: dict[str, tuple[Cell, ...]] = {}
    for view in views:
        found = {row.criterion: row for row in report.headlines if row.view is view}
        table[view_label(report, view)] = tuple(
            _cell(found.get(key), key, decides=view is deciding and key == report.mask_criterion)
            for key in report.criteria
        )
    return table


def _cell(row: Headline | None, criterion: str, *, decides: bool) -> Cell:
    if row is None or not row.compared:
        return Cell(criterion=criterion, sparsity="–", changed="not counted", width=0, decides=decides)
    unchanged = row.compared - row.changed
    return Cell(
        criterion=criterion,
        sparsity=share_of(unchanged, row.compared),
        changed=f"{row.changed:,} of {row.compared:,} changed",
        width=round(100 * unchanged / row.compared, 2),
        decides=decides,
    )


def summary_line(report: DiffReport) -> str:
    """The result in one sentence, with criterion, view and denominator."""
    row = report.headline(report.mask_criterion, report.view)
    if row is None or not row.compared:
        return "Nothing was compared."
    text = (
        f"{share_of(row.compared - row.changed, row.compared)} of {row.compared:,} compared entries did not "
        f"change under {row.criterion}, {view_label(report, row.view)}"
    )
    other = View.NATIVE if row.view is View.SERVED else View.SERVED
    beside = report.headline(row.criterion, other)
    if beside is not None and beside.view is other and beside.compared:
        unchanged = beside.compared - beside.changed
        text += f"; {share_of(unchanged, beside.compared)} {view_label(report, other)}"
    return text + "."


def notes(report: DiffReport) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """The precision note: heading → sentences."""
    value = (
        "value calls an entry changed when the two numbers differ, with no tolerance, so the answer does not "
        "depend on how large the weight is (+0 and −0 are equal, and so are two NaN). bitwise compares the "
        "stored codes."
    )
    groups = (
        ("Why value", (value,)),
        ("What a tolerance hides", tuple(_hidden(report))),
        ("What bf16 makes invisible", tuple(_invisible(report))),
    )
    return tuple((heading, sentences) for heading, sentences in groups if sentences)


def _hidden(report: DiffReport) -> list[str]:
    sentences = []
    for record in report.precision:
        where = f"{record.view.value}, {record.dtype.label}"
        for found in record.hidden:
            criterion = Criterion.parse(found.criterion)
            if rel_equals_value(criterion, record.dtype):
                step = power_of_two(-record.dtype.layout.mantissa_bits - 1)
                sentences.append(
                    f"{criterion} ({where}): the same as value, since neighbouring {record.dtype.label} "
                    f"numbers differ by at least {step} relative."
                )
                continue
            text = (
                f"{criterion} ({where}) calls {found.hidden:,} of {found.value_changed:,} changed entries "
                f"unchanged ({share_of(found.hidden, found.value_changed)})"
            )
            if criterion.kind == "atol" and record.dtype.itemsize <= 2:
                steps = hidden_ulps(criterion.parameter, record.dtype, num=1)
                if steps:
                    below = power_of_two(steps[0].below_exponent)
                    text += f", among them every step of 1 ULP below |w| = {below}"
            sentences.append(text + ".")
    return sentences


def _invisible(report: DiffReport) -> list[str]:
    sentences = []
    for record in report.visible:
        seen = record.visible
        lost = seen.native_changed - seen.served_changed
        sentences.append(
            f"Of {seen.native_changed:,} {record.dtype.label} changes {seen.served_changed:,} remain when "
            f"both sides are rounded to bf16; {lost:,} ({share_of(lost, seen.native_changed)}) do not."
        )
    if any(r.dtype is DType.BF16 and r.view is View.NATIVE for r in report.precision):
        sentences.append(
            "These weights are stored in bf16, where the neighbour of w lies |w|/256 to |w|/128 away: a move "
            "of less than half of that left no trace before this comparison. The change rate by magnitude "
            "below shows how far that may matter."
        )
    return sentences


def _views(report: DiffReport) -> list[View]:
    return list(dict.fromkeys(row.view for row in report.headlines))
