"""Finished points of a cross-sampling on disk, so that a killed run goes on and a later one adds to it.

Contract: `points/settings.json` says what all points of a folder have in common; a point is one safetensors
file, complete or absent, with its completions, signals, switches and scores. Points of other settings are
refused, never mixed. Without a folder points live in memory.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from sparsity_audit.errors import OutputError
from sparsity_audit.report.output import write_below
from sparsity_audit.seams import reached
from sparsity_audit.tokens.intervention import CrossSamples

__all__ = ["CrossStore", "StoredPoint", "weights_identity"]

_FOLDER = "points"
_SETTINGS = f"{_FOLDER}/settings.json"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoredPoint:
    """One rule's completions with their scores.

    Args:
        samples: Completions of all rows.
        scores: float64[rows], NaN without one.
        threshold: The threshold that was used, nats; None where the rule has none.
        reasons: Row → why it has no score.
    """

    samples: CrossSamples
    scores: np.ndarray
    threshold: float | None
    reasons: dict[int, str]


class CrossStore:
    """The finished points of one output folder.

    Args:
        folder: The output folder; None keeps nothing.
        settings: What all its points have in common.
        restart: Remove the points of other settings.

    Raises:
        OutputError: The folder holds points of other settings, or cannot be written.
    """

    def __init__(self, folder: Path | None, settings: Mapping[str, Any], *, restart: bool) -> None:
        self._folder = folder
        if folder is None:
            return
        wanted = json.dumps(settings, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
        path = folder / _SETTINGS
        found = path.read_text(encoding="utf-8") if path.is_file() else None
        if found == wanted:
            return
        if found is not None and not restart:
            raise OutputError(
                str(folder),
                f"holds points of another cross-sampling: {_first_difference(found, settings)}",
                remedy="choose another -o, or add --overwrite",
            )
        shutil.rmtree(folder / _FOLDER, ignore_errors=True)
        write_below(folder, _SETTINGS, wanted.encode())

    def load(self, key: str) -> StoredPoint | None:
        """A finished point; None where it is not there or cannot be read."""
        if self._folder is None:
            return None
        try:
            with safe_open(self._path(key), framework="np") as file:
                meta = json.loads(file.metadata()["point"])
                parts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None
        scores = parts.pop("scores")
        return StoredPoint(
            samples=CrossSamples.from_arrays(parts),
            scores=scores,
            threshold=meta["threshold"],
            reasons={int(row): text for row, text in meta["reasons"].items()},
        )

    def save(self, key: str, point: StoredPoint) -> None:
        """Write a point. Raises OutputError."""
        if self._folder is None:
            return
        arrays = point.samples.to_arrays() | {"scores": point.scores}
        meta = json.dumps({"threshold": point.threshold, "reasons": point.reasons}, sort_keys=True)
        write_below(self._folder, f"{_FOLDER}/{key}.safetensors", save(arrays, metadata={"point": meta}))
        reached("point written")

    def _path(self, key: str) -> str:
        assert self._folder is not None, "only a folder has files"
        return str(self._folder / _FOLDER / f"{key}.safetensors")


def weights_identity(reference: str | Path) -> list[list[Any]]:
    """What tells one state of a model folder from another: its files' names, sizes and times of change.

    A reference that is no folder (the Hub, a shipped base) is its own name.
    """
    folder = Path(reference).expanduser()
    if not folder.is_dir():
        return [[str(reference)]]
    files = sorted(path for path in folder.iterdir() if path.suffix in {".safetensors", ".bin", ".json"})
    return [[path.name, (stat := path.stat()).st_size, stat.st_mtime_ns] for path in files]


def _first_difference(found: str, settings: Mapping[str, Any]) -> str:
    try:
        stored = json.loads(found)
    except ValueError:
        return "its settings cannot be read"
    names = sorted({*stored, *settings})
    name = next((n for n in names if stored.get(n) != settings.get(n)), "settings")
    return f"{name} is {_short(stored.get(name))} there, {_short(settings.get(name))} here"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"
