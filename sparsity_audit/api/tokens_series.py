"""Divergence along a run's saved steps, end to end: `tokens series`.

Contract: base and last step complete the prompts, unless completions were given; then every saved step is
scored on the same completions against the base, whose hidden states are computed once. One model is in
memory at a time. Defaults live here and nowhere below.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from sparsity_audit import __version__
from sparsity_audit.api.series_steps import SavedStep, saved_steps, weights_beside
from sparsity_audit.api.token_models import ModelDType, ModelSource
from sparsity_audit.api.token_sets import (
    CompletionSet,
    Limits,
    OnProgress,
    broken_completions,
    given_set,
    measured_set,
    sampled_set,
    spilled_set,
)
from sparsity_audit.api.tokens_diverge import Question, VocabularyRule, ask, check_numbers, one_thread_for
from sparsity_audit.errors import UsageError
from sparsity_audit.models.memory import release_memory
from sparsity_audit.models.score import Resident, Spilled
from sparsity_audit.models.vocabulary import check_same_vocabulary
from sparsity_audit.report.output import verify_free, write_below
from sparsity_audit.report.tokens import FailedPrompt, SamplingRecord
from sparsity_audit.report.tokens_series import SeriesSet, TokensSeriesReport, TokensStep
from sparsity_audit.tokens.series import summarise_series

__all__ = ["tokens_series"]


def tokens_series(
    base: str | Path,
    *steps: str | Path,
    prompts: str | Path | None = None,
    task: str | None = None,
    lengths: Sequence[int] = (4,),
    num_prompts: int | None = None,
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
    output: str | Path | None = None,
    overwrite: bool = False,
    figures: bool = True,
    on_progress: OnProgress = lambda _stage, _done, _all: None,
    on_note: Callable[[str], None] = lambda _note: None,
) -> TokensSeriesReport:
    """Follow the divergence from the base over a run's saved steps, on fixed completions.

    Args:
        base: The model the run started from.
        *steps: Saved steps in order, or a folder of `checkpoint-N` folders, which are ordered by number.
        prompts: As for `tokens_diverge`.
        task: As there.
        lengths: As there.
        num_prompts: As there.
        num_samples: Completions of each prompt, by the base and by the last step.
        temperature: As there.
        max_new_tokens: As there.
        vocabulary: As there.
        template: As there; `tuned` is the last step's.
        device: As there.
        dtype: As there.
        seed: As there.
        batch_tokens: As there.
        chunk_bytes: As there.
        output: Directory for record, table and figure; nothing is written without it.
        overwrite: Replace what an earlier run left there.
        figures: Draw the figure into `output` as well.
        on_progress: As there.
        on_note: As there.

    Raises:
        UsageError: No saved steps, a step given twice, or as `tokens_diverge`.
        OutputError: `output` holds what would be replaced, or cannot be written.
        SparsityAuditError: A model cannot be read, or is not a causal language model.
    """
    from sparsity_audit.report.tokens_series_files import TOKENS_SERIES_FILES, render_tokens_series

    check_numbers(num_samples=num_samples, top_k=1, top_p=None, temperature=temperature)
    found = saved_steps(steps)
    if output is not None:
        verify_free(Path(output), TOKENS_SERIES_FILES, inputs=[base, *steps], overwrite=overwrite)
    question = ask(
        (base, found[-1].reference),
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
    sources = _sources(question, found)
    is_given = any(prompt.completions for prompt in question.prompts)
    sampling = SamplingRecord(
        num_samples=None if is_given else num_samples,
        temperature=temperature,
        max_new_tokens=question.max_new_tokens,
        seed=seed,
        top_k=1,
        top_p=None,
    )
    limits = Limits(batch_tokens=batch_tokens, chunk_bytes=chunk_bytes, page_prompts=0)
    notes = [
        *question.notes,
        *[f"not taken: {place}, which has weights too" for place in weights_beside(steps)],
    ]
    with one_thread_for(question):
        sets, js, failed = _measure(question, sources, sampling, limits, on_progress, notes.append)
    for note in notes:
        on_note(note)
    report = TokensSeriesReport(
        tool=f"sparsity-audit {__version__}",
        base=str(base),
        steps=tuple(TokensStep(label=s.label, number=s.number, reference=s.reference) for s in found),
        source=question.source,
        sampling=sampling,
        num_prompts=question.num_prompts,
        sets=tuple(_set_record(one, paths, seed=seed) for one, paths in zip(sets, js, strict=True)),
        failed=(*question.failed, *failed),
        notes=tuple(dict.fromkeys(notes)),
    )
    if output is not None:
        for name, data in render_tokens_series(report, figures=figures).items():
            write_below(Path(output), name, data)
    return report


def _sources(question: Question, steps: Sequence[SavedStep]) -> list[ModelSource]:
    """The steps, each checked for the vocabulary that base and last step share."""
    sources = [replace(question.sources[1], reference=step.reference) for step in steps]
    for source in sources[:-1]:
        facts = source.facts()
        shared = question.vocabulary
        is_prefix = shared.size < max(shared.base_size, shared.tuned_size)
        found = check_same_vocabulary(question.facts[1], facts, common_prefix=is_prefix)
        if found.size < shared.size:
            raise UsageError(
                facts.name,
                f"shares {found.size:,} ids with the last step",
                expected=f"{shared.size:,}, as base and last step do",
            )
    return sources


def _measure(
    question: Question,
    sources: Sequence[ModelSource],
    sampling: SamplingRecord,
    limits: Limits,
    on_progress: OnProgress,
    on_note: Callable[[str], None],
) -> tuple[list[CompletionSet], list[tuple[np.ndarray, np.ndarray]], list[FailedPrompt]]:
    """Sets of completions, (JS, prompt) of each set's positions at each step, and what was lost."""
    prompts, vocabulary = question.prompts, question.vocabulary
    sets: list[CompletionSet] = []
    if sampling.num_samples is None:
        sets = [given_set(prompts, eos_ids=vocabulary.eos_ids)]
    else:
        last = sources[-1].load(on_note=on_note)
        sets = [sampled_set(last, "tuned", prompts, vocabulary, sampling, limits, on_progress)]
        del last
        release_memory()
    base = question.sources[0].load(on_note=on_note)
    if sampling.num_samples is not None:
        sets.insert(0, sampled_set(base, "base", prompts, vocabulary, sampling, limits, on_progress))
    failed = [lost for one in sets for lost in one.failed]
    with tempfile.TemporaryDirectory(prefix="sparsity-audit-") as folder:
        spilled = [spilled_set(base, one, Path(folder), limits, on_progress) for one in sets]
        del base
        release_memory()
        paths = [_Paths(one) for one in sets]
        for source in sources:
            _score_step(source, sets, spilled, paths, question, sampling, limits, on_progress, on_note)
    failed += [lost for path in paths for lost in path.failed]
    return sets, [path.joined() for path in paths], list(dict.fromkeys(failed))


