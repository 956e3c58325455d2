"""Sets of completions: sampled from a model, or given; and what both models say of them.

Contract: a completion is named by its prompt and its number, and its noise belongs to that name, so that
neither other prompts nor batches move it. With both models in memory, or one after the other (`sequential`),
the results are the same but for rounding.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparsity_audit.api.token_models import ModelSource
from sparsity_audit.api.token_prompts import EncodedPrompt
from sparsity_audit.models.memory import release_memory
from sparsity_audit.models.noise import row_seed
from sparsity_audit.models.protocol import LanguageModel, Tokenizer
from sparsity_audit.models.sample import sample
from sparsity_audit.models.score import Resident, Scored, Side, Spilled, spill
from sparsity_audit.models.vocabulary import SharedVocabulary
from sparsity_audit.report.tokens import FailedPrompt, SamplingRecord
from sparsity_audit.tokens.positions import Measured, measure

__all__ = [
    "CompletionSet",
    "Limits",
    "OnProgress",
    "broken_completions",
    "given_set",
    "measure_sets",
    "measured_set",
    "sampled_set",
    "spilled_set",
]

OnProgress = Callable[[str, int, int], None]
"""Called with a stage, what is done of it, and all of it."""

_NOT_NUMBERS = "the logits are no numbers (NaN or infinite)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of memory: they change results by rounding only.

    Args:
        batch_tokens: Padded tokens of a batch at most.
        chunk_bytes: Working memory of the divergences at most.
        page_prompts: Prompts whose first completions keep their tops for the page.
    """

    batch_tokens: int
    chunk_bytes: int
    page_prompts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionSet:
    """Completions, by prompt and number.

    Args:
        name: `base`, `tuned` or `given`.
        prompts: The prompt of each completion.
        samples: Its number among the prompt's.
        tokens: Its ids, at least one.
        truncated: Whether it has no end token.
        failed: What is missing here, with the reason.
    """

    name: str
    prompts: tuple[EncodedPrompt, ...]
    samples: tuple[int, ...]
    tokens: tuple[tuple[int, ...], ...]
    truncated: tuple[bool, ...]
    failed: tuple[FailedPrompt, ...]

    @property
    def sequences(self) -> list[Scored]:
        """Prompts with completions, to score."""
        return [
            Scored(prompt=prompt.ids, completion=tokens)
            for prompt, tokens in zip(self.prompts, self.tokens, strict=True)
        ]

    @property
    def places(self) -> list[tuple[int, int]]:
        """(prompt number, sample) of each completion."""
        return [(prompt.number, number) for prompt, number in zip(self.prompts, self.samples, strict=True)]

    def scores(self, tokenizer: Tokenizer) -> list[float | None]:
        """1 for a right completion, 0 for a wrong one, None where nothing judges."""
        return [
            None if prompt.line.judge is None else float(prompt.line.judge(tokenizer.decode(tokens)))
            for prompt, tokens in zip(self.prompts, self.tokens, strict=True)
        ]

    def lost(self, row: int, reason: str) -> FailedPrompt:
        """A completion of the set as one that is not in the figures."""
        prompt = self.prompts[row]
        what = f"{self.name} {'completion' if self.name == 'given' else 'sample'} {self.samples[row]}"
        return FailedPrompt(prompt=prompt.number, name=prompt.line.name, completion=what, reason=reason)


def given_set(prompts: Sequence[EncodedPrompt], *, eos_ids: Sequence[int]) -> CompletionSet:
    """The completions that came with the prompts."""
    rows = [(p, n, tokens) for p in prompts for n, tokens in enumerate(p.completions)]
    return CompletionSet(
        name="given",
        prompts=tuple(prompt for prompt, _, _ in rows),
        samples=tuple(number for _, number, _ in rows),
        tokens=tuple(tokens for _, _, tokens in rows),
        truncated=tuple(tokens[-1] not in eos_ids for _, _, tokens in rows),
        failed=(),
    )


