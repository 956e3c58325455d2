"""The versioned record of a retraining, `retrain.json`: its runs, how their rates were chosen, the verdict.

Contract: a function of the question alone: the same call gives the same bytes, interrupted or not. Paths of
what was made are relative to the output directory. None is undefined or not asked for, never 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from sparsity_audit.stats.scores import Accuracy, RecoveredShare

__all__ = [
    "RETRAIN_FILE",
    "RETRAIN_FORMAT",
    "RETRAIN_VERSION",
    "ProofRecord",
    "RetrainReport",
    "RetrainedRun",
    "TriedRate",
    "retrain_json_schema",
    "retrain_to_json",
]

RETRAIN_FORMAT = "sparsity-audit/retrain"
RETRAIN_VERSION = 1
RETRAIN_FILE = "retrain.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class TriedRate:
    """One learning rate a run was trained at.

    Args:
        multiple: Of the full run's rate.
        lr: The rate.
        folder: The training run's folder.
        validation: Accuracy on the validation prompts; None where there was nothing to choose.
        failure: Why this run ended early; None where it did not.
    """

    multiple: float
    lr: float
    folder: str
    validation: Accuracy | None
    failure: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProofRecord:
    """Entries outside the mask that were compared with the base, bit for bit, and found equal."""

    num_tensors: int
    num_frozen: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrainedRun:
    """A run that was trained here: the subnetwork, or a control.

    Args:
        label: `sub`, or the control's name.
        kind: `sub`, or the kind of control.
        meaning: What it is, in words.
        mask: Where its mask lies; None of a full run.
        selected: Entries of the mask.
        density: selected ÷ entries compared.
        seed: Of its training.
        lr: The learning rate that was chosen; None where every one failed.
        folder: The chosen run's folder; None where every rate failed.
        rates: All that was tried, ascending.
        proof: That what is frozen kept its bits; None of a full run.
        score: Accuracy on the test prompts; None where nobody says how to score.
        share: Of the full run's gain; None without scores or without a full run.
    """

    label: str
    kind: Literal["sub", "random", "magnitude", "complement", "other", "seed", "layer"]
    meaning: str
    mask: str | None
    selected: int | None
    density: float | None
    seed: int
    lr: float | None
    folder: str | None
    rates: tuple[TriedRate, ...]
    proof: ProofRecord | None
    score: Accuracy | None
    share: RecoveredShare | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrainReport:
    """A retraining.

    Args:
        format: `sparsity-audit/retrain`.
        version: Version of this record.
        tool: Name and version of the writer.
        trainer: `lab`, or TRL's `sft`, `dpo` or `grpo`.
        base: What training started from.
        full: The full run that is repeated; None where none was given.
        mask: The mask as it was given.
        criterion: The mask's criterion.
        full_seed: The full run's seed, where it is known.
        full_lr: The learning rate that multiples refer to.
        metric: What the scores measure; None without scores.
        base_score: The base's.
        full_score: The full run's.
        runs: The subnetwork first, then the controls.
        verdict: The result in words.
        warnings: What must not be concluded.
        notes: What a reader must know.
    """

    format: str = RETRAIN_FORMAT
    version: int = RETRAIN_VERSION
    tool: str
    trainer: str
    base: str
    full: str | None
    mask: str
    criterion: str
    full_seed: int | None
    full_lr: float
    metric: str | None
    base_score: Accuracy | None
    full_score: Accuracy | None
    runs: tuple[RetrainedRun, ...]
    verdict: str
    warnings: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def sub(self) -> RetrainedRun:
        """The retrained subnetwork."""
        return self.runs[0]

    def run(self, label: str) -> RetrainedRun:
        """The run of a label. Raises KeyError."""
        for run in self.runs:
            if run.label == label:
                return run
        raise KeyError(label)


def retrain_to_json(report: RetrainReport) -> bytes:
    """`retrain.json`: indented UTF-8 with a final newline."""
    return _adapter().dump_json(report, indent=1) + b"\n"


def retrain_json_schema() -> dict[str, Any]:
    """The JSON Schema of `retrain.json`."""
    schema = _adapter().json_schema(mode="serialization")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"{RETRAIN_FORMAT} {RETRAIN_VERSION}",
        **schema,
    }


def _adapter() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(RetrainReport)
