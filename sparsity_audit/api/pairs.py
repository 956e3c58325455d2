"""`diff --pairs`: many audits, one table and one figure.

Contract: each pair is a normal output directory below the common one and resumes like any other. A pair whose
report is there already, of the same question about the same inputs, is read and not run again, also when it
is not among those to run. A pair that fails is recorded with its error and the next one is run. The common
files are written after every pair, so that an interrupted run leaves a table of what it has.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from sparsity_audit.api.diff import diff
from sparsity_audit.api.pairs_file import Expected, PairEntry, PairsFile, read_pairs
from sparsity_audit.checkpoint.hub_cache import CacheKeeper, hub_reference_of
from sparsity_audit.checkpoint.spelling import verify_local
from sparsity_audit.compare.dispatch import KernelName
from sparsity_audit.errors import OutputError, SparsityAuditError, UsageError
from sparsity_audit.report.output import write_atomically
from sparsity_audit.report.pairs import ExpectedRecord, Measured, PairRow, PairsReport, pairs_to_json
from sparsity_audit.report.pairs_tables import pairs_csv, pairs_latex, pairs_markdown
from sparsity_audit.report.preset import PresetResult
from sparsity_audit.report.schema import DiffReport, from_json
from sparsity_audit.types import View

__all__ = ["diff_pairs"]

_REPORT, _REQUEST = "report.json", "pair.json"


def diff_pairs(
    pairs: str | Path | PairsFile,
    output: str | Path,
    *,
    only: Sequence[str] = (),
    evict: bool = False,
    overwrite: bool = False,
    figures: bool = True,
    workers: int | None = None,
    kernel: KernelName = "auto",
    device: str = "auto",
    on_pair: Callable[[int, int, PairEntry], None] | None = None,
    on_report: Callable[[PairEntry, DiffReport], None] | None = None,
    on_note: Callable[[str], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> PairsReport:
    """Compare many pairs and hold each against what is expected of it.

    Args:
        pairs: A YAML file, or `published:SET`.
        output: Directory for one sub-directory a pair, `pairs.json`, `.csv`, `.md`, `.tex` and `figures/`.
        only: Names or globs of the pairs to run; the others are `skipped`. A pair that the file marks with
            `skip` runs only when its full name stands here.
        evict: Remove from the Hub cache what a pair downloaded, once no later pair needs it. What was
            cached before the run stays.
        overwrite: Measure again what is there.
        figures: Draw the strip figure, and those of each pair.
        workers: As for `diff`.
        kernel: As for `diff`.
        device: As for `diff`.
        on_pair: Called with number, count and pair before it is compared.
        on_report: Called with the report of each pair that this run measured.
        on_note: Called with lines for the user.
        on_progress: Called with bytes done and bytes in all of the current pair.

    Raises:
        UsageError: The file is not understood, or `only` matches nothing.
        OutputError: The directory cannot be written.
    """
    found = pairs if isinstance(pairs, PairsFile) else read_pairs(pairs)
    note = on_note or (lambda _text: None)
    folder = Path(output)
    chosen = _chosen(found, only)
    options = {"workers": workers, "kernel": kernel, "device": device, "figures": figures}
    options["on_progress"] = on_progress
    keeper = CacheKeeper() if evict else None
    _make(folder)
    rows = {entry.name: _row_before(entry, folder / entry.name, overwrite=overwrite) for entry in found.pairs}
    for number, entry in enumerate(chosen):
        if on_pair is not None:
            on_pair(number + 1, len(chosen), entry)
        try:
            report, is_new = _audit(
                entry, folder / entry.name, overwrite=overwrite, note=note, options=options
            )
            rows[entry.name] = _measured_row(entry, report)
        except SparsityAuditError as error:
            rows[entry.name] = _unmeasured(entry, "failed", str(error))
            note(f"{entry.name} failed: {error}")
        else:
            if is_new and on_report is not None:
                on_report(entry, report)
        if keeper is not None:
            _evict(keeper, entry, later=chosen[number + 1 :], note=note)
        _write(folder, _report(found, rows), figures=False)
    result = _report(found, rows)
    _write(folder, result, figures=figures)
    return result


def _chosen(found: PairsFile, only: Sequence[str]) -> list[PairEntry]:
    for pattern in only:
        if not any(fnmatchcase(entry.name, pattern) for entry in found.pairs):
            names = ", ".join(entry.name for entry in found.pairs)
            raise UsageError(f"--only {pattern}", f"matches no pair of {found.label}", expected=names)
    return [
        entry
        for entry in found.pairs
        if entry.name in only
        or (entry.skip is None and (not only or any(fnmatchcase(entry.name, glob) for glob in only)))
    ]


def _row_before(entry: PairEntry, folder: Path, *, overwrite: bool) -> PairRow:
    """The row of a pair that this run does not reach: what an earlier run found, or why there is nothing."""
    if not overwrite and (folder / _REPORT).exists():
        try:
            return _measured_row(entry, _finished(folder, _request(entry)))
        except SparsityAuditError:
            pass  # of other inputs; said as an error when the pair's turn comes
    return _unmeasured(entry, "skipped", entry.skip or "not run yet")


def _make(folder: Path) -> None:
    verify_local(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(str(folder), error.strerror or "cannot be written") from error


def _audit(
    entry: PairEntry, folder: Path, *, overwrite: bool, note: Callable[[str], None], options: dict[str, Any]
) -> tuple[DiffReport, bool]:
    """The pair's report, and whether it is new: read when it answers the same question, else measured."""
    request = _request(entry)
    if (folder / _REPORT).exists():
        if not overwrite:
            return _finished(folder, request), False
        (folder / _REPORT).unlink()
    _make(folder)
    write_atomically(folder / _REQUEST, json.dumps(request, indent=1).encode() + b"\n")
    report = diff(
        entry.base,
        entry.tuned,
        criteria=entry.criteria,
        view=entry.view,
        maps=entry.maps,
        stats="counts" if entry.stats == "counts" else "full",
        lr=entry.lr,
        weights_dtype=entry.weights_dtype,
        preset=entry.preset,
        output=folder,
        overwrite=overwrite,
        on_note=note,
        **options,
    )
    return report, True


