"""Figures `density` (layer × module) and `layers` (update sparsity by layer)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sparsity_audit.report.runs import Run, question, shared_question
from sparsity_audit.report.schema import DiffReport, ViewRollups
from sparsity_audit.report.style import COLOURS, HEAT_MAP, INK, MARKERS, PALE, new_panels, panels_across
from sparsity_audit.report.tables import shown_view
from sparsity_audit.stats.rollup import Headline, Rollup, RollupCount

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

__all__ = ["DensityGrid", "caption_density", "caption_layers", "density_grids", "draw_density", "draw_layers"]

_MODULE_ORDER = (
    *("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj"),
    *("gate_proj", "up_proj", "gate_up_proj", "down_proj", "router", "norm", "bias"),
)
_SCALE_TOPS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_MIN_CELL_IN = 0.2
_CELL_HEIGHT_IN = 0.17
_LABELS_IN = 0.75
_COLOUR_BAR_IN = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class DensityGrid:
    """Update density of one stack of layers.

    Args:
        run: Label of the run.
        stack: Name of the stack; empty where the model has one.
        layers: Layer numbers as text, in order.
        modules: Module types, attention first.
        cells: (module, layer) → counts; missing where the layer has no such module.
    """

    run: str
    stack: str
    layers: tuple[str, ...]
    modules: tuple[str, ...]
    cells: dict[tuple[str, str], Headline]


def density_grids(run: Run) -> list[DensityGrid]:
    """One grid a stack of layers, under the run's criterion and view; empty grids are left out."""
    found: dict[str, dict[tuple[str, str], Headline]] = {}
    for group in _rollups(run.report).by_layer_and_module:
        label, _, module = group.key.partition("/")
        stack, _, layer = label.rpartition(".")
        count = _count(group, run.report)
        if count is not None and count.total.compared:
            found.setdefault(stack, {})[module, layer] = count.total
    return [
        DensityGrid(
            run=run.label,
            stack=stack,
            layers=tuple(sorted({layer for _, layer in cells}, key=int)),
            modules=tuple(sorted(dict.fromkeys(module for module, _ in cells), key=_module_rank)),
            cells=cells,
        )
        for stack, cells in found.items()
    ]


def draw_density(runs: Sequence[Run], *, width: float) -> Figure | None:
    """Heat maps of update density, on one colour scale from 0; numbers in % where they fit."""
    grids = [grid for run in runs for grid in density_grids(run)]
    if not grids:
        return None
    num_layers = max(len(grid.layers) for grid in grids)
    num_modules = max(len(grid.modules) for grid in grids)
    min_panel = min(width, max(2.0, _LABELS_IN + _MIN_CELL_IN * num_layers))
    figure, panels = new_panels(
        len(grids),
        width=width,
        panel_height=0.75 + _CELL_HEIGHT_IN * num_modules,
        min_panel=min_panel,
        share_y=False,
    )
    across = panels_across(len(grids), width=width, min_panel=min_panel)
    panel_in = (width - _COLOUR_BAR_IN) / across - _LABELS_IN
    densest = max(row.changed / row.compared for grid in grids for row in grid.cells.values())
    top = next(limit for limit in _SCALE_TOPS if densest <= limit)
    meshes = [
        _draw_grid(axes, grid, top=top, has_numbers=panel_in >= _MIN_CELL_IN * len(grid.layers))
        for axes, grid in zip(panels, grids, strict=True)
    ]
    asked = shared_question(runs)
    bar = figure.colorbar(meshes[0], ax=panels, pad=0.02, fraction=0.05, aspect=15)
    bar.set_label("update density (%)" + (f"\n{asked}" if asked else ""))
    return figure


def caption_density(runs: Sequence[Run]) -> str:
    """What the cells are."""
    outside = any(_has_tensors_outside(run) for run in runs)
    note = " Tensors outside the layers (embeddings, head, final norm) are not in it." if outside else ""
    return (
        "Update density, the share of compared entries that changed, by layer and module; size-weighted "
        "within a cell; numbers are %; grey: no such tensor." + note
    )


def _draw_grid(axes: Axes, grid: DensityGrid, *, top: float, has_numbers: bool) -> AxesImage:
    values = np.full((len(grid.modules), len(grid.layers)), np.nan)
    for y, module in enumerate(grid.modules):
        for x, layer in enumerate(grid.layers):
            if (module, layer) in grid.cells:
                row = grid.cells[module, layer]
                values[y, x] = 100 * row.changed / row.compared
                if has_numbers:
                    is_dark = values[y, x] < 50 * top
                    axes.text(
                        x,
                        y,
                        _cell_text(row.changed, row.compared, has_decimal=top <= 0.1),
                        ha="center",
                        va="center",
                        fontsize=5.5,
                        color="white" if is_dark else "black",
                    )
    mesh = axes.imshow(values, cmap=HEAT_MAP, vmin=0, vmax=100 * top, aspect="auto", interpolation="nearest")
    axes.set_facecolor(PALE)
    step = max(1, math.ceil(len(grid.layers) / 16))
    axes.set_xticks(range(0, len(grid.layers), step), grid.layers[::step])
    axes.set_yticks(range(len(grid.modules)), grid.modules)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("layer")
    axes.set_title(f"{grid.run}\n{grid.stack}" if grid.stack else grid.run)
    return mesh


