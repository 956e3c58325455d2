"""Render finished audits again, from their output directories and without the checkpoints.

Contract: `render` writes the same bytes that `diff` wrote (with the same versions of the tool and of
matplotlib); `plot` writes figures alone, several audits side by side. Only files that this tool names are
written, and none is replaced unless asked for, but for `render` into the directories it reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from sparsity_audit.errors import OutputError, UsageError
from sparsity_audit.report.figures import DEFAULT_WIDTH, render_figures
from sparsity_audit.report.files import render_record, render_side_by_side
from sparsity_audit.report.output import JOURNAL_NAME, write_below
from sparsity_audit.report.runs import Run, label_runs
from sparsity_audit.report.schema import DiffReport, from_json
from sparsity_audit.report.style import FORMATS, FigureFormat

__all__ = ["load_report", "plot", "render"]


def load_report(directory: str | Path) -> DiffReport:
    """The record of a finished audit.

    Raises:
        UsageError: Not an output directory of `diff`, or its run is not finished.
        CorruptCheckpointError: `report.json` is not what `diff` writes.
    """
    folder = Path(directory)
    path = folder / "report.json"
    try:
        return from_json(path.read_bytes(), source=str(path))
    except OSError as error:
        if (folder / JOURNAL_NAME).exists():
            raise UsageError(
                str(folder),
                "holds an unfinished run",
                remedy="give its diff command again, which goes on where it stopped",
            ) from error
        raise UsageError(
            str(folder), "holds no report.json", expected="a directory that `diff -o` has written"
        ) from error


def plot(
    directories: Sequence[str | Path],
    *,
    output: str | Path,
    figures: Sequence[str] = (),
    labels: Sequence[str] = (),
    formats: Sequence[FigureFormat] = FORMATS,
    width: float = DEFAULT_WIDTH,
    overwrite: bool = False,
) -> tuple[Path, ...]:
    """Write figures of finished audits, side by side, and a caption stub for each; returns their paths.

    Args:
        directories: Output directories of `diff`.
        output: Directory for the figures.
        figures: Names; without them every figure that has something to show.
        labels: Names of the audits in the figures, in order; without them ends of the tuned references.
        formats: Of `pdf`, `svg`, `png`.
        width: Inches; 3.25, 5.5 and 6.75 are a column, a text block and a page.
        overwrite: Replace figures of the same names.

    Raises:
        UsageError: Not finished audits, no such figure, or labels that do not fit.
        OutputError: A figure is there already, or cannot be written.
    """
    runs = label_runs([load_report(directory) for directory in directories], labels)
    files = render_figures(runs, names=figures, formats=formats, width=width)
    return _write(Path(output), files, overwrite=overwrite)


def render(
    directories: Sequence[str | Path],
    *,
    output: str | Path | None = None,
    labels: Sequence[str] = (),
    figures: bool = True,
    parquet: bool = False,
    overwrite: bool = False,
) -> tuple[Path, ...]:
    """Write tables, page and figures of finished audits again; returns their paths.

    Args:
        directories: Output directories of `diff`.
        output: Where to; without it into the directories themselves. Several audits get a folder each
            there, named by their label, beside `tables/` and `figures/` with all of them side by side.
        labels: As in `plot`.
        figures: With figures.
        parquet: With `tensors.parquet`; needs the extra `parquet`.
        overwrite: Replace files in `output`.

    Raises:
        UsageError: Not finished audits, or labels that do not fit.
        OutputError: A file is there already, or cannot be written.
        MissingExtraError: pyarrow is not installed.
    """
    runs = label_runs([load_report(directory) for directory in directories], labels)
    written: list[Path] = []
    if output is None:
        for directory, run in zip(directories, runs, strict=True):
            files = _files_of(run, directory, figures=figures, parquet=parquet)
            written += _write(Path(directory), files, overwrite=True)
        return tuple(written)
    if len(runs) == 1:
        files = _files_of(runs[0], directories[0], figures=figures, parquet=parquet)
        return _write(Path(output), files, overwrite=overwrite)
    folders = _folder_names(runs)
    files = render_side_by_side(runs, figures=figures)
    for directory, run, folder in zip(directories, runs, folders, strict=True):
        made = _files_of(run, directory, figures=figures, parquet=parquet)
        files |= {f"{folder}/{name}": data for name, data in made.items()}
    return _write(Path(output), files, overwrite=overwrite)


def _files_of(run: Run, directory: str | Path, *, figures: bool, parquet: bool) -> dict[str, bytes]:
    axes = _load_axes(Path(directory))
    return render_record(run.report, axes=axes, figures=figures, parquet=parquet)


def _load_axes(folder: Path) -> Mapping[str, np.ndarray]:
    """Counts per row and column; empty where `diff` wrote none, as at level `counts`."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    path = folder / "axis_counts.safetensors"
    if not path.exists():
        return {}
    try:
        return load(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise UsageError(str(path), f"cannot be read ({error})", remedy="run diff again") from error


def _folder_names(runs: Sequence[Run]) -> list[str]:
    """The labels as names of folders."""
    names = [run.label.replace("/", "__") for run in runs]
    for run, name in zip(runs, names, strict=True):
        if name in ("", ".", "..", "tables", "figures") or "\0" in name or names.count(name) > 1:
            raise UsageError(
                f"label {run.label!r}", "cannot name a folder of its own", remedy="choose another --label"
            )
    return names


def _write(folder: Path, files: Mapping[str, bytes], *, overwrite: bool) -> tuple[Path, ...]:
    taken = [name for name in files if (folder / name).exists()]
    if taken and not overwrite:
        raise OutputError(
            str(folder),
            f"holds {taken[0]}" + (f" and {len(taken) - 1} more of the files to write" if taken[1:] else ""),
            remedy="choose another -o, or add --overwrite",
        )
    for name, data in files.items():
        write_below(folder, name, data)
    return tuple(folder / name for name in files)
