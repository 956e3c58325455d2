"""Overlaps of two or more runs against named chance levels, end to end.

Contract: `overlap` makes the masks of checkpoints in a temporary directory, checks that all masks speak of
the same thing, counts every pair in one pass over the bits and returns an `OverlapReport`; with `output` it
also writes it. Bits are read only of masks that belong together. Defaults live here and nowhere below.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path

from sparsity_audit.align.roles import Role, role_of
from sparsity_audit.api.across_runs import across_runs
from sparsity_audit.api.diff import diff
from sparsity_audit.api.overlap_inputs import (
    OpenedRuns,
    base_strata,
    named_runs,
    open_runs,
    place_of,
    verified,
)
from sparsity_audit.api.runs_file import labels_of, question_of
from sparsity_audit.checkpoint.opening import open_checkpoint
from sparsity_audit.checkpoint.store import Catalogue
from sparsity_audit.errors import OutputError
from sparsity_audit.masks.algebra import CombinedSource
from sparsity_audit.masks.metadata import tool_name
from sparsity_audit.masks.reader import MaskReader
from sparsity_audit.passes.many import count_overlaps
from sparsity_audit.report.overlap import GroupOverlap, LeftOutTensor, OverlapReport, PairRecord, RunRecord
from sparsity_audit.report.overlap_files import FILE_NAMES, write_overlap
from sparsity_audit.stats.ladder import attribution
from sparsity_audit.stats.overlap import MAGNITUDE, PairOverlap, StratumTable, overlap_by, pair_overlap
from sparsity_audit.types import Criterion, View

__all__ = ["overlap"]

_MAX_WORKERS = 8


def overlap(
    runs: str | Path | Sequence[str | Path],
    *,
    base: str | Path | None = None,
    reference: str | Path | None = None,
    criterion: Criterion | str | None = None,
    view: View | str | None = None,
    maps: Sequence[tuple[str, str]] = (),
    force: bool = False,
    output: str | Path | None = None,
    overwrite: bool = False,
    figures: bool = False,
    workers: int | None = None,
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
        force: Compare masks of different bases, criteria, views or tensors all the same: entries that all of
            them compare are counted, and what differs stands in the report's notes.
        output: Directory for record, tables and figure; nothing is written without it.
        overwrite: Replace what an earlier run left there.
        figures: Draw the ladder into `output` as well.
        workers: Threads; default one a core, at most 8.
        on_note: Called with lines for the user.

    Raises:
        MaskError: The masks do not belong together, one is damaged, or `base` is not theirs.
        UsageError: Fewer than two runs, or one given twice; a file of runs that is not understood.
        SparsityAuditError: As `diff` of a checkpoint.
    """
    note = on_note or (lambda _text: None)
    asked = question_of(runs, base=base, reference=reference, criterion=criterion, view=view)
    base, reference = asked.base, asked.reference
    given = named_runs(asked.runs, reference)
    control = None if reference is None else place_of(given, reference)
    workers = workers or min(_MAX_WORKERS, len(os.sched_getaffinity(0)))
    if output is not None:
        _verify_output(Path(output), given, overwrite=overwrite)
    with ExitStack() as stack:
        make = partial(diff, maps=maps, stats="counts", workers=workers, on_note=note)
        inputs = open_runs(
            given, stack, base=base, criterion=asked.criterion, view=asked.view, make=make, note=note
        )
        readers = [stack.enter_context(MaskReader(catalogue)) for catalogue in inputs.masks]
        combined, notes = verified(given, readers, force=force)
        catalogue = None if base is None else open_checkpoint(base)
        grouping = None if catalogue is None else base_strata(inputs, readers, catalogue, stack, force=force)
        learned = [place for place in range(len(given)) if place != control]
        tables = count_overlaps(
            inputs.masks, combined.tensors, grouping=grouping, core_of=learned, workers=workers
        )
        if catalogue is not None:
            catalogue.verify_unchanged()
    report = _build(inputs, given, labels_of(asked, given), control, tables, catalogue, combined, notes)
    report = across_runs(report, tables, asked.levels)
    if output is not None:
        write_overlap(report, Path(output), figures=figures)
    return report


