"""The files of an output directory, as bytes, in the order they are written."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from sparsity_audit.align.records import Pair
from sparsity_audit.report.schema import DiffReport, to_json
from sparsity_audit.report.tables import summary_markdown, tensors_csv
from sparsity_audit.stats.tally import Tally

__all__ = ["render_files"]

_LIBRARIES = ("numpy", "numba", "safetensors", "torch", "huggingface-hub")


def render_files(
    report: DiffReport, pairs: Sequence[Pair], tallies: Sequence[Tally], *, facts: Mapping[str, Any]
) -> dict[str, bytes]:
    """File name → content; `report.json` last, because it marks the directory as finished."""
    files = {"tensors.csv": tensors_csv(report), "summary.md": summary_markdown(report)}
    axes = _axis_counts(pairs, tallies)
    if axes is not None:
        files["axis_counts.safetensors"] = axes
    files["run.json"] = _run_facts(facts)
    files["report.json"] = to_json(report)
    return files


def _axis_counts(pairs: Sequence[Pair], tallies: Sequence[Tally]) -> bytes | None:
    """Changed entries per row and column under the mask criterion, as `NAME.rows` and `NAME.cols`."""
    from safetensors.numpy import save

    arrays: dict[str, np.ndarray] = {}
    for pair, tally in zip(pairs, tallies, strict=True):
        if tally.axes is not None:
            for axis, counts in (("rows", tally.axes.rows), ("cols", tally.axes.cols)):
                narrow = np.uint32 if counts.max(initial=0) < 2**32 else np.uint64
                arrays[f"{pair.name}.{axis}"] = counts.astype(narrow)
    return save(arrays) if arrays else None


def _run_facts(facts: Mapping[str, Any]) -> bytes:
    """Everything about a run that may differ between two runs of equal result."""
    started = facts["started"]
    record = {
        "argv": sys.argv,
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("sparsity-audit", *_LIBRARIES)},
        "cpus": len(os.sched_getaffinity(0)),
        "workers": facts["workers"],
        "device": facts["device"],
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "wall_s": round(time.time() - started, 3),
    }
    return json.dumps(record, indent=1).encode() + b"\n"
