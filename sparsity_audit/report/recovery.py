"""The versioned record of a recovery, and its JSON.

Contract: exact counts, fractions in [0, 1] but for shares of a gain, which may lie outside; None is
undefined, never 0. Agreement of the base with the full run stands beside that of every run, as the first run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from sparsity_audit.passes.recovery import Offender
from sparsity_audit.stats.recovery import PartRecovery
from sparsity_audit.stats.scores import Accuracy, Interval, RecoveredShare

__all__ = [
    "RECOVERY_FORMAT",
    "RECOVERY_VERSION",
    "FrozenRecord",
    "GroupRecovery",
    "LeftOutPair",
    "PartsRecord",
    "RecoveryReport",
    "RecoveryRun",
    "ScoreRecord",
    "recovery_json_schema",
    "recovery_to_json",
]

RECOVERY_FORMAT = "sparsity-audit/recovery"
RECOVERY_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PartsRecord:
    """Agreement with the full run.

    Args:
        inside: Of the entries in the mask.
        outside: Of the others; what agrees here agrees by construction.
        overall: Of all entries compared.
    """

    inside: PartRecovery
    outside: PartRecovery
    overall: PartRecovery


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRecovery:
    """Agreement within a part of the model: a layer, a module type, or a tensor."""

    key: str
    parts: PartsRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenRecord:
    """Whether entries outside a run's own mask are bit-identical to the base's.

    Args:
        mask: The mask the run was trained in; what full changed, where none was given for `sub`.
        entries: Entries outside of it.
        moved: Those among them whose stored code is not the base's.
        first: The first of those.
    """

    mask: str
    entries: int
    moved: int
    first: Offender | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRecord:
    """A task score.

    Args:
        accuracy: Share of right answers, and trials.
        interval: Wilson's.
        share: Of the full run's gain; None for base and full themselves.
        lead: Accuracy of `sub` less this one, Newcombe's interval; of controls alone.
    """

    accuracy: Accuracy
    interval: Interval
    share: RecoveredShare | None
    lead: Interval | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryRun:
    """A run against the full run.

    Args:
        label: `base`, `sub`, or the name of a control.
        role: What it is here.
        reference: Where it was read, with its revision where it has one.
        dtypes: Stored dtypes of what was compared, as people say them.
        seed: Of its training, where its configuration tells.
        precision: How the trainer kept weights between steps (`bf16`, `fp32`), where its configuration tells.
        parts: Agreement over the model.
        frozen: The check of frozen entries; None where the run has no mask of its own.
        score: Its task score; None where none was given.
        by_layer: Agreement by layer; tensors outside of layers are left out.
        by_module: By module type.
        by_tensor: By tensor.
    """

    label: str
    role: Literal["base", "sub", "control"]
    reference: str
    dtypes: tuple[str, ...]
    seed: int | None
    precision: str | None
    parts: PartsRecord
    frozen: FrozenRecord | None
    score: ScoreRecord | None
    by_layer: tuple[GroupRecovery, ...]
    by_module: tuple[GroupRecovery, ...]
    by_tensor: tuple[GroupRecovery, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOutPair:
    """A tensor that was not compared."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryReport:
    """How far retrained runs come to the full run.

    Args:
        format: `sparsity-audit/recovery`.
        version: Version of this record.
        tool: Name and version of the writer.
        base: The base.
        full: The full run.
        full_seed: Its seed, where its configuration tells.
        full_precision: How its weights were kept between steps, where its configuration tells.
        mask: The mask that inside and outside refer to; None for what full changed.
        criterion: The mask's criterion.
        view: `native` or `served`.
        compared: Entries compared.
        inside: Entries of the mask among them.
        density: inside ÷ compared.
        criteria: Keys of the criteria of agreement.
        metric: What the scores measure; None without scores.
        full_score: The full run's score.
        runs: The base, the retrained run, the controls.
        verdict: The result in words.
        warnings: What must not be concluded.
        left_out: Tensors that were not compared.
        notes: What a reader must know.
    """

    format: str = RECOVERY_FORMAT
    version: int = RECOVERY_VERSION
    tool: str
    base: str
    full: str
    full_seed: int | None
    full_precision: str | None
    mask: str | None
    criterion: str
    view: str
    compared: int
    inside: int
    density: float | None
    criteria: tuple[str, ...]
    metric: str | None
    full_score: ScoreRecord | None
    runs: tuple[RecoveryRun, ...]
    verdict: str
    warnings: tuple[str, ...]
    left_out: tuple[LeftOutPair, ...]
    notes: tuple[str, ...]

    @property
    def sub(self) -> RecoveryRun:
        """The retrained run."""
        return self.runs[1]


def recovery_to_json(report: RecoveryReport) -> bytes:
    """`recovery.json`: indented UTF-8 with a final newline."""
    return _adapter().dump_json(report, indent=1) + b"\n"


def recovery_json_schema() -> dict[str, Any]:
    """The JSON Schema of `recovery.json`."""
    schema = _adapter().json_schema(mode="serialization")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"{RECOVERY_FORMAT} {RECOVERY_VERSION}",
        **schema,
    }


def _adapter() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(RecoveryReport)
