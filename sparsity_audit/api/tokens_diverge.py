"""Which tokens RL changed, end to end: `tokens diverge`.

Contract: `tokens_diverge` reads prompts, lets both models complete them unless completions were given, scores
all completions with both, and returns a `TokensReport`; with `output` it also writes it, with every position
and a page. What can be refused is refused before weights are read. Defaults live here and nowhere below.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sparsity_audit import __version__
from sparsity_audit.api.token_models import ModelDType, ModelSource
from sparsity_audit.api.token_prompts import (
    EncodedPrompt,
    PromptLine,
    encode_prompts,
    lab_prompts,
    read_prompts,
)
from sparsity_audit.api.token_sets import (
    CompletionSet,
    Limits,
    OnProgress,
    broken_completions,
    measure_sets,
)
from sparsity_audit.errors import UsageError
from sparsity_audit.models.vocabulary import SharedVocabulary, check_same_vocabulary
from sparsity_audit.report.output import verify_free, write_below
from sparsity_audit.report.tokens import (
    FailedPrompt,
    ModelRecord,
    PromptRecord,
    SamplingRecord,
    SetRecord,
    TokensReport,
    VocabularyRecord,
)
from sparsity_audit.tokens.positions import Measured
from sparsity_audit.tokens.shifted import by_prompt, shifted_positions, shifted_tokens
from sparsity_audit.tokens.summary import summarise

if TYPE_CHECKING:
    from sparsity_audit.models.facts import ModelFacts
    from sparsity_audit.models.protocol import Tokenizer

__all__ = [
    "Question",
    "VocabularyRule",
    "ask",
    "check_numbers",
    "model_records",
    "one_thread_for",
    "tokens_diverge",
]

VocabularyRule = Literal["same", "common-prefix"]
_MAX_NEW_TOKENS = 512
_NUM_PROMPTS = 64
_NUM_SHIFTED = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What two models are asked, before their weights are read.

    Args:
        sources: Base and tuned.
        facts: Base and tuned.
        vocabulary: The ids that are compared.
        tokenizer: The one that encodes and decodes.
        source: Where the prompts came from, in words.
        num_prompts: Prompts given.
        prompts: Those that can be used.
        failed: The others.
        max_new_tokens: Limit of a completion.
        notes: What a reader must know.
    """

    sources: tuple[ModelSource, ModelSource]
    facts: tuple[ModelFacts, ModelFacts]
    vocabulary: SharedVocabulary
    tokenizer: Tokenizer
    source: str
    num_prompts: int
    prompts: tuple[EncodedPrompt, ...]
    failed: tuple[FailedPrompt, ...]
    max_new_tokens: int
    notes: tuple[str, ...]

    @property
    def is_lab(self) -> bool:
        """Whether the lab computes both models."""
        return all(fact.loader == "lab" for fact in self.facts)


