"""The versioned record of patching: which parts of an update carry the divergent tokens, and its JSON.

Contract: shares are of the divergence between base and tuned on the same completions; a share may lie outside
[0, 1], since a part alone can also lead away. None is undefined or not measured, never 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from sparsity_audit.report.tokens import FailedPrompt, ModelRecord
from sparsity_audit.stats.paired import GapShare, Mean
from sparsity_audit.tokens.intervals import RatioEstimate

__all__ = [
    "PATCH_FORMAT",
    "PATCH_VERSION",
    "PatchDirection",
    "PatchReport",
    "PatchRow",
    "TakeOver",
    "patch_json_schema",
    "patch_to_json",
]

PATCH_FORMAT = "sparsity-audit/tokens-patch"
PATCH_VERSION = 1

PatchDirection = Literal["add", "remove"]
"""`add`: the base with the part from the tuned model; `remove`: the tuned model with it from the base."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TakeOver:
    """A cross-sampling in which a patched model takes over from the base.

    Args:
        threshold: Of the JS between base and patched model, nats.
        switched_frac: Share of tokens the patched model wrote.
        accuracy: Mean score.
        recovered: Share of the gap from base to tuned.
    """

    threshold: float
    switched_frac: float
    accuracy: Mean
    recovered: GapShare


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchRow:
    """One part, added or removed.

    Args:
        kind: `layer`, `module`, `mask`, or `update` for a model that holds a part of the update.
        name: The part.
        direction: See `PatchDirection`.
        entries: Entries of the part.
        mean_js: Mean JS to the tuned model with the patch, nats.
        js_share: Added: 1 − JS to tuned with the patch ÷ without it, the share it reproduces. Removed: JS to
            tuned ÷ JS of base to tuned, the share of the divergence it brings back.
        divergent_share: Of the positions where base and tuned diverge (JS above the limit): added, the share
            that no longer does; removed, the share that does.
        argmax_share: Of the positions where base and tuned differ in their first choice: added, the share
            with the tuned model's; removed, the share without it.
        accuracy: Mean score of the patched model's own completions; None where nothing judged.
        recovered: Share of the gap from base to tuned that it has; None as above.
        take_over: Cross-sampling with the patched model in the tuned one's place; None where not asked for.
    """

    kind: str
    name: str
    direction: PatchDirection
    entries: int
    mean_js: float
    js_share: RatioEstimate
    divergent_share: RatioEstimate
    argmax_share: RatioEstimate
    accuracy: Mean | None
    recovered: GapShare | None
    take_over: TakeOver | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchReport:
    """From tokens to weights.

    Args:
        format: `sparsity-audit/tokens-patch`.
        version: Version of this record.
        tool: Name and version of the writer.
        base: The base.
        tuned: The tuned model.
        source: Where the prompts came from.
        verifier: Who judged; None where nobody did.
        completions: Whose completions the divergence is measured on.
        num_prompts: Prompts.
        num_completions: Completions.
        positions: Positions.
        limit: JS above which a position is divergent, nats.
        divergent: Positions where base and tuned are.
        mean_js: Mean JS of base and tuned.
        seed: Of problems, noise and resamples.
        base_accuracy: The base's own; None where nothing judged.
        tuned_accuracy: The tuned model's own.
        tuned_take_over: Cross-sampling with the tuned model itself; None where not asked for.
        rows: The parts.
        failed: What could not be used.
        notes: What a reader must know.
    """

    format: str = PATCH_FORMAT
    version: int = PATCH_VERSION
    tool: str
    base: ModelRecord
    tuned: ModelRecord
    source: str
    verifier: str | None
    completions: str
    num_prompts: int
    num_completions: int
    positions: int
    limit: float
    divergent: int
    mean_js: float
    seed: int
    base_accuracy: Mean | None
    tuned_accuracy: Mean | None
    tuned_take_over: TakeOver | None
    rows: tuple[PatchRow, ...]
    failed: tuple[FailedPrompt, ...]
    notes: tuple[str, ...]


def patch_to_json(report: PatchReport) -> bytes:
    """`patch.json`: indented UTF-8 with a final newline."""
    return _adapter().dump_json(report, indent=1) + b"\n"


def patch_json_schema() -> dict[str, Any]:
    """The JSON Schema of `patch.json`."""
    schema = _adapter().json_schema(mode="serialization")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"{PATCH_FORMAT} {PATCH_VERSION}",
        **schema,
    }


def _adapter() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(PatchReport)
