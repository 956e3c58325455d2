"""The versioned record of a token divergence, and its JSON.

Contract: exact counts, shares in [0, 1], nats; None is undefined, never 0. What is not in the figures (failed
prompts and completions) is listed with its reason; completions that the limit cut are counted and are in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparsity_audit.tokens.shifted import PromptRow, ShiftedPosition, ShiftedToken
from sparsity_audit.tokens.summary import SetSummary

__all__ = [
    "TOKENS_FORMAT",
    "TOKENS_VERSION",
    "FailedPrompt",
    "ModelRecord",
    "PromptRecord",
    "SamplingRecord",
    "SetRecord",
    "TokensReport",
    "VocabularyRecord",
    "tokens_json_schema",
    "tokens_to_json",
]

TOKENS_FORMAT = "sparsity-audit/tokens"
TOKENS_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRecord:
    """A model of the comparison.

    Args:
        reference: What it was loaded from.
        loader: `lab` or `transformers`.
        dtype: Of its weights and arithmetic; `auto` is as stored.
        device: Where it ran.
        context_tokens: Longest sequence it takes; None where nothing says.
    """

    reference: str
    loader: str
    dtype: str
    device: str
    context_tokens: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabularyRecord:
    """The ids that are compared.

    Args:
        size: Ids from 0 that both have; distributions are renormalised over them.
        base_size: Width of the base's logits.
        tuned_size: Width of the tuned model's.
    """

    size: int
    base_size: int
    tuned_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingRecord:
    """How completions were made, and what was measured on them.

    Args:
        num_samples: Of each prompt and model; None where completions were given.
        temperature: Of the sampling alone: distributions are compared at temperature 1.
        max_new_tokens: Limit of a completion.
        seed: Of problems, noise and resamples.
        top_k: Of the overlap of the most probable tokens.
        top_p: Nucleus of the truncated JS; None for none.
    """

    num_samples: int | None
    temperature: float
    max_new_tokens: int
    seed: int
    top_k: int
    top_p: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedPrompt:
    """A prompt, or one completion of it, that is not in the figures.

    Args:
        prompt: Number of the prompt.
        name: Its name.
        completion: Which set and completion, as `tuned sample 3`; empty for the whole prompt.
        reason: Why.
    """

    prompt: int
    name: str
    completion: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRecord:
    """A prompt, and its row in each set that has it.

    Args:
        number: Its place among those given.
        name: Its name.
        text: Its text, special tokens included.
    """

    number: int
    name: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SetRecord:
    """One set of completions, scored by both models.

    Args:
        name: `base` or `tuned` for a model's own samples, `given` for those of the file.
        truncated: Completions that the limit or the context cut: without an end token.
        accuracy: Share of right completions, where a task judges them.
        summary: Of its positions.
        shifted_positions: The most divergent ones, one a completion.
        shifted_tokens: The tokens that hold most of the divergence.
        by_prompt: One row a prompt.
    """

    name: str
    truncated: int
    accuracy: float | None
    summary: SetSummary
    shifted_positions: tuple[ShiftedPosition, ...]
    shifted_tokens: tuple[ShiftedToken, ...]
    by_prompt: tuple[PromptRow, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokensReport:
    """Where two models' next-token distributions differ.

    Args:
        format: `sparsity-audit/tokens`.
        version: Version of this record.
        tool: Name and version of the writer.
        base: The base.
        tuned: The tuned model.
        source: Where the prompts came from.
        vocabulary: The ids that are compared.
        sampling: How completions were made.
        num_prompts: Prompts given.
        prompts: Those that could be used.
        sets: Sets of completions, the base's own samples first.
        failed: What is not in the figures.
        notes: What a reader must know.
    """

    format: str = TOKENS_FORMAT
    version: int = TOKENS_VERSION
    tool: str
    base: ModelRecord
    tuned: ModelRecord
    source: str
    vocabulary: VocabularyRecord
    sampling: SamplingRecord
    num_prompts: int
    prompts: tuple[PromptRecord, ...]
    sets: tuple[SetRecord, ...]
    failed: tuple[FailedPrompt, ...]
    notes: tuple[str, ...]


def tokens_to_json(report: TokensReport) -> bytes:
    """`tokens.json`: indented UTF-8 with a final newline."""
    return _adapter().dump_json(report, indent=1) + b"\n"


def tokens_json_schema() -> dict[str, Any]:
    """The JSON Schema of `tokens.json`."""
    schema = _adapter().json_schema(mode="serialization")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"{TOKENS_FORMAT} {TOKENS_VERSION}",
        **schema,
    }


def _adapter() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(TokensReport)
