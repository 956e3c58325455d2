"""What the page's script needs, as compact JSON: the tensors table by column, row and column maps.

Contract: columns, not rows, and labels by index, so that 90 k tensors stay within reach of a browser; every
count and float is the record's. The text is safe inside a `<script>` element whatever the names hold.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparsity_audit.report.schema import DiffReport, TensorRecord
from sparsity_audit.stats.rollup import ViewSummary
from sparsity_audit.stats.stripes import line_score
from sparsity_audit.types import View

__all__ = ["MAX_MAPS", "AxisMap", "axis_criterion", "axis_maps", "page_data", "script_json"]

MAX_MAPS = 40
"""Tensors whose maps the page holds: the most uneven ones."""

_MAX_BINS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class AxisMap:
    """Where in a matrix the changes lie.

    Args:
        index: Position of the tensor in the report.
        name: Its name.
        rows: Changed entries per bin of consecutive rows.
        cols: The same for columns.
        num_rows: Rows; bin b of B holds rows ⌊b·n/B⌋ to ⌊(b+1)·n/B⌋ − 1.
        num_cols: Columns, binned alike.
        row_score: Stripe score of the rows, 1 on average for independent entries; None without changes, or
            where everything changed.
        col_score: The same for columns.
    """

    index: int
    name: str
    rows: tuple[int, ...]
    cols: tuple[int, ...]
    num_rows: int
    num_cols: int
    row_score: float | None
    col_score: float | None


def axis_criterion(report: DiffReport) -> str:
    """The criterion that row and column counts follow."""
    return report.mask_criterion if report.structure is None else report.structure.criterion


def axis_maps(report: DiffReport, axes: Mapping[str, np.ndarray]) -> tuple[AxisMap, ...]:
    """Maps of the matrices with the most uneven rows, most uneven first.

    Args:
        report: The record.
        axes: `NAME.rows` and `NAME.cols`, as `axis_counts.safetensors` holds them.
    """
    maps = []
    for index, tensor in enumerate(report.tensors):
        rows, cols = axes.get(f"{tensor.name}.rows"), axes.get(f"{tensor.name}.cols")
        if rows is None or cols is None or min(len(rows), len(cols)) < 2:
            continue
        row_score = line_score(rows, len(cols))
        if row_score is None:
            continue
        maps.append(
            AxisMap(
                index=index,
                name=tensor.name,
                rows=_binned(rows),
                cols=_binned(cols),
                num_rows=len(rows),
                num_cols=len(cols),
                row_score=row_score,
                col_score=line_score(cols, len(rows)),
            )
        )
    maps.sort(key=lambda found: (-(found.row_score or 0), found.index))
    return tuple(maps[:MAX_MAPS])


def _binned(counts: np.ndarray) -> tuple[int, ...]:
    bins = min(len(counts), _MAX_BINS)
    starts = np.arange(bins) * len(counts) // bins
    return tuple(int(total) for total in np.add.reduceat(counts.astype(np.int64), starts))


def page_data(report: DiffReport, maps: Sequence[AxisMap]) -> dict[str, Any]:
    """Plain JSON values for the script; see report.js for their use."""
    tensors = report.tensors
    views = list(dict.fromkeys(row.view for row in report.headlines))
    heads = [tensor.summary for tensor in tensors]
    return {
        "criteria": list(report.criteria),
        "criterion": report.mask_criterion,
        "axisCriterion": axis_criterion(report),
        "view": report.view if report.view in views else View.NATIVE,
        "name": [tensor.name for tensor in tensors],
        "tuned": {str(i): t.tuned_name for i, t in enumerate(tensors) if t.tuned_name != t.name},
        "layer": [head.layer for head in heads],
        "module": _indexed([head.module for head in heads]),
        "kind": _indexed([head.kind for head in heads]),
        "rule": _indexed([tensor.rule for tensor in tensors]),
        "dtype": _indexed([_dtypes(tensor) for tensor in tensors]),
        "shape": _indexed(["×".join(str(size) for size in tensor.shape) or "scalar" for tensor in tensors]),
        "entries": [tensor.entries for tensor in tensors],
        "views": {view.value: _view_columns(report, view) for view in views},
        "rows": [None if head.rows is None else head.rows.touched for head in heads],
        "cols": [None if head.cols is None else head.cols.touched for head in heads],
        "decayRows": {
            str(i): h.decay_only_rows for i, h in enumerate(heads) if h.decay_only_rows is not None
        },
        "sigma": {
            str(i): t.displacement.sigma
            for i, t in enumerate(tensors)
            if t.displacement is not None and t.displacement.sigma is not None
        },
        "baseFp": [tensor.base_fingerprint for tensor in tensors],
        "tunedFp": [tensor.tuned_fingerprint for tensor in tensors],
        "maps": [
            {
                "i": found.index,
                "rows": found.rows,
                "cols": found.cols,
                "n": [found.num_rows, found.num_cols],
                "d": [found.row_score, found.col_score],
            }
            for found in maps
        ],
    }


def _view_columns(report: DiffReport, view: View) -> dict[str, Any]:
    summaries = [_summary(tensor, view) for tensor in report.tensors]
    counts = [{count.criterion: count.changed for count in summary.counts} for summary in summaries]
    return {
        "changed": {key: [found.get(key) for found in counts] for key in report.criteria},
        "flips": [summary.sign_flips for summary in summaries],
        "l2": [summary.l2 for summary in summaries],
        "max": [summary.max_abs for summary in summaries],
        "rel": [summary.relative_l2 for summary in summaries],
    }


def _summary(tensor: TensorRecord, view: View) -> ViewSummary:
    """The view of a tensor; as in the headlines, native stands in where it has no served view of its own."""
    if view is View.SERVED and tensor.summary.served is not None:
        return tensor.summary.served
    return tensor.summary.native


def _dtypes(tensor: TensorRecord) -> str:
    base, tuned = tensor.summary.base_dtype.label, tensor.summary.tuned_dtype.label
    return base if base == tuned else f"{base} → {tuned}"


def _indexed(values: Sequence[str]) -> dict[str, Any]:
    """Distinct values in order of appearance, and an index per tensor."""
    labels = {value: number for number, value in enumerate(dict.fromkeys(values))}
    return {"labels": list(labels), "at": [labels[value] for value in values]}


_UNSAFE = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def script_json(data: Mapping[str, Any]) -> str:
    """JSON that no HTML parser can be made to leave: `<`, `>`, `&` only as escapes."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.translate(str.maketrans(_UNSAFE))
