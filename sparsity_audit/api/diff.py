"""The audit of one pair of checkpoints, end to end.

Contract: `diff` opens both sides, matches them, runs one streaming pass and returns a `DiffReport`; with
`output` or `mask` it also writes them, resumably. `plan_diff` stops before any data is read. `finish_diff` is
the half after the pass, which `merge` shares. Defaults live here and nowhere below.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from sparsity_audit.api.diff_outputs import DiffOutputs
from sparsity_audit.api.diff_question import (
    SPECTRAL_MAX_DIM,
    DiffQuestion,
    Prepared,
    counted_criteria,
    prepare,
)
from sparsity_audit.api.engines import EngineName, engine_facts, open_engine, resolve_engine_device
from sparsity_audit.api.gates import Expectations, judge
from sparsity_audit.api.presets import apply_preset
from sparsity_audit.api.structure import StructureChoice, count_nulls
from sparsity_audit.checkpoint.store import Catalogue
from sparsity_audit.compare.accumulate import Level
from sparsity_audit.compare.dispatch import KernelName, load_kernel
from sparsity_audit.passes.engine import Workers
from sparsity_audit.passes.execute import run_plan
from sparsity_audit.passes.mask_sink import MaskSink
from sparsity_audit.passes.plan import Plan, WorkUnit, expected_core_seconds
from sparsity_audit.passes.spectral import SpectralPlan, choose_spectral, measure_spectra
from sparsity_audit.passes.topk import TopSelection, select_top
from sparsity_audit.report.build import ReportInputs, build_report
from sparsity_audit.report.schema import AccountRecord, DiffReport, PlanSummary
from sparsity_audit.stats.tally import Tally
from sparsity_audit.types import Criterion, View

__all__ = ["diff", "finish_diff", "plan_diff", "spectral_plan", "unit_progress"]


def plan_diff(
    base: str | Path | Catalogue,
    tuned: str | Path | Catalogue,
    *,
    criteria: Sequence[Criterion | str] = (),
    view: View | str = View.NATIVE,
    maps: Sequence[tuple[str, str]] = (),
    stats: Level = "full",
    spectral: Sequence[str] = (),
    spectral_max_dim: int = SPECTRAL_MAX_DIM,
    unit_bytes: int | None = None,
) -> PlanSummary:
    """What `diff` would compare, from headers alone. Arguments and errors as there."""
    question = DiffQuestion.of(
        criteria=criteria, view=view, maps=maps, stats=stats, spectral=spectral, unit_bytes=unit_bytes
    )
    prepared = prepare(base, tuned, question, probe=False, skip_equal=True)
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
        criteria=tuple(c.key for c in (*counted_criteria(question), *prepared.tops)),
        leftovers=tuple(lost),
        findings=alignment.findings,
        expected_s=expected_core_seconds(plan),
        rate_bytes_s=plan.num_bytes / max(expected_core_seconds(plan), 1e-9),
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
    spectral_max_dim: int = SPECTRAL_MAX_DIM,
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
    engine: EngineName = "threads",
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
        workers: Threads; default one a core, at most 8. With an engine, tasks at once.
        kernel: `auto`, `numpy`, `numba` or `reference`; the result is the same.
        device: `auto`, `cpu`, `cuda`, `cuda:N`.
        unit_bytes: Aim of a work unit's bytes a side; the result is the same.
        engine: `threads`, or `ray`: work units on a Ray cluster (see `workers`); the result is the same.
        on_note: Called with lines for the user.
        on_progress: Called with bytes done and bytes in all, both sides.

    Raises:
        SparsityAuditError: See its children; nothing is left half-written.
    """
    started = time.time()
    note = on_note or (lambda _text: None)
    question = DiffQuestion.of(
        criteria=criteria,
        view=view,
        maps=maps,
        stats=stats,
        structure=structure,
        spectral=spectral,
        spectral_max_dim=spectral_max_dim,
        lr=lr,
        weights_dtype=weights_dtype,
        preset=preset,
        figures=figures,
        parquet=parquet,
        expectations=expectations,
        unit_bytes=unit_bytes,
    )
    prepared = prepare(base, tuned, question, skip_equal=mask is None)
    for text in (*prepared.base.notes, *prepared.tuned.notes):
        note(text)
    question.verify(prepared.alignment)
    spectra = spectral_plan(prepared.plan, question, on_note=note)
    where = resolve_engine_device(engine, device)
    with ExitStack() as stack:
        running = stack.enter_context(open_engine(engine, workers=workers, device=where))
        outputs = DiffOutputs(prepared, stack, output=output, mask=mask, overwrite=overwrite, view=View(view))
        if outputs.num_resumed:
            note(f"resuming: {outputs.num_resumed} of {len(prepared.plan.units)} work units are done already")
        tallies = run_plan(
            prepared.plan,
            kernel=load_kernel(kernel, num_bytes=prepared.plan.num_bytes, device=where),
            workers=running,
            journal=outputs.journal,
            bits=outputs.sink if prepared.criterion.kind != "top" else None,
            on_unit=unit_progress(prepared.plan, on_progress),
        )
        facts = {"started": started, "device": where, **engine_facts(engine, running)}
        return finish_diff(
            prepared, question, outputs, tallies, spectra=spectra, workers=running, facts=facts, on_note=note
        )


