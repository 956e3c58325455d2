"""The files of critical tokens of any model: record, table, summary, figure.

Contract: pure functions of the record. The figure has one point a position, ΔJ against what is at stake, and
the means of both groups with their intervals.
"""

from __future__ import annotations

import csv
import io
from dataclasses import fields
from typing import TYPE_CHECKING

from sparsity_audit.report.critical import CriticalGroup, CriticalPosition, TokensCritical, critical_to_json
from sparsity_audit.report.overlap_text import markdown_table, share
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
from sparsity_audit.stats.paired import Mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "CRITICAL_HEAD",
    "TOKENS_CRITICAL_FILES",
    "critical_facts",
    "critical_rows",
    "draw_tokens_critical",
    "interval_words",
    "render_tokens_critical",
    "top_positions",
]

TOKENS_CRITICAL_FILES = (
    *("critical.json", "critical.csv", "summary.md"),
    *(f"figures/critical.{suffix}" for suffix in (*FORMATS, "txt")),
)

CRITICAL_HEAD = (
    *("positions", "number", "ΔJ", "95 % interval", "p(token)", "kept", "another"),
    *("drop", "95 % interval", "at stake", "95 % interval"),
)
_LOOKS = {"chosen": (COLOURS[0], "o"), "random": ("#8C8C8C", "x")}
_SHOWN = 12


def render_tokens_critical(report: TokensCritical, *, figures: bool) -> dict[str, bytes]:
    """Name → content; the record comes last, so that a directory with one is complete."""
    files = {"critical.csv": _csv(report), "summary.md": _markdown(report)}
    if figures:
        with house_style():
            figure = draw_tokens_critical(report, width=WIDTHS[0])
            files |= {f"figures/critical.{suffix}": to_bytes(figure, suffix) for suffix in FORMATS}
        files["figures/critical.txt"] = (_caption(report) + "\n").encode()
    return files | {"critical.json": critical_to_json(report)}


def _csv(report: TokensCritical) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    names = [field.name for field in fields(CriticalPosition)]
    writer.writerow(names)
    writer.writerows([getattr(row, name) for name in names] for row in report.positions)
    return text.getvalue().encode()


def critical_facts(report: TokensCritical) -> list[str]:
    """What was asked, one line a fact."""
    lead = report.lead
    return [
        f"{report.model.reference}: {report.chosen_by}; {report.completions} completions",
        (
            f"{report.source}: {report.num_prompts} prompts, {report.num_completions} completions, "
            f"{report.continuations} continuations of each side, temperature {report.temperature:g}, seed "
            f"{report.seed}"
        ),
        f"judged by {report.verifier}; {report.unjudged} continuations without a score",
        (
            f"mean J {report.mean_certainty:.3f}; at stake, chosen less random: {share(lead.value)} "
            f"({interval_words(lead)})"
        ),
    ]


def critical_rows(report: TokensCritical) -> list[list[str]]:
    """One row a group."""
    return [_row(group) for group in report.groups]


def _row(group: CriticalGroup) -> list[str]:
    delta, drop = group.delta_certainty, group.drop
    scores = (group.kept_probability, group.score_kept, group.score_substituted)
    name = f"{group.name}{', critical' if group.critical else ''}"
    return [
        *(name, f"{group.positions:,}", share(delta.value), interval_words(delta)),
        *[share(mean.value) for mean in scores],
        *[text for mean in (drop, group.at_stake) for text in (share(mean.value), interval_words(mean))],
    ]


def interval_words(mean: Mean) -> str:
    """`low to high`, or a dash."""
    if mean.low is None or mean.high is None:
        return "–"
    return f"{mean.low:.3f} to {mean.high:.3f}".replace("-", "−")


def top_positions(report: TokensCritical, *, most: int) -> list[list[str]]:
    """The chosen positions of largest drop: prompt, place, text before, token, substitute, drop."""
    rows = [row for row in report.positions if row.group == "chosen" and row.drop is not None]
    rows.sort(key=lambda row: (-(row.drop or 0.0), row.prompt, row.sample, row.position))
    return [
        [r.name, str(r.position), r.before, r.token, r.substitute, share(r.delta_certainty), share(r.drop)]
        for r in rows[:most]
    ]


def _markdown(report: TokensCritical) -> bytes:
    lines = ["# Critical tokens", "", *[f"- {line}" for line in (*critical_facts(report), *report.notes)]]
    lines += [f"- left out: prompt {lost.name}, {lost.completion}: {lost.reason}" for lost in report.failed]
    lines += ["", *markdown_table(CRITICAL_HEAD, critical_rows(report)), "", "## Largest drops", ""]
    head = ("prompt", "position", "before", "token", "another", "ΔJ", "drop")
    lines += markdown_table(head, top_positions(report, most=_SHOWN))
    return ("\n".join(lines) + "\n").encode()


def _caption(report: TokensCritical) -> str:
    text = (
        "Certainty before a token, less the completion's mean (ΔJ), against what the score loses on "
        "average when the model draws it once more (at stake); large symbols: means, 95 % bootstrap intervals"
    )
    return ". ".join([text, "; ".join(critical_facts(report)) + "."])


def draw_tokens_critical(report: TokensCritical, *, width: float) -> Figure:
    """One point a position; draw inside of `house_style`."""
    figure, panels = new_panels(1, width=width, panel_height=2.4)
    axes = panels[0]
    axes.axhline(0, color=INK, linewidth=0.6)
    axes.axvline(0, color=INK, linewidth=0.6)
    for group in reversed(report.groups):
        colour, marker = _LOOKS[group.name]
        rows = [row for row in report.positions if row.group == group.name and row.at_stake is not None]
        places = [row.delta_certainty for row in rows]
        stakes = [row.at_stake or 0.0 for row in rows]
        axes.plot(places, stakes, marker, color=colour, markersize=2.5, alpha=0.35, linestyle="none")
        delta, stake = group.delta_certainty, group.at_stake
        if delta.value is None or stake.value is None:
            continue
        axes.errorbar(
            delta.value,
            stake.value,
            xerr=[[_reach(delta, delta.low)], [_reach(delta, delta.high)]],
            yerr=[[_reach(stake, stake.low)], [_reach(stake, stake.high)]],
            color=colour,
            marker="s" if group.name == "random" else "o",
            markeredgecolor=INK,
            markersize=7,
            linestyle="none",
            label=f"{group.name} positions",
            zorder=4,
        )
    axes.set_xlabel("ΔJ")
    axes.set_ylabel("at stake")
    add_legend(figure, panels, width=width)
    return figure


def _reach(mean: Mean, end: float | None) -> float:
    return 0.0 if end is None or mean.value is None else abs(end - mean.value)
