"""Overlaps of two or more runs against named chance levels, end to end.

Contract: `overlap` makes the masks of checkpoints in a temporary directory, checks that all masks speak of
the same thing, counts every pair in one pass over the bits and returns an `OverlapReport`; with `output` it
also writes it. Bits are read only of masks that belong together. Defaults live here and nowhere below.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Literal

from sparsity_audit.align.roles import Role, role_of
from sparsity_audit.api.diff import diff
from sparsity_audit.checkpoint.opening import open_checkpoint
from sparsity_audit.checkpoint.store import Catalogue
from sparsity_audit.errors import MaskError, OutputError, UsageError
from sparsity_audit.masks.algebra import CombinedSource, Operand
from sparsity_audit.masks.metadata import tool_name
from sparsity_audit.masks.reader import MaskCatalogue, MaskReader, open_mask
from sparsity_audit.masks.shards import INDEX_NAME
from sparsity_audit.passes.base_strata import StrataGrouping
from sparsity_audit.passes.many import count_overlaps
from sparsity_audit.report.output import write_below
from sparsity_audit.report.overlap import GroupOverlap, LeftOutTensor, OverlapReport, PairRecord, RunRecord
from sparsity_audit.report.overlap_files import FILE_NAMES, render_overlap
from sparsity_audit.stats.ladder import attribution
from sparsity_audit.stats.overlap import MAGNITUDE, PairOverlap, StratumTable, overlap_by, pair_overlap
from sparsity_audit.types import Criterion, View

__all__ = ["overlap"]

_MAX_WORKERS = 8


def overlap(
    runs: Sequence[str | Path],
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
        runs: Mask directories, or checkpoints tuned from `base`; two or more with `reference`.
        base: The checkpoint that all runs started from; gives the magnitude null, and checkpoints need it.
        reference: The run that learned nothing (shuffled rewards, for instance); one of `runs`, or one more.
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
        UsageError: Fewer than two runs, or one given twice.
        SparsityAuditError: As `diff` of a checkpoint.
    """
    note = on_note or (lambda _text: None)
    given = _given(runs, reference)
    workers = workers or min(_MAX_WORKERS, len(os.sched_getaffinity(0)))
    if output is not None:
        _verify_output(Path(output), given, overwrite=overwrite)
    with ExitStack() as stack:
        make = partial(diff, maps=maps, stats="counts", workers=workers, on_note=note)
        inputs = _open_runs(given, stack, base=base, criterion=criterion, view=view, make=make, note=note)
        readers = [stack.enter_context(MaskReader(catalogue)) for catalogue in inputs.masks]
        combined, notes = _verified(given, readers, force=force)
        catalogue = None if base is None else open_checkpoint(base)
        grouping = None
        if catalogue is not None:
            made = [
                reader for reader, kind in zip(readers, inputs.kinds, strict=True) if kind == "checkpoint"
            ]
            like = made[0] if made else min(readers, key=lambda reader: len(reader.tensors))
            # What was made from this base a moment ago needs no proof that it was.
            grouping = stack.enter_context(
                closing(StrataGrouping(like, catalogue, force=force or bool(made)))
            )
        tables = count_overlaps(inputs.masks, combined.tensors, grouping=grouping, workers=workers)
        if catalogue is not None:
            catalogue.verify_unchanged()
    report = _build(inputs, given, reference, tables, catalogue, combined, notes)
    if output is not None:
        for name, data in render_overlap(report, figures=figures).items():
            write_below(Path(output), name, data)
    return report


def _given(runs: Sequence[str | Path], reference: str | Path | None) -> list[str]:
    """The runs as texts, the reference among them. Raises UsageError."""
    given = [str(run) for run in runs]
    if reference is not None and _place(given, reference) is None:
        given.append(str(reference))
    if len(given) < 2:
        raise UsageError("overlap", f"{len(given)} runs", expected="two or more masks or checkpoints")
    doubled = [text for text, count in Counter(map(_same_path, given)).items() if count > 1]
    if doubled:
        raise UsageError(
            doubled[0], "given twice", expected="different runs: a run overlaps with itself entirely"
        )
    return given


def _place(given: Sequence[str], run: str | Path) -> int | None:
    paths = [_same_path(text) for text in given]
    return paths.index(_same_path(str(run))) if _same_path(str(run)) in paths else None


def _same_path(text: str) -> str:
    path = Path(text).expanduser()
    return str(path.resolve()) if path.exists() else text


@dataclass(frozen=True, slots=True, kw_only=True)
class _Inputs:
    """The runs' masks and what they were made of; parallel."""

    masks: tuple[MaskCatalogue, ...]
    kinds: tuple[Literal["mask", "checkpoint"], ...]


