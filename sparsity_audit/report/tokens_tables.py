"""A token divergence as CSV, Markdown and rows for a terminal, pure functions of the record.

Contract: sets of completions stand side by side. Intervals are 95 %, over prompts. Token texts are shown with
`⏎` for a line break and `␣` for a space that is a token's end, so that no table is torn by them.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import asdict

from sparsity_audit.report.overlap_text import digits, markdown_table, share
from sparsity_audit.report.tokens import SetRecord, TokensReport
from sparsity_audit.tokens.intervals import RatioEstimate
from sparsity_audit.tokens.summary import HIGH, LOW, NEW_TOKEN, SetSummary

__all__ = [
    "SET_NAMES",
    "TOKEN_HEAD",
    "facts",
    "failed_lines",
    "figure_head",
    "figure_rows",
    "headline",
    "prompts_csv",
    "shifted_head",
    "shifted_rows",
    "shown",
    "token_rows",
    "tokens_markdown",
]

SET_NAMES = {"base": "base's samples", "tuned": "tuned's samples", "given": "given completions"}
TOKEN_HEAD = ("token", "positions", "mean JS", "share of JS", f"JS > {HIGH}", "Δ log p")
_SHORT = 60

_SHARES: tuple[tuple[str, Callable[[SetSummary], RatioEstimate | None]], ...] = (
    (f"JS > {HIGH}", lambda s: s.above),
    (f"JS < {LOW}", lambda s: s.below),
    (f"JS > {HIGH} within the nucleus", lambda s: s.above_nucleus),
    ("share of all JS in the top 10 %", lambda s: s.concentration),
    ("same first choice", lambda s: s.argmax_agreement),
    ("overlap of the top k", lambda s: s.top_k_overlap),
    (f"where JS > {HIGH}: same first choice", lambda s: s.choices_above.same),
    (f"where JS > {HIGH}: in the base's top 3", lambda s: s.choices_above.in_top_3),
    (f"where JS > {HIGH}: in the base's top 10", lambda s: s.choices_above.in_top_10),
    (f"where JS > {HIGH}: new (p < {NEW_TOKEN})", lambda s: s.choices_above.new),
)
_NATS: tuple[tuple[str, Callable[[SetSummary], RatioEstimate | None]], ...] = (
    ("mean JS", lambda s: s.mean_js),
    ("mean KL(base‖tuned)", lambda s: s.kl_base_tuned),
    ("mean KL(tuned‖base)", lambda s: s.kl_tuned_base),
    ("mean entropy, base", lambda s: s.entropy_base),
    ("mean entropy, tuned", lambda s: s.entropy_tuned),
    ("mean Δ log p of the token", lambda s: s.delta_logprob),
)


def headline(report: TokensReport) -> str:
    """Where the models differ, in one sentence."""
    parts = []
    for one in report.sets:
        above = one.summary.above
        span = "" if above.low is None else f" ({share(above.low)} to {share(above.high)})"
        parts.append(f"{share(above.value)}{span} of {one.summary.positions:,} on {SET_NAMES[one.name]}")
    return f"JS > {HIGH} at a share of positions: {', '.join(parts)}"


def facts(report: TokensReport) -> list[str]:
    """What was compared and how."""
    sampling = report.sampling
    how = "given completions"
    if sampling.num_samples is not None:
        how = (
            f"{sampling.num_samples} a prompt and model at temperature {sampling.temperature:g}, "
            f"at most {sampling.max_new_tokens:,} tokens, seed {sampling.seed}"
        )
    used = f"{len(report.prompts):,} of {report.num_prompts:,} prompts used ({report.source})"
    both = report.base, report.tuned
    ran = " and ".join(dict.fromkeys(f"{m.loader}, {m.dtype}, {m.device}" for m in both))
    cut = "full vocabulary" if sampling.top_p is None else f"full vocabulary, and top-p {sampling.top_p:g}"
    return [
        f"base {report.base.reference}, tuned {report.tuned.reference} ({ran})",
        f"{used}; completions: {how}",
        f"{cut} of {report.vocabulary.size:,} tokens, nats, at temperature 1; top k = {sampling.top_k}",
    ]


def failed_lines(report: TokensReport, *, most: int) -> list[str]:
    """What is not in the figures."""
    lines = [
        f"not in the figures: prompt {f.name}{', ' + f.completion if f.completion else ''}: {f.reason}"
        for f in report.failed[:most]
    ]
    if len(report.failed) > most:
        lines.append(f"… and {len(report.failed) - most:,} more, all in tokens.json")
    return lines


def figure_head(report: TokensReport) -> list[str]:
    """Head of `figure_rows`."""
    return ["figure", *[SET_NAMES[one.name] for one in report.sets]]


def figure_rows(report: TokensReport) -> list[list[str]]:
    """One row a figure, one column a set."""
    sets = report.sets
    rows = [
        ["prompts", *[f"{s.summary.prompts:,}" for s in sets]],
        ["completions", *[f"{s.summary.sequences:,}" for s in sets]],
        ["… without an end token", *[f"{s.truncated:,}" for s in sets]],
        ["positions", *[f"{s.summary.positions:,}" for s in sets]],
    ]
    if any(s.accuracy is not None for s in sets):
        rows.append(["accuracy", *[share(s.accuracy) for s in sets]])
    for group, text in ((_SHARES, share), (_NATS, digits)):
        for name, of in group:
            cells = [of(s.summary) for s in sets]
            if any(cell is not None for cell in cells):
                rows.append([name, *["–" if cell is None else _estimate(cell, text) for cell in cells]])
    for percentile in sets[0].summary.js_percentiles:
        name = "largest JS" if percentile == 100 else f"JS, {percentile} % quantile"
        rows.append([name, *[digits(s.summary.js_percentiles[percentile]) for s in sets]])
    if any(s.summary.infinite_kl for s in sets):
        rows.append(["positions with an infinite KL", *[f"{s.summary.infinite_kl:,}" for s in sets]])
    return rows


def _estimate(found: RatioEstimate, text: Callable[[float | None], str]) -> str:
    if found.low is None:
        return text(found.value)
    return f"{text(found.value)} ({text(found.low)} to {text(found.high)})"


def shown(text: str) -> str:
    """A token or context on one line, its outer spaces visible."""
    body = text.replace("\n", "⏎").replace("\r", "").replace("\t", "⇥")
    inner = body.strip(" ")
    start = len(body) - len(body.lstrip(" "))
    return "␣" * len(body) if not inner else "␣" * start + inner + "␣" * (len(body) - start - len(inner))


def shifted_head() -> list[str]:
    """Head of `shifted_rows`."""
    return ["prompt", "at", "JS", "Δ log p", "base's choice", "tuned's choice", "its base rank", "context"]


def shifted_rows(one: SetRecord, *, most: int) -> list[list[str]]:
    """The most divergent positions; the token that stands there is between «»."""
    return [
        [
            str(p.prompt),
            str(p.position),
            digits(p.js),
            digits(p.delta_logprob),
            shown(p.base_choice),
            shown(p.tuned_choice),
            f"{p.tuned_choice_rank:,}",
            f"{shown(p.before)[-_SHORT:]}«{shown(p.token)}»{shown(p.after)[: _SHORT // 3]}",
        ]
        for p in one.shifted_positions[:most]
    ]


def token_rows(one: SetRecord, *, most: int) -> list[list[str]]:
    """The tokens that hold most of the divergence."""
    return [
        [
            shown(t.token),
            f"{t.positions:,}",
            digits(t.mean_js),
            share(t.js_share),
            share(t.above),
            digits(t.delta_logprob),
        ]
        for t in one.shifted_tokens[:most]
    ]


def prompts_csv(report: TokensReport) -> bytes:
    """One line a prompt and set."""
    text = io.StringIO()
    names = {prompt.number: prompt.name for prompt in report.prompts}
    head = ["set", "name", *asdict(report.sets[0].by_prompt[0])]
    writer = csv.DictWriter(text, fieldnames=head, lineterminator="\n")
    writer.writeheader()
    for one in report.sets:
        for row in one.by_prompt:
            writer.writerow({"set": one.name, "name": names[row.prompt], **asdict(row)})
    return text.getvalue().encode()


def tokens_markdown(report: TokensReport) -> bytes:
    """`summary.md`: headline, figures of all sets, tokens and positions that moved, what is missing."""
    lines = ["# Which tokens changed", "", f"**{headline(report)}.**", ""]
    lines += [f"- {line}" for line in (*facts(report), *report.notes)]
    lines += ["", *markdown_table(figure_head(report), figure_rows(report)), ""]
    for one in report.sets:
        lines += [f"## Tokens that hold the divergence: {SET_NAMES[one.name]}", ""]
        lines += [*_table(TOKEN_HEAD, token_rows(one, most=20)), ""]
        lines += [f"## Most divergent positions, one a completion: {SET_NAMES[one.name]}", ""]
        lines += [*_table(shifted_head(), shifted_rows(one, most=20)), ""]
    if report.failed:
        lines += ["## Not in the figures", ""]
        lines += [f"- {line}" for line in failed_lines(report, most=200)]
    return ("\n".join(lines).rstrip() + "\n").encode()


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table whose cells come from models: what Markdown or HTML would read is escaped."""
    unsafe = str.maketrans({c: f"\\{c}" for c in "\\`*_[]#~"} | {"<": "&lt;", ">": "&gt;"})
    return markdown_table(head, [[cell.translate(unsafe) for cell in row] for row in rows])
