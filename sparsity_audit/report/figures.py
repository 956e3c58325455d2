"""The figures by name, and their files: pictures in each format and a caption stub.

Contract: a function of records; drawing the same records again gives the same bytes. A figure that has
nothing to show (no layers, level `counts`) is left out unless it was asked for by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from sparsity_audit.errors import UsageError
from sparsity_audit.report.figures_headline import caption_headline, draw_headline
from sparsity_audit.report.figures_precision import (
    caption_change_rate,
    caption_ulps,
    draw_change_rate,
    draw_ulps,
)
from sparsity_audit.report.figures_structure import (
    caption_density,
    caption_layers,
    draw_density,
    draw_layers,
)
from sparsity_audit.report.figures_tolerance import (
    caption_delta,
    caption_tolerance,
    draw_delta,
    draw_tolerance,
)
from sparsity_audit.report.runs import Run, describe_runs
from sparsity_audit.report.style import FORMATS, FigureFormat, house_style, to_bytes
from sparsity_audit.types import View

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["DEFAULT_WIDTH", "FIGURES", "FigureKind", "caption", "render_figures"]

DEFAULT_WIDTH = 5.5


class _Draw(Protocol):
    def __call__(self, runs: Sequence[Run], *, width: float) -> Figure | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FigureKind:
    """How a figure is made.

    Args:
        draw: Records → figure of `width` inches, or None when they have nothing to show.
        explain: Records → what the figure shows, for its caption.
    """

    draw: _Draw
    explain: Callable[[Sequence[Run]], str]


FIGURES: dict[str, FigureKind] = {
    "headline": FigureKind(draw=draw_headline, explain=caption_headline),
    "change-rate": FigureKind(draw=draw_change_rate, explain=caption_change_rate),
    "density": FigureKind(draw=draw_density, explain=caption_density),
    "layers": FigureKind(draw=draw_layers, explain=caption_layers),
    "ulps": FigureKind(draw=draw_ulps, explain=caption_ulps),
    "delta": FigureKind(draw=draw_delta, explain=caption_delta),
    "tolerance": FigureKind(draw=draw_tolerance, explain=caption_tolerance),
}


def render_figures(
    runs: Sequence[Run],
    *,
    names: Sequence[str] = (),
    formats: Sequence[FigureFormat] = FORMATS,
    width: float = DEFAULT_WIDTH,
) -> dict[str, bytes]:
    """File name → content of the figures asked for (all that have something to show without `names`).

    Raises:
        UsageError: There is no such figure, or one that was named has nothing to show.
    """
    unknown = [name for name in names if name not in FIGURES]
    if unknown:
        raise UsageError("--figure", f"unknown: {', '.join(unknown)}", expected=f"of {', '.join(FIGURES)}")
    files: dict[str, bytes] = {}
    for name in dict.fromkeys(names) or FIGURES:
        with house_style():
            figure = FIGURES[name].draw(runs, width=width)
            if figure is None and names:
                raise UsageError(
                    f"--figure {name}",
                    "the reports have nothing for it",
                    remedy="run diff with --stats full; density and layers need numbered layers",
                )
            if figure is not None:
                files |= {f"{name}.{suffix}": to_bytes(figure, suffix) for suffix in formats}
                files[f"{name}.txt"] = caption(name, runs).encode()
    return files


def caption(name: str, runs: Sequence[Run]) -> str:
    """A caption stub: what is shown, then one line a run with criterion, dtypes and references."""
    lines = [FIGURES[name].explain(runs)]
    if any(row.view is View.SERVED for run in runs for row in run.report.headlines):
        lines.append("Native: as stored. Served: both sides rounded to bf16; absent where that is native.")
    return "\n".join([*lines, *describe_runs(runs)]) + "\n"
