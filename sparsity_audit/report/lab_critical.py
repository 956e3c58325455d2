"""The files of critical positions: record, table, figure."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sparsity_audit.report.lab_track import label_steps, place_of_step
from sparsity_audit.report.style import COLOURS, FORMATS, INK, MARKERS, PALE, WIDTHS, house_style, to_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sparsity_audit.lab.critical import Critical
    from sparsity_audit.lab.estimators import Estimate, Interval

__all__ = [
    "CRITICAL_FILES",
    "critical_csv",
    "critical_json_schema",
    "draw_critical",
    "error_bars",
    "render_critical",
]

CRITICAL_FILES = (
    "critical.json",
    "critical.csv",
    *(f"figures/critical.{suffix}" for suffix in (*FORMATS, "txt")),
)


def render_critical(found: Critical) -> dict[str, bytes]:
    """Name → content; the record comes last."""
    files = {"critical.csv": critical_csv(found)}
    with house_style():
        figure = draw_critical(found, width=WIDTHS[2])
        files |= {f"figures/critical.{suffix}": to_bytes(figure, suffix) for suffix in FORMATS}
    files["figures/critical.txt"] = f"{critical_caption(found)}\n".encode()
    record = json.dumps(found.to_json(), indent=1, ensure_ascii=False, allow_nan=False)
    return files | {"critical.json": f"{record}\n".encode()}


def critical_json_schema() -> dict[str, Any]:
    """The JSON Schema of `critical.json`."""
    from pydantic import TypeAdapter

    from sparsity_audit.lab.critical import CRITICAL_FORMAT, CRITICAL_VERSION, Critical

    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"{CRITICAL_FORMAT} {CRITICAL_VERSION}",
        **TypeAdapter(Critical).json_schema(mode="serialization"),
    }


def critical_csv(found: Critical) -> bytes:
    """One line a position."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    steps = [f"right_probability[{step.step}]" for step in found.steps]
    names = ("delta_certainty", "drop")
    ends = [f"{name}{end}" for name in names for end in ("", "_low", "_high")]
    writer.writerow(
        [
            *("index", "example", "num_tokens", "certainty", *ends, "accuracy_right", "accuracy_wrong"),
            *("right_probability", "critical", *steps),
        ]
    )
    for place, position in enumerate(found.positions):
        intervals = (position.delta_certainty, position.drop)
        writer.writerow(
            [position.index, position.example, position.num_tokens, position.certainty]
            + [end for part in intervals for end in (part.value, part.low, part.high)]
            + [position.accuracy_right.value, position.accuracy_wrong.value, position.right_probability]
            + [int(position.critical), *[step.by_position[place] for step in found.steps]]
        )
    return text.getvalue().encode()


def critical_caption(found: Critical) -> str:
    """What the figure shows, and under which conditions."""
    followed = "" if found.run is None else f"; run: {found.run}"
    return (
        f"Positions of a written solution of format {found.solution_format} ({found.example}): how much less "
        "certain the policy is there than on average (ΔJ, Shannon), and the accuracy after the right and "
        "after a "
        f"wrong token. Shaded positions are critical: the interval of ΔJ lies below 0 and the drop above "
        f"{found.min_drop:g}. {found.checkpoint}, {found.task}, {found.length} digits, {found.num_prompts} "
        f"prompts, 95 % intervals over prompts{followed}."
    )


def draw_critical(found: Critical, *, width: float) -> Figure:
    """ΔJ and accuracies by position, and the right token's probability by step; draw in `house_style`."""
    from matplotlib.figure import Figure

    rows = 3 if found.steps else 2
    figure = Figure(figsize=(width, 1.55 * rows + 0.4))
    panels = figure.subplots(rows, 1)
    places = [position.index for position in found.positions]
    for axes in panels[:2]:
        for index in found.critical:
            axes.axvspan(index - 0.5, index + 0.5, color=PALE, linewidth=0)
        axes.set_xlim(-0.6, len(places) - 0.4)
        axes.set_xticks(places, [_shown(p.example) for p in found.positions])
        axes.grid(axis="y")
    deltas = [position.delta_certainty for position in found.positions]
    panels[0].errorbar(
        places,
        [delta.value for delta in deltas],
        yerr=error_bars(deltas),
        color=COLOURS[0],
        marker=MARKERS[0],
        linestyle="none",
    )
    panels[0].axhline(0, color=INK, linewidth=0.6)
    panels[0].set_ylabel("ΔJ")
    for number, (name, label) in enumerate(
        (("accuracy_right", "right token forced"), ("accuracy_wrong", "wrong token forced"))
    ):
        figures = [getattr(position, name) for position in found.positions]
        panels[1].errorbar(
            places,
            [f.value for f in figures],
            yerr=error_bars(figures),
            color=COLOURS[number],
            marker=MARKERS[number],
            linestyle="none",
            label=label,
        )
    panels[1].set_ylim(-0.05, 1.05)
    panels[1].set_ylabel("accuracy")
    panels[1].set_xlabel(f"solution of the first prompt, {found.example.partition('=')[0]}")
    panels[1].legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    if found.steps:
        _draw_steps(panels[2], found)
    return figure


def error_bars(figures: Sequence[Estimate | Interval]) -> list[list[float]]:
    """Lengths downwards and upwards; an end that rounding put on the wrong side has none."""
    return [[max(0.0, f.value - f.low) for f in figures], [max(0.0, f.high - f.value) for f in figures]]


def _draw_steps(axes: Axes, found: Critical) -> None:
    steps = [step.step for step in found.steps]
    places = [place_of_step(step) for step in steps]
    for number, (name, label) in enumerate((("critical", "critical positions"), ("others", "all others"))):
        intervals = [getattr(step, name) for step in found.steps]
        if any(part is None for part in intervals):
            continue
        axes.errorbar(
            places,
            [part.value for part in intervals],
            yerr=error_bars(intervals),
            color=COLOURS[number],
            marker=MARKERS[number],
            label=label,
        )
    axes.set_ylabel("p(right token)")
    axes.grid(axis="y")
    axes.legend()
    label_steps(axes, steps)


def _shown(token: str) -> str:
    return {"<eos>": "⏎"}.get(token, token)
