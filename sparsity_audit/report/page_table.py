"""What the sections of the page share: a table of text, cut at a stated length, and how shares read."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sparsity_audit.report.schema import DiffReport
from sparsity_audit.report.tables import share_text
from sparsity_audit.types import View

__all__ = ["MAX_ROWS", "Table", "cut_note", "natural", "share_of", "view_label"]

MAX_ROWS = 200
"""Rows of a table that may be long; the note below it says how many are left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table of text.

    Args:
        title: Its caption.
        head: Column names; the first column is the row's name, the others are numbers unless in `words`.
        rows: Cells.
        words: Columns of text beside the first.
        more: What was cut off, in a sentence; empty when all is shown.
    """

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: tuple[int, ...] = ()
    more: str = ""


def view_label(report: DiffReport, view: View) -> str:
    """The view with what it compares: `native (fp32)`."""
    dtypes = {
        (t.summary.served if view is View.SERVED and t.summary.served else t.summary.native).dtype.label
        for t in report.tensors
    }
    return f"{view.value} ({', '.join(sorted(dtypes))})" if dtypes else view.value


def cut_note(count: int) -> str:
    """What a table of `count` rows leaves out."""
    return f"{count - MAX_ROWS:,} more rows are in report.json." if count > MAX_ROWS else ""


def natural(text: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key that counts: `layers.9` before `layers.10`."""
    return tuple((0, int(p), "") if p.isdecimal() else (1, 0, p) for p in re.split(r"(\d+)", text) if p)


def share_of(part: int, whole: int) -> str:
    """As in the other tables, with a space that does not break."""
    return share_text(part, whole).replace(" %", "\N{NO-BREAK SPACE}%")
