"""The heat maps of all pairs of runs: observed beside chance, and what is left beyond it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from sparsity_audit.report.across_runs import OverlapMatrix
from sparsity_audit.report.across_tables import linkage_text
from sparsity_audit.report.overlap import OverlapReport
from sparsity_audit.report.overlap_tables import run_lines
from sparsity_audit.report.style import FORMATS, HEAT_MAP, PALE, WIDTHS, house_style, to_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["caption_matrix", "draw_matrix", "render_matrix"]

_MAX_NUMBERS = 12
_MAX_LABELS = 40
_PANEL_IN = 2.55
_SCALE_STEPS = 20


def render_matrix(report: OverlapReport) -> dict[str, bytes]:
    """`matrix.pdf`, `.svg`, `.png` and the caption; nothing below three runs, or where no pair overlaps."""
    matrix = report.matrix
    if matrix is None or not np.isfinite(_array(matrix.jaccard)).any():
        return {}
    with house_style():
        figure = draw_matrix(report, matrix, width=WIDTHS[2])
        files = {f"matrix.{name}": to_bytes(figure, name) for name in FORMATS}
    return files | {"matrix.txt": (caption_matrix(report, matrix) + "\n").encode()}


def caption_matrix(report: OverlapReport, matrix: OverlapMatrix) -> str:
    """What the cells are."""
    parts = [
        f"Overlap of {len(matrix.runs)} runs, pair by pair",
        f"Left: Jaccard, observed below the diagonal and expected under the {matrix.null} null above it",
        f"Right: excess share over the {matrix.null} null, 0 at chance and 1 where one mask holds the other",
        "Grey: no such figure",
        linkage_text(matrix),
        "; ".join(run_lines(report)),
    ]
    return ". ".join(parts) + "."


def draw_matrix(report: OverlapReport, matrix: OverlapMatrix, *, width: float) -> Figure:
    """Two panels, each on its own scale; draw inside of `house_style`."""
    from matplotlib.figure import Figure

    runs = len(matrix.runs)
    longest = max(len(run) for run in matrix.runs)
    labels_in = min(1.3, 0.055 * min(longest, 24) + 0.1)
    figure = Figure(figsize=(width, _PANEL_IN + labels_in + 0.5))
    left, right = figure.subplots(1, 2)
    observed, chance = _array(matrix.jaccard), _array(matrix.chance)
    low = np.tri(runs, k=-1, dtype=bool)
    _draw_panel(left, matrix.runs, np.where(low, observed, chance), is_signed=False)
    left.set_title(f"Jaccard: observed below,\n{matrix.null} chance above the diagonal")
    _draw_panel(right, matrix.runs, _array(matrix.excess_share), is_signed=True)
    right.set_title(f"excess share over\n{matrix.null} chance")
    right.set_yticklabels([])
    figure.supxlabel(f"changed: {report.criterion}, {report.view} view", fontsize=7)
    return figure


def _draw_panel(axes: Axes, runs: tuple[str, ...], cells: np.ndarray, *, is_signed: bool) -> None:
    bottom, top = _limits(cells, is_signed=is_signed)
    mesh = axes.imshow(cells, cmap=HEAT_MAP, vmin=bottom, vmax=top, interpolation="nearest")
    axes.set_facecolor(PALE)
    if len(runs) <= _MAX_NUMBERS:
        for r, q in zip(*np.nonzero(np.isfinite(cells)), strict=True):
            axes.text(
                q,
                r,
                _number(float(cells[r, q]), has_thousandths=len(runs) <= _MAX_NUMBERS // 2 + 2),
                ha="center",
                va="center",
                fontsize=5.5 if len(runs) <= _MAX_NUMBERS // 2 + 2 else 5,
                color="white" if cells[r, q] < (bottom + top) / 2 else "black",
            )
    step = max(1, math.ceil(len(runs) / _MAX_LABELS))
    names = [_shortened(run) for run in runs][::step]
    axes.set_xticks(range(0, len(runs), step), names, rotation=90)
    axes.set_yticks(range(0, len(runs), step), names)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = axes.figure.colorbar(mesh, ax=axes, fraction=0.046, pad=0.03, aspect=18)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    bar.ax.tick_params(length=2, labelsize=6)


def _limits(cells: np.ndarray, *, is_signed: bool) -> tuple[float, float]:
    """Ends of the scale, on twentieths, so that small differences stay small; an excess share starts at 0."""
    known = cells[np.isfinite(cells)]
    if not known.size:
        return 0.0, 1.0
    low = math.floor(_SCALE_STEPS * min(known.min(), 0.0 if is_signed else 1.0)) / _SCALE_STEPS
    high = math.ceil(_SCALE_STEPS * known.max()) / _SCALE_STEPS
    return low, max(high, low + 1 / _SCALE_STEPS)


def _number(value: float, *, has_thousandths: bool) -> str:
    """Short enough for a cell, without the zero before the point; 0 is exactly that."""
    if value == 0:
        return "0"
    text = f"{abs(value):.{3 if has_thousandths else 2}f}".removeprefix("0")
    return ("−" if value < 0 else "") + text


def _shortened(label: str) -> str:
    """The end of a long label: paths differ there."""
    return label if len(label) <= 24 else "…" + label[-23:]


def _array(cells: tuple[tuple[float | None, ...], ...]) -> np.ndarray:
    """NaN where there is no figure."""
    return np.array([[math.nan if value is None else value for value in row] for row in cells])
