"""Spectral records as table rows, each update above its random reference."""

from __future__ import annotations

from collections.abc import Sequence

from sparsity_audit.stats.spectral_records import SpectralMeasures, SpectralRecord

__all__ = ["OVERLAP_HEAD", "SPECTRAL_HEAD", "overlap_rows", "refusal_lines", "spectral_rows"]

SPECTRAL_HEAD = (
    "matrix",
    "",
    "rank (float64)",
    "rank (float32)",
    "above rounding",
    "effective rank",
    "stable rank",
    "k for 99 %",
    "NSS",
    "left angle °",
    "right angle °",
)
OVERLAP_HEAD = (
    "matrix",
    "",
    "changed",
    "principal, 10 % of entries",
    "low-magnitude, 10 %",
    "principal, as many as changed",
    "low-magnitude, as many",
)
_SHOWN = (
    ("rank_float64", ".0f"),
    ("rank_float32", ".0f"),
    ("rank_rounding", ".0f"),
    ("effective_rank", ".4g"),
    ("stable_rank", ".4g"),
    ("rank_99", ".0f"),
    ("nss", ".3g"),
    ("left_max_angle_deg", ".3g"),
    ("right_max_angle_deg", ".3g"),
)
_ALPHA = 0.1


def spectral_rows(records: Sequence[SpectralRecord]) -> list[list[str]]:
    """Two rows a measured matrix: the update, and the mean of its references with their sd."""
    rows = []
    for record in records:
        if record.observed is None:
            continue
        size = f"{record.shape[0]}×{record.shape[1]}" + (", estimate" if record.is_estimate else "")
        update = [_number(getattr(record.observed, name), form) for name, form in _SHOWN]
        rows.append([f"{record.name} ({size})", "update", *update])
        if record.reference_mean is not None:
            rows.append(["", "random", *_reference(record.reference_mean, record.reference_sd)])
    return rows


def overlap_rows(records: Sequence[SpectralRecord]) -> list[list[str]]:
    """Share of the update mask inside each target, above its chance level and what magnitudes alone give."""
    rows = []
    for record in records:
        if not record.overlaps:
            continue
        targets = [[o for o in record.overlaps if o.target == t] for t in ("principal", "low-magnitude")]
        shown = [next(o for o in found if o.alpha == _ALPHA) for found in targets]
        shown += [found[-1] for found in targets]
        changed = f"{100 * record.changed / record.entries:.1f} %"
        rows += [
            [record.name, "update", changed, *[f"{100 * o.share:.1f} %" for o in shown]],
            ["", "chance", "", *[_expected(o.chance, o.chance_sd) for o in shown]],
            ["", "magnitudes", "", *[_expected(o.magnitude_share, o.magnitude_sd) for o in shown]],
        ]
    return rows


def refusal_lines(records: Sequence[SpectralRecord]) -> list[str]:
    """`name: reason` for each matrix that was not measured."""
    return [f"{record.name}: {record.refused}" for record in records if record.refused]


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"


def _reference(mean: SpectralMeasures, deviation: SpectralMeasures | None) -> list[str]:
    cells = []
    for name, form in _SHOWN:
        cell, spread = _number(getattr(mean, name), form), getattr(deviation, name, None)
        cells.append(cell if spread is None else f"{cell} ± {spread:.1g}")
    return cells


def _expected(share: float, deviation: float) -> str:
    return f"{100 * share:.1f} ± {100 * deviation:.1g}"
