"""The files of a training run: config, metrics, checkpoints, the state a killed run goes on from.

Contract: every file but the two logs appears complete, by rename; the logs are cut to the last state when a
run goes on. What a folder holds of another run is refused, never mixed; `clear` removes a run's files and
no others.
"""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from sparsity_audit.checkpoint.spelling import verify_local
from sparsity_audit.errors import OutputError
from sparsity_audit.lab.config import TrainConfig
from sparsity_audit.lab.estimators import Estimate
from sparsity_audit.lab.folder import save_model, write_file
from sparsity_audit.lab.loop import Training
from sparsity_audit.lab.metrics import StepMetrics
from sparsity_audit.seams import reached

__all__ = ["RunFolder", "TrainResult"]

_LOCK = "train.lock"
_PRECISION = {
    "bf16": {
        "weights": "bf16 values, rounded to nearest even after every update (storage is emulated)",
        "moments": "fp32",
        "matmuls": "fp32",
        "stored": "bf16",
    },
    "fp32": {"weights": "fp32", "moments": "fp32", "matmuls": "fp32", "stored": "fp32"},
}
_FILES = ("run.json", "result.json", "metrics.jsonl", "metrics.csv", "timings.jsonl", "state.safetensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """A finished run.

    Args:
        output: Its folder.
        steps: Steps taken.
        updates: Updates that moved weights.
        steps_without_signal: Steps in which nothing had a gradient.
        base_accuracy: pass@1 at temperature 1 of the base, as training began, on held-out problems.
        accuracy: The same of the trained policy, on the same problems.
        warnings: What the user was told.
    """

    output: Path
    steps: int
    updates: int
    steps_without_signal: int
    base_accuracy: Estimate
    accuracy: Estimate
    warnings: tuple[str, ...]


class RunFolder:
    """The files of one run."""

    def __init__(self, path: Path) -> None:
        verify_local(path)
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            found = "is a file" if path.is_file() else error.strerror or "cannot be written"
            raise OutputError(str(path), found, expected="a directory", remedy="choose another -o") from error
        strange = {file.name for file in path.iterdir()} - {_LOCK, "run.json.partial"}
        if strange and not self._run.exists():
            raise OutputError(
                str(path), "is not empty, and not the folder of a training run", remedy="choose another -o"
            )

    @property
    def _run(self) -> Path:
        return self.path / "run.json"

    def locked(self) -> _Lock:
        """A lock for as long as the run goes on; it ends with the process, however that ends."""
        return _Lock(self.path / _LOCK)

    def clear(self) -> None:
        """Remove the files of a run, and nothing else. Raises OutputError."""
        try:
            for name in _FILES:
                (self.path / name).unlink(missing_ok=True)
            for folder in (*self.path.glob("checkpoint-*"), self.path / "final"):
                shutil.rmtree(folder, ignore_errors=True)
        except OSError as error:
            raise OutputError(str(self.path), error.strerror or "cannot be written") from error

    def belongs_to(self, config: TrainConfig) -> bool:
        """Whether a run with this config was here before. Raises OutputError where another one was."""
        if not self._run.exists():
            record = {"config": config.to_json(), "precision": _PRECISION[config.precision]}
            write_file(self._run, _json({**record, "environment": _environment()}))
            return False
        try:
            found = json.loads(self._run.read_bytes())["config"]
        except (ValueError, KeyError, TypeError) as error:
            raise OutputError(str(self._run), "cannot be read", remedy="choose another -o") from error
        wanted = json.loads(_json(config.to_json()))
        if found != wanted:
            differing = [key for key in sorted({*found, *wanted}) if found.get(key) != wanted.get(key)]
            raise OutputError(
                str(self.path),
                "holds another run: "
                + ", ".join(f"{key} {found.get(key)} → {wanted.get(key)}" for key in differing[:4]),
                remedy="repeat that run's settings to go on, choose another -o, or add --overwrite",
            )
        return True

    def resume(self, training: Training, on_note: Callable[[str], None]) -> list[StepMetrics]:
        """Load the last state, cut the metrics behind it, and return those before it."""
        path = self.path / "state.safetensors"
        if path.exists():
            try:
                training.load_state(load_tensors(path.read_bytes()))
            except (OSError, SafetensorError, KeyError) as error:
                raise OutputError(
                    str(path), f"cannot be read: {error}", remedy="add --overwrite to begin anew"
                ) from error
            on_note(f"going on after step {training.done} of {training.config.steps}")
        for name in ("metrics.jsonl", "timings.jsonl"):
            lines = self._lines(name)[: training.done]
            write_file(self.path / name, b"".join(lines))
        return [StepMetrics(**json.loads(line)) for line in self._lines("metrics.jsonl")]

    def _lines(self, name: str) -> list[bytes]:
        path = self.path / name
        return path.read_bytes().splitlines(keepends=True) if path.exists() else []

    def append(self, metrics: StepMetrics, *, seconds: float) -> None:
        """Record a step. Raises OutputError."""
        tokens = round((metrics.tokens_per_completion or 0) * metrics.rollouts)
        timing = {
            "step": metrics.step,
            "seconds": seconds,
            "tokens": tokens,
            "tokens_per_s": tokens / seconds,
        }
        try:
            for name, row in (("metrics.jsonl", metrics.to_json()), ("timings.jsonl", timing)):
                with (self.path / name).open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise OutputError(str(self.path), error.strerror or "cannot be written") from error

    def save(self, training: Training, name: str) -> None:
        """Write the policy as a Hugging Face folder, in the arm's dtype."""
        save_model(training.policy, self.path / name, dtype=training.config.precision, overwrite=True)

    def save_state(self, training: Training) -> None:
        """Replace the state."""
        write_file(self.path / "state.safetensors", save_tensors(training.state()))

    def finish(self, result: TrainResult) -> TrainResult:
        """Write the tables and the result, and drop what only a run that goes on needs."""
        write_file(self.path / "metrics.csv", _table(self._lines("metrics.jsonl")))
        reached("metrics table written")
        plain = {name: value for name, value in asdict(result).items() if name != "output"}
        write_file(self.path / "result.json", _json(plain))
        (self.path / "state.safetensors").unlink(missing_ok=True)
        return result

    def result(self) -> TrainResult | None:
        """What a finished run found; None while there is none."""
        path = self.path / "result.json"
        if not path.exists():
            return None
        found: dict[str, Any] = json.loads(path.read_bytes())
        for name in ("base_accuracy", "accuracy"):
            found[name] = Estimate(**found[name])
        return TrainResult(**{**found, "output": self.path, "warnings": tuple(found["warnings"])})


class _Lock:
    """An exclusive lock on a file, removed at the end."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        self._file = self.path.open("w")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise OutputError(
                str(self.path.parent),
                "another run is writing here",
                remedy="wait for it, or choose another -o",
            ) from error

    def __exit__(self, *_: object) -> None:
        self.path.unlink(missing_ok=True)
        self._file.close()


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def _table(lines: list[bytes]) -> bytes:
    """The metrics as CSV, one column a format."""
    rows = []
    for line in lines:
        row = json.loads(line)
        shares = row.pop("format_shares")
        rows.append({**row, **{f"share_{name}": share for name, share in shares.items()}})
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _environment() -> dict[str, Any]:
    """What may differ between two runs of one config."""
    return {
        "argv": sys.argv,
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {"sparsity-audit": version("sparsity-audit"), "torch": torch.__version__},
        "cpus": len(os.sched_getaffinity(0)),
        "threads": 1,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
