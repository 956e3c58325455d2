"""The versioned record of critical tokens of any model, and its JSON.

Contract: positions are judged in two groups, those that were asked for and as many random ones of the same
completions; intervals are over prompts. None is undefined, never 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparsity_audit.report.tokens import FailedPrompt, ModelRecord
from sparsity_audit.stats.paired import Mean

__all__ = [
    "TOKENS_CRITICAL_FORMAT",
    "TOKENS_CRITICAL_VERSION",
    "CriticalGroup",
    "CriticalPosition",
    "TokensCritical",
    "critical_json_schema",
    "critical_to_json",
]

TOKENS_CRITICAL_FORMAT = "sparsity-audit/tokens-critical"
TOKENS_CRITICAL_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticalPosition:
    """One position of one completion.

    Args:
        group: `chosen` or `random`.
        prompt: The prompt's number.
        name: The prompt's id.
        sample: Number of the completion among the prompt's.
        position: From 0.
        before: The text just before.
        token: The token that stands there.
        substitute: The token that was put in its place.
        certainty: J, in [0, 1].
        delta_certainty: ΔJ.
        kept_probability: Probability of the token that stands there.
        score_kept: Mean score after it; None where nothing was judged.
        score_substituted: Mean score after the substitute.
        drop: score_kept − score_substituted.
        at_stake: (1 − kept_probability) · drop: what the score loses on average when the model draws this
            token once more.
    """

    group: str
    prompt: int
    name: str
    sample: int
    position: int
    before: str
    token: str
    substitute: str
    certainty: float
    delta_certainty: float
    kept_probability: float
    score_kept: float | None
    score_substituted: float | None
    drop: float | None
    at_stake: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticalGroup:
    """Positions of one group; means are over prompts.

    Args:
        name: `chosen` or `random`.
        positions: Positions.
        delta_certainty: ΔJ.
        kept_probability: Probability of the tokens that stand there.
        score_kept: Score after them.
        score_substituted: Score after the substitutes.
        drop: score_kept − score_substituted, paired. A substitute that the model would hardly ever draw is a
            slip, and costs much wherever it stands.
        at_stake: (1 − kept_probability) · drop.
        critical: The interval of ΔJ lies below 0, that of the drop above `min_drop`.
    """

    name: str
    positions: int
    delta_certainty: Mean
    kept_probability: Mean
    score_kept: Mean
    score_substituted: Mean
    drop: Mean
    at_stake: Mean
    critical: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TokensCritical:
    """Forced substitution at the positions of a model's completions.

    Args:
        format: `sparsity-audit/tokens-critical`.
        version: Version of this record.
        tool: Name and version of the writer.
        model: The policy.
        source: Where the prompts came from.
        verifier: Who judged.
        chosen_by: Where the positions came from, in words.
        completions: Whose completions: `given`, `own`, or the set of a divergence.
        num_prompts: Prompts.
        num_completions: Completions.
        continuations: Continuations of each side of each position.
        temperature: Of the completions and continuations.
        min_drop: Least drop that is decisive.
        seed: Of problems, noise, substitutes and resamples.
        mean_certainty: J over all positions.
        groups: `chosen`, then `random`.
        lead: `at_stake` of the chosen less that of the random positions, paired by prompt.
        positions: All positions judged.
        unjudged: Continuations without a score.
        failed: Prompts that could not be used, and positions without another token.
        notes: What a reader must know.
    """

    format: str = TOKENS_CRITICAL_FORMAT
    version: int = TOKENS_CRITICAL_VERSION
    tool: str
    model: ModelRecord
    source: str
    verifier: str
    chosen_by: str
    completions: str
    num_prompts: int
    num_completions: int
    continuations: int
    temperature: float
    min_drop: float
    seed: int
    mean_certainty: float
    groups: tuple[CriticalGroup, ...]
    lead: Mean
    positions: tuple[CriticalPosition, ...]
    unjudged: int
    failed: tuple[FailedPrompt, ...]
    notes: tuple[str, ...]


def critical_to_json(report: TokensCritical) -> bytes:
    """`critical.json`: indented UTF-8 with a final newline."""
    return _adapter().dump_json(report, indent=1) + b"\n"


def critical_json_schema() -> dict[str, Any]:
    """The JSON Schema of `critical.json`."""
    schema = _adapter().json_schema(mode="serialization")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"{TOKENS_CRITICAL_FORMAT} {TOKENS_CRITICAL_VERSION}",
        **schema,
    }


def _adapter() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(TokensCritical)
