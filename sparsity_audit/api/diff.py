"""The audit of one pair of checkpoints, end to end.

Contract: `diff` opens both sides, matches them, runs one streaming pass and returns a `DiffReport`; with
`output` or `mask` it also writes them, resumably. `plan_diff` stops before any data is read. Defaults live
here and nowhere below.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sparsity_audit.align.match import match
from sparsity_audit.align.records import Alignment
from sparsity_audit.api.gates import Expectations, judge
from sparsity_audit.api.presets import apply_preset, preset_criteria
from sparsity_audit.api.sides import open_sides
from sparsity_audit.api.structure import StructureChoice, count_nulls, verify_choice
from sparsity_audit.checkpoint.store import Catalogue
from sparsity_audit.compare.accumulate import Kernel, Level
from sparsity_audit.compare.dispatch import KernelName, load_kernel, resolve_device
from sparsity_audit.compare.pair import PairSpec
from sparsity_audit.errors import AlignmentError, OutputError, UsageError
from sparsity_audit.masks.container import MaskWriter
from sparsity_audit.passes.execute import run_plan
from sparsity_audit.passes.journal import Journal
from sparsity_audit.passes.mask_sink import MaskSink, mask_fingerprints, mask_metadata, mask_tensors
from sparsity_audit.passes.plan import Plan, WorkUnit, default_criteria, make_plan
from sparsity_audit.passes.probe import probe_shrinks
from sparsity_audit.passes.spectral import SpectralPlan, choose_spectral, measure_spectra
from sparsity_audit.passes.topk import TopSelection, select_top
from sparsity_audit.report.build import ReportInputs, build_report
from sparsity_audit.report.output import OutputDirectory
from sparsity_audit.report.schema import AccountRecord, DiffReport, PlanSummary
from sparsity_audit.seams import reached
from sparsity_audit.stats.tally import Tally
from sparsity_audit.types import Criterion, DType, View

__all__ = ["diff", "plan_diff"]

_UNIT_BYTES = 64 << 20
_MAX_WORKERS = 8
_SPECTRAL_MAX_DIM = 4096
_WEIGHTS_DTYPES = {"bf16": DType.BF16, "fp32": DType.F32}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prepared:
    base: Catalogue
    tuned: Catalogue
    alignment: Alignment
    plan: Plan
    criterion: Criterion
    tops: tuple[Criterion, ...]


def plan_diff(
    base: str | Path | Catalogue,
    tuned: str | Path | Catalogue,
    *,
    criteria: Sequence[Criterion | str] = (),
    view: View | str = View.NATIVE,
    maps: Sequence[tuple[str, str]] = (),
    stats: Level = "full",
    spectral: Sequence[str] = (),
    spectral_max_dim: int = _SPECTRAL_MAX_DIM,
    unit_bytes: int | None = None,
) -> PlanSummary:
    """What `diff` would compare, from headers alone. Arguments and errors as there."""
    prepared = _prepare(
        base,
        tuned,
        criteria=criteria,
        view=view,
        maps=maps,
        stats=stats,
        unit_bytes=unit_bytes,
        skip_equal=not spectral,
    )
    plan, alignment = prepared.plan, prepared.alignment
    lost = [f"{left.side} {left.name}: {left.reason}" for left in alignment.leftovers]
    lost += [f"skipped {pair.name}: {pair.reason}" for pair in alignment.skipped]
    return PlanSummary(
        base=prepared.base.resolved,
        tuned=prepared.tuned.resolved,
        num_pairs=len(plan.pairs),
        num_units=len(plan.units),
        num_entries=plan.num_entries,
        num_bytes=plan.num_bytes,
        accounts=AccountRecord(base=alignment.account("base"), tuned=alignment.account("tuned")),
        criteria=tuple(c.key for c in (*_counted(criteria, stats), *prepared.tops)),
        leftovers=tuple(lost),
        findings=alignment.findings,
        spectral_cost=choose_spectral(plan, spectral, max_dim=spectral_max_dim).note if spectral else "",
    )


def diff(
    base: str | Path | Catalogue,
    tuned: str | Path | Catalogue,
    *,
    criteria: Sequence[Criterion | str] = (),
    view: View | str = View.NATIVE,
    maps: Sequence[tuple[str, str]] = (),
    stats: Level = "full",
    structure: StructureChoice = "auto",
    spectral: Sequence[str] = (),
    spectral_max_dim: int = _SPECTRAL_MAX_DIM,
    lr: float | None = None,
    weights_dtype: str | None = None,
    preset: str | None = None,
    output: str | Path | None = None,
    mask: str | Path | None = None,
    overwrite: bool = False,
    figures: bool = False,
    parquet: bool = False,
    expectations: Expectations | None = None,
    workers: int | None = None,
    kernel: KernelName = "auto",
    device: str = "auto",
    unit_bytes: int | None = None,
    on_note: Callable[[str], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> DiffReport:
    """Compare two checkpoints entry by entry.

    Args:
        base: Directory, file or Hub reference of the base, or a catalogue opened before.
        tuned: The same for the tuned side.
        criteria: Criteria beside `bitwise`, `value`, `atol:1e-5`, `rel:1e-3`; the first one decides the
            mask, row and column counts and the sparsity gates (default `value`).
        view: Which view decides those; both are reported.
        maps: (REGEX, REPL) rules that rename tuned tensors to base names.
        stats: `full`, or `counts` for criteria, fingerprints and masks alone.
        structure: `on` reads the base's matrices a second time, for the stripe scores that magnitudes alone
            give; `auto` does so for a base below 2 GB.
        spectral: Globs of the matrices whose spectra are measured; `on_note` gets the cost first.
        spectral_max_dim: Matrices with a longer side are estimated from a sketch.
        lr: Peak learning rate, for the half-ULP law.
        weights_dtype: `bf16` or `fp32`: how the trainer kept the weights between steps.
        preset: `mukherjee2025` or `zhu2025`: also compute what that paper computes.
        output: Directory for the report; nothing is written without it.
        mask: Directory for the update mask.
        overwrite: Replace what an earlier run left in `output` and `mask`.
        figures: Write figures to `output` as well; about three seconds, whatever the checkpoint's size.
        parquet: Write `tensors.parquet` to `output` as well; needs the extra `parquet`.
        expectations: Gates to judge.
        workers: Threads; default one a core, at most 8.
        kernel: `auto`, `numpy`, `numba` or `reference`; the result is the same.
        device: `auto`, `cpu`, `cuda`, `cuda:N`.
        unit_bytes: Aim of a work unit's bytes a side; the result is the same.
        on_note: Called with lines for the user.
        on_progress: Called with bytes done and bytes in all, both sides.

    Raises:
        SparsityAuditError: See its children; nothing is left half-written.
    """
    started = time.time()
    note = on_note or (lambda _text: None)
    expectations = expectations or Expectations()
    if preset is not None:
        criteria = preset_criteria(preset, criteria)
    prepared = _prepare(
        base,
        tuned,
        criteria=criteria,
        view=view,
        maps=maps,
        stats=stats,
        unit_bytes=unit_bytes,
        skip_equal=mask is None and not spectral,
    )
    for text in (*prepared.base.notes, *prepared.tuned.notes):
        note(text)
    expectations.verify_patterns(prepared.alignment)
    half_ulp = _half_ulp_question(lr, weights_dtype)
    spectra = choose_spectral(prepared.plan, spectral, max_dim=spectral_max_dim) if spectral else None
    if spectra is not None:
        note(spectra.note)
    verify_choice(structure, stats)
    if parquet:
        from sparsity_audit.report.parquet import verify_parquet

        verify_parquet()
    workers = workers or min(_MAX_WORKERS, len(os.sched_getaffinity(0)))
    where = resolve_device(device)
    with ExitStack() as stack:
        outputs = _Outputs(prepared, stack, output=output, mask=mask, overwrite=overwrite, view=View(view))
        if outputs.num_resumed:
            note(f"resuming: {outputs.num_resumed} of {len(prepared.plan.units)} work units are done already")
        report, tallies = _measure(
            prepared,
            outputs,
            view=View(view),
            stats=stats,
            structure=structure,
            half_ulp=half_ulp,
            kernel=load_kernel(kernel, num_bytes=prepared.plan.num_bytes, device=where),
            workers=workers,
            on_note=note,
            on_progress=on_progress,
        )
        report = replace(report, gates=judge(expectations, report))
        report = _with_spectra(report, prepared, tallies, spectra)
        if preset is not None:
            report = replace(report, preset=apply_preset(report, preset))
        facts = {"started": started, "workers": workers, "device": where}
        outputs.finish(report, tallies, facts=facts, figures=figures, parquet=parquet)
    return report


def _measure(
    prepared: _Prepared,
    outputs: _Outputs,
    *,
    view: View,
    stats: Level,
    structure: StructureChoice,
    half_ulp: tuple[float, DType] | None,
    kernel: Kernel,
    workers: int,
    on_note: Callable[[str], None],
    on_progress: Callable[[int, int], None] | None,
) -> tuple[DiffReport, tuple[Tally, ...]]:
    """Run the passes over the bytes; returns the report, still without gates, and what was counted."""
    tallies = run_plan(
        prepared.plan,
        kernel=kernel,
        workers=workers,
        journal=outputs.journal,
        bits=outputs.sink if prepared.criterion.kind != "top" else None,
        on_unit=_unit_progress(prepared.plan, on_progress),
    )
    tallies, selections = _select_tops(prepared, tallies, view, workers, outputs.sink)
    nulls, nulls_note = count_nulls(
        prepared.plan, tallies, choice=structure, view=view, workers=workers, on_note=on_note
    )
    inputs = ReportInputs(
        base=prepared.base,
        tuned=prepared.tuned,
        alignment=prepared.alignment,
        specs=prepared.plan.specs,
        tallies=tallies,
        criterion=prepared.criterion,
        tops=selections,
        view=view,
        level=stats,
        half_ulp=half_ulp,
        nulls=nulls,
        nulls_note=nulls_note,
    )
    return build_report(inputs), tallies


def _prepare(
    base: str | Path | Catalogue,
    tuned: str | Path | Catalogue,
    *,
    criteria: Sequence[Criterion | str],
    view: View | str,
    maps: Sequence[tuple[str, str]],
    stats: Level,
    unit_bytes: int | None,
    skip_equal: bool,
) -> _Prepared:
    asked = [c if isinstance(c, Criterion) else Criterion.parse(c) for c in criteria]
    counted = _counted(criteria, stats)
    chosen = asked[0] if asked else Criterion.parse("value")
    sides = open_sides(base, tuned)
    alignment = match(*sides, maps=tuple(maps))
    if not alignment.pairs:
        raise AlignmentError(
            f"{sides[0].reference} and {sides[1].reference}",
            f"no tensor of {len(sides[0].tensors)} and {len(sides[1].tensors)} can be compared",
            remedy="check that both are the same architecture; rename with --map REGEX=REPL",
        )
    shrinks: Sequence[float | None] = [None] * len(alignment.pairs)
    if stats == "full":
        shrinks = probe_shrinks(*sides, alignment.pairs)
    specs = tuple(
        PairSpec(
            base=pair.base.spec.dtype,
            tuned=pair.tuned.spec.dtype,
            criteria=counted,
            mask=counted.index(chosen) if chosen in counted else 1,
            view=View(view),
            level=stats,
            shrink=shrink,
        )
        for pair, shrink in zip(alignment.pairs, shrinks, strict=True)
    )
    tops = tuple(dict.fromkeys(c for c in asked if c.kind == "top"))
    plan = make_plan(
        *sides,
        alignment,
        specs=specs,
        unit_bytes=unit_bytes or _UNIT_BYTES,
        # Masks, and draws that are keyed by fingerprints, need those of every tensor.
        skip_equal=skip_equal and not tops,
    )
    return _Prepared(
        base=sides[0],
        tuned=replace(sides[1], notes=(*sides[1].notes, *plan.notes)),
        alignment=alignment,
        plan=plan,
        criterion=chosen,
        tops=tops,
    )


def _counted(criteria: Sequence[Criterion | str], level: Level) -> tuple[Criterion, ...]:
    asked = tuple(c if isinstance(c, Criterion) else Criterion.parse(c) for c in criteria)
    return default_criteria(asked, level=level)


def _half_ulp_question(lr: float | None, weights_dtype: str | None) -> tuple[float, DType] | None:
    if (lr is None) != (weights_dtype is None):
        raise UsageError(
            "--lr and --weights-dtype",
            "one is given without the other",
            expected="both: the half-ULP law holds for weights stored in bf16 between steps",
        )
    if lr is None or weights_dtype is None:
        return None
    if not 0 < lr < float("inf"):
        raise UsageError("--lr", f"{lr} is no learning rate", expected="a positive number")
    if weights_dtype not in _WEIGHTS_DTYPES:
        raise UsageError("--weights-dtype", repr(weights_dtype), expected=" or ".join(_WEIGHTS_DTYPES))
    return lr, _WEIGHTS_DTYPES[weights_dtype]


def _unit_progress(
    plan: Plan, on_progress: Callable[[int, int], None] | None
) -> Callable[[WorkUnit], None] | None:
    if on_progress is None:
        return None
    done, total = 0, plan.num_bytes

    def advance(unit: WorkUnit) -> None:
        nonlocal done
        spec = plan.specs[unit.pair]
        done += unit.num_entries * (spec.base.itemsize + spec.tuned.itemsize)
        on_progress(done, total)

    return advance


def _with_spectra(
    report: DiffReport, prepared: _Prepared, tallies: Sequence[Tally], chosen: SpectralPlan | None
) -> DiffReport:
    if chosen is None:
        return report
    spectra = measure_spectra(prepared.plan, tallies, chosen, criterion=prepared.criterion, view=report.view)
    return replace(report, spectral=spectra)


def _select_tops(
    prepared: _Prepared, tallies: tuple[Tally, ...], view: View, workers: int, sink: MaskSink | None
) -> tuple[tuple[Tally, ...], tuple[TopSelection, ...]]:
    """Run the `top` criteria; their counts join the other criteria's in the view they were selected in."""
    found: list[TopSelection] = []
    for criterion in prepared.tops:
        bits = sink if criterion == prepared.criterion else None
        selections, selected = select_top(
            prepared.plan, tallies, criterion, view=view, workers=workers, bits=bits
        )
        found.extend(selections)
        tallies = tuple(
            tally.with_count(
                criterion.key,
                part.count,
                served=view is View.SERVED,
                lines=(part.rows, part.cols) if criterion == prepared.criterion else None,
            )
            for tally, part in zip(tallies, selected, strict=True)
        )
    return tallies, tuple(found)


