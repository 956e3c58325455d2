"""The files of a track: record, table, figure."""

from __future__ import annotations

import csv
import io
import json
import math
from typing import TYPE_CHECKING, Any

from sparsity_audit.report.style import COLOURS, FORMATS, MARKERS, WIDTHS, house_style, to_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sparsity_audit.lab.track import Track

__all__ = [
    "TRACK_FILES",
    "draw_formats",
    "draw_share_panel",
    "draw_track",
    "label_steps",
    "place_of_step",
    "render_track",
    "track_csv",
    "track_json_schema",
]

_PANEL_IN = 2.1
_MAX_LABELS = 8
_SEEN = 0.005
"""Least share of `other` at some step that is drawn; the table has it in any case."""

TRACK_FILES = (
    "track.json",
    "track.csv",
    *(f"figures/{name}.{suffix}" for name in ("track", "formats") for suffix in (*FORMATS, "txt")),
)


def render_track(track: Track) -> dict[str, bytes]:
    """Name → content; the record comes last."""
    files = {"track.csv": track_csv(track)}
    with house_style():
        for name, draw, what in (
            ("track", draw_track, "Accuracy, formats, entropy and drift at the saved steps"),
            ("formats", draw_formats, "Share and accuracy of each format at the saved steps"),
        ):
            figure = draw(track, width=WIDTHS[2])
            files |= {f"figures/{name}.{suffix}": to_bytes(figure, suffix) for suffix in FORMATS}
            files[f"figures/{name}.txt"] = f"{what}. {_facts(track)}\n".encode()
    record = json.dumps(track.to_json(), indent=1, ensure_ascii=False, allow_nan=False)
    return files | {"track.json": f"{record}\n".encode()}


def track_json_schema() -> dict[str, Any]:
    """The JSON Schema of `track.json`."""
    from pydantic import TypeAdapter

    from sparsity_audit.lab.track import TRACK_FORMAT, TRACK_VERSION, Track

    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"{TRACK_FORMAT} {TRACK_VERSION}",
        **TypeAdapter(Track).json_schema(mode="serialization"),
    }


def track_csv(track: Track) -> bytes:
    """One line a saved step; empty where a figure is not defined."""
    text = io.StringIO()
    rows = [_row(track, place) for place in range(len(track.points))]
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _row(track: Track, place: int) -> dict[str, Any]:
    point = track.points[place]
    found, drift = point.evaluation, point.evaluation.drift
    assert drift is not None, "a track is judged against its base"
    return {
        "step": point.step,
        "accuracy": found.accuracy.value,
        "accuracy_low": found.accuracy.low,
        "accuracy_high": found.accuracy.high,
        "greedy_accuracy": found.greedy_accuracy.value,
        **{f"pass_at_{k}": estimate.value for k, estimate in found.pass_at.items()},
        **{f"maj_at_{k}": estimate.value for k, estimate in found.majority_at.items()},
        "entropy_per_token": found.entropy_per_token,
        "tokens_per_completion": found.tokens_per_completion,
        "truncated_frac": found.truncated_frac,
        "kl_per_token": drift.kl_per_token,
        "kl_per_completion": drift.kl_per_completion,
        **{f"kl_to_optimum[{row.beta:g}]": row.kl for row in drift.optima},
        **{f"share_distance[{row.beta:g}]": row.share_distance for row in drift.optima},
        **{f"share_{row.format}": row.share for row in found.formats},
        **{f"accuracy_{row.format}": row.accuracy for row in found.formats},
    }