def measure_sets(
    sources: tuple[ModelSource, ModelSource],
    prompts: Sequence[EncodedPrompt],
    *,
    vocabulary: SharedVocabulary,
    sampling: SamplingRecord,
    limits: Limits,
    sequential: bool,
    on_progress: OnProgress,
    on_note: Callable[[str], None],
) -> list[tuple[CompletionSet, Measured]]:
    """Complete the prompts with both models, unless completions were given, and score all with both.

    Args:
        sources: Base and tuned.
        prompts: What can be used.
        vocabulary: The ids that are compared.
        sampling: How to complete, and what to measure.
        limits: Bounds of memory.
        sequential: Hold one model at a time: the tuned one is loaded twice where it samples.
        on_progress: As `OnProgress`.
        on_note: Called with what a reader must know.
    """

    def sampled(model: LanguageModel, name: str) -> CompletionSet:
        return sampled_set(model, name, prompts, vocabulary, sampling, limits, on_progress)

    def measured(base: Side, tuned: Side, one: CompletionSet) -> tuple[CompletionSet, Measured]:
        return one, measured_set(base, tuned, one, vocabulary, sampling, limits, on_progress)

    given = [given_set(prompts, eos_ids=vocabulary.eos_ids)] if sampling.num_samples is None else None
    if not sequential:
        base, tuned = (source.load(on_note=on_note) for source in sources)
        sets = given or [sampled(base, "base"), sampled(tuned, "tuned")]
        return [measured(Resident(base), Resident(tuned), one) for one in sets]
    of_tuned = []
    if given is None:
        tuned = sources[1].load(on_note=on_note)
        of_tuned = [sampled(tuned, "tuned")]
        del tuned
        release_memory()
    base = sources[0].load(on_note=on_note)
    sets = given or [sampled(base, "base"), *of_tuned]
    with tempfile.TemporaryDirectory(prefix="sparsity-audit-") as folder:
        spilled = [spilled_set(base, one, Path(folder), limits, on_progress) for one in sets]
        del base
        release_memory()
        tuned = Resident(sources[1].load(on_note=on_note))
        return [measured(side, tuned, one) for side, one in zip(spilled, sets, strict=True)]


def sampled_set(
    model: LanguageModel,
    name: str,
    prompts: Sequence[EncodedPrompt],
    vocabulary: SharedVocabulary,
    sampling: SamplingRecord,
    limits: Limits,
    on_progress: OnProgress,
) -> CompletionSet:
    """A model's own completions; those whose logits were no numbers, or that are empty, are failed."""
    rows = [(prompt, number) for prompt in prompts for number in range(sampling.num_samples or 0)]
    made = sample(
        model,
        [prompt.ids for prompt, _ in rows],
        seeds=[row_seed(sampling.seed, name, prompt.number, number) for prompt, number in rows],
        eos_ids=vocabulary.eos_ids,
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        batch_tokens=limits.batch_tokens,
        on_rows=_counter(f"samples of {name}", len(rows), on_progress),
    )
    kept, failed = [], []
    for (prompt, number), one in zip(rows, made, strict=True):
        reason = _NOT_NUMBERS if one.failed else None
        if max(one.tokens, default=0) >= vocabulary.size:
            reason = f"has a token beyond the {vocabulary.size:,} ids that both models share"
        if reason is None:
            kept.append((prompt, number, one))
        else:
            what = f"{name} sample {number}"
            failed.append(
                FailedPrompt(prompt=prompt.number, name=prompt.line.name, completion=what, reason=reason)
            )
    return CompletionSet(
        name=name,
        prompts=tuple(prompt for prompt, _, _ in kept),
        samples=tuple(number for _, number, _ in kept),
        tokens=tuple(one.tokens for _, _, one in kept),
        truncated=tuple(one.truncated for _, _, one in kept),
        failed=tuple(failed),
    )


def measured_set(
    base: Side,
    tuned: Side,
    one: CompletionSet,
    vocabulary: SharedVocabulary,
    sampling: SamplingRecord,
    limits: Limits,
    on_progress: OnProgress,
) -> Measured:
    """All positions of a set; the first completions of the first prompts keep their tops."""
    shown = sorted({prompt.number for prompt in one.prompts})[: limits.page_prompts]
    first = {prompt.number: row for row, prompt in reversed(list(enumerate(one.prompts)))}
    return measure(
        base,
        tuned,
        one.sequences,
        vocab_size=vocabulary.size,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        with_tops={first[number] for number in shown},
        batch_tokens=limits.batch_tokens,
        chunk_bytes=limits.chunk_bytes,
        on_sequences=_counter(f"scores, completions of {one.name}", len(one.tokens), on_progress),
    )


def spilled_set(
    base: LanguageModel, one: CompletionSet, folder: Path, limits: Limits, on_progress: OnProgress
) -> Spilled:
    """The base's hidden states of a set, in a folder of its own below `folder`."""
    place = folder / one.name
    place.mkdir()
    report = _counter(f"hidden states of the base, {one.name}", len(one.tokens), on_progress)
    return spill(base, one.sequences, place, batch_tokens=limits.batch_tokens, on_sequences=report)


def broken_completions(one: CompletionSet, found: Measured) -> list[FailedPrompt]:
    """The completions that were left out when they were scored."""
    return [one.lost(bad.sequence, f"{_NOT_NUMBERS} at position {bad.position}") for bad in found.broken]


def _counter(stage: str, total: int, on_progress: OnProgress) -> Callable[[int], None]:
    done = 0

    def count(num: int) -> None:
        nonlocal done
        done += num
        on_progress(stage, done, total)

    return count
