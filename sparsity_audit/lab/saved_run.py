"""A run's folder, read again: its settings, its reference, its saved weights and its metrics.

Contract: what `lab train` wrote is read, nothing is written. A run that is not finished can be read as far as
it has come. The reference is `checkpoint-0`; a run that kept only its last weights has its base instead,
which must still have the bytes that the run started from.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsity_audit.errors import CheckpointNotFoundError, CorruptCheckpointError
from sparsity_audit.lab.folder import resolve_base

__all__ = ["SavedRun", "read_run"]

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedRun:
    """What a run left.

    Args:
        path: Its folder.
        config: Its settings, as in `run.json`.
        reference: Folder of the weights it started from.
        checkpoints: (step, folder) by step; at least one.
        metrics: One record a step, as in `metrics.jsonl`.
    """

    path: Path
    config: Mapping[str, Any]
    reference: Path
    checkpoints: tuple[tuple[int, Path], ...]
    metrics: tuple[Mapping[str, Any], ...]

    @property
    def task(self) -> str:
        """The task's name."""
        return self.config["task"]

    @property
    def lengths(self) -> dict[int, float]:
        """Weight by length of its problems."""
        return {int(length): float(weight) for length, weight in self.config["lengths"].items()}

    @property
    def title(self) -> str:
        """The run in a few words."""
        shuffled = ", shuffled rewards" if self.config["shuffle_rewards"] else ""
        lr = f"{self.config['lr']:.0e}".replace("e-0", "e-")
        return (
            f"{self.config['algorithm']}, {self.config['precision']}, lr {lr}, "
            f"seed {self.config['seed']}{shuffled}"
        )


def read_run(path: str | Path) -> SavedRun:
    """The run of a folder.

    Raises:
        CheckpointNotFoundError: No run is there, or none of its weights, or its base is gone or another.
        CorruptCheckpointError: A file of it cannot be read.
    """
    folder = Path(path)
    config = _config(folder)
    found = [(m, child) for child in folder.glob("checkpoint-*") if (m := _CHECKPOINT.fullmatch(child.name))]
    checkpoints = sorted((int(match[1]), child) for match, child in found)
    if (folder / "final").is_dir() and config["steps"] not in dict(checkpoints):
        checkpoints.append((config["steps"], folder / "final"))
    if not checkpoints:
        raise CheckpointNotFoundError(
            str(folder),
            "no saved weights yet",
            expected="checkpoint-N or final",
            remedy="run `lab train` to its end",
        )
    return SavedRun(
        path=folder,
        config=config,
        reference=_reference(folder, config, dict(checkpoints)),
        checkpoints=tuple(checkpoints),
        metrics=_metrics(folder / "metrics.jsonl"),
    )


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"
    try:
        return json.loads(path.read_bytes())["config"]
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(
            str(folder), "no run.json", expected="the folder of a run that `lab train` wrote"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptCheckpointError(str(path), f"cannot be read: {error}") from error


def _reference(folder: Path, config: Mapping[str, Any], checkpoints: Mapping[int, Path]) -> Path:
    if 0 in checkpoints:
        return checkpoints[0]
    base = resolve_base(config["base"])
    weights = base / "model.safetensors"
    found = hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else None
    if found != config["base_sha256"]:
        raise CheckpointNotFoundError(
            str(folder),
            f"no checkpoint-0, and its base {base} {'is gone' if found is None else 'has other weights now'}",
            remedy="put the base back, or train with --checkpoints log",
        )
    return base


def _metrics(path: Path) -> tuple[Mapping[str, Any], ...]:
    try:
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        return tuple(json.loads(line) for line in lines)
    except (OSError, ValueError) as error:
        raise CorruptCheckpointError(str(path), f"cannot be read: {error}") from error