def finish_diff(
    prepared: Prepared,
    question: DiffQuestion,
    outputs: DiffOutputs,
    tallies: tuple[Tally, ...],
    *,
    spectra: SpectralPlan | None,
    workers: Workers,
    facts: dict[str, Any],
    on_note: Callable[[str], None],
) -> DiffReport:
    """Everything after the pass: top selections, second readings, the report, its gates, the files.

    Args:
        prepared: Both sides and the plan.
        question: What is asked.
        outputs: Where it goes; its mask holds the pass's bits.
        tallies: What the pass counted, in plan order.
        spectra: The matrices whose spectra are measured.
        workers: Threads.
        facts: What `run.json` says beside versions and host.
        on_note: Called with lines for the user.
    """
    view = question.view
    tallies, selections = _select_tops(prepared, tallies, view, workers, outputs.sink)
    nulls, nulls_note = count_nulls(
        prepared.plan, tallies, choice=question.structure, view=view, workers=workers, on_note=on_note
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
        level=question.stats,
        half_ulp=question.half_ulp,
        nulls=nulls,
        nulls_note=nulls_note,
    )
    report = build_report(inputs)
    report = replace(report, gates=judge(question.expectations, report))
    if spectra is not None:
        found = measure_spectra(prepared.plan, tallies, spectra, criterion=prepared.criterion, view=view)
        report = replace(report, spectral=found)
    if question.preset is not None:
        report = replace(report, preset=apply_preset(report, question.preset))
    outputs.finish(report, tallies, facts=facts, figures=question.figures, parquet=question.parquet)
    return report


def spectral_plan(
    plan: Plan, question: DiffQuestion, *, on_note: Callable[[str], None]
) -> SpectralPlan | None:
    """The matrices whose spectra are asked for, after their cost was told; None where none are."""
    if not question.spectral:
        return None
    chosen = choose_spectral(plan, question.spectral, max_dim=question.spectral_max_dim)
    on_note(chosen.note)
    return chosen


def unit_progress(
    plan: Plan, on_progress: Callable[[int, int], None] | None
) -> Callable[[WorkUnit], None] | None:
    """What tells `on_progress` of bytes done and in all when a unit ends."""
    if on_progress is None:
        return None
    done, total = 0, plan.num_bytes

    def advance(unit: WorkUnit) -> None:
        nonlocal done
        spec = plan.specs[unit.pair]
        done += unit.num_entries * (spec.base.itemsize + spec.tuned.itemsize)
        on_progress(done, total)

    return advance


def _select_tops(
    prepared: Prepared, tallies: tuple[Tally, ...], view: View, workers: Workers, sink: MaskSink | None
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
