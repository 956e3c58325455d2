"""The versioned record of a cross-sampling, and its JSON.

Contract: counts are exact integers, fractions in [0, 1] but for shares of a gap, which may lie outside; None
is undefined, never 0. Every control stands beside the point it is matched with, with the number of
interventions that it really made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from sparsity_audit.report.tokens import FailedPrompt, ModelRecord
from sparsity_audit.stats.paired import GapShare, Mean

__all__ = [
    "CROSS_FORMAT",
    "CROSS_VERSION",
    "CrossPoint",
    "CrossReport",
    "Direction",
    "Selector",
    "Unjudged",
    "cross_json_schema",
    "cross_to_json",
]

CROSS_FORMAT = "sparsity-audit/tokens-cross-sample"
CROSS_VERSION = 1

Direction = Literal["forward", "reverse"]
"""`forward`: the base writes and the tuned model takes over; `reverse`: the other way round."""

Selector = Literal["none", "js", "random", "entropy", "first"]
"""What decides where the other model takes over; `none` is the primary model alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossPoint:
    """One rule's completions of all prompts.

    Args:
        key: Its name, unique in the record.
        direction: Who writes and who takes over.
        selector: What decides where.
        asked: The setting in words: `js > 0.1`, `5 % of positions`, `1 token`; empty for none.
        matches: Key of the point whose number of interventions a control has; None for others.
        threshold: Above which the selector's signal must lie, nats; None where it has none.
        budget: Interventions of a completion at most; None for no limit.
        completions: Completions.
        tokens: Positions written.
        switched: Positions where the rule fired and the other model's draw was taken.
        changed: Those among them where that draw was another token.
        switched_frac: switched ÷ tokens.
        changed_frac: changed ÷ tokens.
        switched_per_completion: switched ÷ completions.
        spent_frac: Share of the completions that spent the whole budget; None without one.
        truncated: Completions without an end token.
        broken: Completions that ended because logits were no numbers.
        unjudged: Completions the verifier gave no score.
        accuracy: Mean score, over prompts.
        difference: Less the primary model's own, paired by prompt.
        recovered: Share of the gap from the primary model to the intervening one.
    """

    key: str
    direction: Direction
    selector: Selector
    asked: str
    matches: str | None
    threshold: float | None
    budget: int | None
    completions: int
    tokens: int
    switched: int
    changed: int
    switched_frac: float
    changed_frac: float
    switched_per_completion: float
    spent_frac: float | None
    truncated: int
    broken: int
    unjudged: int
    accuracy: Mean
    difference: Mean
    recovered: GapShare


@dataclass(frozen=True, slots=True, kw_only=True)
class Unjudged:
    """A completion without a score.

    Args:
        point: Key of its point.
        prompt: The prompt's number.
        name: The prompt's id.
        sample: Number of the completion among the prompt's.
        reason: What the verifier raised or returned.
    """

    point: str
    prompt: int
    name: str
    sample: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossReport:
    """Two models taking turns on the same prompts.

    Args:
        format: `sparsity-audit/tokens-cross-sample`.
        version: Version of this record.
        tool: Name and version of the writer.
        base: The base.
        tuned: The tuned model.
        source: Where the prompts came from.
        verifier: Who judged.
        num_prompts: Prompts that were used.
        num_samples: Completions of each.
        temperature: Of the distributions drawn from and compared.
        max_new_tokens: Limit of a completion.
        vocab_size: Ids that are compared.
        seed: Of problems, noise, controls and resamples.
        base_accuracy: The base's own mean score.
        tuned_accuracy: The tuned model's own.
        gap: tuned − base, paired by prompt.
        points: The primary models alone, then each rule with its controls.
        failed: Prompts that could not be used.
        unjudged: The first completions without a score; every point counts all of its own.
        notes: What a reader must know.
    """

    format: str = CROSS_FORMAT
    version: int = CROSS_VERSION
    tool: str
    base: ModelRecord
    tuned: ModelRecord
    source: str
    verifier: str
    num_prompts: int
    num_samples: int
    temperature: float
    max_new_tokens: int
    vocab_size: int
    seed: int
    base_accuracy: Mean
    tuned_accuracy: Mean
    gap: Mean
    points: tuple[CrossPoint, ...]
    failed: tuple[FailedPrompt, ...]
    unjudged: tuple[Unjudged, ...]
    notes: tuple[str, ...]

    @property
    def directions(self) -> tuple[Direction, ...]:
        """Directions that have a rule, in order."""
        found: dict[Direction, None] = {p.direction: None for p in self.points if p.selector != "none"}
        return tuple(found)

    def primary(self, direction: Direction) -> CrossPoint:
        """The primary model alone."""
        return next(p for p in self.points if p.direction == direction and p.selector == "none")


def cross_to_json(report: CrossReport) -> bytes:
    """`cross.json`: indented UTF-8 with a final newline."""
    return _adapter().dump_json(report, indent=1) + b"\n"


def cross_json_schema() -> dict[str, Any]:
    """The JSON Schema of `cross.json`."""
    schema = _adapter().json_schema(mode="serialization")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"{CROSS_FORMAT} {CROSS_VERSION}",
        **schema,
    }


def _adapter() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(CrossReport)