def _request(entry: PairEntry) -> dict[str, Any]:
    """What decides the report: the question, and for local sides the identity of their files.

    A branch of a Hub repository is its name: where it has moved since, `overwrite` measures it again.
    """
    keys = ("base", "tuned", "criteria", "view", "maps", "stats", "lr", "weights_dtype", "preset")
    question = {key: value for key, value in asdict(entry).items() if key in keys}
    files = {side: _identity(reference) for side, reference in (("base", entry.base), ("tuned", entry.tuned))}
    return json.loads(json.dumps(question | {"files": files}))


def _identity(reference: str) -> list[list[Any]] | None:
    """Names, sizes and times of a local side's files; None for a Hub reference."""
    if hub_reference_of(reference) is not None:
        return None
    path = Path(reference)
    files = [path] if path.is_file() else sorted(path.glob("*")) if path.is_dir() else []
    stats = [(file.name, file.stat()) for file in files if file.is_file()]
    return [[name, found.st_size, found.st_mtime_ns] for name, found in stats]


def _finished(folder: Path, request: dict[str, Any]) -> DiffReport:
    try:
        before = json.loads((folder / _REQUEST).read_bytes())
    except (OSError, ValueError):
        before = None
    if isinstance(before, dict):
        # A local side that is gone has no other content: its report still stands.
        kept = before.get("files") or {}
        gone = {side: kept.get(side) for side, files in request["files"].items() if files == []}
        request = request | {"files": request["files"] | gone}
    if before != request:
        changed = [key for key in request if not isinstance(before, dict) or before.get(key) != request[key]]
        raise OutputError(
            str(folder),
            f"holds a report with other {', '.join(changed)}",
            remedy="choose another -o, or add --overwrite",
        )
    return from_json((folder / _REPORT).read_bytes(), source=str(folder / _REPORT))