def _build(
    inputs: OpenedRuns,
    given: Sequence[str],
    labels: Sequence[str],
    control: int | None,
    tables: Sequence[StratumTable],
    base: Catalogue | None,
    combined: CombinedSource,
    notes: tuple[str, ...],
) -> OverlapReport:
    compared = sum(int(table.entries.sum()) for table in tables)
    if base is None:
        notes = (*notes, "no magnitude null: it needs the weights of the base; --base BASE adds it")
    changed = [sum(int(table.changed[r].sum()) for table in tables) for r in range(len(given))]
    config = {} if base is None else base.config
    keys = _Keys({table.tensor: role_of(table.tensor, config) for table in tables})
    pairs = sorted(combinations(range(len(given)), 2), key=lambda pair: control in pair)
    return OverlapReport(
        tool=tool_name(),
        criterion=combined.metadata.criterion,
        view=combined.metadata.view,
        base=None if base is None else base.resolved_label,
        compared=compared,
        runs=tuple(
            RunRecord(
                label=labels[r],
                reference=given[r],
                kind=inputs.kinds[r],
                changed=changed[r],
                density=changed[r] / compared if compared else None,
                is_reference=r == control,
            )
            for r in range(len(given))
        ),
        pairs=tuple(_pair(tables, r, q, labels, control, keys, has_base=base is not None) for r, q in pairs),
        left_out=tuple(LeftOutTensor(name=lost.name, reason=lost.reason) for lost in combined.left_out),
        notes=notes,
    )


def _pair(
    tables: Sequence[StratumTable],
    r: int,
    q: int,
    labels: Sequence[str],
    control: int | None,
    keys: _Keys,
    *,
    has_base: bool,
) -> PairRecord:
    def known(found: PairOverlap) -> PairOverlap:
        """Without strata of a base, what the counts call magnitude is the per-tensor null again."""
        if has_base:
            return found
        return replace(found, nulls={name: null for name, null in found.nulls.items() if name != MAGNITUDE})

    def groups(key: Callable[[str], str | None]) -> tuple[GroupOverlap, ...]:
        found = overlap_by(tables, key, r, q)
        return tuple(GroupOverlap(key=name, overlap=known(part)) for name, part in found.items())

    overall = known(pair_overlap(tables, r, q))
    beside, label = None, ""
    if control is not None and control not in (r, q):
        beside, label = known(pair_overlap(tables, r, control)), f"the reference {labels[control]}"
    return PairRecord(
        a=labels[r],
        b=labels[q],
        overall=overall,
        ladder=attribution(overall, beside, reference_label=label),
        by_layer=groups(keys.layer),
        by_module=groups(keys.module),
        by_tensor=groups(lambda name: name),
    )


class _Keys:
    """Layer and module of each tensor; layers carry their stack's name where there are several stacks."""

    def __init__(self, roles: Mapping[str, Role]) -> None:
        self._roles = roles
        self._several = len({role.stack for role in roles.values() if role.layer is not None}) > 1

    def layer(self, name: str) -> str | None:
        role = self._roles[name]
        if role.layer is None:
            return None
        return f"{role.stack}.{role.layer}" if self._several else str(role.layer)

    def module(self, name: str) -> str:
        return self._roles[name].module


def _verify_output(folder: Path, given: Sequence[str], *, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise OutputError(str(folder), "is a file", expected="a directory", remedy="choose another -o")
    if place_of(given, folder) is not None:
        raise OutputError(str(folder), "holds a run that is compared", remedy="choose another -o")
    there = [name for name in FILE_NAMES if (folder / name).exists()]
    if there and not overwrite:
        raise OutputError(
            str(folder),
            f"holds {', '.join(there[:3])}, which this run would replace",
            remedy="choose another -o, or add --overwrite",
        )
