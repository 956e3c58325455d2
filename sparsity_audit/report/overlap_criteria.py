"""Overlaps under several criteria side by side: one table, and a figure of observed and expected overlap.

Contract: pure functions of the records, which share their runs in one order. Numbers are those of the
records; each figure of chance stands under the name of its null.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sparsity_audit.report.overlap import OverlapReport, PairRecord
from sparsity_audit.report.overlap_tables import run_lines
from sparsity_audit.report.overlap_text import markdown_table, share
from sparsity_audit.report.style import (
    COLOURS,
    FORMATS,
    MARKERS,
    WIDTHS,
    add_legend,
    house_style,
    new_panels,
    to_bytes,
)
from sparsity_audit.stats.ladder import RUNGS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "CRITERIA_FILES",
    "CRITERIA_HEAD",
    "criteria_rows",
    "criterion_folder",
    "draw_criteria",
    "render_criteria",
]

CRITERIA_FILES = (
    *("criteria.csv", "summary.md"),
    *(f"figures/criteria.{suffix}" for suffix in (*FORMATS, "txt")),
)
CRITERIA_HEAD = (
    *("criterion", "pair", "density A", "density B", "Jaccard"),
    *(f"{null} chance" for null in RUNGS),
    *("excess over magnitude", "excess over row-column-magnitude", "sign agreement", "cosine"),
)
_PANEL_IN = 2.4


def criterion_folder(key: str) -> str:
    """The name of a criterion's directory: `top:1%` becomes `top-1pct`."""
    return key.replace("%", "pct").replace(":", "-")


def criteria_rows(reports: Sequence[OverlapReport]) -> list[list[str]]:
    """Cells under `CRITERIA_HEAD`, one row a criterion and pair."""
    return [[share(c) if not isinstance(c, str) else c for c in cells] for cells in _cells(reports)]


def _cells(reports: Sequence[OverlapReport]) -> list[list[str | float | None]]:
    rows: list[list[str | float | None]] = []
    for report in reports:
        for pair in report.pairs:
            found, delta = pair.overall, pair.delta
            n = found.entries
            rungs = [found.nulls.get(null) for null in RUNGS]
            rows.append(
                [
                    report.criterion,
                    pair.name,
                    found.a / n if n else None,
                    found.b / n if n else None,
                    found.jaccard,
                    *[None if null is None else null.jaccard for null in rungs],
                    *[None if null is None else null.excess_share for null in rungs[2:]],
                    None if delta is None else delta.sign_agreement,
                    None if delta is None else delta.cosine_intersection,
                ]
            )
    return rows


def render_criteria(reports: Sequence[OverlapReport], *, figures: bool) -> dict[str, bytes]:
    """Name → content."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CRITERIA_HEAD)
    writer.writerows(_cells(reports))
    lines = ["# Overlap under several criteria", ""]
    lines += [f"- **{r.criterion}**, {r.headline.name}: {r.headline.ladder.sentence}." for r in reports]
    lines += ["", *markdown_table(CRITERIA_HEAD, criteria_rows(reports)), ""]
    files = {"criteria.csv": text.getvalue().encode(), "summary.md": "\n".join(lines).encode()}
    if not figures:
        return files
    with house_style():
        figure = draw_criteria(reports, width=WIDTHS[1])
        files |= {f"figures/criteria.{name}": to_bytes(figure, name) for name in FORMATS}
    caption = "Jaccard overlap under several criteria, observed and expected under each named null. "
    caption += "; ".join(line for report in reports for line in run_lines(report))
    return files | {"figures/criteria.txt": f"{caption}.\n".encode()}


def draw_criteria(reports: Sequence[OverlapReport], *, width: float) -> Figure:
    """Overlap by criterion, one panel for the headline pair and one for its reference; in `house_style`."""
    panels = [[report.headline for report in reports], [report.reference_pair for report in reports]]
    shown = [[pair for pair in pairs if pair is not None] for pairs in panels if None not in pairs]
    figure, axes = new_panels(len(shown), width=width, panel_height=_PANEL_IN)
    for panel, pairs in zip(axes, shown, strict=True):
        _draw_panel(panel, [report.criterion for report in reports], pairs)
    axes[0].set_ylabel("Jaccard overlap")
    add_legend(figure, axes, width=width)
    return figure


def _draw_panel(axes: Axes, criteria: Sequence[str], pairs: Sequence[PairRecord]) -> None:
    places = range(len(pairs))
    axes.plot(
        places,
        [_number(pair.overall.jaccard) for pair in pairs],
        marker="o",
        color=COLOURS[0],
        linewidth=1.8,
        label="observed",
        zorder=4,
    )
    for number, null in enumerate(RUNGS):
        if all(null in pair.overall.nulls for pair in pairs):
            axes.plot(
                places,
                [_number(pair.overall.nulls[null].jaccard) for pair in pairs],
                marker=MARKERS[1 + number],
                markerfacecolor="white",
                color=COLOURS[1 + number],
                linewidth=0.8,
                label=f"{null} chance",
            )
    axes.set_xticks(list(places), list(criteria))
    axes.set_ylim(-0.03, 1.03)
    axes.set_title(pairs[0].name.replace(" × ", "\n× "))
    axes.grid(axis="y")


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
