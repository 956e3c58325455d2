"""The heat map of the page: update density by layer and module, size-weighted.

Contract: pure; the colour scale ends on tens of percent, so that small differences stay small; what is not
shown is counted.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from sparsity_audit.report.page_table import natural, view_label
from sparsity_audit.report.schema import DiffReport, ViewRollups
from sparsity_audit.report.tables import share_text
from sparsity_audit.stats.rollup import Headline, Rollup

__all__ = ["HeatCell", "HeatMap", "heat_maps"]

_MAX_LAYERS, _MAX_MODULES = 400, 40
_HEAT_STEPS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class HeatCell:
    """Density of one group: step on the colour scale, text, and the counts in words."""

    step: int
    text: str
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HeatMap:
    """Update density by layer (rows) and module (columns), size-weighted.

    Args:
        view: Label of the view.
        criterion: The criterion.
        low: Lower end of the colour scale, as a percentage.
        high: Upper end.
        modules: Column names; the last one is all modules of a layer together.
        rows: Layer → cells; None where a layer has no such module.
        more: What was left out.
    """

    view: str
    criterion: str
    low: str
    high: str
    modules: tuple[str, ...]
    rows: tuple[tuple[str, tuple[HeatCell | None, ...]], ...]
    more: str


def heat_maps(report: DiffReport) -> tuple[HeatMap, ...]:
    """One map a view that counts the mask criterion."""
    found = (_heat_map(report, rollups) for rollups in report.rollups)
    return tuple(heat for heat in found if heat is not None)


def _heat_map(report: DiffReport, rollups: ViewRollups) -> HeatMap | None:
    criterion = report.mask_criterion
    per_layer = {group.key: count for group in rollups.by_layer if (count := _count(group, criterion))}
    cells: dict[tuple[str, str], tuple[Rollup, Headline]] = {}
    weights: dict[str, int] = {}
    for group in rollups.by_layer_and_module:
        count = _count(group, criterion)
        if count is not None:
            layer, module = _split_key(group.key, per_layer)
            cells[layer, module] = (group, count)
            weights[module] = weights.get(module, 0) + group.entries
    densities = [count.density for _, count in cells.values() if count.density is not None]
    if not densities:
        return None
    low = min(9, int(min(densities) * 10))
    high = max(low + 1, math.ceil(max(densities) * 10))
    layers = sorted(per_layer, key=natural)
    largest = set(sorted(weights, key=lambda name: -weights[name])[:_MAX_MODULES])
    modules = [name for name in weights if name in largest]
    more = []
    if len(layers) > _MAX_LAYERS:
        more.append(f"{len(layers) - _MAX_LAYERS:,} more layers")
    if len(weights) > _MAX_MODULES:
        more.append(f"{len(weights) - _MAX_MODULES:,} smaller module types")
    rows = []
    for layer in layers[:_MAX_LAYERS]:
        line = [
            _heat_cell(f"layer {layer}, {module}", *cells[layer, module], low=low, high=high)
            if (layer, module) in cells
            else None
            for module in modules
        ]
        total = next(group for group in rollups.by_layer if group.key == layer)
        line.append(_heat_cell(f"layer {layer}", total, per_layer[layer], low=low, high=high))
        rows.append((layer, tuple(line)))
    return HeatMap(
        view=view_label(report, rollups.view),
        criterion=criterion,
        low=f"{10 * low} %",
        high=f"{10 * high} %",
        modules=(*modules, "whole layer"),
        rows=tuple(rows),
        more=f"Not shown: {' and '.join(more)}; the tensors table has them." if more else "",
    )


def _split_key(key: str, layers: dict[str, Headline]) -> tuple[str, str]:
    """Layer and module of a `layer/module` key; a layer's name may hold slashes itself."""
    at = [found.start() for found in re.finditer("/", key)]
    cut = next((place for place in at if key[:place] in layers), at[0])
    return key[:cut], key[cut + 1 :]


def _heat_cell(what: str, group: Rollup, count: Headline, *, low: int, high: int) -> HeatCell:
    if count.density is None:
        return HeatCell(step=0, text="–", detail=f"{what}: no entries")
    place = (10 * count.density - low) / (high - low)
    share = share_text(count.changed, count.compared)
    tensors = "1 tensor" if group.num_tensors == 1 else f"{group.num_tensors:,} tensors"
    return HeatCell(
        step=round(min(1.0, max(0.0, place)) * _HEAT_STEPS),
        text=_short_share(count.changed, count.compared),
        detail=f"{what}: {count.changed:,} of {count.compared:,} changed ({share}), {tensors}",
    )


def _short_share(part: int, whole: int) -> str:
    return share_text(part, whole).removesuffix(" %").replace("less than ", "<").replace("more than ", ">")


def _count(group: Rollup, criterion: str) -> Headline | None:
    return next((c.total for c in group.counts if c.total.criterion == criterion), None)
