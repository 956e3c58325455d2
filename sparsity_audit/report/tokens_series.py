"""The versioned record of a token divergence along a run, and its JSON.

Contract: exact counts, shares in [0, 1], nats; None is undefined, never 0. Every step is scored on the same
completions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparsity_audit.report.tokens import FailedPrompt, SamplingRecord
from sparsity_audit.tokens.series import SetSeries

__all__ = [
    "TOKENS_SERIES_FORMAT",
    "TOKENS_SERIES_VERSION",
    "SeriesSet",
    "TokensSeriesReport",
    "TokensStep",
    "tokens_series_json_schema",
    "tokens_series_to_json",
]

TOKENS_SERIES_FORMAT = "sparsity-audit/tokens-series"
TOKENS_SERIES_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TokensStep:
    """A saved step.

    Args:
        label: What tables and figures call it.
        number: Its number; None where its name has none.
        reference: Where it was read from.
    """

    label: str
    number: int | None
    reference: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SeriesSet:
    """One set of completions along the steps.

    Args:
        name: `base` for the base's own samples, `tuned` for the last step's, `given` for those of the file.
        completions: Completions.
        truncated: Those without an end token.
        series: What was measured.
    """

    name: str
    completions: int
    truncated: int
    series: SetSeries


@dataclass(frozen=True, slots=True, kw_only=True)
class TokensSeriesReport:
    """How far a run's saved steps are from its base, token by token.

    Args:
        format: `sparsity-audit/tokens-series`.
        version: Version of this record.
        tool: Name and version of the writer.
        base: The base.
        steps: The saved steps, in order.
        source: Where the prompts came from.
        sampling: How completions were made.
        num_prompts: Prompts given.
        sets: Sets of completions.
        failed: What is not in the figures.
        notes: What a reader must know.
    """

    format: str = TOKENS_SERIES_FORMAT
    version: int = TOKENS_SERIES_VERSION
    tool: str
    base: str
    steps: tuple[TokensStep, ...]
    source: str
    sampling: SamplingRecord
    num_prompts: int
    sets: tuple[SeriesSet, ...]
    failed: tuple[FailedPrompt, ...]
    notes: tuple[str, ...]


def tokens_series_to_json(report: TokensSeriesReport) -> bytes:
    """`tokens-series.json`: indented UTF-8 with a final newline."""
    return _adapter().dump_json(report, indent=1) + b"\n"


def tokens_series_json_schema() -> dict[str, Any]:
    """The JSON Schema of `tokens-series.json`."""
    schema = _adapter().json_schema(mode="serialization")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"{TOKENS_SERIES_FORMAT} {TOKENS_SERIES_VERSION}",
        **schema,
    }


def _adapter() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(TokensSeriesReport)
