"""The output directory of a run: prepared before the pass, filled by rename after it.

Contract: nothing appears under its final name before it is complete; `report.json` comes last, so a
directory with a report is a finished one. What an earlier run left is refused unless overwriting was
asked for, and then only files this tool writes are removed. Between `OutputDirectory` and `clear` or `finish`
the caller locks the journal, so that no two runs write here at once.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from sparsity_audit.checkpoint.spelling import verify_local
from sparsity_audit.errors import OutputError
from sparsity_audit.report.figures import FIGURES
from sparsity_audit.report.latex import TABLES
from sparsity_audit.report.style import FORMATS
from sparsity_audit.seams import reached

__all__ = ["JOURNAL_NAME", "OutputDirectory", "verify_free", "write_atomically", "write_below"]

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
        overwrite: Accept the results of an earlier run, finished or not; `clear` removes them.
        inputs: Files that are read: their directories are no place for results, which would be taken for
            a part of the checkpoint later.

    Raises:
        OutputError: It holds a finished run, files that a run would replace, or a checkpoint that is read;
            or it cannot be written.
    """

    def __init__(self, path: Path, *, overwrite: bool, inputs: Iterable[Path] = ()) -> None:
        verify_local(path)
        self.path = path
        elsewhere = "choose another -o, or add --overwrite"
        if path.resolve() in {file.parent.resolve() for file in inputs}:
            raise OutputError(
                str(path), "holds a checkpoint that is compared", remedy="choose another -o for the results"
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            found = "is a file" if path.is_file() else error.strerror or "cannot be written"
            raise OutputError(
                str(path), found, expected="a directory you may write to", remedy="choose another -o"
            ) from error
        if not overwrite:
            if (path / "report.json").exists():
                raise OutputError(str(path), "holds the report of a finished run", remedy=elsewhere)
            there = [name for name in _OURS if (path / name).exists()]
            if there and not self.journal.exists():
                raise OutputError(
                    str(path), f"holds {', '.join(there[:3])}, which a run would replace", remedy=elsewhere
                )
        if not os.access(path, os.W_OK | os.X_OK):
            raise OutputError(
                str(path),
                "is not writable",
                expected="a directory you may write to",
                remedy="choose another -o",
            )

    def clear(self) -> None:
        """Remove the results of an earlier run, and nothing else. Raises OutputError."""
        try:
            for name in _OURS:
                (self.path / name).unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(str(self.path), error.strerror or "cannot be written") from error

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


def verify_free(folder: Path, names: Sequence[str], *, inputs: Iterable[str | Path], overwrite: bool) -> None:
    """Refuse a directory for results in which a run would replace files, or that is read itself.

    Args:
        folder: Where results shall go.
        names: Files the run writes.
        inputs: What is read; references that are no local paths are passed over.
        overwrite: Accept that files of these names are replaced.

    Raises:
        OutputError: It is no directory, holds such files, or is an input.
    """
    verify_local(folder)
    if folder.exists() and not folder.is_dir():
        raise OutputError(str(folder), "is a file", expected="a directory", remedy="choose another -o")
    paths = [Path(path).expanduser() for path in inputs]
    if folder.expanduser().resolve() in {path.resolve() for path in paths if path.exists()}:
        raise OutputError(str(folder), "holds a run that is compared", remedy="choose another -o")
    there = [name for name in names if (folder / name).exists()]
    if there and not overwrite:
        raise OutputError(
            str(folder),
            f"holds {', '.join(there[:3])}, which this run would replace",
            remedy="choose another -o, or add --overwrite",
        )


def write_below(folder: Path, name: str, data: bytes) -> None:
    """Write `folder/name`, whose folders are made where they are missing. Raises OutputError."""
    verify_local(folder)
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
