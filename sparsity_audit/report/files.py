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
from sparsity_audit.report.figures import render_figures
from sparsity_audit.report.latex import latex_tables
from sparsity_audit.report.runs import Run, label_runs
from sparsity_audit.report.schema import DiffReport, to_json
from sparsity_audit.report.tables import rollups_csv, summary_markdown, tensors_csv
from sparsity_audit.stats.tally import Tally

__all__ = ["render_files", "render_record", "render_side_by_side"]

_LIBRARIES = ("numpy", "numba", "safetensors", "torch", "huggingface-hub")


def render_files(
    report: DiffReport,
    pairs: Sequence[Pair],
    tallies: Sequence[Tally],
    *,
    facts: Mapping[str, Any],
    figures: bool,
    parquet: bool,
) -> dict[str, bytes]:
    """File name → content; `report.json` last, because it marks the directory as finished."""
    from safetensors.numpy import save

    axes = _axis_counts(pairs, tallies)
    files = render_record(report, axes=axes, figures=figures, parquet=parquet)
    if axes:
        files["axis_counts.safetensors"] = save(axes)
    files["run.json"] = _run_facts(facts)
    files["report.json"] = to_json(report)
    return files


def render_record(
    report: DiffReport, *, axes: Mapping[str, np.ndarray], figures: bool, parquet: bool
) -> dict[str, bytes]:
    """The files that follow from the record and the counts per row and column alone.

    Args:
        report: The record.
        axes: What `axis_counts.safetensors` holds; may be empty.
        figures: With pictures: about three seconds, whatever the size of the checkpoint.
        parquet: With `tensors.parquet`, which needs an extra.

    Raises:
        MissingExtraError: `parquet` was asked for and pyarrow is not installed.
    """
    from sparsity_audit.report.html import render_html

    files = {
        "tensors.csv": tensors_csv(report),
        "rollups.csv": rollups_csv(report),
        "summary.md": summary_markdown(report),
    }
    if parquet:
        from sparsity_audit.report.parquet import tensors_parquet

        files["tensors.parquet"] = tensors_parquet(report)
    files |= render_side_by_side(label_runs([report]), figures=figures)
    files["report.html"] = render_html(report, axes=axes)
    return files


def render_side_by_side(runs: Sequence[Run], *, figures: bool) -> dict[str, bytes]:
    """LaTeX tables and figures of one or several runs."""
    files = {f"tables/{name}": data for name, data in latex_tables(runs).items()}
    if figures:
        files |= {f"figures/{name}": data for name, data in render_figures(runs).items()}
    return files


def _axis_counts(pairs: Sequence[Pair], tallies: Sequence[Tally]) -> dict[str, np.ndarray]:
    """Changed entries per row and column under the mask criterion, as `NAME.rows` and `NAME.cols`."""
    arrays: dict[str, np.ndarray] = {}
    for pair, tally in zip(pairs, tallies, strict=True):
        if tally.axes is not None:
            for axis, counts in (("rows", tally.axes.rows), ("cols", tally.axes.cols)):
                narrow = np.uint32 if counts.max(initial=0) < 2**32 else np.uint64
                arrays[f"{pair.name}.{axis}"] = counts.astype(narrow)
    return arrays


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
        **{name: facts[name] for name in ("engine", "shares") if name in facts},
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "wall_s": round(time.time() - started, 3),
    }
    return json.dumps(record, indent=1).encode() + b"\n"
