"""Split `diff` into shares that need no contact with each other, and join them.

Contract: `diff_share` compares the units of one share and leaves a journal (and, for a mask, the bits) in its
directory; it may be killed and run again. `merge` refuses shares of different questions or inputs, names
those that are missing or unfinished, and then does what `diff` does after its pass: the same bytes
(`run.json` aside), whatever the number of shares and where they ran. The shares are removed last.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsity_audit.api.diff import finish_diff, spectral_plan, unit_progress
from sparsity_audit.api.diff_outputs import DiffOutputs
from sparsity_audit.api.diff_question import DiffQuestion, Prepared, prepare
from sparsity_audit.api.engines import EngineName, engine_facts, num_workers, open_engine
from sparsity_audit.api.found_shares import find_shares
from sparsity_audit.checkpoint.spelling import verify_local
from sparsity_audit.checkpoint.store import Catalogue
from sparsity_audit.compare.dispatch import KernelName, load_kernel, resolve_device
from sparsity_audit.errors import OutputError, UsageError
from sparsity_audit.masks.share_bits import ShareBits, share_bits_path
from sparsity_audit.passes.execute import merge_tallies, run_plan
from sparsity_audit.passes.journal import Journal
from sparsity_audit.passes.mask_sink import MaskSink
from sparsity_audit.passes.plan import Plan
from sparsity_audit.passes.shares import plan_of_share, share_name, shares_of, touched_tensors
from sparsity_audit.report.schema import DiffReport

__all__ = ["ShareRecord", "diff_share", "merge"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShareRecord:
    """A finished share.

    Args:
        journal: Its file.
        shard_index: Which share it is, from 0.
        num_shards: Of how many.
        num_units: Its work units.
        num_bytes: Bytes it compared, both sides.
        plan_bytes: Bytes of all shares.
    """

    journal: str
    shard_index: int
    num_shards: int
    num_units: int
    num_bytes: int
    plan_bytes: int


def diff_share(
    base: str | Path | Catalogue,
    tuned: str | Path | Catalogue,
    *,
    shard_index: int,
    num_shards: int,
    output: str | Path,
    question: DiffQuestion,
    mask: str | Path | None = None,
    overwrite: bool = False,
    workers: int | None = None,
    kernel: KernelName = "auto",
    device: str = "auto",
    on_note: Callable[[str], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> ShareRecord:
    """Compare one share of a pair; `merge` makes the report of all of them.

    Args:
        base: As in `diff`.
        tuned: As in `diff`.
        shard_index: Which share, from 0.
        num_shards: How many shares there are; the same in every run.
        output: Directory for the share's files. All shares may have the same one, or each its own.
        question: What is asked; the same in every run.
        mask: Directory in which `merge` shall make the update mask.
        overwrite: Drop what an earlier run of this share left; `merge` will replace a report beside it.
        workers: As in `diff`.
        kernel: As in `diff`.
        device: As in `diff`.
        on_note: Called with lines for the user.
        on_progress: Called with this share's bytes done and in all.

    Raises:
        UsageError: There is no such share.
        OutputError: The directory holds this share of another question, or a finished report.
    """
    if not 0 <= shard_index < num_shards:
        raise UsageError(
            "--shard-index",
            f"{shard_index} of {num_shards}",
            expected=f"0 … {num_shards - 1}: shares are counted from 0",
        )
    note = on_note or (lambda _text: None)
    prepared = prepare(base, tuned, question, skip_equal=mask is None)
    for text in (*prepared.base.notes, *prepared.tuned.notes):
        note(text)
    question.verify(prepared.alignment)
    plan = plan_of_share(prepared.plan, shard_index, num_shards)
    facts = _facts(prepared, question, shard_index=shard_index, num_shards=num_shards, mask=mask)
    folder = _share_folder(Path(output), prepared, overwrite=overwrite)
    name = share_name(shard_index, num_shards)
    with ExitStack() as stack:
        journal = Journal(folder / f"{name}.jsonl", plan_key=plan.key, facts=facts, restart=overwrite)
        stack.callback(journal.close)
        bits = _open_bits(folder, name, plan, journal, overwrite=overwrite) if _has_bits(facts) else None
        if bits is not None:
            stack.callback(bits.close)
        if journal.done:
            note(f"resuming: {len(journal.done)} of {len(plan.units)} work units are done already")
        where = resolve_device(device)
        run_plan(
            plan,
            kernel=load_kernel(kernel, num_bytes=plan.num_bytes, device=where),
            workers=workers or num_workers(),
            journal=journal,
            bits=None if bits is None else MaskSink(bits),
            on_unit=unit_progress(plan, on_progress),
        )
        if bits is not None:
            bits.finish()
        journal.sync()
    return ShareRecord(
        journal=str(folder / f"{name}.jsonl"),
        shard_index=shard_index,
        num_shards=num_shards,
        num_units=len(plan.units),
        num_bytes=plan.num_bytes,
        plan_bytes=prepared.plan.num_bytes,
    )


def _facts(
    prepared: Prepared,
    question: DiffQuestion,
    *,
    shard_index: int,
    num_shards: int,
    mask: str | Path | None,
) -> dict[str, Any]:
    """What a share's journal says beside its plan, so that `merge` needs no arguments."""
    return {
        "share": [shard_index, num_shards],
        "base": prepared.base.reference,
        "tuned": prepared.tuned.reference,
        "question": question.to_json(),
        "mask": None if mask is None else str(mask),
        "local": [
            side.reference for side in (prepared.base, prepared.tuned) if Path(side.reference).exists()
        ],
    }