def tokens_diverge(
    base: str | Path,
    tuned: str | Path,
    *,
    prompts: str | Path | None = None,
    task: str | None = None,
    lengths: Sequence[int] = (4,),
    num_prompts: int | None = None,
    num_samples: int = 1,
    temperature: float = 1.0,
    max_new_tokens: int | None = None,
    top_k: int = 5,
    top_p: float | None = None,
    vocabulary: VocabularyRule = "same",
    template: Literal["base", "tuned"] = "tuned",
    sequential: bool = False,
    device: str = "cpu",
    dtype: ModelDType = "auto",
    seed: int = 0,
    batch_tokens: int = 16_384,
    chunk_bytes: int = 512 << 20,
    page_prompts: int = 24,
    output: str | Path | None = None,
    overwrite: bool = False,
    figures: bool = True,
    parquet: bool = False,
    on_progress: OnProgress = lambda _stage, _done, _all: None,
    on_note: Callable[[str], None] = lambda _note: None,
) -> TokensReport:
    """Compare two models' next-token distributions at every position of completions.

    Args:
        base: A model folder, a Hub reference, or `mix` or `single` for a base of the lab.
        tuned: The model that was trained from it.
        prompts: A JSONL file: `prompt` or `messages` on each line, and perhaps `completion` or
            `completions`. Given completions are scored as they are, and nothing is sampled.
        task: A task of the lab to draw problems of, instead of a file.
        lengths: Digits of its problems, in equal shares.
        num_prompts: Problems to draw (default 64), or lines to read at most (default all).
        num_samples: Completions of each prompt by each model.
        temperature: Of the sampling; 0 takes the most probable token each time. Distributions are compared at
            temperature 1 whatever it is.
        max_new_tokens: Limit of a completion; default 512, and for the lab what no right solution reaches.
        top_k: Of the overlap of the most probable tokens, and of the page's hover.
        top_p: Nucleus for a second, truncated JS.
        vocabulary: `same` refuses different vocabularies, `common-prefix` compares the ids before the first
            difference.
        template: Whose tokenizer, and chat template, encodes the prompts.
        sequential: Hold one model in memory at a time.
        device: `cpu`, `cuda`, `cuda:1`, …
        dtype: Of weights and arithmetic; `auto` is as stored.
        seed: Of problems, noise and resamples.
        batch_tokens: Padded tokens of a batch at most.
        chunk_bytes: Working memory of the divergences at most, but for one position.
        page_prompts: Prompts whose first completions are on the page: the first ones, not chosen ones.
        output: Directory for record, tables, positions, figures and page; nothing is written without it.
        overwrite: Replace what an earlier run left there.
        figures: Draw figures into `output` as well.
        parquet: Write the positions as Parquet instead of CSV.
        on_progress: Called with a stage, what is done of it, and all of it.
        on_note: Called with lines for the user.

    Raises:
        UsageError: No prompts, different vocabularies, or a number that cannot be.
        MissingExtraError: A model needs `transformers`, which is not installed.
        OutputError: `output` holds what would be replaced, or cannot be written.
        SparsityAuditError: A model cannot be read, or is not a causal language model.
    """
    from sparsity_audit.report.tokens_files import TOKENS_FILES, render_tokens, verify_positions

    check_numbers(num_samples=num_samples, top_k=top_k, top_p=top_p, temperature=temperature)
    if output is not None:
        inputs = [path for path in (base, tuned, prompts) if path is not None]
        verify_free(Path(output), TOKENS_FILES, inputs=inputs, overwrite=overwrite)
        verify_positions(parquet=parquet)
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
    is_given = any(prompt.completions for prompt in question.prompts)
    sampling = SamplingRecord(
        num_samples=None if is_given else num_samples,
        temperature=temperature,
        max_new_tokens=question.max_new_tokens,
        seed=seed,
        top_k=min(top_k, question.vocabulary.size),
        top_p=top_p,
    )
    limits = Limits(batch_tokens=batch_tokens, chunk_bytes=chunk_bytes, page_prompts=page_prompts)
    notes = list(question.notes)
    with one_thread_for(question):
        found = measure_sets(
            question.sources,
            question.prompts,
            vocabulary=question.vocabulary,
            sampling=sampling,
            limits=limits,
            sequential=sequential,
            on_progress=on_progress,
            on_note=notes.append,
        )
    for note in notes:
        on_note(note)
    report = _report(question, sampling, found, notes=tuple(dict.fromkeys(notes)))
    if output is not None:
        tokenizer = question.tokenizer
        files = render_tokens(
            report,
            found=[(one.name, one.places, measured) for one, measured in found],
            scores={one.name: one.scores(tokenizer) for one, _ in found},
            decode=tokenizer.decode,
            figures=figures,
            parquet=parquet,
        )
        for name, data in files:
            write_below(Path(output), name, data)
    return report


def ask(
    models: tuple[str | Path, str | Path],
    *,
    prompts: str | Path | None,
    task: str | None,
    lengths: Sequence[int],
    num_prompts: int | None,
    max_new_tokens: int | None,
    vocabulary: VocabularyRule,
    template: Literal["base", "tuned"],
    device: str,
    dtype: ModelDType,
    seed: int,
) -> Question:
    """Prompts encoded for two models whose weights have not been read; arguments as of `tokens_diverge`."""
    lines, source, limit = _lines(prompts, task, lengths=lengths, num_prompts=num_prompts, seed=seed)
    base, tuned = (ModelSource(reference=model, device=device, dtype=dtype) for model in models)
    facts = base.facts(), tuned.facts()
    shared = check_same_vocabulary(*facts, common_prefix=vocabulary == "common-prefix")
    tokenizer = facts[template == "tuned"].tokenizer
    encoded, failed = encode_prompts(lines, facts, tokenizer=tokenizer, vocab_size=shared.size)
    return Question(
        sources=(base, tuned),
        facts=facts,
        vocabulary=shared,
        tokenizer=tokenizer,
        source=source,
        num_prompts=len(lines),
        prompts=tuple(encoded),
        failed=tuple(failed),
        max_new_tokens=limit if max_new_tokens is None else max_new_tokens,
        notes=_notes(facts, shared, encoded, template=template),
    )


def _lines(
    prompts: str | Path | None,
    task: str | None,
    *,
    lengths: Sequence[int],
    num_prompts: int | None,
    seed: int,
) -> tuple[list[PromptLine], str, int]:
    """What was asked, where it came from, and the limit of a completion that fits it."""
    if (prompts is None) == (task is None):
        raise UsageError(
            "prompts", "exactly one of a file and a task is needed", remedy="--prompts or --task"
        )
    if num_prompts is not None and num_prompts < 1:
        raise UsageError("num_prompts", str(num_prompts), expected="at least 1")
    if prompts is not None:
        return read_prompts(prompts, num=num_prompts), str(prompts), _MAX_NEW_TOKENS
    from sparsity_audit.lab.tasks import named_task

    assert task is not None
    num = num_prompts or _NUM_PROMPTS
    lines = lab_prompts(task, lengths=lengths, num=num, seed=seed)
    digits = ", ".join(map(str, lengths))
    return lines, f"{task}, {digits} digits, seed {seed}", named_task(task).max_new_tokens(max(lengths))