def _cell_text(changed: int, compared: int, *, has_decimal: bool) -> str:
    """The share in %, short enough for a cell; never 0 or 100 when it is neither."""
    digits = 1 if has_decimal else 0
    text = f"{100 * changed / compared:.{digits}f}"
    if float(text) == 0:
        return ("<.1" if has_decimal else "<1") if changed else "0"
    return ">99" if float(text) == 100 and changed < compared else text


def draw_layers(runs: Sequence[Run], *, width: float) -> Figure | None:
    """Update sparsity by layer: a line size-weighted, hollow markers for the mean over tensors."""
    stacks: dict[str, list[tuple[Run, list[tuple[int, RollupCount]]]]] = {}
    for run in runs:
        for stack, points in _layer_points(run.report).items():
            stacks.setdefault(stack, []).append((run, points))
    if not stacks:
        return None
    from matplotlib.ticker import MaxNLocator

    figure, panels = new_panels(len(stacks), width=width, panel_height=2.0, min_panel=2.6)
    asked = shared_question(runs)
    for axes, (stack, members) in zip(panels, stacks.items(), strict=True):
        for run, points in members:
            number = [other.label for other in runs].index(run.label)
            name = run.label if asked else f"{run.label} ({question(run.report)})"
            _draw_layers_of(axes, points, number=number, label=name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("layer")
        axes.grid(axis="y")
        if stack:
            axes.set_title(stack)
    _widen_to_percent(panels[0])
    panels[0].set_ylabel("update sparsity (%)" + (f"\n{asked}" if asked else ""))
    handles, labels = panels[0].get_legend_handles_labels()
    handles.append(_hollow_marker())
    labels.append("mean over tensors (unweighted)")
    columns = min(len(labels), max(1, int(width / 2.2)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)
    return figure


def caption_layers(_runs: Sequence[Run]) -> str:
    """What the lines and markers are."""
    return (
        "Update sparsity by layer. Lines: size-weighted, all entries of the layer alike. Hollow markers: "
        "unweighted mean over the layer's tensors, in which a norm weighs as much as a matrix."
    )


def _layer_points(report: DiffReport) -> dict[str, list[tuple[int, RollupCount]]]:
    """Stack → (layer, counts) in the order of the layers."""
    stacks: dict[str, list[tuple[int, RollupCount]]] = {}
    for group in _rollups(report).by_layer:
        stack, _, layer = group.key.rpartition(".")
        count = _count(group, report)
        if count is not None and count.total.compared:
            stacks.setdefault(stack, []).append((int(layer), count))
    return {stack: sorted(points, key=lambda point: point[0]) for stack, points in stacks.items()}


def _draw_layers_of(axes: Axes, points: list[tuple[int, RollupCount]], *, number: int, label: str) -> None:
    colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
    layers = [layer for layer, _ in points]
    sparsities = [100 * (c.total.compared - c.total.changed) / c.total.compared for _, c in points]
    axes.plot(layers, sparsities, color=colour, marker=marker, label=label)
    means = [(layer, 100 * c.mean_sparsity) for layer, c in points if c.mean_sparsity is not None]
    axes.plot(
        [layer for layer, _ in means],
        [mean for _, mean in means],
        color=colour,
        marker=marker,
        markerfacecolor="none",
        markersize=5.5,
        markeredgewidth=0.7,
        linestyle="none",
        label="_means",
    )


def _hollow_marker() -> Artist:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=INK, marker="o", markerfacecolor="none", markersize=5.5, linestyle="none")


def _widen_to_percent(axes: Axes) -> None:
    """At least five points of range, so that a flat line does not look like noise; inside 0 … 100."""
    low, high = axes.get_ylim()
    middle, half = (low + high) / 2, max(high - low, 5) / 2
    low, high = max(0.0, middle - half), min(100.0, middle + half)
    low, high = min(low, 95.0), max(high, 5.0)
    margin = 0.04 * (high - low)  # markers on the edge stay whole
    axes.set_ylim(low - margin, high + margin)


def _rollups(report: DiffReport) -> ViewRollups:
    view = shown_view(report)
    return next(rollups for rollups in report.rollups if rollups.view is view)


def _count(group: Rollup, report: DiffReport) -> RollupCount | None:
    return next((c for c in group.counts if c.total.criterion == report.mask_criterion), None)


def _has_tensors_outside(run: Run) -> bool:
    rollups = _rollups(run.report)
    inside = sum(group.num_tensors for group in rollups.by_layer)
    return any(group.num_tensors > inside for group in rollups.totals[:1])


def _module_rank(module: str) -> tuple[int, str]:
    known = module in _MODULE_ORDER
    return (_MODULE_ORDER.index(module) if known else len(_MODULE_ORDER), module)
