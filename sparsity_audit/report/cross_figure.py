"""A cross-sampling drawn: accuracy against the share of tokens that the other model wrote.

Contract: a pure function of the record. Rules by divergence are in colour, controls in grey with markers of
their own, at the share they really had; lines follow the rule from seldom to often. Both models alone are
the horizontal lines.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsity_audit.report.cross import CrossPoint, CrossReport, Direction
from sparsity_audit.report.cross_tables import DIRECTION_NAMES, cross_facts, cross_headline
from sparsity_audit.report.style import (
    COLOURS,
    FORMATS,
    INK,
    WIDTHS,
    add_legend,
    house_style,
    new_panels,
    to_bytes,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["caption_cross", "draw_cross", "render_cross_figure"]

_GREY = "#8C8C8C"
_LOOKS = {
    ("js", False): (COLOURS[0], "o", "-", "by divergence"),
    ("js", True): (COLOURS[1], "D", "-", "by divergence, a budget of tokens"),
    ("random", False): (_GREY, "x", ":", "random positions"),
    ("random", True): (_GREY, "+", ":", "random positions, a budget"),
    ("entropy", False): (_GREY, "^", "--", "by the primary model's entropy"),
    ("entropy", True): (_GREY, "v", "--", "by entropy, a budget"),
    ("first", True): (INK, "s", "-.", "first positions"),
}


def render_cross_figure(report: CrossReport) -> dict[str, bytes]:
    """`cross.pdf`, `.svg`, `.png` and the caption."""
    with house_style():
        figure = draw_cross(report, width=WIDTHS[2])
        files = {f"cross.{name}": to_bytes(figure, name) for name in FORMATS}
    return files | {"cross.txt": (caption_cross(report) + "\n").encode()}


def caption_cross(report: CrossReport) -> str:
    """What the figure shows, as a start for the caption."""
    return ". ".join(
        [
            (
                "Accuracy against the share of tokens that the other model wrote, with 95 % bootstrap "
                "intervals over prompts; grey: controls with as many interventions; lines: both models alone"
            ),
            cross_headline(report),
            "; ".join(cross_facts(report)) + ".",
        ]
    )


def draw_cross(report: CrossReport, *, width: float) -> Figure:
    """A panel a direction; draw inside of `house_style`."""
    directions = report.directions
    figure, panels = new_panels(len(directions), width=width, panel_height=2.5)
    for axes, direction in zip(panels, directions, strict=True):
        _draw_ends(axes, report)
        for look in _LOOKS:
            _draw_curve(axes, report, direction, look)
        axes.set_title(DIRECTION_NAMES[direction])
        axes.set_xlabel("tokens switched, %")
        axes.set_xscale("symlog", linthresh=1, linscale=0.5)
        most = max((100 * p.switched_frac for p in report.points if p.direction == direction), default=1)
        ticks = [tick for tick in (0, 0.5, 1, 2, 5, 10, 20, 50, 100) if tick <= max(most * 1.15, 2)]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.set_xlim(-0.06, max(most * 1.25, 2.2))
        axes.grid(axis="y")
    panels[0].set_ylabel("accuracy")
    add_legend(figure, panels, width=width)
    return figure


def _draw_ends(axes: Axes, report: CrossReport) -> None:
    for mean, name, line in (
        (report.base_accuracy, "base", (0, (5, 2))),
        (report.tuned_accuracy, "tuned", "-"),
    ):
        if mean.value is not None:
            axes.axhline(
                mean.value, color=INK, linewidth=0.7, linestyle=line, label=f"{name} alone", zorder=1
            )


def _draw_curve(axes: Axes, report: CrossReport, direction: Direction, look: tuple[str, bool]) -> None:
    points = [
        point
        for point in _along_the_rule(report)
        if point.direction == direction and _look(point) == look and point.accuracy.value is not None
    ]
    if not points:
        return
    colour, marker, line, label = _LOOKS[look]
    # The primary model alone is where every curve begins.
    start = report.primary(direction)
    shown = [start, *points]
    places = [100 * p.switched_frac for p in shown]
    values = [p.accuracy.value or 0.0 for p in shown]
    axes.plot(places, values, color=colour, linestyle=line, linewidth=1.0, zorder=2)
    below = [_reach(p, p.accuracy.low) for p in points]
    above = [_reach(p, p.accuracy.high) for p in points]
    axes.errorbar(
        places[1:],
        values[1:],
        yerr=[below, above],
        color=colour,
        marker=marker,
        markersize=4,
        linestyle="none",
        elinewidth=0.6,
        label=label,
        zorder=3,
    )


def _along_the_rule(report: CrossReport) -> list[CrossPoint]:
    """Points from the rule that fires least to the one that fires most, controls in the order of theirs.

    Not by the share they reach: where an intervention changes how many more follow, a lower threshold can
    switch fewer tokens.
    """
    rules = {point.key: point for point in report.points}

    def place(point: CrossPoint) -> tuple[int, float]:
        rule = point if point.matches is None else rules[point.matches]
        return (rule.budget or 0, -(rule.threshold or 0.0))

    return sorted(report.points, key=place)


def _look(point: CrossPoint) -> tuple[str, bool]:
    return point.selector, point.budget is not None


def _reach(point: CrossPoint, end: float | None) -> float:
    return 0.0 if end is None or point.accuracy.value is None else abs(end - point.accuracy.value)