def _open_runs(
    given: Sequence[str],
    stack: ExitStack,
    *,
    base: str | Path | None,
    criterion: Criterion | str | None,
    view: View | str | None,
    make: Callable[..., object],
    note: Callable[[str], None],
) -> _Inputs:
    """Open the masks, and make those of checkpoints under the same question."""
    masks = {run: open_mask(run) for run in given if (Path(run).expanduser() / INDEX_NAME).is_file()}
    question = _question(masks, criterion=criterion, view=view)
    missing = [run for run in given if run not in masks]
    if missing and base is None:
        raise MaskError(
            missing[0],
            "no mask directory",
            expected=f"a directory with {INDEX_NAME}, or a checkpoint beside its base",
            remedy="--base BASE compares checkpoints; `diff BASE RUN --mask DIR` makes a mask to keep",
        )
    if missing:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sparsity-audit-")))
        for number, run in enumerate(missing):
            note(f"making the mask of {run} ({question[0]}, {question[1]} view)")
            make(base, run, criteria=question[:1], view=question[1], mask=scratch / str(number))
            masks[run] = open_mask(scratch / str(number))
    return _Inputs(
        masks=tuple(masks[run] for run in given),
        kinds=tuple("checkpoint" if run in missing else "mask" for run in given),
    )


def _question(
    masks: Mapping[str, MaskCatalogue], *, criterion: Criterion | str | None, view: View | str | None
) -> tuple[str, str]:
    """Criterion and view of all runs: as asked, else those of the first mask. Raises MaskError."""
    asked = (
        None if criterion is None else Criterion.parse(str(criterion)).key,
        None if view is None else View(view).value,
    )
    for run, mask in masks.items():
        found = (mask.metadata.criterion, mask.metadata.view)
        for what, wanted, there in zip(("criterion", "view"), asked, found, strict=True):
            if wanted is not None and wanted != there:
                raise MaskError(
                    run,
                    f"a mask made under {what} {there!r}",
                    expected=f"{wanted!r}, as asked",
                    remedy=f"leave --{what} to the masks, or give the checkpoint in place of this mask",
                )
    first = next((mask.metadata for mask in masks.values()), None)
    known = ("value", View.NATIVE.value) if first is None else (first.criterion, first.view)
    return asked[0] or known[0], asked[1] or known[1]


def _strata(
    inputs: _Inputs, readers: Sequence[MaskReader], base: Catalogue, stack: ExitStack, *, force: bool
) -> StrataGrouping:
    """Strata of the base's weights. Raises MaskError where it is not known to be the masks' base."""
    made = [reader for reader, kind in zip(readers, inputs.kinds, strict=True) if kind == "checkpoint"]
    like = made[0] if made else min(readers, key=lambda reader: len(reader.tensors))
    # A mask made from this base a moment ago needs no proof of it, and the others share its base.
    return stack.enter_context(closing(StrataGrouping(like, base, force=force or bool(made))))


def _verified(
    given: Sequence[str], readers: Sequence[MaskReader], *, force: bool
) -> tuple[CombinedSource, tuple[str, ...]]:
    """What all masks compare, and what differs where that was forced. Raises MaskError."""
    operands = [Operand(path=run, source=reader) for run, reader in zip(given, readers, strict=True)]
    notes: list[str] = []
    try:
        combined = CombinedSource("and", operands)
    except MaskError as error:
        if not force:
            raise
        notes.append(f"forced: {error.subject}: {error.found}; what follows compares unlike things")
        combined = CombinedSource("and", operands, force=True)
    for name in combined.tensors:
        ranges = [reader.tensors[name].compared for reader in readers]
        other = next((place for place, found in enumerate(ranges) if found != ranges[0]), None)
        if other is None:
            continue
        subject = f"{given[0]} and {given[other]}: tensor {name!r}"
        found = f"compared rows {[list(pair) for pair in ranges[0]]!r:.80} and "
        found += f"{[list(pair) for pair in ranges[other]]!r:.80}"
        if not force:
            raise MaskError(
                subject, found, expected="the same rows", remedy="--force counts the rows compared in all"
            )
        notes.append(f"forced: {subject}: {found}; only common rows are counted")
    return combined, tuple(notes)


def _build(
    inputs: _Inputs,
    given: Sequence[str],
    reference: str | Path | None,
    tables: Sequence[StratumTable],
    base: Catalogue | None,
    combined: CombinedSource,
    notes: tuple[str, ...],
) -> OverlapReport:
    control = None if reference is None else _place(given, reference)
    labels = _labels(given)
    compared = sum(int(table.entries.sum()) for table in tables)
    if base is None:
        notes = (*notes, "no magnitude null: it needs the weights of the base; --base BASE adds it")
    changed = [sum(int(table.changed[r].sum()) for table in tables) for r in range(len(given))]
    config = {} if base is None else base.config
    keys = _Keys({table.tensor: role_of(table.tensor, config) for table in tables})
    pairs = sorted(combinations(range(len(given)), 2), key=lambda pair: control in pair)
    parts = range(len(given) + 1)
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
        held_by=tuple(sum(int(table.core[k].sum()) for table in tables) for k in parts),
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


def _labels(given: Sequence[str]) -> list[str]:
    names = [Path(text).name or text for text in given]
    return [name if names.count(name) == 1 else text for name, text in zip(names, given, strict=True)]


def _verify_output(folder: Path, given: Sequence[str], *, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise OutputError(str(folder), "is a file", expected="a directory", remedy="choose another -o")
    if _place(given, folder) is not None:
        raise OutputError(str(folder), "holds a run that is compared", remedy="choose another -o")
    there = [name for name in FILE_NAMES if (folder / name).exists()]
    if there and not overwrite:
        raise OutputError(
            str(folder),
            f"holds {', '.join(there[:3])}, which this run would replace",
            remedy="choose another -o, or add --overwrite",
        )