def _evict(
    keeper: CacheKeeper, entry: PairEntry, *, later: Sequence[PairEntry], note: Callable[[str], None]
) -> None:
    needed = {name for other in later for name in _repositories(other)}
    done = keeper.evict(_repositories(entry) - needed)
    if done.removed:
        note(f"evicted {', '.join(done.removed)}: {done.freed_bytes:,} bytes freed")
    if done.kept:
        note(f"kept {', '.join(done.kept)}: cached before this run")


def _repositories(entry: PairEntry) -> set[str]:
    references = (hub_reference_of(entry.base), hub_reference_of(entry.tuned))
    return {reference.repo_id for reference in references if reference is not None}


def _unmeasured(entry: PairEntry, status: Any, message: str) -> PairRow:
    expected = entry.expected
    return PairRow(
        **_labels(entry),
        status=status,
        message=message,
        expected=None
        if expected is None
        else ExpectedRecord(sparsity_percent=expected.sparsity, tolerance_points=expected.tolerance),
    )


def _labels(entry: PairEntry) -> dict[str, Any]:
    names = ("name", "algorithm", "kind", "base", "tuned", "source", "note")
    return {name: getattr(entry, name) for name in names}


def _measured_row(entry: PairEntry, report: DiffReport) -> PairRow:
    preset = report.preset
    measured = _of_preset(preset) if preset is not None else _of_criterion(report, None, None)
    return PairRow(
        **_labels(entry),
        status="done",
        base_resolved=report.base.resolved,
        tuned_resolved=report.tuned.resolved,
        base_dtypes=tuple(report.base.entries_by_dtype),
        tuned_dtypes=tuple(report.tuned.entries_by_dtype),
        headlines=report.headlines,
        preset=preset,
        measured=measured,
        expected=None if entry.expected is None else _judge(entry.expected, report, measured),
        report=f"{entry.name}/{_REPORT}",
    )


def _of_preset(preset: PresetResult) -> Measured:
    return Measured(
        rule=preset.preset,
        view=preset.view,
        compared=preset.compared,
        changed=preset.changed,
        sparsity=preset.sparsity,
    )


def _of_criterion(report: DiffReport, criterion: str | None, view: View | None) -> Measured | None:
    found = report.headline(criterion or report.mask_criterion, view or report.view)
    if found is None:
        return None
    return Measured(
        rule=found.criterion,
        view=found.view,
        compared=found.compared,
        changed=found.changed,
        sparsity=found.sparsity,
    )


def _judge(expected: Expected, report: DiffReport, measured: Measured | None) -> ExpectedRecord:
    if expected.criterion is not None or expected.view is not None:
        measured = _of_criterion(report, expected.criterion, expected.view)
    percent = None if measured is None else measured.percent
    difference = None if percent is None else percent - expected.sparsity
    return ExpectedRecord(
        sparsity_percent=expected.sparsity,
        tolerance_points=expected.tolerance,
        measured=measured,
        difference_points=difference,
        passed=None if difference is None else abs(difference) <= expected.tolerance,
    )


def _report(found: PairsFile, rows: dict[str, PairRow]) -> PairsReport:
    return PairsReport(
        tool=f"sparsity-audit {importlib.metadata.version('sparsity-audit')}",
        label=found.label,
        title=found.title,
        source=found.source,
        note=found.note,
        rows=tuple(rows[entry.name] for entry in found.pairs),
    )


def _write(folder: Path, report: PairsReport, *, figures: bool) -> None:
    files = {
        "pairs.csv": pairs_csv(report),
        "pairs.md": pairs_markdown(report),
        "pairs.tex": pairs_latex(report),
    }
    if figures:
        from sparsity_audit.report.pairs_figure import render_strip

        _make(folder / "figures")
        files |= {f"figures/{name}": data for name, data in render_strip(report).items()}
    for name, data in {**files, "pairs.json": pairs_to_json(report)}.items():
        write_atomically(folder / name, data)
