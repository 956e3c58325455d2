"""Excess share by module type and by layer, of the headline pair beside its reference pair."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from sparsity_audit.report.overlap import GroupOverlap, OverlapReport, PairRecord
from sparsity_audit.report.overlap_tables import run_lines
from sparsity_audit.report.page_table import natural
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
from sparsity_audit.stats.ladder import MIN_HEADROOM

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["caption_parts", "draw_parts", "render_parts"]

_ROW_IN = 0.21
_LARGEST_IN = 8.5
_MARGIN_IN = 0.8
_APART = 0.4
_MAX_NAMES = 60

_Groups = Callable[[PairRecord], Sequence[GroupOverlap]]


def _by_layer(pair: PairRecord) -> Sequence[GroupOverlap]:
    return pair.by_layer


def _by_module(pair: PairRecord) -> Sequence[GroupOverlap]:
    return pair.by_module


_LEVELS: tuple[tuple[str, _Groups], ...] = (("module", _by_module), ("layer", _by_layer))


def render_parts(report: OverlapReport) -> dict[str, bytes]:
    """`parts.pdf`, `.svg`, `.png` and the caption; nothing where no part has an excess share."""
    levels = [level for level in _LEVELS if _keys(report, level[1])]
    if not levels:
        return {}
    with house_style():
        figure = draw_parts(report, width=WIDTHS[1])
        files = {f"parts.{name}": to_bytes(figure, name) for name in FORMATS}
    return files | {"parts.txt": (caption_parts(report) + "\n").encode()}


def caption_parts(report: OverlapReport) -> str:
    """What the dots are."""
    first = report.headline
    parts = [
        f"Excess share of the overlap over the {first.ladder.residual_null} null by part of the model",
        "0 at chance, 1 where one mask holds the other. " + " and ".join(_pairs(report)),
        f"Hollow: noisy, fewer than {MIN_HEADROOM} entries lie between chance and containment",
        "A triangle points to a value beyond the axis. No mark: chance leaves no room for an excess",
        "; ".join(run_lines(report)),
    ]
    return ". ".join(parts) + "."


def draw_parts(report: OverlapReport, *, width: float) -> Figure:
    """Modules above layers on a common axis; draw inside of `house_style`."""
    from matplotlib.figure import Figure

    levels = [(title, groups, keys) for title, groups in _LEVELS if (keys := _keys(report, groups))]
    rows = [len(keys) for *_, keys in levels]
    figure = Figure(figsize=(width, min(_LARGEST_IN, _ROW_IN * sum(rows) + _MARGIN_IN)))
    panels = figure.subplots(len(levels), 1, squeeze=False, sharex=True, height_ratios=rows)[:, 0]
    limits = _limits(report)
    pairs = _pairs(report)
    for axes, (title, groups, keys) in zip(panels, levels, strict=True):
        axes.axvline(0, color=INK, linewidth=0.6, zorder=1)
        for number, (name, pair) in enumerate(pairs.items()):
            offset = (number - (len(pairs) - 1) / 2) * _APART
            _draw_pair(axes, groups(pair), keys, pair, limits, number=number, name=name, offset=offset)
        step = -(-sum(rows) // _MAX_NAMES)
        axes.set_yticks(range(0, len(keys), step), keys[::step])
        axes.set_ylim(len(keys) - 0.4, -0.6)
        axes.set_ylabel(title)
        axes.grid(axis="y")
    panels[-1].set_xlim(*limits)
    panels[-1].set_xlabel(
        f"excess share over {report.headline.ladder.residual_null} chance ({report.criterion}, "
        f"{report.view} view)"
    )
    figure.align_ylabels(panels)
    add_legend(figure, list(panels), width=2 * width)
    return figure


def _pairs(report: OverlapReport) -> dict[str, PairRecord]:
    found = [pair for pair in (report.headline, report.reference_pair) if pair is not None]
    return {pair.name: pair for pair in found}


def _share(group: GroupOverlap, pair: PairRecord) -> float | None:
    return group.overlap.nulls[pair.ladder.residual_null].excess_share


def _is_noise(group: GroupOverlap, pair: PairRecord) -> bool:
    found = group.overlap
    return min(found.a, found.b) - found.nulls[pair.ladder.residual_null].expected < MIN_HEADROOM


def _keys(report: OverlapReport, groups: _Groups) -> list[str]:
    """Parts in which some pair has an excess share, layers in the order of their numbers."""
    pairs = _pairs(report).values()
    found = {g.key for pair in pairs for g in groups(pair) if _share(g, pair) is not None}
    keys = [group.key for group in groups(report.headline) if group.key in found]
    return sorted(keys, key=natural) if groups is _by_layer else keys


def _limits(report: OverlapReport) -> tuple[float, float]:
    """Ends of the axis: 0 and all shares that are no noise, or all where all are; never beyond −1 and 1."""
    shares = [
        (share, _is_noise(group, pair))
        for pair in _pairs(report).values()
        for _, groups in _LEVELS
        for group in groups(pair)
        if (share := _share(group, pair)) is not None
    ]
    kept = [share for share, is_noise in shares if not is_noise] or [share for share, _ in shares]
    low, high = max(-1.0, min(0.0, *kept)), min(1.0, max(0.05, *kept))
    margin = 0.08 * (high - low)
    return low - margin, high + margin


def _draw_pair(
    axes: Axes,
    groups: Sequence[GroupOverlap],
    keys: Sequence[str],
    pair: PairRecord,
    limits: tuple[float, float],
    *,
    number: int,
    name: str,
    offset: float,
) -> None:
    found = {group.key: group for group in groups}
    colour, marker = COLOURS[number], MARKERS[number]
    axes.plot([], [], marker, color=colour, label=name)
    for place, key in enumerate(keys):
        share = _share(found[key], pair)
        if share is None:
            continue
        height = place + offset
        if not limits[0] <= share <= limits[1]:
            _draw_beyond(axes, share, height, limits, colour=colour)
            continue
        is_noise = _is_noise(found[key], pair)
        axes.plot(
            *(share, height, marker),
            color=colour,
            markerfacecolor="white" if is_noise else colour,
            markeredgewidth=0.8,
            zorder=3,
        )
        axes.hlines(height, 0, share, color=colour, linewidth=0.6, alpha=0.5, zorder=2)


def _draw_beyond(
    axes: Axes, share: float, height: float, limits: tuple[float, float], *, colour: str
) -> None:
    """A triangle on the edge that points to where the mark would be, and its value."""
    is_right = share > limits[1]
    edge = limits[1] if is_right else limits[0]
    axes.plot(
        *(edge, height, ">" if is_right else "<"),
        color=colour,
        markerfacecolor="white",
        markeredgewidth=0.8,
        clip_on=False,
        zorder=3,
    )
    axes.annotate(
        f"{share:.2f}".replace("-", "−").replace("0.", "."),
        (edge, height),
        textcoords="offset points",
        xytext=(-5 if is_right else 5, 0),
        ha="right" if is_right else "left",
        va="center",
        fontsize=6,
        color=INK,
    )
