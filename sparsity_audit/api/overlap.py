"""Overlaps of two or more runs against named chance levels, end to end.

Contract: `overlap` makes the masks of checkpoints in a temporary directory, checks that all masks speak of
the same thing, counts every pair in one pass over the bits and returns an `OverlapReport`; with `output` it
also writes it. Bits are read only of masks that belong together. Defaults live here and nowhere below.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

from sparsity_audit.align.roles import LayerModuleKeys
from sparsity_audit.api.across_runs import across_runs
from sparsity_audit.api.diff import diff
from sparsity_audit.api.engines import EngineName, open_engine
from sparsity_audit.api.overlap_inputs import (
    OpenedRuns,
    agreement,
    base_strata,
    named_runs,
    open_runs,
    place_of,
    verified,
)
from sparsity_audit.api.overlap_nulls import (
    Compared,
    MoreNulls,
    NullChoice,
    WalkQuestion,
    more_nulls,
    random_walk,
)
from sparsity_audit.api.runs_file import labels_of, question_of
from sparsity_audit.api.sides import open_base
from sparsity_audit.checkpoint.store import Catalogue
from sparsity_audit.errors import UsageError
from sparsity_audit.masks.algebra import CombinedSource
from sparsity_audit.masks.metadata import tool_name
from sparsity_audit.masks.reader import MaskReader
from sparsity_audit.passes.many import count_overlaps
from sparsity_audit.report.output import verify_free, write_below
from sparsity_audit.report.overlap import (
    GroupOverlap,
    LeftOutTensor,
    OverlapReport,
    PairRecord,
    RunRecord,
    WalkRecord,
)
from sparsity_audit.report.overlap_criteria import CRITERIA_FILES, criterion_folder, render_criteria
from sparsity_audit.report.overlap_files import FILE_NAMES, write_overlap
from sparsity_audit.stats.agreement import DeltaAgreement
from sparsity_audit.stats.chance import Expectation
from sparsity_audit.stats.ladder import attribution
from sparsity_audit.stats.overlap import MAGNITUDE, PairOverlap, overlap_by, pair_overlap
from sparsity_audit.stats.uncertainty import block_heterogeneity
from sparsity_audit.types import Criterion, View

__all__ = ["overlap", "overlap_criteria"]

_DRAWS = 2000


def overlap(
    runs: str | Path | Sequence[str | Path],
    *,
    base: str | Path | None = None,
    reference: str | Path | None = None,
    criterion: Criterion | str | None = None,
    view: View | str | None = None,
    maps: Sequence[tuple[str, str]] = (),
    nulls: NullChoice = "auto",
    walk: tuple[int, float] | None = None,
    seed: int = 0,
    force: bool = False,
    output: str | Path | None = None,
    overwrite: bool = False,
    figures: bool = False,
    workers: int | None = None,
    engine: EngineName = "threads",
    on_note: Callable[[str], None] | None = None,
) -> OverlapReport:
    """Compare what several runs changed, pair by pair, with what chance would give.

    Args:
        runs: Mask directories, or checkpoints tuned from `base`; two or more with `reference`. Or one YAML
            file that lists runs and their factors; what is given here wins over what the file says.
        base: The checkpoint that all runs started from; gives the magnitude null, and checkpoints need it.
        reference: The run that learned nothing (shuffled rewards, for instance); one of `runs`, by path or
            by its label in the file, or one more.
        criterion: What "changed" means for checkpoints; default that of the masks, else `value`.
        view: `native` or `served`; default that of the masks, else `native`.
        maps: (REGEX, REPL) rules that rename tensors of checkpoints to base names.
        nulls: `auto` computes every null that applies, but fits rows and columns only where that takes about
            a minute of one core; `all` does so at any size; `counts` stops at those that follow from counts.
        walk: Steps and learning rate of a walk of weights stored in bf16, simulated beside the nulls.
        seed: Of the walk, and of the resamples behind heterogeneity.
        force: Compare masks of different bases, criteria, views or tensors all the same: entries that all of
            them compare are counted, and what differs stands in the report's notes.
        output: Directory for record, tables and figure; nothing is written without it.
        overwrite: Replace what an earlier run left there.
        figures: Draw figures into `output` as well.
        workers: Threads; default one a core, at most 8. With an engine, tasks at once.
        engine: `threads` or `ray`, as in `diff`.
        on_note: Called with lines for the user.

    Raises:
        MaskError: The masks do not belong together, one is damaged, or `base` is not theirs.
        UsageError: Fewer than two runs, one given twice, a file of runs that is not understood, or a walk
            without steps or size.
        SparsityAuditError: As `diff` of a checkpoint.
    """
    note = on_note or (lambda _text: None)
    asked = question_of(runs, base=base, reference=reference, criterion=criterion, view=view)
    base, reference = asked.base, asked.reference
    given = named_runs(asked.runs, reference)
    control = None if reference is None else place_of(given, reference)
    question = _walk_question(walk, seed)
    if output is not None:
        verify_free(Path(output), FILE_NAMES, inputs=given, overwrite=overwrite)
    with ExitStack() as stack:
        running = stack.enter_context(open_engine(engine, workers=workers))
        make = partial(diff, maps=maps, stats="counts", workers=workers, engine=engine, on_note=note)
        inputs = open_runs(
            given, stack, base=base, criterion=asked.criterion, view=asked.view, make=make, note=note
        )
        readers = [stack.enter_context(MaskReader(catalogue)) for catalogue in inputs.masks]
        combined, notes = verified(given, readers, force=force)
        catalogue = None if base is None else open_base(base)
        strata, finer = None, None
        if catalogue is not None:
            strata, finer = base_strata(inputs, readers, catalogue, stack, force=force)
        compared = Compared(
            masks=inputs.masks,
            tensors=combined.tensors,
            tables=count_overlaps(
                inputs.masks,
                combined.tensors,
                grouping=strata,
                core_of=[place for place in range(len(given)) if place != control],
                workers=running,
            ),
            pairs=tuple(combinations(range(len(given)), 2)),
            criterion=combined.metadata.criterion,
            view=combined.metadata.view,
            strata=strata,
            finer=finer,
            workers=running,
        )
        found = more_nulls(compared, nulls, on_note=note)
        walked, lost = (None, []) if question is None else random_walk(compared, question)
        deltas, delta_notes = agreement(
            inputs, given, catalogue, view=compared.view, maps=maps, workers=running
        )
        if catalogue is not None:
            catalogue.verify_unchanged()
    report = _Build(
        inputs=inputs,
        given=given,
        labels=labels_of(asked, given),
        control=control,
        compared=compared,
        nulls=found,
        walk=walked,
        deltas=deltas,
        base=catalogue,
        combined=combined,
        notes=(*notes, *found.notes, *lost, *delta_notes),
        seed=seed,
    ).report()
    report = across_runs(report, compared.tables, asked.levels)
    if output is not None:
        write_overlap(report, Path(output), figures=figures)
    return report


def overlap_criteria(
    runs: str | Path | Sequence[str | Path],
    *,
    criteria: Sequence[Criterion | str],
    output: str | Path | None = None,
    overwrite: bool = False,
    figures: bool = False,
    **options: Any,
) -> tuple[OverlapReport, ...]:
    """`overlap` under several criteria, each with masks of its own, and one table and figure of them all.

    Args:
        runs: Checkpoints, or one YAML file of them; a mask has one criterion.
        criteria: Two or more, for instance `top:1%`, `top:5%`, `top:20%`.
        output: Directory for the table and the figure; each criterion gets a directory of its own below it.
        overwrite: Replace what an earlier run left there.
        figures: Draw figures as well.
        **options: As `overlap`.

    Raises:
        SparsityAuditError: As `overlap`; nothing is written then but what earlier criteria wrote.
    """
    folder = None if output is None else Path(output)
    if folder is not None:
        given = [runs] if isinstance(runs, (str, Path)) else runs
        verify_free(folder, CRITERIA_FILES, inputs=[str(run) for run in given], overwrite=overwrite)
    reports = tuple(
        overlap(
            runs,
            criterion=criterion,
            output=None if folder is None else folder / criterion_folder(str(criterion)),
            overwrite=overwrite,
            figures=figures,
            **options,
        )
        for criterion in criteria
    )
    if folder is not None:
        for name, data in render_criteria(reports, figures=figures).items():
            write_below(folder, name, data)
    return reports


def _walk_question(walk: tuple[int, float] | None, seed: int) -> WalkQuestion | None:
    if walk is None:
        return None
    steps, lr = walk
    if steps < 1 or not 0 < lr < float("inf"):
        raise UsageError("walk", f"{steps} steps of {lr}", expected="at least one step of a positive size")
    return WalkQuestion(steps=steps, lr=lr, seed=seed)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Build:
    """All that was found, and the report made of it."""

    inputs: OpenedRuns
    given: Sequence[str]
    labels: Sequence[str]
    control: int | None
    compared: Compared
    nulls: MoreNulls
    walk: WalkRecord | None
    deltas: Mapping[tuple[int, int], DeltaAgreement]
    base: Catalogue | None
    combined: CombinedSource
    notes: tuple[str, ...]
    seed: int

    def report(self) -> OverlapReport:
        tables, control, labels = self.compared.tables, self.control, self.labels
        compared = sum(int(table.entries.sum()) for table in tables)
        notes = self.notes
        if self.base is None:
            notes = (*notes, "no magnitude null: it needs the weights of the base; --base BASE adds it")
        changed = [sum(int(table.changed[r].sum()) for table in tables) for r in range(len(labels))]
        config = {} if self.base is None else self.base.config
        keys = LayerModuleKeys((table.tensor for table in tables), config)
        pairs = sorted(self.compared.pairs, key=lambda pair: control in pair)
        return OverlapReport(
            tool=tool_name(),
            criterion=self.compared.criterion,
            view=self.compared.view,
            base=None if self.base is None else self.base.resolved_label,
            compared=compared,
            runs=tuple(
                RunRecord(
                    label=labels[r],
                    reference=self.given[r],
                    kind=self.inputs.kinds[r],
                    changed=changed[r],
                    density=changed[r] / compared if compared else None,
                    is_reference=r == control,
                )
                for r in range(len(labels))
            ),
            pairs=tuple(self._pair(pair, keys) for pair in pairs),
            walk=self.walk,
            left_out=tuple(
                LeftOutTensor(name=lost.name, reason=lost.reason) for lost in self.combined.left_out
            ),
            notes=notes,
        )

    def _pair(self, pair: tuple[int, int], keys: LayerModuleKeys) -> PairRecord:
        r, q = pair
        overall, control = self._overall(pair), self.control
        beside, label = None, ""
        if control is not None and control not in pair:
            beside, label = self._overall((min(r, control), max(r, control))), self.labels[control]
        ladder = attribution(overall, beside, reference_label=f"the reference {label}")
        by_tensor = self._groups(pair, lambda name: name)
        blocks = [part.overlap for part in by_tensor]
        return PairRecord(
            a=self.labels[r],
            b=self.labels[q],
            overall=overall,
            ladder=ladder,
            by_layer=self._groups(pair, keys.layer),
            by_module=self._groups(pair, keys.module),
            by_tensor=by_tensor,
            convergence=self.nulls.convergence.get(pair, ()),
            phantom=self.nulls.phantoms.get(pair),
            heterogeneity=block_heterogeneity(blocks, ladder.residual_null, draws=_DRAWS, seed=self.seed),
            delta=self.deltas.get(pair),
        )

    def _overall(self, pair: tuple[int, int]) -> PairOverlap:
        of_tensor = list(self.nulls.expectations.get(pair, {}).values())
        names = of_tensor[0] if of_tensor else {}
        others = {null: Expectation.total([part[null] for part in of_tensor]) for null in names}
        return self._known(pair_overlap(self.compared.tables, *pair, others=others))

    def _groups(self, pair: tuple[int, int], key: Callable[[str], str | None]) -> tuple[GroupOverlap, ...]:
        found = overlap_by(self.compared.tables, key, *pair, others=self.nulls.expectations.get(pair))
        return tuple(GroupOverlap(key=name, overlap=self._known(part)) for name, part in found.items())

    def _known(self, found: PairOverlap) -> PairOverlap:
        """Without strata of a base, what the counts call magnitude is the per-tensor null again."""
        if self.base is not None:
            return found
        return replace(found, nulls={name: null for name, null in found.nulls.items() if name != MAGNITUDE})
