"""A token series as CSV, Markdown, terminal rows and a figure: pure functions of the record."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsity_audit.report.overlap_text import digits, markdown_table, share
from sparsity_audit.report.style import COLOURS, FORMATS, MARKERS, PALE, WIDTHS, house_style, to_bytes
from sparsity_audit.report.tokens_series import SeriesSet, TokensSeriesReport, tokens_series_to_json
from sparsity_audit.report.tokens_tables import SET_NAMES
from sparsity_audit.tokens.summary import HIGH

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "TOKENS_SERIES_FILES",
    "draw_tokens_series",
    "print_tokens_series",
    "render_tokens_series",
    "tokens_series_csv",
    "tokens_series_headline",
]

TOKENS_SERIES_FILES = (
    *("tokens-series.json", "tokens-series.csv", "summary.md"),
    *(f"figures/tokens-series.{suffix}" for suffix in (*FORMATS, "txt")),
)
_COUNTS = (
    *("divergent", "shared", "jaccard", "chance_jaccard", "coverage", "jaccard_top", "chance_jaccard_top"),
)
_HEAD = (
    *("step", "mean JS", f"JS > {HIGH}", "90 %", "99 %", "divergent", "Jaccard with the last", "by chance"),
    *("coverage of the last", "Jaccard of the top 10 %", "by chance"),
)


def render_tokens_series(report: TokensSeriesReport, *, figures: bool) -> dict[str, bytes]:
    """Name → content; the record comes last, so that a directory with one is complete."""
    files = {"tokens-series.csv": tokens_series_csv(report), "summary.md": _markdown(report)}
    if figures:
        with house_style():
            figure = draw_tokens_series(report, width=WIDTHS[2])
            files |= {f"figures/tokens-series.{suffix}": to_bytes(figure, suffix) for suffix in FORMATS}
        caption = (
            "Left: mean divergence from the base and its 90 and 99 % quantiles at each saved step, "
            f"{_last_name(report)}. Middle: share of positions with JS > {HIGH}, 95 % intervals. "
            "Right: Jaccard index of the most divergent tenth of the positions with that of the last "
            f"step, and, dashed, of those with JS > {HIGH}; grey: two tenths by chance."
        )
        about = "; ".join(_facts(report))
        files["figures/tokens-series.txt"] = (
            f"{caption} {tokens_series_headline(report)}. {about}.\n".encode()
        )
    return files | {"tokens-series.json": tokens_series_to_json(report)}


def tokens_series_headline(report: TokensSeriesReport) -> str:
    """How it grew, in one sentence."""
    one = report.sets[-1]
    steps = one.series.steps
    grows = "never falls" if one.series.mean_grows else "does not only grow"
    kept = "" if one.series.monotone is None else (
        f"; of the {steps[-1].divergent:,} positions that end above {HIGH}, a share of "
        f"{share(one.series.monotone)} never moves back"
    )  # fmt: skip
    return (
        f"on {SET_NAMES[one.name]} the share of positions with JS > {HIGH} goes from "
        f"{share(steps[0].above.value)} at {report.steps[0].label} to {share(steps[-1].above.value)} at "
        f"{report.steps[-1].label}; the mean {grows} between saved steps{kept}"
    )


def _facts(report: TokensSeriesReport) -> list[str]:
    sampling = report.sampling
    how = "given completions"
    if sampling.num_samples is not None:
        how = f"{sampling.num_samples} a prompt of base and last step, temperature {sampling.temperature:g}"
    return [
        f"base {report.base}, {len(report.steps)} saved steps",
        f"{report.num_prompts:,} prompts ({report.source}); completions: {how}, seed {sampling.seed}",
        *report.notes,
    ]


def _last_name(report: TokensSeriesReport) -> str:
    return SET_NAMES[report.sets[-1].name].replace("tuned", "the last step")


def _rows(report: TokensSeriesReport, one: SeriesSet) -> list[list[str]]:
    rows = []
    for step, found in zip(report.steps, one.series.steps, strict=True):
        span = "" if found.above.low is None else f" ({share(found.above.low)} to {share(found.above.high)})"
        rows.append(
            [
                step.label,
                digits(found.mean_js.value),
                f"{share(found.above.value)}{span}",
                digits(found.js_percentiles[90]),
                digits(found.js_percentiles[99]),
                f"{found.divergent:,}",
                share(found.jaccard),
                share(found.chance_jaccard),
                share(found.coverage),
                share(found.jaccard_top),
                share(found.chance_jaccard_top),
            ]
        )
    return rows


def tokens_series_csv(report: TokensSeriesReport) -> bytes:
    """One line a set and saved step."""
    text = io.StringIO()
    lines = [_line(report, one, n) for one in report.sets for n in range(len(report.steps))]
    writer = csv.DictWriter(text, fieldnames=list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue().encode()


def _line(report: TokensSeriesReport, one: SeriesSet, number: int) -> dict[str, Any]:
    found = one.series.steps[number]
    spans = {"mean_js": found.mean_js, "above": found.above, "below": found.below}
    return {
        "set": one.name,
        "step": report.steps[number].label,
        "positions": one.series.positions,
        **{
            name + part: value
            for name, span in spans.items()
            for part, value in (("", span.value), ("_low", span.low), ("_high", span.high))
        },
        **{f"js_p{percentile}": value for percentile, value in found.js_percentiles.items()},
        **{name: getattr(found, name) for name in _COUNTS},
    }


def _markdown(report: TokensSeriesReport) -> bytes:
    lines = ["# Divergence along the run", "", f"**{tokens_series_headline(report)}.**", ""]
    lines += [f"- {line}" for line in _facts(report)]
    for one in report.sets:
        lines += ["", f"## On {SET_NAMES[one.name]}", ""]
        lines += [f"{one.completions:,} completions, {one.series.positions:,} positions.", ""]
        lines += markdown_table(_HEAD, _rows(report, one))
    if report.failed:
        lines += ["", "## Not in the figures", ""]
        lines += [f"- prompt {f.name}, {f.completion or 'whole'}: {f.reason}" for f in report.failed[:200]]
    return ("\n".join(lines) + "\n").encode()


def print_tokens_series(report: TokensSeriesReport, *, output: Path | None) -> None:
    """Print the record to stdout."""
    from sparsity_audit.report.overlap_terminal import new_console, print_table, say

    console = new_console()
    say(console, f"{tokens_series_headline(report)}.\n", style="bold")
    for one in report.sets:
        say(console, f"on {SET_NAMES[one.name]}, {one.series.positions:,} positions", style="bold")
        print_table(console, _HEAD, _rows(report, one))
        console.print()
    for line in (*_facts(report), *([f"{len(report.failed):,} not in the figures"] if report.failed else [])):
        say(console, f"• {line}")
    if output is not None:
        say(console, f"record, table and figure written to {output}")


def draw_tokens_series(report: TokensSeriesReport, *, width: float) -> Figure:
    """Growth, share of divergent positions, overlap with the last set; draw in `house_style`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 2.5))
    panels = figure.subplots(1, 3)
    places = list(range(len(report.steps)))
    for number, one in enumerate(report.sets):
        _draw_set(panels, one, places, number)
    last = report.sets[-1].series.steps
    for number, (label, values) in enumerate(
        (
            ("mean", [step.mean_js.value or 0.0 for step in last]),
            ("90 %", [step.js_percentiles[90] for step in last]),
            ("99 %", [step.js_percentiles[99] for step in last]),
        )
    ):
        panels[0].plot(
            places,
            [value or float("nan") for value in values],
            color=COLOURS[number + 2],
            marker=MARKERS[number + 2],
            label=label,
        )
    titles = ("JS (nats)", f"share with JS > {HIGH}", "Jaccard with the last step")
    for axes, title in zip(panels, titles, strict=True):
        _finish(axes, report, places, title)
    panels[0].set_yscale("log")
    for axes in panels[1:]:
        axes.set_ylim(0, None)
    panels[0].legend(loc="upper left")
    figure.legend(*panels[1].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _draw_set(panels: Any, one: SeriesSet, places: list[int], number: int) -> None:
    steps = one.series.steps
    look: dict[str, Any] = {"color": COLOURS[number], "marker": MARKERS[number]}
    panels[1].plot(places, [step.above.value for step in steps], label=SET_NAMES[one.name], **look)
    lows, highs = ([getattr(step.above, end) for step in steps] for end in ("low", "high"))
    if None not in lows:
        panels[1].fill_between(places, lows, highs, color=COLOURS[number], alpha=0.2, linewidth=0)
    panels[2].plot(places, [_or_nan(step.jaccard_top) for step in steps], **look)
    panels[2].plot(places, [_or_nan(step.jaccard) for step in steps], color=COLOURS[number], linestyle="--")
    panels[2].axhline(steps[-1].chance_jaccard_top, color=PALE, zorder=1)


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value


def _finish(axes: Axes, report: TokensSeriesReport, places: list[int], title: str) -> None:
    labels = [str(step.label if step.number is None else step.number) for step in report.steps]
    every = max(1, len(labels) // 6)
    axes.set_xticks(places[::every], labels[::every])
    axes.set_xlabel("saved step")
    axes.set_ylabel(title)
    axes.grid(axis="y")
