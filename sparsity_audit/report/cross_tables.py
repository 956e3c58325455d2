"""Cross-samplings as CSV, Markdown, LaTeX and rows for a terminal, pure functions of the record.

Contract: CSV holds exact counts and floats that read back equal. Each rule stands above its controls, with
the numbers of interventions that were really made.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from sparsity_audit.report.cross import CrossPoint, CrossReport, Direction
from sparsity_audit.report.overlap_text import latex_table, markdown_table, share
from sparsity_audit.stats.paired import GapShare, Mean

__all__ = [
    "CROSS_HEAD",
    "DIRECTION_NAMES",
    "cross_csv",
    "cross_facts",
    "cross_headline",
    "cross_latex",
    "cross_markdown",
    "cross_rows",
    "interval_text",
]

DIRECTION_NAMES: dict[Direction, str] = {
    "forward": "base writes, tuned takes over",
    "reverse": "tuned writes, base takes over",
}

CROSS_HEAD = (
    *("rule", "switched", "changed", "a completion", "accuracy", "95 % interval"),
    *("share of the gap", "95 % interval"),
)

_COUNTS = (
    *("key", "direction", "selector", "asked", "matches", "threshold", "budget", "completions", "tokens"),
    *("switched", "changed", "switched_frac", "changed_frac", "switched_per_completion", "spent_frac"),
    *("truncated", "broken", "unjudged"),
)


def cross_csv(report: CrossReport) -> bytes:
    """One line a point."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    means = [f"{name}{end}" for name in ("accuracy", "difference") for end in ("", "_low", "_high")]
    writer.writerow([*_COUNTS, *means, "num_prompts", "recovered", "recovered_low", "recovered_high"])
    for point in report.points:
        ends = [(m.value, m.low, m.high) for m in (point.accuracy, point.difference)]
        found = point.recovered
        writer.writerow(
            [
                *[getattr(point, name) for name in _COUNTS],
                *[value for end in ends for value in end],
                *(point.accuracy.num_prompts, found.value, found.low, found.high),
            ]
        )
    return text.getvalue().encode()


def cross_headline(report: CrossReport) -> str:
    """The gap, and the cheapest rule that recovers most of it, in a sentence."""
    base, tuned = report.base_accuracy, report.tuned_accuracy
    text = f"Base {share(base.value)}, tuned {share(tuned.value)}"
    best = _best(report)
    if best is None or best.recovered.value is None:
        return f"{text} ({report.num_prompts} prompts × {report.num_samples})"
    return (
        f"{text}: with {100 * best.switched_frac:.1f} % of the tokens from the tuned model ({best.asked}) "
        f"the base has {100 * best.recovered.value:.0f} % of the gap"
    )


def _best(report: CrossReport) -> CrossPoint | None:
    """The forward rule with the fewest switched tokens among those that recover half of the gap or more."""
    found = [
        point
        for point in report.points
        if point.direction == "forward" and point.selector == "js" and (point.recovered.value or 0) >= 0.5
    ]
    return min(found, key=lambda point: point.switched_frac, default=None)


def cross_rows(report: CrossReport, direction: Direction) -> list[list[str]]:
    """One row a point of a direction."""
    rows = []
    for point in report.points:
        if point.direction != direction:
            continue
        name = "primary model alone" if point.selector == "none" else point.asked
        rows.append(
            [
                name if point.matches is None else f"  {name.partition(': ')[2]}",
                _percent(point.switched_frac),
                _percent(point.changed_frac),
                f"{point.switched_per_completion:.2f}",
                share(point.accuracy.value),
                interval_text(point.accuracy),
                "" if point.selector == "none" else share(point.recovered.value),
                "" if point.selector == "none" else interval_text(point.recovered),
            ]
        )
    return rows


def interval_text(found: Mean | GapShare) -> str:
    """`low to high`, or why there is none."""
    if found.low is None or found.high is None:
        reason = found.reason if isinstance(found, GapShare) else None
        return f"none: {reason}" if reason else "–"
    return f"{found.low:.3f} to {found.high:.3f}".replace("-", "−")


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def cross_facts(report: CrossReport) -> list[str]:
    """What was asked, one line a fact."""
    unjudged = f"{len(report.unjudged)} listed without a score" if report.unjudged else ""
    lines = [
        f"base {report.base.reference}, tuned {report.tuned.reference}",
        (
            f"{report.source}: {report.num_prompts} prompts × {report.num_samples}, temperature "
            f"{report.temperature:g}, at most {report.max_new_tokens} tokens, seed {report.seed}"
        ),
        f"judged by {report.verifier}",
        (
            "all points draw with the same noise; switched: the other model's draw was taken, changed: it "
            "was another token"
        ),
    ]
    return [*lines, *([unjudged] if unjudged else [])]


def cross_markdown(report: CrossReport) -> bytes:
    """`summary.md`."""
    lines = ["# Cross-sampling", "", f"**{cross_headline(report)}.**", ""]
    lines += [f"- {line}" for line in (*cross_facts(report), *report.notes)]
    lines += [f"- left out: prompt {lost.name}: {lost.reason}" for lost in report.failed]
    for direction in report.directions:
        name = DIRECTION_NAMES[direction]
        lines += ["", f"## {name[0].upper()}{name[1:]}", ""]
        lines += markdown_table(CROSS_HEAD, cross_rows(report, direction))
    if report.unjudged:
        lines += ["", "## Completions without a score", ""]
        lines += [f"- {one.point}, prompt {one.name}, {one.sample}: {one.reason}" for one in report.unjudged]
    return ("\n".join(lines) + "\n").encode()


def cross_latex(report: CrossReport) -> bytes:
    """A booktabs table with one row a point."""
    rows: list[Sequence[str]] = []
    for direction in report.directions:
        rows += [
            [f"{DIRECTION_NAMES[direction]}: {row[0].strip()}", *row[1:]]
            for row in cross_rows(report, direction)
        ]
    return latex_table("Cross-sampling. " + "; ".join(cross_facts(report)), CROSS_HEAD, rows)
