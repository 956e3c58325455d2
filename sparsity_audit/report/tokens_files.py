"""The files of a token divergence's output directory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from sparsity_audit.report.parquet import verify_parquet
from sparsity_audit.report.style import FORMATS
from sparsity_audit.report.tokens import TokensReport, tokens_to_json
from sparsity_audit.report.tokens_positions import FoundSets, positions_csv, positions_parquet
from sparsity_audit.report.tokens_tables import prompts_csv, tokens_markdown

__all__ = ["TOKENS_FILES", "render_tokens", "verify_positions"]

_FIGURES = ("divergence", "tokens")
TOKENS_FILES = (
    *("tokens.json", "positions.csv", "positions.parquet", "prompts.csv", "summary.md"),
    "tokens.html",
    *(f"figures/{name}.{suffix}" for name in _FIGURES for suffix in (*FORMATS, "txt")),
)


def verify_positions(*, parquet: bool) -> None:
    """Raises MissingExtraError where Parquet is asked for and pyarrow is not there: before the work."""
    if parquet:
        verify_parquet()


def render_tokens(
    report: TokensReport,
    *,
    found: FoundSets,
    scores: dict[str, list[float | None]],
    decode: Callable[[Sequence[int]], str],
    figures: bool,
    parquet: bool,
) -> Iterator[tuple[str, bytes]]:
    """(name, content) one after another; the record comes last, so that a directory with one is complete."""
    if parquet:
        yield "positions.parquet", positions_parquet(found, decode=decode)
    else:
        yield "positions.csv", positions_csv(found, decode=decode)
    yield "prompts.csv", prompts_csv(report)
    yield "summary.md", tokens_markdown(report)
    if figures:
        from sparsity_audit.report.tokens_figures import render_tokens_figures

        for name, data in render_tokens_figures(report).items():
            yield f"figures/{name}", data
    from sparsity_audit.report.tokens_page import render_tokens_page

    yield "tokens.html", render_tokens_page(report, found=found, scores=scores, decode=decode)
    yield "tokens.json", tokens_to_json(report)
