"""The directory of one retraining: whose it is, and that two processes do not write it at once.

Contract: `plan.json` says which question the directory answers, and is written before anything else; another
question is refused, the same one goes on with what is there. `runs/`, `masks/`, `scores.json`, `recovery/`
and, last, `retrain.json` are what is written. More controls may be asked for later; what is trained stays.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sparsity_audit.checkpoint.spelling import verify_local
from sparsity_audit.errors import OutputError
from sparsity_audit.report.output import write_below

__all__ = ["PLAN_FILE", "RetrainFolder", "is_retraining"]

PLAN_FILE = "plan.json"
_FORMAT = "sparsity-audit/retrain-plan"
_LOCK = "retrain.lock"


def is_retraining(path: Path) -> bool:
    """Whether a directory is one of a retraining."""
    return _read_plan(path) is not None


def _read_plan(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((path / PLAN_FILE).read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("format") == _FORMAT else None


class RetrainFolder:
    """A context manager that holds the directory of one question.

    Args:
        path: The directory; made where it is missing.
        question: What identifies the retraining, as plain JSON.

    Raises:
        OutputError: It holds something else or another retraining, another process writes it, or it cannot
            be written.
    """

    def __init__(self, path: Path, question: Mapping[str, Any]) -> None:
        verify_local(path)
        self.path = path
        wanted = json.loads(json.dumps({"format": _FORMAT, "version": 1, **question}))
        try:
            path.mkdir(parents=True, exist_ok=True)
            strange = {file.name for file in path.iterdir()} - {_LOCK, f"{PLAN_FILE}.partial"}
        except OSError as error:
            found = "is a file" if path.is_file() else error.strerror or "cannot be written"
            raise OutputError(str(path), found, expected="a directory", remedy="choose another -o") from error
        plan = _read_plan(path)
        if strange and plan is None:
            raise OutputError(
                str(path), "is not empty, and not the folder of a retraining", remedy="choose another -o"
            )
        if plan is not None and plan != wanted:
            raise OutputError(
                str(path),
                f"holds another retraining: {_difference(plan, wanted)}",
                expected="one retraining a directory",
                remedy="repeat that one's options to go on, or choose another -o",
            )
        self._plan = None if plan is not None else wanted

    def __enter__(self) -> Self:
        try:
            self._file = (self.path / _LOCK).open("w")
        except OSError as error:
            raise OutputError(str(self.path), error.strerror or "cannot be written") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise OutputError(
                str(self.path),
                "another retraining is writing here",
                remedy="wait for it, or choose another -o",
            ) from error
        if self._plan is not None:
            write_below(self.path, PLAN_FILE, _json(self._plan))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        (self.path / _LOCK).unlink(missing_ok=True)
        self._file.close()

    def write(self, name: str, value: Mapping[str, Any] | bytes) -> None:
        """Write one file below the directory. Raises OutputError."""
        write_below(self.path, name, value if isinstance(value, bytes) else _json(value))


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    parts = []
    for key in sorted({*found, *wanted}):
        mine, other = found.get(key), wanted.get(key)
        if mine == other:
            continue
        if isinstance(mine, dict) and isinstance(other, dict):
            parts.append(f"{key} ({_difference(mine, other)})")
        else:
            parts.append(f"{key} {mine} → {other}")
    return ", ".join(parts[:4])
