"""Patchings as CSV, Markdown and rows for a terminal, pure functions of the record."""

from __future__ import annotations

import csv
import io

from sparsity_audit.report.overlap_text import markdown_table, share
from sparsity_audit.report.tokens_patch import PatchReport, PatchRow
from sparsity_audit.tokens.intervals import RatioEstimate

__all__ = [
    "DIRECTION_TITLES",
    "patch_csv",
    "patch_facts",
    "patch_head",
    "patch_headline",
    "patch_markdown",
    "patch_rows",
]

DIRECTION_TITLES = {
    "add": "the base with one part of the tuned model: share of the divergence it reproduces",
    "remove": "the tuned model with one part of the base: share of the divergence it brings back",
}

_SHARES = ("js_share", "divergent_share", "argmax_share")


def patch_csv(report: PatchReport) -> bytes:
    """One line a part and direction."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    ends = [f"{name}{end}" for name in _SHARES for end in ("", "_low", "_high")]
    judged = ("accuracy", "accuracy_low", "accuracy_high", "recovered", "recovered_low", "recovered_high")
    crossed = ("take_over_switched_frac", "take_over_accuracy", "take_over_recovered")
    writer.writerow(["kind", "name", "direction", "entries", "mean_js", *ends, *judged, *crossed])
    for row in report.rows:
        shares = [getattr(row, name) for name in _SHARES]
        found, gap, over = row.accuracy, row.recovered, row.take_over
        writer.writerow(
            [
                *(row.kind, row.name, row.direction, row.entries, row.mean_js),
                *[value for one in shares for value in (one.value, one.low, one.high)],
                *((None,) * 3 if found is None else (found.value, found.low, found.high)),
                *((None,) * 3 if gap is None else (gap.value, gap.low, gap.high)),
                *(
                    (None,) * 3
                    if over is None
                    else (over.switched_frac, over.accuracy.value, over.recovered.value)
                ),
            ]
        )
    return text.getvalue().encode()


def patch_headline(report: PatchReport) -> str:
    """The layer that carries most, in a sentence."""
    layers = [
        r for r in report.rows if r.kind == "layer" and r.direction == "add" and r.js_share.value is not None
    ]
    text = f"Mean JS of base and tuned {report.mean_js:.4f} at {report.positions:,} positions"
    if not layers:
        return text
    best = max(layers, key=lambda row: row.js_share.value or 0.0)
    return f"{text}; {best.name} alone reproduces {share(best.js_share.value)} of it, more than any other"


def patch_facts(report: PatchReport) -> list[str]:
    """What was asked, one line a fact."""
    whose = {"both": "base and tuned", "base": "the base", "tuned": "the tuned model"}[report.completions]
    lines = [
        f"base {report.base.reference}, tuned {report.tuned.reference}",
        (
            f"{report.source}: {report.num_prompts} prompts, {report.num_completions} completions of "
            f"{whose}, seed {report.seed}"
        ),
        f"divergent: JS > {report.limit:g}, {report.divergent:,} of {report.positions:,} positions",
    ]
    if report.base_accuracy is not None and report.tuned_accuracy is not None:
        lines.append(
            f"judged by {report.verifier}: base {share(report.base_accuracy.value)}, tuned "
            f"{share(report.tuned_accuracy.value)}"
        )
    over = report.tuned_take_over
    if over is not None:
        lines.append(
            f"the tuned model takes over where js > {over.threshold:g}: {100 * over.switched_frac:.1f} % of "
            f"tokens, accuracy {share(over.accuracy.value)}, share of the gap {share(over.recovered.value)}"
        )
    return lines


def patch_head(report: PatchReport, direction: str) -> list[str]:
    """Head of `patch_rows`."""
    head = ["part", "entries", "share of JS", "95 % interval", "divergent tokens", "first choices"]
    if report.base_accuracy is not None:
        head += ["accuracy", "share of the gap"]
    if _is_crossed(report, direction):
        head += ["take-over: tokens", "accuracy", "share of the gap"]
    return head


def patch_rows(report: PatchReport, direction: str) -> list[list[str]]:
    """One row a part."""
    return [_cells(report, row) for row in report.rows if row.direction == direction]


def _cells(report: PatchReport, row: PatchRow) -> list[str]:
    cells = [row.name, f"{row.entries:,}", share(row.js_share.value), _interval(row.js_share)]
    cells += [share(row.divergent_share.value), share(row.argmax_share.value)]
    if report.base_accuracy is not None:
        cells.append(share(row.accuracy.value if row.accuracy is not None else None))
        cells.append(share(row.recovered.value if row.recovered is not None else None))
    if _is_crossed(report, row.direction):
        over = row.take_over
        cells += (
            ["", "", ""]
            if over is None
            else [
                f"{100 * over.switched_frac:.1f} %",
                share(over.accuracy.value),
                share(over.recovered.value),
            ]
        )
    return cells


def _is_crossed(report: PatchReport, direction: str) -> bool:
    return any(row.take_over is not None for row in report.rows if row.direction == direction)


def _interval(found: RatioEstimate) -> str:
    if found.low is None or found.high is None:
        return "–"
    return f"{found.low:.3f} to {found.high:.3f}".replace("-", "−")


def patch_markdown(report: PatchReport) -> bytes:
    """`summary.md`."""
    lines = ["# From tokens to weights", "", f"**{patch_headline(report)}.**", ""]
    lines += [f"- {line}" for line in (*patch_facts(report), *report.notes)]
    lines += [f"- left out: prompt {lost.name}: {lost.reason}" for lost in report.failed]
    for direction, title in DIRECTION_TITLES.items():
        rows = patch_rows(report, direction)
        if rows:
            lines += [
                "",
                f"## {title[0].upper()}{title[1:]}",
                "",
                *markdown_table(patch_head(report, direction), rows),
            ]
    return ("\n".join(lines) + "\n").encode()
