"""ΔW pruning: a base plus a part of an update, as checkpoints that any evaluation harness can load.

Contract: `prune` matches both sides, selects, and writes every asked checkpoint in one pass over both, with
memory of a few blocks a worker. The output appears whole or not at all. Defaults live here and nowhere below.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from sparsity_audit.align.match import match
from sparsity_audit.align.records import Alignment, Side
from sparsity_audit.api.prune_records import PruneRecords
from sparsity_audit.api.sides import open_sides
from sparsity_audit.checkpoint.store import Catalogue
from sparsity_audit.compare.dispatch import load_kernel
from sparsity_audit.compare.pair import PairSpec
from sparsity_audit.errors import AlignmentError, UsageError
from sparsity_audit.masks.shards import (
    CHECKPOINT_NAMING,
    MAX_SHARD_BYTES,
    ShardWriter,
    StoredTensor,
    output_error,
)
from sparsity_audit.passes.execute import run_plan
from sparsity_audit.passes.keep import Keep, keep_folders
from sparsity_audit.passes.plan import Plan, default_criteria, make_plan
from sparsity_audit.passes.prune import Outlet, PairCounts, stored_tensors, write_pruned
from sparsity_audit.passes.prune_masks import KeepMask, make_keep_mask
from sparsity_audit.report.output import write_atomically
from sparsity_audit.report.prune import (
    PRUNE_FILE,
    PrunedCheckpoint,
    PruneRecord,
    prune_to_json,
)
from sparsity_audit.report.staging import StagedDirectory
from sparsity_audit.types import View

__all__ = ["prune"]

_UNIT_BYTES = 64 << 20
_MAX_WORKERS = 8
_METADATA = {"format": "pt"}  # what transformers asks of a safetensors file


def prune(
    base: str | Path | Catalogue,
    tuned: str | Path | Catalogue,
    output: str | Path,
    *,
    keep: Sequence[str | Keep],
    per_tensor: bool = False,
    complement: bool = False,
    seed: int = 0,
    view: View | str = View.NATIVE,
    like: Side = "tuned",
    upcast: bool = False,
    maps: Sequence[tuple[str, str]] = (),
    force: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    workers: int | None = None,
    on_note: Callable[[str], None] | None = None,
) -> tuple[PrunedCheckpoint, ...]:
    """Write the base with a part of the update; one result a selection, in the order asked for.

    Args:
        base: Directory, file or Hub reference of the base, or a catalogue opened before.
        tuned: The same for the tuned side.
        output: New or empty directory: the checkpoint, or with several selections a directory of them, named
            after what they keep (`top-5pct`).
        keep: One or more of `top:5%`, `bottom:80%`, `random:5%` (or a count; `…:tensor` within each tensor),
            `mask:DIR`, `all`, `none`. Fractions of top and random are of the compared entries, those of
            bottom of the entries that moved.
        per_tensor: Select within each tensor.
        complement: Keep the compared entries that are not selected.
        seed: Of random selections.
        view: The view whose |Δ| orders the entries; stored values are kept in either.
        like: The side that gives names, shapes, configuration, tokenizer and what has no counterpart.
        upcast: Store tensors whose sides differ in dtype in the one that holds both exactly.
        maps: (REGEX, REPL) rules that rename tuned tensors to base names.
        force: Take a mask whose base cannot be shown to be this one.
        max_shard_bytes: Tensor bytes after which a new file begins.
        workers: Threads; default one a core, at most 8. The result is the same.
        on_note: Called with lines for the user.

    Raises:
        UsageError: Nothing to keep is named, two selections have one name, or dtypes differ.
        AlignmentError: No tensor of one side matches one of the other.
        MaskError: A mask is not one of this base.
        UnsupportedFormatError: Block-scaled fp8.
        OutputError: `output` is not empty, or cannot be written; nothing is left behind.
        SparsityAuditError: As `open_checkpoint` of a side.
    """
    note = on_note or (lambda _text: None)
    if seed < 0:
        raise UsageError("seed", str(seed), expected="a number ≥ 0")
    if not keep:
        raise UsageError(
            "keep", "nothing is named", expected="one or more selections", remedy="--keep top:5%"
        )
    keeps = [
        k if isinstance(k, Keep) else Keep.parse(k, per_tensor=per_tensor, complement=complement)
        for k in keep
    ]
    names = keep_folders(keeps)
    sides = open_sides(base, tuned)
    for text in (*sides[0].notes, *sides[1].notes):
        note(text)
    alignment = match(*sides, maps=tuple(maps))
    plan = _plan(sides, alignment, View(view))
    stored = stored_tensors(plan, like, upcast=upcast)
    inputs = [file.path.parent for side in sides for file in side.files]
    inputs += [Path(k.mask).expanduser() for k in keeps if k.mask is not None]
    workers = workers or min(_MAX_WORKERS, len(os.sched_getaffinity(0)))
    with StagedDirectory(Path(output), dict.fromkeys(inputs)) as stage:
        note(f"{len(plan.pairs)} tensors, {plan.num_entries:,} entries: comparing")
        kernel = load_kernel("auto", num_bytes=plan.num_bytes)
        tallies = run_plan(plan, kernel=kernel, workers=workers)
        masks = []
        for number, wanted in enumerate(keeps):
            note(f"selecting {wanted.key}")
            made = make_keep_mask(
                wanted,
                plan,
                tallies,
                alignment,
                view=View(view),
                seed=seed,
                force=force,
                workers=workers,
                scratch=stage.scratch / str(number),
            )
            masks.append(made)
        folders = [stage.content / name for name in names] if len(keeps) > 1 else [stage.content]
        note(f"writing {len(keeps)} checkpoint{'s' * (len(keeps) != 1)}")
        counts = _write(
            plan, masks, folders, stored, like=like, view=View(view), size=max_shard_bytes, workers=workers
        )
        builder = PruneRecords(
            plan=plan,
            alignment=alignment,
            tallies=tallies,
            stored=stored,
            counts=counts,
            like=like,
            view=View(view),
            seed=seed,
        )
        records = tuple(builder.record(number, mask) for number, mask in enumerate(masks))
        for record, folder in zip(records, folders, strict=True):
            _write_companions(folder, builder.folder, record)
        stage.commit()
    paths = [Path(output) / name for name in names] if len(keeps) > 1 else [Path(output)]
    return tuple(PrunedCheckpoint(path=p, record=r) for p, r in zip(paths, records, strict=True))


def _plan(sides: tuple[Catalogue, Catalogue], alignment: Alignment, view: View) -> Plan:
    if not alignment.pairs:
        raise AlignmentError(
            f"{sides[0].reference} and {sides[1].reference}",
            f"no tensor of {len(sides[0].tensors)} and {len(sides[1].tensors)} can be compared",
            remedy="check that both are the same architecture; rename with --map REGEX=REPL",
        )
    criteria = default_criteria(level="counts")
    specs = tuple(
        PairSpec(
            base=pair.base.spec.dtype,
            tuned=pair.tuned.spec.dtype,
            criteria=criteria,
            view=view,
            level="counts",
        )
        for pair in alignment.pairs
    )
    return make_plan(*sides, alignment, specs=specs, unit_bytes=_UNIT_BYTES)


def _write(
    plan: Plan,
    masks: Sequence[KeepMask],
    folders: Sequence[Path],
    stored: Sequence[StoredTensor],
    *,
    like: Side,
    view: View,
    size: int,
    workers: int,
) -> tuple[PairCounts, ...]:
    outlets: list[Outlet] = []
    try:
        for mask, folder in zip(masks, folders, strict=True):
            writer = ShardWriter(
                folder,
                stored,
                naming=CHECKPOINT_NAMING,
                metadata_of=lambda _names: _METADATA,
                late_key=None,
                max_shard_bytes=size,
            )
            outlets.append(Outlet(keep=mask, writer=writer))
        counts = write_pruned(plan, outlets, stored, like=like, view=view, workers=workers)
        for outlet in outlets:
            outlet.writer.finish(lambda _names: _METADATA)
    finally:
        for outlet in outlets:
            outlet.writer.close()
    return counts


def _write_companions(folder: Path, source: Path, record: PruneRecord) -> None:
    """Copy configuration and tokenizer; the record comes last."""
    for name in record.files:
        try:
            data = (source / name).read_bytes()
        except OSError as error:
            raise output_error(source / name, error) from error
        write_atomically(folder / name, data)
    write_atomically(folder / PRUNE_FILE, prune_to_json(record))
