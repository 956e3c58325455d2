"""What happens to the weights along a run, from its saved steps, end to end.

Contract: `series` reads the base and every step once and returns a `SeriesReport`; with `output` it also
writes it. Defaults live here and nowhere below.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from sparsity_audit.align.roles import LayerModuleKeys
from sparsity_audit.api.engines import EngineName, open_engine
from sparsity_audit.api.series_steps import SavedStep, saved_steps, weights_beside
from sparsity_audit.api.sides import open_against, open_base
from sparsity_audit.checkpoint.store import Catalogue
from sparsity_audit.errors import AlignmentError, UsageError
from sparsity_audit.masks.metadata import tool_name
from sparsity_audit.passes.series import SeriesPass, count_series
from sparsity_audit.report.output import verify_free, write_below
from sparsity_audit.report.series import PartTrajectory, SeriesReport, SeriesStep, UnreadTensor
from sparsity_audit.report.series_files import SERIES_FILES, render_series
from sparsity_audit.stats.trajectory import TrajectoryCounts, trajectory_record
from sparsity_audit.types import Criterion, View

__all__ = ["series"]

_LAGS = (1, 2, 5)


def series(
    base: str | Path,
    steps: Sequence[str | Path],
    *,
    criterion: Criterion | str = "value",
    view: View | str = View.NATIVE,
    lags: Sequence[int] = _LAGS,
    maps: Sequence[tuple[str, str]] = (),
    output: str | Path | None = None,
    overwrite: bool = False,
    figures: bool = False,
    workers: int | None = None,
    engine: EngineName = "threads",
    on_note: Callable[[str], None] | None = None,
) -> SeriesReport:
    """Follow a run from its base over its saved steps.

    Args:
        base: θ_0: what the run started from.
        steps: θ_1 … θ_T in order, or folders that hold `checkpoint-*`, `step-*` or the like, taken by number.
        criterion: What changed means against the base: any but `top`, whose mask is as large at every step.
        view: `native` or `served`. Codes are compared step to step as stored.
        lags: Values of k for step-to-step sparsity S_k, in saved steps; 1 is always among them.
        maps: (REGEX, REPL) rules that rename tensors of the steps to base names.
        output: Directory for record, tables and figures; nothing is written without it.
        overwrite: Replace what an earlier run left there.
        figures: Draw figures into `output` as well.
        workers: Threads; default one a core, at most 8. With an engine, tasks at once.
        engine: `threads` or `ray`, as in `diff`.
        on_note: Called with lines for the user.

    Raises:
        UsageError: No step, one twice, or a criterion or lag that makes no sense here.
        AlignmentError: Nothing is compared in every step.
        SparsityAuditError: As `diff` of a checkpoint.
    """
    note = on_note or (lambda _text: None)
    asked = Criterion.parse(criterion) if isinstance(criterion, str) else criterion
    chosen_lags = _checked_lags(lags)
    if asked.kind == "top":
        raise UsageError(
            asked.key,
            "a mask of the largest movements is as large at every step",
            expected="bitwise, value, atol:X, rel:X or ulp:K",
            remedy="compare such masks with `overlap`",
        )
    found = saved_steps(steps)
    if output is not None:
        verify_free(
            Path(output), SERIES_FILES, inputs=[step.reference for step in found], overwrite=overwrite
        )
    opened = open_base(base)
    catalogues = [open_against(opened, step.reference) for step in found]
    for text in (text for catalogue in (opened, *catalogues) for text in catalogue.notes):
        note(text)
    with open_engine(engine, workers=workers) as running:
        counted = count_series(
            opened,
            catalogues,
            criterion=asked,
            view=View(view),
            lags=chosen_lags,
            maps=maps,
            workers=running,
        )
    if not counted.counts:
        raise AlignmentError(
            f"{base} and {len(found)} steps",
            "no tensor is compared in every step",
            expected="checkpoints of one model",
            remedy="rename with --map REGEX=REPL",
        )
    beside = [
        f"not taken: {place}, which has weights too; give it as a last step if it is one"
        for place in weights_beside(steps)
    ]
    report = _report(opened, catalogues, found, counted, asked, View(view), chosen_lags)
    report = replace(report, notes=(*report.notes, *beside))
    if output is not None:
        for name, data in render_series(report, figures=figures).items():
            write_below(Path(output), name, data)
    return report


def _checked_lags(lags: Sequence[int]) -> tuple[int, ...]:
    wrong = [lag for lag in lags if lag < 1]
    if wrong:
        raise UsageError("lags", f"{wrong[0]}", expected="numbers of saved steps, 1 or more")
    return tuple(sorted({1, *lags}))


def _report(
    base: Catalogue,
    catalogues: Sequence[Catalogue],
    steps: Sequence[SavedStep],
    counted: SeriesPass,
    criterion: Criterion,
    view: View,
    lags: tuple[int, ...],
) -> SeriesReport:
    labels = [step.label for step in steps]
    keys = LayerModuleKeys(counted.counts, base.config)

    def record(parts: Sequence[TrajectoryCounts]):
        return trajectory_record(parts, labels=labels, lags=lags)

    def groups(key: Callable[[str], str | None]) -> tuple[PartTrajectory, ...]:
        found = _grouped(counted.counts, key)
        return tuple(PartTrajectory(key=name, trajectory=record(parts)) for name, parts in found.items())

    overall = record(list(counted.counts.values()))
    return SeriesReport(
        tool=tool_name(),
        criterion=criterion.key,
        view=view.value,
        base=base.resolved_label,
        steps=tuple(
            SeriesStep(label=step.label, number=step.number, resolved=catalogue.resolved_label)
            for step, catalogue in zip(steps, catalogues, strict=True)
        ),
        lags=lags,
        overall=overall,
        by_layer=groups(keys.layer),
        by_module=groups(keys.module),
        by_tensor=groups(lambda name: name),
        left_out=tuple(UnreadTensor(name=n, reason=r) for n, r in counted.left_out.items()),
        notes=tuple(_notes(steps, counted, overall.entries)),
    )


def _grouped(
    counts: Mapping[str, TrajectoryCounts], key: Callable[[str], str | None]
) -> dict[str, list[TrajectoryCounts]]:
    found: dict[str, list[TrajectoryCounts]] = {}
    for name, part in counts.items():
        group = key(name)
        if group is not None:
            found.setdefault(group, []).append(part)
    return found


def _notes(steps: Sequence[SavedStep], counted: SeriesPass, entries: int) -> list[str]:
    notes = ["as fine as the saved steps: what changed and came back between two of them is not seen"]
    numbers = [step.number for step in steps if step.number is not None]
    if numbers != sorted(numbers):
        notes.append("the numbers of the steps do not ascend in the order given; their order was kept")
    moved = np.sum([part.moved[0] for part in counted.counts.values()], axis=0)
    still = [step.label for step, count in zip(steps, moved, strict=True) if entries and not count]
    if still:
        notes.append(f"no code differs from the saved step before at: {', '.join(still[:5])}")
    return notes