def _has_bits(facts: Mapping[str, Any]) -> bool:
    """Whether shares hold mask bits: those of a `top` criterion are selected when all is counted."""
    criteria = facts["question"]["criteria"]
    return facts["mask"] is not None and not (criteria and criteria[0].startswith("top:"))


def _share_folder(folder: Path, prepared: Prepared, *, overwrite: bool) -> Path:
    verify_local(folder)
    inputs = {file.path.parent.resolve() for side in (prepared.base, prepared.tuned) for file in side.files}
    if folder.resolve() in inputs:
        raise OutputError(
            str(folder), "holds a checkpoint that is compared", remedy="choose another -o for the results"
        )
    if (folder / "report.json").exists() and not overwrite:
        # Said now, not when all shares have run: `merge` would refuse to replace it.
        raise OutputError(
            str(folder),
            "holds the report of a finished run",
            remedy="choose another -o, or add --overwrite to the shares and to `merge`",
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            str(folder), error.strerror or "cannot be written", remedy="choose another -o"
        ) from error
    return folder


def _open_bits(folder: Path, name: str, plan: Plan, journal: Journal, *, overwrite: bool) -> ShareBits:
    if overwrite:
        final = share_bits_path(folder, name)
        for path in (final, final.with_name(final.name + ".partial")):
            path.unlink(missing_ok=True)
    bits = ShareBits(folder, name, touched_tensors(plan, plan.units), plan_key=plan.key)
    if not bits.reused:
        journal.restart()  # its units' bits are gone
    return bits


def merge(
    folders: Sequence[str | Path],
    *,
    output: str | Path | None = None,
    mask: str | Path | None = None,
    overwrite: bool = False,
    workers: int | None = None,
    engine: EngineName = "threads",
    on_note: Callable[[str], None] | None = None,
) -> DiffReport:
    """Make the report of a split run; `diff` in one process would have written the same bytes.

    Reads headers, the shares, and what `diff` reads after its pass: both sides again for a `top` criterion,
    the base for structure, and the matrices of `--spectral`.

    Args:
        folders: Where the shares lie: one directory, or several without a common file system.
        output: Directory for the report; default the first of `folders`.
        mask: Directory for the update mask; default what the shares were given.
        overwrite: Replace what an earlier run left in `output` and `mask`.
        workers: Threads for what is read again.
        engine: As in `diff`.
        on_note: Called with lines for the user.

    Raises:
        UsageError: Shares are missing or unfinished, or belong to different questions.
        OutputError: A share still runs, or `output` holds a finished run.
        ChangedInputError: A checkpoint is not what the shares compared.
    """
    started, note = time.time(), on_note or (lambda _text: None)
    found = find_shares([Path(folder) for folder in folders])
    found.verify_here()
    question = DiffQuestion.from_json(found.facts["question"])
    sides, skip_equal = (found.facts["base"], found.facts["tuned"]), found.facts["mask"] is None
    prepared = prepare(*sides, question, skip_equal=skip_equal)
    found.verify_plan(prepared.plan)
    question.verify(prepared.alignment)
    spectra = spectral_plan(prepared.plan, question, on_note=note)
    mask = mask or found.facts["mask"]
    with_bits = mask is not None and prepared.criterion.kind != "top"
    found.verify_complete(shares_of(prepared.plan, found.num_shards), with_bits=with_bits)
    with ExitStack() as stack:
        running = stack.enter_context(open_engine(engine, workers=workers))
        outputs = DiffOutputs(
            prepared,
            stack,
            output=found.folders[0] if output is None else output,
            mask=mask,
            overwrite=overwrite,
            view=question.view,
        )
        tallies = merge_tallies(prepared.plan, found.tallies(prepared.plan))
        if with_bits:
            outputs.copy_bits(found.bits)
        facts = {"started": started, "device": "cpu", "shares": found.num_shards}
        facts |= engine_facts(engine, running)
        report = finish_diff(
            prepared, question, outputs, tallies, spectra=spectra, workers=running, facts=facts, on_note=note
        )
    found.remove()
    return report
