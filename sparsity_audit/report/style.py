"""How figures look, and how they become bytes. matplotlib is imported inside the functions.

Contract: a figure drawn and rendered twice gives the same bytes: the user's own matplotlib settings are set
aside, no metadata holds a date or a version, ids in SVG are salted with a constant. Text stays text in SVG,
and PDF embeds TrueType. No pyplot, so nothing global but the settings inside `house_style`.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "COLOURS",
    "FORMATS",
    "HATCHES",
    "HEAT_MAP",
    "INK",
    "MARKERS",
    "PALE",
    "WIDTHS",
    "FigureFormat",
    "add_legend",
    "house_style",
    "new_panels",
    "panels_across",
    "power",
    "to_bytes",
]

FigureFormat = Literal["pdf", "svg", "png"]
FORMATS: tuple[FigureFormat, ...] = ("pdf", "svg", "png")

WIDTHS = (3.25, 5.5, 6.75)
"""Inches: one column of two, a text block, a full page."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette (https://jfly.uni-koeln.de/color/), without its yellow, too pale for lines."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
HATCHES = ("", "////", "....", "xxxx")
HEAT_MAP = "cividis"
INK = "#333333"
PALE = "#D9D9D9"

_SETTINGS: dict[str, Any] = {
    "pdf.fonttype": 42,
    "ps.fonttype": 42,
    "svg.fonttype": "none",
    "svg.hashsalt": "sparsity-audit",
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.wspace": 0.04,
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "font.family": ["DejaVu Sans"],
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "axes.linewidth": 0.6,
    "axes.edgecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "grid.color": PALE,
    "grid.linewidth": 0.4,
    "hatch.linewidth": 0.5,
}
_METADATA: dict[str, dict[str, str | None]] = {
    "pdf": {"Creator": "sparsity-audit", "Producer": None, "CreationDate": None},
    "svg": {"Creator": "sparsity-audit", "Date": None},
    "png": {"Software": None},
}
_MIN_PANEL_IN = 2.0
_HANDLE_IN, _LETTER_IN = 0.45, 0.055
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@contextmanager
def house_style() -> Iterator[None]:
    """Draw and render inside of this."""
    import matplotlib as mpl

    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_SETTINGS)  # pyright: ignore[reportCallIssue, reportArgumentType]
        yield


def new_panels(
    num: int, *, width: float, panel_height: float, min_panel: float = _MIN_PANEL_IN, share_y: bool = True
) -> tuple[Figure, list[Axes]]:
    """A figure of `width` inches with `num` panels side by side, in as many rows as they need."""
    from matplotlib.figure import Figure

    across = panels_across(num, width=width, min_panel=min_panel)
    down = -(-num // across)
    figure = Figure(figsize=(width, panel_height * down + 0.35))
    grid = figure.subplots(down, across, squeeze=False, sharey=share_y)
    for spare in grid.flat[num:]:
        spare.remove()
    return figure, list(grid.flat[:num])


def add_legend(figure: Figure, panels: Sequence[Axes], *, width: float) -> None:
    """One legend for all panels, under them."""
    handles: dict[str, Artist] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    longest = max(map(len, handles), default=0)
    columns = min(len(handles), max(1, int(width / max(1.3, _HANDLE_IN + _LETTER_IN * longest))))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns)


def panels_across(num: int, *, width: float, min_panel: float) -> int:
    """Panels in a row of `width` inches."""
    return max(1, min(num, int(width / min_panel)))


def power(base: int, exponent: int) -> str:
    """`2⁻⁸` as plain text: searchable in SVG, and a tenth of the time that mathtext takes."""
    return f"{base}{str(exponent).translate(_SUPERSCRIPTS)}"


def to_bytes(figure: Figure, file_format: FigureFormat) -> bytes:
    """The figure as a file's content. PNG at 200 dots an inch."""
    if figure.get_layout_engine() is not None:
        # Once is enough for all formats, and without an engine a figure is drawn once instead of twice.
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
    data = io.BytesIO()
    figure.savefig(data, format=file_format, metadata=_METADATA[file_format])
    return data.getvalue()