class _Paths:
    """The JS of one set's positions, step after step; a completion that failed at one is left out of all."""

    def __init__(self, one: CompletionSet) -> None:
        self._set = one
        self._steps: list[tuple[np.ndarray, np.ndarray]] = []
        self.failed: list[FailedPrompt] = []

    def add(self, columns: dict[str, np.ndarray], failed: Sequence[FailedPrompt]) -> None:
        """One step's positions."""
        if not columns or not len(columns["js"]):
            reason = failed[0].reason if failed else "there are none"
            raise UsageError(f"completions of {self._set.name}", f"none could be scored: {reason}")
        self._steps.append((columns["sequence"], columns["js"]))
        self.failed += failed

    def joined(self) -> tuple[np.ndarray, np.ndarray]:
        """float64[steps, positions], and the prompt of each position."""
        everywhere = set.intersection(*[set(sequence.tolist()) for sequence, _ in self._steps])
        if not everywhere:
            raise UsageError(
                f"completions of {self._set.name}",
                "none could be scored at every step",
                expected="finite logits",
            )
        kept = [np.isin(sequence, sorted(everywhere)) for sequence, _ in self._steps]
        prompts = np.array([prompt for prompt, _ in self._set.places])
        rows = [js[mask] for (_, js), mask in zip(self._steps, kept, strict=True)]
        return np.stack(rows), prompts[self._steps[0][0][kept[0]]]


def _score_step(
    source: ModelSource,
    sets: Sequence[CompletionSet],
    spilled: Sequence[Spilled],
    paths: Sequence[_Paths],
    question: Question,
    sampling: SamplingRecord,
    limits: Limits,
    on_progress: OnProgress,
    on_note: Callable[[str], None],
) -> None:
    """Add one saved step to the paths of every set; its weights are let go at the end."""
    model = source.load(on_note=on_note)
    for one, side, path in zip(sets, spilled, paths, strict=True):
        found = measured_set(side, Resident(model), one, question.vocabulary, sampling, limits, on_progress)
        path.add(found.columns, broken_completions(one, found))
    del model
    release_memory()


def _set_record(one: CompletionSet, paths: tuple[np.ndarray, np.ndarray], *, seed: int) -> SeriesSet:
    js, owner = paths
    return SeriesSet(
        name=one.name,
        completions=len(one.tokens),
        truncated=sum(one.truncated),
        series=summarise_series(js, owner, seed=seed),
    )
