"""From tokens to weights, end to end: `tokens patch`.

Contract: `tokens_patch` samples completions, measures how far base and tuned diverge on them, then puts
layers, module types, masks and pruned updates into one of the models in memory, one after the other, and
measures what is left. No checkpoint is written. Defaults live here and nowhere below.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sparsity_audit.api.token_models import ModelDType, ModelSource
from sparsity_audit.api.token_sets import OnProgress
from sparsity_audit.api.token_verifier import Verifier, who_judges
from sparsity_audit.api.tokens_diverge import VocabularyRule, ask, one_thread_for
from sparsity_audit.api.tokens_patch_audit import CompletionsOf, PatchAudit
from sparsity_audit.errors import UsageError
from sparsity_audit.report.output import verify_free, write_below
from sparsity_audit.report.tokens_patch import PatchDirection, PatchReport, PatchRow
from sparsity_audit.tokens.patching import Part, parts_of, put, verify_same_shapes
from sparsity_audit.training.parameters import name_parameters
from sparsity_audit.training.update_masks import bind_mask

if TYPE_CHECKING:
    from sparsity_audit.models.protocol import LanguageModel

__all__ = ["tokens_patch"]

_PARTS = ("layer", "module")


def tokens_patch(
    base: str | Path,
    tuned: str | Path,
    *,
    prompts: str | Path | None = None,
    task: str | None = None,
    lengths: Sequence[int] = (4,),
    num_prompts: int | None = None,
    verifier: str | Verifier | None = None,
    parts: Sequence[Literal["layer", "module"]] = _PARTS,
    masks: Sequence[str | Path] = (),
    pruned: Sequence[str | Path] = (),
    completions: CompletionsOf = "both",
    limit: float = 0.1,
    take_over: float | None = None,
    num_samples: int = 1,
    temperature: float = 1.0,
    max_new_tokens: int | None = None,
    vocabulary: VocabularyRule = "same",
    template: Literal["base", "tuned"] = "tuned",
    device: str = "cpu",
    dtype: ModelDType = "auto",
    seed: int = 0,
    batch_tokens: int = 16_384,
    chunk_bytes: int = 512 << 20,
    force: bool = False,
    output: str | Path | None = None,
    overwrite: bool = False,
    figures: bool = True,
    on_progress: OnProgress = lambda _stage, _done, _all: None,
    on_note: Callable[[str], None] = lambda _note: None,
) -> PatchReport:
    """Which layers, modules or entries of an update carry the divergent tokens.

    Args:
        base: A model folder, a Hub reference, or `mix` or `single` for a base of the lab.
        tuned: The model that was trained from it, of the same architecture.
        prompts: A JSONL file, as for `tokens_cross_sample`.
        task: A task of the lab instead of a file; it judges by itself.
        lengths: Digits of its problems, in equal shares.
        num_prompts: Problems to draw (default 64), or lines to read at most (default all).
        verifier: Judges the patched models' own completions, as for `tokens_cross_sample`; without one, and
            without a task, accuracies are left out.
        parts: What is patched one at a time: `layer`, `module`.
        masks: Update masks of this base: their entries are one part each.
        pruned: Models that hold a part of the update, such as `prune` writes.
        completions: Whose completions the divergence is measured on.
        limit: JS above which a position is divergent, nats.
        take_over: JS threshold of a cross-sampling in which a masked or pruned update takes the tuned model's
            place; None for none.
        num_samples: Completions of each prompt.
        temperature: Of the sampling; distributions are compared at temperature 1.
        max_new_tokens: Limit of a completion; default 512, and for the lab what no right solution reaches.
        vocabulary: As for `tokens_cross_sample`.
        template: As there.
        device: Where all models are: base, tuned, and the one that is patched.
        dtype: Of weights and arithmetic; `auto` is as stored.
        seed: Of problems, noise and resamples.
        batch_tokens: Padded tokens of a batch at most.
        chunk_bytes: Working memory of the divergences at most.
        force: Take masks that cannot be shown to be of this base.
        output: Directory for record, table and figure; nothing is written without it.
        overwrite: Replace what an earlier run left there.
        figures: Draw the figure into `output` as well.
        on_progress: Called with a stage, what is done of it, and all of it.
        on_note: Called with lines for the user.

    Raises:
        UsageError: As for `tokens_cross_sample`; or the two are not of one architecture.
        MaskError: A mask is not one of this base.
        OutputError: `output` holds what would be replaced, or cannot be written.
        SparsityAuditError: A model cannot be read.
    """
    from sparsity_audit.report.tokens_patch_files import PATCH_FILES, render_patch

    _check(parts, masks, pruned, limit=limit, take_over=take_over, num_samples=num_samples)
    judge_name, judge = who_judges(verifier, task)
    if output is not None:
        inputs = [path for path in (base, tuned, prompts, *masks, *pruned) if path is not None]
        verify_free(Path(output), PATCH_FILES, inputs=inputs, overwrite=overwrite)
    question = ask(
        (base, tuned),
        prompts=prompts,
        task=task,
        lengths=lengths,
        num_prompts=num_prompts,
        max_new_tokens=max_new_tokens,
        vocabulary=vocabulary,
        template=template,
        device=device,
        dtype=dtype,
        seed=seed,
    )
    with one_thread_for(question), tempfile.TemporaryDirectory(prefix="sparsity-audit-") as scratch:
        audit = PatchAudit(
            question,
            verifier=judge,
            judges=judge_name is not None,
            completions=completions,
            limit=limit,
            take_over=take_over,
            num_samples=num_samples,
            temperature=temperature,
            seed=seed,
            batch_tokens=batch_tokens,
            chunk_bytes=chunk_bytes,
            scratch=Path(scratch),
            on_note=on_note,
        )
        rows = _rows(audit, parts, masks, pruned, force=force, on_progress=on_progress)
        report = audit.report(rows, verifier=judge_name)
    for note in report.notes:
        on_note(note)
    if output is not None:
        for file, data in render_patch(report, figures=figures).items():
            write_below(Path(output), file, data)
    return report


def _check(
    parts: Sequence[str],
    masks: Sequence[Any],
    pruned: Sequence[Any],
    *,
    limit: float,
    take_over: float | None,
    num_samples: int,
) -> None:
    unknown = [part for part in parts if part not in _PARTS]
    if unknown:
        raise UsageError("parts", f"{unknown[0]!r} is not known", expected=f"some of {', '.join(_PARTS)}")
    if not parts and not masks and not pruned:
        raise UsageError("patch", "nothing is asked for", remedy="--parts, --mask or --pruned")
    for name, value in (("limit", limit), ("take_over", take_over)):
        if value is not None and not 0 <= value < float("inf"):
            raise UsageError(name, str(value), expected="a number ≥ 0 in nats")
    if num_samples < 1:
        raise UsageError("num_samples", str(num_samples), expected="at least 1")


def _rows(
    audit: PatchAudit,
    parts: Sequence[Literal["layer", "module"]],
    masks: Sequence[str | Path],
    pruned: Sequence[str | Path],
    *,
    force: bool,
    on_progress: OnProgress,
) -> list[PatchRow]:
    """All parts, added and removed; a pruned update as it is."""
    wanted = [part for kind in parts for part in parts_of(audit.base.module, kind)]
    wanted += [_mask_part(audit.base, mask, force=force) for mask in masks]
    rows: list[PatchRow] = []
    total = 2 * len(wanted) + len(pruned)
    directions: tuple[PatchDirection, ...] = ("add", "remove")
    for part in wanted:
        for direction in directions:
            target, source = (audit.base, audit.tuned) if direction == "add" else (audit.tuned, audit.base)
            put_in = put(target.module, source.module, part)
            rows.append(audit.row(target, put_in, part.kind, part.name, direction, _entries(part, target)))
            on_progress("parts", len(rows), total)
    for folder in pruned:
        model = ModelSource(
            reference=folder, device=audit.question.sources[0].device, dtype=audit.question.sources[0].dtype
        ).load(on_note=audit.on_note)
        verify_same_shapes(audit.base, model)
        rows.append(audit.row(model, nullcontext(), "update", str(folder), "add", _moved(audit.base, model)))
        on_progress("parts", len(rows), total)
    return rows


def _mask_part(base: LanguageModel, mask: str | Path, *, force: bool) -> Part:
    named = name_parameters(base.module)
    bound = bind_mask(named, mask, base="trust" if force else "verify")
    own = dict(base.module.named_parameters())
    bits = {name: bound.selected[id(p)] for name, p in own.items() if id(p) in bound.selected}
    return Part(kind="mask", name=str(mask), tensors=bits)


def _entries(part: Part, model: LanguageModel) -> int:
    own = dict(model.module.named_parameters())
    return sum(own[name].numel() if bits is None else int(bits.sum()) for name, bits in part.tensors.items())


def _moved(base: LanguageModel, model: LanguageModel) -> int:
    """Entries whose value is not the base's."""
    own = dict(base.module.named_parameters())
    return sum(int((p != own[name]).sum()) for name, p in model.module.named_parameters())