def draw_formats(track: Track, *, width: float) -> Figure:
    """Share and accuracy of each format by step, the training batches' shares behind; in `house_style`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, _PANEL_IN + 0.5))
    share, accuracy = figure.subplots(1, 2)
    draw_share_panel(share, track)
    for number, name in enumerate(_formats(track)):
        rows = [next(r for r in p.evaluation.formats if r.format == name) for p in track.points]
        shown = [math.nan if row.accuracy is None else row.accuracy for row in rows]
        _line(accuracy, track, shown, number, f"format {name}")
    _dress(accuracy, track, "accuracy within the format")
    figure.legend(*share.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def draw_track(track: Track, *, width: float) -> Figure:
    """Four panels: formats, best of k, entropy, distances; draw in `house_style`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 2 * _PANEL_IN + 0.6))
    (share, right), (entropy, distance) = figure.subplots(2, 2)
    draw_share_panel(share, track)
    share.legend(ncols=2)
    found = [point.evaluation for point in track.points]
    most = max(found[0].pass_at)
    _line(right, track, [f.accuracy.value for f in found], 0, "pass@1 at temperature 1")
    _line(right, track, [f.greedy_accuracy.value for f in found], 1, "greedy pass@1")
    if most > 1:
        _line(right, track, [f.pass_at[most].value for f in found], 2, f"pass@{most}")
        _line(right, track, [f.majority_at[most].value for f in found], 3, f"maj@{most}")
    _dress(right, track, "share of prompts")
    right.legend(ncols=2)
    _line(entropy, track, [f.entropy_per_token for f in found], 0, "entropy")
    _dress(entropy, track, "entropy, nats a token", top=None)
    drifts = [drift for f in found if (drift := f.drift) is not None]
    _line(distance, track, [drift.kl_per_completion for drift in drifts], 0, "KL(policy‖base)")
    for number, beta in enumerate(track.betas[:3]):
        kls = [next(row.kl for row in drift.optima if row.beta == beta) for drift in drifts]
        _line(distance, track, kls, number + 1, f"KL(policy‖optimum), β {beta:g}")
    _dress(distance, track, "nats a completion", top=None)
    distance.legend()
    return figure


def draw_share_panel(axes: Axes, track: Track) -> None:
    """Share of each format at the saved steps, the run's own rollouts behind as thin lines."""
    for number, name in enumerate(_formats(track)):
        axes.plot(
            [place_of_step(batch.step - 1) for batch in track.batches],
            [batch.shares.get(name, math.nan) for batch in track.batches],
            color=COLOURS[number],
            linewidth=0.5,
            alpha=0.5,
        )
        shown = [track.share(name, place=place) for place in range(len(track.points))]
        _line(axes, track, shown, number, f"format {name}")
    _dress(axes, track, "share of completions")


def _line(axes: Axes, track: Track, values: list[float], number: int, label: str) -> None:
    places = [place_of_step(point.step) for point in track.points]
    axes.plot(places, values, marker=MARKERS[number], color=COLOURS[number], label=label)


def _dress(axes: Axes, track: Track, label: str, *, top: float | None = 1.0) -> None:
    axes.set_ylabel(label)
    axes.grid(axis="y")
    if top is None:
        axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
    else:
        axes.set_ylim(-0.03 * top, 1.03 * top)
    label_steps(axes, [point.step for point in track.points])


def place_of_step(step: int) -> float:
    """Where a step stands on an axis that keeps step 0 and shows doublings alike."""
    return math.log2(step + 1)


def label_steps(axes: Axes, steps: list[int]) -> None:
    """Ticks at saved steps, without two that would touch; the last one stays."""
    shown: list[int] = []
    least = place_of_step(steps[-1]) / _MAX_LABELS
    for step in reversed(steps):
        if not shown or place_of_step(shown[-1]) - place_of_step(step) >= least:
            shown.append(step)
    axes.set_xticks([place_of_step(step) for step in shown], [str(step) for step in shown])
    axes.set_xlabel("training step")


def _formats(track: Track) -> list[str]:
    """Formats in their order; `other` only where it occurs."""
    rows = [point.evaluation.formats for point in track.points]
    return [
        row.format
        for row in rows[0]
        if row.format != "other" or any(part[-1].share >= _SEEN for part in rows)
    ]


def _facts(track: Track) -> str:
    found = track.points[0].evaluation
    lengths = ", ".join(str(length) for length in found.lengths)
    return (
        f"{track.run}; {found.task}, {lengths} digits, {found.num_prompts} prompts × {found.num_samples} "
        "samples at temperature 1, the same prompts at every step; thin lines: shares in the run's own "
        "rollouts."
    )
