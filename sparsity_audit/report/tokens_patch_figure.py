"""Patching drawn: how much of the token divergence each layer, module type and mask carries.

Contract: a pure function of the record. A part added to the base and the same part removed from the tuned
model stand side by side: parts that work only together have small shares in one and large ones in the other.
"""

from __future__ import annotations

from pathlib import PurePath
from typing import TYPE_CHECKING

from sparsity_audit.report.style import (
    COLOURS,
    FORMATS,
    INK,
    MARKERS,
    WIDTHS,
    add_legend,
    house_style,
    to_bytes,
)
from sparsity_audit.report.tokens_patch import PatchReport, PatchRow
from sparsity_audit.report.tokens_patch_tables import patch_facts, patch_headline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["caption_patch", "draw_patch", "render_patch_figure"]

_TITLES = {"layer": "by layer", "module": "by module type", "mask": "masks and pruned updates"}
_LABELS = {"add": "added to the base: reproduced", "remove": "removed from the tuned model: brought back"}
_ROW_IN = 0.22


def render_patch_figure(report: PatchReport) -> dict[str, bytes]:
    """`patch.pdf`, `.svg`, `.png` and the caption."""
    with house_style():
        figure = draw_patch(report, width=WIDTHS[2])
        files = {f"patch.{name}": to_bytes(figure, name) for name in FORMATS}
    return files | {"patch.txt": (caption_patch(report) + "\n").encode()}


def caption_patch(report: PatchReport) -> str:
    """What the figure shows, as a start for the caption."""
    text = (
        "Share of the Jensen–Shannon divergence between base and tuned model, on the same completions, that "
        "one part of the update reproduces in the base, or brings back when it is taken out of the tuned "
        "model; 95 % bootstrap intervals over prompts"
    )
    return ". ".join([text, patch_headline(report), "; ".join(patch_facts(report)) + "."])


def draw_patch(report: PatchReport, *, width: float) -> Figure:
    """A panel a kind of part; draw inside of `house_style`."""
    from matplotlib.figure import Figure

    groups = {kind: _rows(report, kind) for kind in _TITLES}
    groups = {kind: names for kind, names in groups.items() if names}
    rows = max(map(len, groups.values()))
    figure = Figure(figsize=(width, _ROW_IN * rows + 1.2))
    panels = list(figure.subplots(1, len(groups), squeeze=False)[0])
    for axes, (kind, names) in zip(panels, groups.items(), strict=True):
        _draw_panel(axes, report, kind, names)
        axes.set_title(_TITLES[kind])
    add_legend(figure, panels, width=width)
    return figure


def _kind(row: PatchRow) -> str:
    return "mask" if row.kind == "update" else row.kind


def _rows(report: PatchReport, kind: str) -> list[str]:
    return list(dict.fromkeys(row.name for row in report.rows if _kind(row) == kind))


def _draw_panel(axes: Axes, report: PatchReport, kind: str, names: list[str]) -> None:
    for end in (0, 1):
        axes.axvline(end, color=INK, linewidth=0.7, zorder=1)
    for number, direction in enumerate(("add", "remove")):
        for row in report.rows:
            found = row.js_share
            if row.direction != direction or _kind(row) != kind or found.value is None:
                continue
            place = names.index(row.name) + (number - 0.5) * 0.26
            if found.low is not None and found.high is not None:
                axes.hlines(place, found.low, found.high, color=COLOURS[number], linewidth=1.0, zorder=2)
            axes.plot(
                found.value, place, MARKERS[number], color=COLOURS[number], label=_LABELS[direction], zorder=3
            )
    axes.set_yticks(range(len(names)), [PurePath(name).name if kind == "mask" else name for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel("share of the divergence")
    axes.grid(axis="x")