def _notes(
    facts: tuple[ModelFacts, ModelFacts],
    shared: SharedVocabulary,
    prompts: Sequence[EncodedPrompt],
    *,
    template: Literal["base", "tuned"],
) -> tuple[str, ...]:
    notes = []
    if shared.size < max(shared.base_size, shared.tuned_size):
        notes.append(
            f"distributions are compared on the first {shared.size:,} ids, renormalised over them; "
            f"base has {shared.base_size:,}, tuned {shared.tuned_size:,}"
        )
    other = facts[template != "tuned"].tokenizer
    first = prompts[0]
    try:
        line = first.line
        ids = (
            other.encode_prompt(line.text or "")
            if line.messages is None
            else other.encode_chat(line.messages)
        )
    except UsageError:
        ids = None
    if ids != list(first.ids):
        notes.append(f"prompts are encoded as the {template} model expects them; the other would differ")
    if not shared.eos_ids:
        notes.append("neither model has an end token: every completion runs to the limit")
    return tuple(notes)


def check_numbers(*, num_samples: int, top_k: int, top_p: float | None, temperature: float) -> None:
    """Refuse numbers that cannot be. Raises UsageError."""
    for name, number in (("num_samples", num_samples), ("top_k", top_k)):
        if number < 1:
            raise UsageError(name, str(number), expected="at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise UsageError("top_p", str(top_p), expected="above 0, at most 1")
    if not 0 <= temperature < float("inf"):
        raise UsageError("temperature", str(temperature), expected="0 (greedy) or more")


def one_thread_for(question: Question) -> AbstractContextManager[None]:
    """One thread for the lab's models, whose results then repeat bit for bit; the user's choice otherwise."""
    if not question.is_lab:
        return nullcontext()
    from sparsity_audit.lab.determinism import one_thread

    return one_thread()


def _report(
    question: Question,
    sampling: SamplingRecord,
    found: Sequence[tuple[CompletionSet, Measured]],
    *,
    notes: tuple[str, ...],
) -> TokensReport:
    failed = list(question.failed)
    for one, measured in found:
        failed += [*one.failed, *broken_completions(one, measured)]
    sets = [
        _set_record(question, one, measured, seed=sampling.seed) for one, measured in found if measured.num
    ]
    if not sets:
        raise UsageError(
            "completions", f"none could be scored; the first: {failed[0].reason}", expected="finite logits"
        )
    base, tuned = model_records(question)
    shared = question.vocabulary
    return TokensReport(
        tool=f"sparsity-audit {__version__}",
        base=base,
        tuned=tuned,
        source=question.source,
        vocabulary=VocabularyRecord(
            size=shared.size, base_size=shared.base_size, tuned_size=shared.tuned_size
        ),
        sampling=sampling,
        num_prompts=question.num_prompts,
        prompts=tuple(
            PromptRecord(number=p.number, name=p.line.name, text=question.tokenizer.decode(p.ids))
            for p in question.prompts
        ),
        sets=tuple(sets),
        failed=tuple(failed),
        notes=notes,
    )


def model_records(question: Question) -> tuple[ModelRecord, ModelRecord]:
    """Base and tuned, as records name them."""
    base, tuned = (
        ModelRecord(
            reference=fact.name,
            loader=fact.loader,
            dtype="fp32" if fact.loader == "lab" else source.dtype,
            device=source.device,
            context_tokens=fact.context_tokens,
        )
        for fact, source in zip(question.facts, question.sources, strict=True)
    )
    return base, tuned


def _set_record(question: Question, one: CompletionSet, measured: Measured, *, seed: int) -> SetRecord:
    decode, columns = question.tokenizer.decode, measured.columns
    scores = one.scores(question.tokenizer)
    judged = [score for score in scores if score is not None]
    ids = [prompt.ids for prompt in one.prompts]
    return SetRecord(
        name=one.name,
        truncated=sum(one.truncated),
        accuracy=sum(judged) / len(judged) if judged else None,
        summary=summarise(columns, [prompt.number for prompt in one.prompts], seed=seed),
        shifted_positions=shifted_positions(columns, one.places, ids, num=_NUM_SHIFTED, decode=decode),
        shifted_tokens=shifted_tokens(columns, num=_NUM_SHIFTED, decode=decode),
        by_prompt=by_prompt(columns, one.places, scores),
    )