class _Outputs:
    """Report directory, mask and journal of a run: opened before the pass, finished after it."""

    def __init__(
        self,
        prepared: _Prepared,
        stack: ExitStack,
        *,
        output: str | Path | None,
        mask: str | Path | None,
        overwrite: bool,
        view: View,
    ) -> None:
        self._prepared = prepared
        self._directory = None
        if output is not None:
            inputs = [file.path for file in (*prepared.base.files, *prepared.tuned.files)]
            self._directory = OutputDirectory(Path(output), overwrite=overwrite, inputs=inputs)
        self._writer: MaskWriter | None = None
        self.sink: MaskSink | None = None
        self.journal: Journal | None = None
        journal_path = self._journal_path(mask)
        if journal_path is None:
            return
        may_resume = journal_path.exists() and not overwrite
        suffix = "" if mask is None else f":mask:{prepared.criterion.key}"
        # The journal's lock comes before anything of an earlier run is touched.
        self.journal = Journal(journal_path, plan_key=prepared.plan.key + suffix, restart=overwrite)
        stack.callback(self.journal.close)
        if mask is not None:
            try:
                writer = self._open_mask(Path(mask), view=view, overwrite=overwrite, may_resume=may_resume)
            except OutputError:
                if not may_resume:
                    journal_path.unlink()  # or the next run would take what is there for its own
                raise
            stack.callback(writer.close)
            if not writer.reused:
                self.journal.restart()  # its units' bits are gone
        if overwrite and self._directory is not None:
            self._directory.clear()

    @property
    def num_resumed(self) -> int:
        """Units found done."""
        return 0 if self.journal is None else len(self.journal.done)

    def finish(
        self,
        report: DiffReport,
        tallies: Sequence[Tally],
        *,
        facts: dict[str, Any],
        figures: bool,
        parquet: bool,
    ) -> None:
        """Name the mask's files, write the report's, remove the journal."""
        if self._writer is not None:
            self._writer.finish(mask_fingerprints(self._prepared.plan.pairs, tallies))
            reached("mask finished")
        if self._directory is not None:
            from sparsity_audit.report.files import render_files

            files = render_files(
                report, self._prepared.plan.pairs, tallies, facts=facts, figures=figures, parquet=parquet
            )
            self._directory.finish(files)
        if self.journal is not None:
            self.journal.path.unlink(missing_ok=True)

    def _journal_path(self, mask: str | Path | None) -> Path | None:
        if self._directory is not None:
            return self._directory.journal
        if mask is None:
            return None
        path = Path(mask) if Path(mask).name not in ("", "..") else Path(mask).resolve()
        return path.parent / f"{path.name}.journal.jsonl"

    def _open_mask(self, path: Path, *, view: View, overwrite: bool, may_resume: bool) -> MaskWriter:
        if overwrite:
            _remove_mask(path)
        prepared = self._prepared
        self._writer = MaskWriter(
            path,
            mask_tensors(prepared.base, prepared.alignment),
            mask_metadata(prepared.base, prepared.tuned, criterion=prepared.criterion, view=view),
            resume=may_resume,
        )
        self.sink = MaskSink(self._writer)
        return self._writer


def _remove_mask(path: Path) -> None:
    """Remove the files of a mask, finished or not, and nothing else."""
    if not path.is_dir():
        return
    try:
        for file in (*path.glob("mask-*-of-*.safetensors*"), *path.glob("mask.safetensors.index.json*")):
            file.unlink()
    except OSError as error:
        raise OutputError(str(path), error.strerror or "cannot be written") from error
