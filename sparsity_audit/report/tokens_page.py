"""`tokens.html`: completions with every token coloured by divergence. Jinja is imported here.

Contract: the bytes are a function of the record, the positions and the token texts. The page loads nothing:
its policy forbids every request, and runs only the one script and style sheet whose hashes it states. Texts
come from models and are not trusted: the template escapes them, the script writes them as text. Numbers have
four significant digits.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sparsity_audit.report.page_data import script_json
from sparsity_audit.report.page_template import TEMPLATES, render_page
from sparsity_audit.report.tokens import TokensReport
from sparsity_audit.report.tokens_positions import FoundSets
from sparsity_audit.report.tokens_tables import facts, failed_lines, figure_head, figure_rows, headline
from sparsity_audit.tokens.positions import Measured, Tops

__all__ = ["render_tokens_page"]

_MAX_FAILED = 100
_COLUMNS = {
    "js": "js",
    "kb": "kl_base_tuned",
    "kt": "kl_tuned_base",
    "hb": "entropy_base",
    "ht": "entropy_tuned",
    "lb": "logprob_base",
    "lt": "logprob_tuned",
    "rb": "rank_base",
    "rt": "rank_tuned",
}


def render_tokens_page(
    report: TokensReport,
    *,
    found: FoundSets,
    scores: dict[str, list[float | None]],
    decode: Callable[[Sequence[int]], str],
) -> bytes:
    """The page, UTF-8.

    Args:
        report: The record.
        found: The sets with their positions; completions whose tops were kept are shown.
        scores: Set → 1 for a right completion, 0 for a wrong one, None where nothing judges.
        decode: Ids to text.
    """
    from markupsafe import Markup

    style, script = ((TEMPLATES / f"tokens.{kind}").read_text("utf-8") for kind in ("css", "js"))
    data = _page_data(report, found, scores, decode)
    page = render_page(
        "tokens.html.jinja",
        policy=_policy(style, script),
        style=Markup(style),  # noqa: S704  (files of this package)
        script=Markup(script),  # noqa: S704
        data=Markup(script_json(data)),  # noqa: S704  (no < > & left)
        headline=headline(report),
        facts=facts(report),
        notes=report.notes,
        head=figure_head(report),
        rows=figure_rows(report),
        num_prompts=len(data["prompts"]),
        failed=failed_lines(report, most=_MAX_FAILED),
    )
    return page.encode("utf-8", errors="xmlcharrefreplace")


def _policy(style: str, script: str) -> str:
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (script, style)]
    return (
        "default-src 'none'; base-uri 'none'; form-action 'none'; "
        f"script-src 'sha256-{hashes[0]}'; style-src 'sha256-{hashes[1]}'"
    )


def _page_data(
    report: TokensReport,
    found: FoundSets,
    scores: dict[str, list[float | None]],
    decode: Callable[[Sequence[int]], str],
) -> dict[str, Any]:
    texts = _Texts(decode)
    shown: dict[int, dict[str, Any]] = {}
    for name, places, measured in found:
        for sequence, tops in sorted(measured.tops.items()):
            completion = _completion(measured, sequence, tops, texts)
            score = scores[name][sequence]
            shown.setdefault(places[sequence][0], {})[name] = completion | {"score": score}
    prompts = [
        {"number": p.number, "name": p.name, "text": p.text, "sets": shown[p.number]}
        for p in report.prompts
        if p.number in shown
    ]
    return {"tokens": texts.found, "prompts": prompts}


class _Texts:
    """Texts of tokens, each once, by their number on the page."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode, self._numbers = decode, dict[int, int]()
        self.found: list[str] = []

    def number(self, token: int) -> int:
        if token not in self._numbers:
            self._numbers[token] = len(self.found)
            self.found.append(self._decode([token]))
        return self._numbers[token]

    def numbers(self, tokens: np.ndarray) -> list[Any]:
        """Of an array of ids of any shape."""
        return [
            self.number(t) if isinstance(t, int) else [self.number(u) for u in t] for t in tokens.tolist()
        ]


def _completion(measured: Measured, sequence: int, tops: Tops, texts: _Texts) -> dict[str, Any]:
    start, end = np.searchsorted(measured.columns["sequence"], [sequence, sequence + 1])
    part = {name: measured.columns[column][start:end] for name, column in _COLUMNS.items()}
    return {
        "t": texts.numbers(measured.columns["token"][start:end]),
        **{name: _rounded(values) for name, values in part.items()},
        "bi": texts.numbers(tops.base_ids),
        "bp": [_rounded(row) for row in tops.base_logprobs],
        "ti": texts.numbers(tops.tuned_ids),
        "tp": [_rounded(row) for row in tops.tuned_logprobs],
    }


def _rounded(values: np.ndarray) -> list[float | int | None]:
    """Four significant digits; None for what is infinite."""
    if values.dtype.kind != "f":
        return values.tolist()
    return [float(f"{value:.4g}") if np.isfinite(value) else None for value in values.tolist()]
