"""A measurement of a study as a file with its question beside it, and what studies read out of a diff.

Contract: a result whose file holds the same question, asked by the same version of the tool, is not measured
again. A file appears complete or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparsity_audit.api.study_plan import Job
from sparsity_audit.masks.metadata import tool_name
from sparsity_audit.report.output import write_below
from sparsity_audit.report.schema import DiffReport
from sparsity_audit.types import View

__all__ = ["half_ulp_of", "has_result", "keep_result", "sparsity_of", "stored_result"]


def keep_result(folder: Path, job: Job, kind: type, measure: Callable[..., Any]) -> None:
    """Measure and keep, unless the answer is there.

    Args:
        folder: The study's folder.
        job: Its settings are the question, and the arguments of `measure` behind the folder.
        kind: Type of the result.
        measure: Does it.
    """
    if has_result(folder, job):
        return
    result = _adapter(kind).dump_python(measure(folder, **job.asked), mode="json")
    found = {"asked": _question(job), "result": result}
    text = json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False)
    write_below(folder, f"measured/{job.name}.json", f"{text}\n".encode())


def has_result(folder: Path, job: Job) -> bool:
    """Whether the answer to this job's question is there."""
    path = folder / "measured" / f"{job.name}.json"
    return path.exists() and json.loads(path.read_bytes())["asked"] == _question(job)


def stored_result(folder: Path, name: str, kind: type) -> Any:
    """What a finished measurement found."""
    stored = json.loads((folder / "measured" / f"{name}.json").read_bytes())
    return _adapter(kind).validate_python(stored["result"])


def _question(job: Job) -> dict[str, Any]:
    return json.loads(json.dumps({"kind": job.kind, "tool": tool_name(), **job.asked}))


def _adapter(kind: type) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def sparsity_of(report: DiffReport, view: View) -> float:
    """Update sparsity under `value`."""
    row = report.headline("value", view)
    assert row is not None, "value is always counted"
    assert row.sparsity is not None, "a run is compared with the weights it began with"
    return row.sparsity


def half_ulp_of(report: DiffReport) -> tuple[float, float, float] | None:
    """The law's interval, where a learning rate was given and weights are stored in bf16."""
    found = [part.half_ulp for part in report.precision if part.view is View.NATIVE and part.half_ulp]
    if not found or found[0].lower is None or found[0].at_lr is None or found[0].upper is None:
        return None
    return found[0].lower, found[0].at_lr, found[0].upper
