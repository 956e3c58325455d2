"""The output directory of a run: prepared before the pass, filled by rename after it.

Contract: nothing appears under its final name before it is complete; `report.json` comes last, so a
directory with a report is a finished one. What an earlier run left is refused unless overwriting was
asked for, and then only files this tool writes are removed.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from sparsity_audit.errors import OutputError
from sparsity_audit.report.figures import FIGURES
from sparsity_audit.report.latex import TABLES
from sparsity_audit.report.style import FORMATS
from sparsity_audit.seams import reached

__all__ = ["JOURNAL_NAME", "OutputDirectory", "write_atomically", "write_below"]

JOURNAL_NAME = "journal.jsonl"
_OURS = (
    *(
        "report.json",
        "run.json",
        "tensors.csv",
        "tensors.parquet",
        "rollups.csv",
        "summary.md",
        "report.html",
    ),
    *("axis_counts.safetensors", *(f"tables/{name}.tex" for name in TABLES)),
    *(f"figures/{name}.{suffix}" for name in FIGURES for suffix in (*FORMATS, "txt")),
)


class OutputDirectory:
    """A directory that a run writes to.

    Args:
        path: The directory; created when missing.
        overwrite: Remove the results of an earlier run, finished or not.

    Raises:
        OutputError: It holds another finished run, or something that is not ours, or cannot be written.
    """

    def __init__(self, path: Path, *, overwrite: bool) -> None:
        self.path = path
        try:
            if overwrite and path.is_dir():
                for name in (*_OURS, JOURNAL_NAME):
                    (path / name).unlink(missing_ok=True)
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(str(path), error.strerror or "cannot be written") from error
        if (path / "report.json").exists():
            raise OutputError(
                str(path),
                "holds the report of a finished run",
                remedy="choose another -o, or add --overwrite",
            )
        if not os.access(path, os.W_OK | os.X_OK):
            raise OutputError(str(path), "is not writable")

    @property
    def journal(self) -> Path:
        """Where the run's journal lies until it is finished."""
        return self.path / JOURNAL_NAME

    def finish(self, files: dict[str, bytes]) -> None:
        """Write the files in the order given, then remove the journal."""
        for name, data in files.items():
            write_below(self.path, name, data)
            reached("file written")
        self.journal.unlink(missing_ok=True)


def write_below(folder: Path, name: str, data: bytes) -> None:
    """Write `folder/name`, whose folders are made where they are missing. Raises OutputError."""
    path = folder / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(str(path.parent), error.strerror or "cannot be written") from error
    write_atomically(path, data)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that it is complete or absent. Raises OutputError."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free if path.parent.is_dir() else 0
        raise OutputError(
            str(path),
            error.strerror or "cannot be written",
            remedy=f"{free} bytes are free there; choose another -o" if free < len(data) else None,
        ) from error
