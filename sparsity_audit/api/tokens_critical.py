"""Which tokens decide the outcome, end to end: `tokens critical`.

Contract: `tokens_critical` takes a model's completions (its own, given ones, or those of a divergence), picks
positions, forces their own and another token there, lets the model go on and judges; the same at as many
random positions. With `output` it writes record, table and figure. Defaults live here and nowhere below.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sparsity_audit.api.token_models import ModelDType
from sparsity_audit.api.token_sets import OnProgress
from sparsity_audit.api.token_verifier import Verifier, judge_required, score_completion
from sparsity_audit.api.tokens_critical_places import (
    DivergentSet,
    least_certain,
    most_divergent,
    places_from_file,
    random_places,
    read_divergent,
)
from sparsity_audit.api.tokens_critical_records import CriticalFound, critical_report
from sparsity_audit.api.tokens_diverge import Question, ask, one_thread_for
from sparsity_audit.errors import UsageError
from sparsity_audit.models.noise import row_seed
from sparsity_audit.models.sample import sample
from sparsity_audit.models.score import Scored
from sparsity_audit.report.critical import TokensCritical
from sparsity_audit.report.output import verify_free, write_below
from sparsity_audit.report.tokens import FailedPrompt
from sparsity_audit.tokens.critical import Forced, Place, continuations, read_positions

if TYPE_CHECKING:
    from sparsity_audit.models.protocol import LanguageModel

__all__ = ["tokens_critical"]


def tokens_critical(
    model: str | Path,
    *,
    prompts: str | Path | None = None,
    task: str | None = None,
    lengths: Sequence[int] = (4,),
    num_prompts: int | None = None,
    verifier: str | Verifier | None = None,
    positions: str | Path | None = None,
    divergent: str | Path | None = None,
    divergent_set: Literal["base", "tuned", "given"] = "base",
    per_completion: int = 1,
    num_continuations: int = 4,
    min_drop: float = 0.1,
    num_samples: int = 1,
    temperature: float = 1.0,
    max_new_tokens: int | None = None,
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
) -> TokensCritical:
    """Force another token at positions of a model's completions, and see what it does to the outcome.

    Args:
        model: A model folder, a Hub reference, or `mix` or `single` for a base of the lab.
        prompts: A JSONL file, as for `tokens_cross_sample`; where lines have completions, those are used.
        task: A task of the lab instead of a file; it judges by itself.
        lengths: Digits of its problems, in equal shares.
        num_prompts: Problems to draw (default 64), or lines to read at most (default all).
        verifier: As for `tokens_cross_sample`.
        positions: A JSONL file of `prompt`, `position` and perhaps `sample`.
        divergent: The output folder of a `tokens_diverge` on the same prompts: its completions, and their
            most divergent positions. Without this and `positions`, the least certain positions are taken.
        divergent_set: Which completions of it.
        per_completion: Positions of each completion, but for those of a file.
        num_continuations: Continuations after each of the two tokens.
        min_drop: Least drop of the score that is called decisive, in [0, 1).
        num_samples: Completions of each prompt, where the model makes them.
        temperature: Of completions and continuations.
        max_new_tokens: Limit of a completion; default 512, and for the lab what no right solution reaches.
        device: `cpu`, `cuda`, `cuda:1`, …
        dtype: Of weights and arithmetic; `auto` is as stored.
        seed: Of problems, noise, substitutes, random positions and resamples.
        batch_tokens: Padded tokens of a batch at most.
        chunk_bytes: Working memory of the distributions at most.
        output: Directory for record, table and figure; nothing is written without it.
        overwrite: Replace what an earlier run left there.
        figures: Draw the figure into `output` as well.
        on_progress: Called with a stage, what is done of it, and all of it.
        on_note: Called with lines for the user.

    Raises:
        UsageError: No prompts, no verifier, positions that are not there, or a number that cannot be.
        OutputError: `output` holds what would be replaced, or cannot be written.
        SparsityAuditError: The model cannot be read, or is not a causal language model.
    """
    from sparsity_audit.report.critical_files import TOKENS_CRITICAL_FILES, render_tokens_critical

    _check(positions, divergent, min_drop, per_completion, num_continuations, num_samples)
    judge_name, judge = judge_required(verifier, task)
    if output is not None:
        inputs = [path for path in (model, prompts, positions, divergent) if path is not None]
        verify_free(Path(output), TOKENS_CRITICAL_FILES, inputs=inputs, overwrite=overwrite)
    question = ask(
        (model, model),
        prompts=prompts,
        task=task,
        lengths=lengths,
        num_prompts=num_prompts,
        max_new_tokens=max_new_tokens,
        vocabulary="same",
        template="tuned",
        device=device,
        dtype=dtype,
        seed=seed,
    )
    run = _Run(
        question=question,
        judge=judge,
        num_samples=num_samples,
        num_continuations=num_continuations,
        temperature=temperature,
        seed=seed,
        batch_tokens=batch_tokens,
        chunk_bytes=chunk_bytes,
    )
    with one_thread_for(question):
        found = run.measure(
            question.sources[0].load(on_note=on_note),
            positions=positions,
            divergent=None if divergent is None else read_divergent(divergent, wanted=divergent_set),
            per_completion=per_completion,
            on_progress=on_progress,
        )
    report = critical_report(
        question,
        found,
        verifier=judge_name,
        num_continuations=num_continuations,
        temperature=temperature,
        min_drop=min_drop,
        seed=seed,
    )
    for note in report.notes:
        on_note(note)
    if output is not None:
        for file, data in render_tokens_critical(report, figures=figures).items():
            write_below(Path(output), file, data)
    return report


def _check(
    positions: Any, divergent: Any, min_drop: float, per_completion: int, continued: int, num_samples: int
) -> None:
    if positions is not None and divergent is not None:
        raise UsageError("positions", "come from a file and from a divergence", expected="one of them")
    if not 0 <= min_drop < 1:
        raise UsageError("min_drop", str(min_drop), expected="from 0 to below 1")
    for name, number in (
        ("per_completion", per_completion),
        ("num_continuations", continued),
        ("num_samples", num_samples),
    ):
        if number < 1:
            raise UsageError(name, str(number), expected="at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    question: Question
    judge: Verifier | None
    num_samples: int
    num_continuations: int
    temperature: float
    seed: int
    batch_tokens: int
    chunk_bytes: int

    def measure(
        self,
        model: LanguageModel,
        *,
        positions: str | Path | None,
        divergent: DivergentSet | None,
        per_completion: int,
        on_progress: OnProgress,
    ) -> CriticalFound:
        """Completions, places, continuations and their scores."""
        origin, rows = self._completions(model, divergent)
        keys, sequences = tuple(key for key, _ in rows), tuple(one for _, one in rows)
        never = (self.question.tokenizer.pad_id,)
        reading = read_positions(
            model,
            sequences,
            seed=self.seed,
            vocab_size=self.question.vocabulary.size,
            never=[number for number in never if number not in self.question.vocabulary.eos_ids],
            batch_tokens=self.batch_tokens,
            chunk_bytes=self.chunk_bytes,
        )
        lengths = [len(one.completion) for one in sequences]
        if positions is not None:
            order = {key: number for number, key in enumerate(keys)}
            chosen, by = places_from_file(positions, order, lengths), f"positions of {positions}"
        elif divergent is not None:
            js = [divergent.js[key] for key in keys]
            chosen = most_divergent(js, per_completion=per_completion)
            by = f"the {per_completion} most divergent of each completion"
        else:
            chosen = least_certain(reading, per_completion=per_completion)
            by = f"the {per_completion} least certain of each completion"
        groups = {"chosen": chosen, "random": random_places(chosen, lengths, seed=self.seed)}
        scores: dict[tuple[Place, bool], list[float]] = {}
        for number, places in enumerate(groups.values()):
            for one in continuations(
                model,
                sequences,
                places,
                reading,
                num=self.num_continuations,
                seed=self.seed,
                eos_ids=self.question.vocabulary.eos_ids,
                max_new_tokens=max(self.question.max_new_tokens, *lengths),
                temperature=self.temperature,
                batch_tokens=self.batch_tokens,
            ):
                scores.setdefault((one.place, one.is_kept), []).append(self._score(keys, one))
            on_progress("groups of positions", number + 1, len(groups))
        if all(math.isnan(score) for each in scores.values() for score in each):
            raise UsageError("verifier", "gave no continuation a score", expected="verdicts")
        alone = [p for places in groups.values() for p in places if (p, True) not in scores]
        return CriticalFound(
            keys=keys,
            sequences=sequences,
            reading=reading,
            groups={name: tuple(p for p in g if (p, True) in scores) for name, g in groups.items()},
            scores={key: tuple(values) for key, values in scores.items()},
            chosen_by=by,
            completions=origin,
            failed=(*self.question.failed, *[self._lost(keys, place) for place in alone]),
        )

    def _completions(
        self, model: LanguageModel, divergent: DivergentSet | None
    ) -> tuple[str, list[tuple[tuple[int, int], Scored]]]:
        """Whose, and each with its (prompt, sample)."""
        asked = self.question.prompts
        if divergent is not None:
            if divergent.source != self.question.source:
                raise UsageError(
                    "divergence",
                    f"is of {divergent.source}",
                    expected=f"the same prompts: {self.question.source}",
                )
            ids = {prompt.number: prompt.ids for prompt in asked}
            rows = [
                (key, Scored(prompt=ids[key[0]], completion=tokens))
                for key, tokens in divergent.tokens.items()
                if key[0] in ids
            ]
            return divergent.name, rows
        if any(prompt.completions for prompt in asked):
            given = [(p, n, tokens) for p in asked for n, tokens in enumerate(p.completions)]
            return "given", [((p.number, n), Scored(prompt=p.ids, completion=t)) for p, n, t in given]
        keys = [(prompt.number, n) for prompt in asked for n in range(self.num_samples)]
        repeated = [prompt.ids for prompt in asked for _ in range(self.num_samples)]
        made = sample(
            model,
            repeated,
            seeds=[row_seed(self.seed, "cross", *key) for key in keys],
            eos_ids=self.question.vocabulary.eos_ids,
            max_new_tokens=self.question.max_new_tokens,
            temperature=self.temperature,
            batch_tokens=self.batch_tokens,
        )
        rows = [
            (key, Scored(prompt=ids, completion=one.tokens))
            for key, ids, one in zip(keys, repeated, made, strict=True)
            if one.tokens and not one.failed
        ]
        if not rows:
            raise UsageError("completions", "the model made none that can be used", expected="finite logits")
        return "own", rows

    def _score(self, keys: Sequence[tuple[int, int]], one: Forced) -> float:
        lines = {prompt.number: prompt.line for prompt in self.question.prompts}
        return score_completion(
            lines[keys[one.place.sequence][0]],
            one.tokens,
            verifier=self.judge,
            tokenizer=self.question.tokenizer,
            eos_ids=self.question.vocabulary.eos_ids,
        )[0]

    def _lost(self, keys: Sequence[tuple[int, int]], place: Place) -> FailedPrompt:
        number, which = keys[place.sequence]
        names = {prompt.number: prompt.line.name for prompt in self.question.prompts}
        what = f"completion {which}, position {place.position}"
        return FailedPrompt(
            prompt=number, name=names[number], completion=what, reason="no other token can stand there"
        )
