"""Figures of a run along its saved steps: areas of entries, sparsity by step, coverage of the final mask."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from sparsity_audit.report.series import SeriesReport
from sparsity_audit.report.series_tables import fact_lines, headline
from sparsity_audit.report.style import COLOURS, FORMATS, INK, MARKERS, PALE, WIDTHS, house_style, to_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_coverage", "draw_steps", "draw_trajectory", "render_series_figures"]

_HEIGHT_IN = 2.6
_MAX_LABELS = 12
_MAX_STRETCH = 4


def render_series_figures(report: SeriesReport) -> dict[str, bytes]:
    """Each figure in every format, and its caption."""
    files: dict[str, bytes] = {}
    with house_style():
        for name, draw, what in (
            ("trajectory", draw_trajectory, "Entries by what has happened to them at each saved step"),
            ("steps", draw_steps, "Update sparsity against the base, and from step to step"),
            ("coverage", draw_coverage, "The mask of each saved step beside the last one's"),
        ):
            figure = draw(report, width=WIDTHS[1])
            files |= {f"{name}.{suffix}": to_bytes(figure, suffix) for suffix in FORMATS}
            files[f"{name}.txt"] = f"{what}. {headline(report)}. {'; '.join(fact_lines(report))}.\n".encode()
    return files


def draw_trajectory(report: SeriesReport, *, width: float) -> Figure:
    """Shares of the entries: changed, changed before and back, not changed yet; draw in `house_style`."""
    figure, axes = _new(width)
    run, places = report.overall, _places(report)
    entries = max(run.entries, 1)
    changed = [step.changed / entries for step in run.steps]
    back = [(step.seen - step.changed) / entries for step in run.steps]
    rest = [1 - step.seen / entries for step in run.steps]
    axes.stackplot(
        places,
        [0.0, *changed],
        [0.0, *back],
        [1.0, *rest],
        labels=["changed", "changed before and back", "not changed so far"],
        colors=[COLOURS[0], COLOURS[4], PALE],
    )
    axes.set_ylim(0, 1)
    axes.set_ylabel("share of the entries")
    _label_steps(axes, report, with_base=True)
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def draw_steps(report: SeriesReport, *, width: float) -> Figure:
    """Update sparsity against the base and S_k by step; draw in `house_style`."""
    figure, axes = _new(width)
    places = _places(report)
    axes.plot(
        places,
        [1.0, *[_number(step.sparsity) for step in report.overall.steps]],
        marker=MARKERS[0],
        color=COLOURS[0],
        label="against the base",
    )
    for number, lag in enumerate(report.lags):
        points = [
            (place, found.sparsity)
            for place, step in zip(places[1:], report.overall.steps, strict=True)
            for found in step.lags
            if found.lag == lag and found.sparsity is not None
        ]
        axes.plot(
            [place for place, _ in points],
            [value for _, value in points],
            marker=MARKERS[1 + number % 6],
            color=COLOURS[1 + number % 6],
            linestyle="--",
            markerfacecolor="white",
            label=f"$S_{{{lag}}}$: {lag} saved step{'s' if lag > 1 else ''} back",
        )
    axes.set_ylim(-0.03, 1.03)
    axes.set_ylabel("share of equal entries")
    axes.grid(axis="y")
    _label_steps(axes, report, with_base=True)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def draw_coverage(report: SeriesReport, *, width: float) -> Figure:
    """How much of the last mask is there, and how much of each mask lasts; draw in `house_style`."""
    figure, axes = _new(width)
    places = _places(report)[1:]
    for number, (name, label) in enumerate(
        (
            ("coverage", "coverage: share of the last mask that is in it"),
            ("precision", "precision: share of it that is in the last mask"),
            ("jaccard", "Jaccard with the last mask"),
        )
    ):
        axes.plot(
            places,
            [_number(getattr(step, name)) for step in report.overall.steps],
            marker=MARKERS[number],
            color=COLOURS[number],
            label=label,
        )
    axes.set_ylim(-0.03, 1.03)
    axes.set_ylabel("share")
    axes.grid(axis="y")
    _label_steps(axes, report, with_base=False)
    figure.legend(loc="outside lower center", ncols=1)
    return figure


def _new(width: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, _HEIGHT_IN))
    return figure, figure.subplots()


def _places(report: SeriesReport) -> list[float]:
    """Places of base and steps: their numbers where these are spaced much alike, else 0, 1, 2 and so on."""
    even = [float(place) for place in range(len(report.steps) + 1)]
    numbers = [float(step.number) for step in report.steps if step.number is not None]
    gaps = [b - a for a, b in pairwise([0.0, *numbers])]
    if len(numbers) < len(report.steps) or min(gaps) <= 0 or max(gaps) > _MAX_STRETCH * min(gaps):
        return even
    return [0.0, *numbers]


def _label_steps(axes: Axes, report: SeriesReport, *, with_base: bool) -> None:
    places, labels = _places(report), ["base", *[step.label for step in report.steps]]
    if not with_base:
        places, labels = places[1:], labels[1:]
    every = -(-len(places) // _MAX_LABELS)
    shown = [number for number in range(len(places)) if number % every == 0 or number == len(places) - 1]
    axes.set_xticks([places[number] for number in shown], [labels[number] for number in shown])
    if max((len(labels[number]) for number in shown), default=0) > 6:
        axes.tick_params(axis="x", labelrotation=30)
    axes.set_xlim(places[0], places[-1] if len(places) > 1 else places[0] + 1)
    axes.set_xlabel(f"saved step ({report.criterion}, {report.view} view)", color=INK)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
