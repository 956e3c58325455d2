"""A recovery drawn: the share of the gain each run has, and how many entries it has in common with full.

Contract: a pure function of the record. Agreement is that inside the mask, with the untrained base beside
every run: what lies outside agrees by construction.
"""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from sparsity_audit.report.recovery import RecoveryReport, RecoveryRun
from sparsity_audit.report.recovery_tables import SHOWN, facts
from sparsity_audit.report.style import COLOURS, FORMATS, INK, MARKERS, PALE, WIDTHS, house_style, to_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["caption_recovery", "draw_recovery", "render_figure"]

_ROW_IN = 0.3
_MARGIN_IN = 1.05


def render_figure(report: RecoveryReport) -> dict[str, bytes]:
    """`recovery.pdf`, `.svg`, `.png` and the caption."""
    with house_style():
        figure = draw_recovery(report, width=WIDTHS[2])
        files = {f"recovery.{name}": to_bytes(figure, name) for name in FORMATS}
    return files | {"recovery.txt": (caption_recovery(report) + "\n").encode()}


def caption_recovery(report: RecoveryReport) -> str:
    """What the figure shows, as a start for the caption."""
    text = "Share of the entries inside the mask that equal the full run's, beside the untrained base"
    if report.full_score is not None:
        text = (
            f"Left: share of the full run's gain in {report.metric}, (run − base) ÷ (full − base), with "
            f"Fieller's 95 % interval. Right: {text[0].lower()}{text[1:]}"
        )
    return ". ".join([text, report.verdict, "; ".join(facts(report))]) + "."


def draw_recovery(report: RecoveryReport, *, width: float) -> Figure:
    """Recovered shares where there are scores, and agreement; draw inside of `house_style`."""
    from matplotlib.figure import Figure

    scored = [run for run in report.runs[1:] if run.score is not None]
    rows = max(len(report.runs) + 1, len(SHOWN))
    figure = Figure(figsize=(width, _ROW_IN * rows + _MARGIN_IN))
    if not scored:
        _draw_agreement(figure.subplots(), report)
    else:
        left, right = figure.subplots(1, 2, gridspec_kw={"width_ratios": (1, 1.15)})
        _draw_shares(left, scored, {run.label: n for n, run in enumerate(report.runs)})
        _draw_agreement(right, report)
    figure.legend(*figure.axes[-1].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _draw_shares(axes: Axes, runs: list[RecoveryRun], places: dict[str, int]) -> None:
    axes.axvline(0, color=PALE, linewidth=0.8, zorder=1)
    axes.axvline(1, color=INK, linewidth=0.8, zorder=1)
    for row, run in enumerate(runs):
        found = None if run.score is None else run.score.share
        if found is None or found.value is None:
            continue
        colour, marker = _look(places[run.label])
        if found.interval is not None:
            axes.hlines(row, found.interval.low, found.interval.high, color=colour, linewidth=1.4, zorder=2)
        axes.plot(found.value, row, marker, color=colour, markersize=5, zorder=3)
        axes.annotate(
            f"{found.value:.2f}".replace("-", "−"),
            (found.value, row),
            textcoords="offset points",
            xytext=(0, 5),
            ha="center",
            fontsize=6,
            color=INK,
        )
    axes.set_yticks(range(len(runs)), [textwrap.fill(run.label, 18) for run in runs])
    axes.set_ylim(len(runs) - 0.4, -0.6)
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, -0.08), max(high, 1.08))
    axes.set_xlabel("share of the full run's gain\n(0 = base, 1 = full)")
    axes.grid(axis="x")


def _draw_agreement(axes: Axes, report: RecoveryReport) -> None:
    count = len(report.runs)
    for number, run in enumerate(report.runs):
        shares = [run.parts.inside.shares[criterion] for criterion in SHOWN]
        at = [place + (number - (count - 1) / 2) * 0.6 / max(count - 1, 1) for place in range(len(SHOWN))]
        points = [(place, share) for place, share in zip(at, shares, strict=True) if share is not None]
        colour, marker = _look(number)
        is_base = run.role == "base"
        for place, share in points:
            axes.vlines(place, 0, share, color=colour, linewidth=0.9, linestyle=":" if is_base else "-")
        axes.plot(
            [place for place, _ in points],
            [share for _, share in points],
            marker,
            color=colour,
            markerfacecolor="white" if is_base else colour,
            label=run.label,
        )
    axes.set_xticks(range(len(SHOWN)), SHOWN)
    axes.set_ylim(0, 1.05)
    axes.set_ylabel("equal to the full run,\ninside the mask")
    axes.grid(axis="y")


def _look(number: int) -> tuple[str, str]:
    """Colour and marker of a run; the base, number 0, is black."""
    if number == 0:
        return COLOURS[-1], "_"
    return COLOURS[(number - 1) % (len(COLOURS) - 1)], MARKERS[(number - 1) % len(MARKERS)]
