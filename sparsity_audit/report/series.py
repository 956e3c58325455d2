"""The versioned record of a trajectory, and its JSON.

Contract: exact counts, fractions in [0, 1]; None is undefined, never 0. Everything is as fine as the saved
steps: an entry that changed and came back between two of them counts as unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparsity_audit.stats.trajectory import TrajectoryRecord

__all__ = [
    "SERIES_FORMAT",
    "SERIES_VERSION",
    "PartTrajectory",
    "SeriesReport",
    "SeriesStep",
    "UnreadTensor",
    "series_json_schema",
    "series_to_json",
]

SERIES_FORMAT = "sparsity-audit/series"
SERIES_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SeriesStep:
    """A saved step.

    Args:
        label: What tables and figures call it: its number where the folder's name has one.
        number: The step's number; None where the folder's name has none.
        resolved: Where it was read from.
    """

    label: str
    number: int | None
    resolved: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PartTrajectory:
    """The trajectory of a part of the model.

    Args:
        key: A layer, a module type, or a tensor.
        trajectory: Its counts.
    """

    key: str
    trajectory: TrajectoryRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class UnreadTensor:
    """A tensor, or rows of one, that the steps do not compare."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SeriesReport:
    """A run along its saved steps.

    Args:
        format: `sparsity-audit/series`.
        version: Version of this record.
        tool: Name and version of the writer.
        criterion: What changed means against the base; step to step it is always `bitwise`.
        view: `native` or `served`.
        base: θ_0.
        steps: θ_1 … θ_T.
        lags: Values of k of step-to-step sparsity, in saved steps.
        overall: Over all compared entries.
        by_layer: By layer; tensors outside of layers are left out.
        by_module: By module type.
        by_tensor: By tensor.
        left_out: What was not compared.
        notes: What a reader must know.
    """

    format: str = SERIES_FORMAT
    version: int = SERIES_VERSION
    tool: str
    criterion: str
    view: str
    base: str
    steps: tuple[SeriesStep, ...]
    lags: tuple[int, ...]
    overall: TrajectoryRecord
    by_layer: tuple[PartTrajectory, ...]
    by_module: tuple[PartTrajectory, ...]
    by_tensor: tuple[PartTrajectory, ...]
    left_out: tuple[UnreadTensor, ...]
    notes: tuple[str, ...]


def series_to_json(report: SeriesReport) -> bytes:
    """`series.json`: indented UTF-8 with a final newline."""
    return _adapter().dump_json(report, indent=1) + b"\n"


def series_json_schema() -> dict[str, Any]:
    """The JSON Schema of `series.json`."""
    schema = _adapter().json_schema(mode="serialization")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"{SERIES_FORMAT} {SERIES_VERSION}",
        **schema,
    }


def _adapter() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(SeriesReport)
