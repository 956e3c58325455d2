"""What is measured of each patched model: divergence from the tuned one, accuracy, cross-sampling.

Contract: completions are sampled once, by base and tuned with the same noise, and the tuned model's hidden
states are kept on disk; a patched model is scored and sampled on the same prompts with the same noise, so
every figure is paired by prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from sparsity_audit import __version__
from sparsity_audit.api.token_verifier import Verifier, score_completion
from sparsity_audit.api.tokens_cross_records import by_prompt
from sparsity_audit.api.tokens_diverge import Question, model_records
from sparsity_audit.errors import UsageError
from sparsity_audit.models.noise import row_seed
from sparsity_audit.models.sample import Sample, sample
from sparsity_audit.models.score import Scored, Side, spill
from sparsity_audit.report.tokens_patch import PatchDirection, PatchReport, PatchRow, TakeOver
from sparsity_audit.stats.paired import gap_share, mean_interval, resample
from sparsity_audit.tokens.intervals import RatioEstimate, ratio_estimates
from sparsity_audit.tokens.intervention import cross_sample
from sparsity_audit.tokens.patching import PositionJs, js_to_tuned, verify_same_shapes
from sparsity_audit.tokens.rules import Above

if TYPE_CHECKING:
    from sparsity_audit.models.protocol import LanguageModel

__all__ = ["CompletionsOf", "PatchAudit"]

CompletionsOf = Literal["base", "tuned", "both"]
_DRAWS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reference:
    """What patched models are held against."""

    js: PositionJs
    base_scores: np.ndarray | None
    tuned_scores: np.ndarray | None


class PatchAudit:
    """Both models, their completions, and the divergence that is to be explained.

    The tuned model's hidden states are spilled once: it is patched itself, and its head is copied.
    """

    def __init__(
        self,
        question: Question,
        *,
        verifier: Verifier | None,
        judges: bool,
        completions: CompletionsOf,
        limit: float,
        take_over: float | None,
        num_samples: int,
        temperature: float,
        seed: int,
        batch_tokens: int,
        chunk_bytes: int,
        scratch: Path,
        on_note: Callable[[str], None],
    ) -> None:
        self.question, self.verifier, self.judges, self.on_note = question, verifier, judges, on_note
        self.completions, self.limit, self.threshold, self.seed = completions, limit, take_over, seed
        self.num_samples, self.temperature = num_samples, temperature
        self.batch_tokens, self.chunk_bytes = batch_tokens, chunk_bytes
        self.base, self.tuned = (source.load(on_note=on_note) for source in question.sources)
        verify_same_shapes(self.base, self.tuned)
        samples = {"base": self._sample(self.base), "tuned": self._sample(self.tuned)}
        self.sequences, self.owners = self._sequences(samples)
        # A model of its own gives the reference: the tuned one is patched, head and all.
        reference = question.sources[1].load()
        self._side: Side = spill(reference, self.sequences, scratch, batch_tokens=batch_tokens)
        self.reference = _Reference(
            js=self._js(self.base),
            base_scores=self._scores(samples["base"]) if judges else None,
            tuned_scores=self._scores(samples["tuned"]) if judges else None,
        )
        if not self.reference.js.js.sum() > 0:
            raise UsageError(
                "models", "do not diverge at any position", expected="a tuned model that differs"
            )
        self.times = resample(len(question.prompts), draws=_DRAWS, seed=seed)

    @property
    def rows(self) -> list[tuple[int, int]]:
        """(prompt number, sample) of each completion of one model."""
        return [(p.number, n) for p in self.question.prompts for n in range(self.num_samples)]

    def _drawing(self) -> dict[str, Any]:
        """How every model completes the prompts: with the same noise, a stream a row."""
        return {
            "seeds": [row_seed(self.seed, "cross", *row) for row in self.rows],
            "eos_ids": self.question.vocabulary.eos_ids,
            "max_new_tokens": self.question.max_new_tokens,
            "temperature": self.temperature,
            "batch_tokens": self.batch_tokens,
        }

    def _prompts(self) -> list[tuple[int, ...]]:
        return [prompt.ids for prompt in self.question.prompts for _ in range(self.num_samples)]

    def _sample(self, model: LanguageModel) -> list[Sample]:
        return sample(model, self._prompts(), **self._drawing())

    def _sequences(self, samples: dict[str, list[Sample]]) -> tuple[list[Scored], np.ndarray]:
        """What is scored, and the place of each one's prompt; broken and foreign completions are left out."""
        place = {prompt.number: number for number, prompt in enumerate(self.question.prompts)}
        names = ("base", "tuned") if self.completions == "both" else (self.completions,)
        found, owners, prompts, lost = [], [], self._prompts(), 0
        for name in names:
            for one, ids, (number, _) in zip(samples[name], prompts, self.rows, strict=True):
                fits = one.tokens and not one.failed and max(one.tokens) < self.question.vocabulary.size
                if fits:
                    found.append(Scored(prompt=ids, completion=one.tokens))
                    owners.append(place[number])
                lost += not fits
        if lost:
            self.on_note(f"{lost} completions are left out: no numbers, or a token of one model alone")
        if not found:
            raise UsageError("completions", "none can be scored", expected="finite logits")
        return found, np.array(owners)

    def _js(self, model: LanguageModel) -> PositionJs:
        return js_to_tuned(
            model,
            self._side,
            self.sequences,
            vocab_size=self.question.vocabulary.size,
            batch_tokens=self.batch_tokens,
            chunk_bytes=self.chunk_bytes,
        )

    def _scores(self, samples: Sequence[Sample]) -> np.ndarray:
        return self._judged([list(one.tokens) for one in samples], [one.failed for one in samples])

    def _judged(self, ids: Sequence[Sequence[int]], failed: Sequence[bool]) -> np.ndarray:
        """Mean score of each prompt."""
        lines = [prompt.line for prompt in self.question.prompts for _ in range(self.num_samples)]
        options = {"tokenizer": self.question.tokenizer, "eos_ids": self.question.vocabulary.eos_ids}
        scores = [
            np.nan if bad else score_completion(line, one, verifier=self.verifier, **options)[0]
            for line, one, bad in zip(lines, ids, failed, strict=True)
        ]
        if np.isnan(scores).all():
            raise UsageError("verifier", "gave no completion a score", expected="verdicts")
        return by_prompt(np.array(scores), [number for number, _ in self.rows])

    def row(
        self,
        model: LanguageModel,
        put_in: AbstractContextManager[None],
        kind: str,
        name: str,
        direction: PatchDirection,
        entries: int,
    ) -> PatchRow:
        """What a patched model does; the patch holds inside of `put_in`."""
        with put_in:
            found = self._js(model)
            scores = self._scores(self._sample(model)) if self.judges else None
            is_update = kind in ("mask", "update") and direction == "add"
            crossed = self.take_over_by(model) if is_update and self.judges else None
        shares = self._shares(found, direction)
        start, goal = self.reference.base_scores, self.reference.tuned_scores
        return PatchRow(
            kind=kind,
            name=name,
            direction=direction,
            entries=entries,
            mean_js=float(found.js.mean()),
            js_share=shares[0],
            divergent_share=shares[1],
            argmax_share=shares[2],
            accuracy=mean_interval(scores, seed=self.seed) if scores is not None else None,
            recovered=None
            if scores is None or start is None or goal is None
            else gap_share(start, goal, scores),
            take_over=crossed,
        )

    def _shares(self, found: PositionJs, direction: PatchDirection) -> list[RatioEstimate]:
        """JS, divergent positions, first choices: each as numerator and denominator by prompt."""
        before = self.reference.js
        is_added = direction == "add"
        divergent, differing = before.js > self.limit, ~before.agrees
        above = np.stack(
            [
                before.js - found.js if is_added else found.js,
                divergent & ((found.js <= self.limit) if is_added else (found.js > self.limit)),
                differing & (found.agrees if is_added else ~found.agrees),
            ],
            axis=1,
        )
        below = np.stack([before.js, divergent, differing], axis=1).astype(np.float64)
        owners, num = self.owners[before.sequence], len(self.question.prompts)

        def by_owner(values: np.ndarray) -> np.ndarray:
            columns = [np.bincount(owners, column, minlength=num) for column in values.T.astype(np.float64)]
            return np.stack(columns, axis=1)

        return ratio_estimates(by_owner(above), by_owner(below), self.times)

    def take_over_by(self, model: LanguageModel) -> TakeOver | None:
        """The base writes, the model takes over; None where that was not asked for."""
        start, goal = self.reference.base_scores, self.reference.tuned_scores
        if self.threshold is None or start is None or goal is None:
            return None
        base = self.question.sources[0].load()  # ours may be the one that is patched
        made = cross_sample(
            base,
            model,
            self._prompts(),
            rule=Above(signal="js", threshold=self.threshold),
            vocab_size=self.question.vocabulary.size,
            **self._drawing(),
        )
        scores = self._judged([made.completion(n) for n in range(len(made.lengths))], made.failed.tolist())
        return TakeOver(
            threshold=self.threshold,
            switched_frac=float(made.switched.sum() / made.lengths.sum().clamp(min=1)),
            accuracy=mean_interval(scores, seed=self.seed),
            recovered=gap_share(start, goal, scores),
        )

    def report(self, rows: Sequence[PatchRow], *, verifier: str | None) -> PatchReport:
        """The record."""
        base, tuned = model_records(self.question)
        before = self.reference.js
        means = [
            None if scores is None else mean_interval(scores, seed=self.seed)
            for scores in (self.reference.base_scores, self.reference.tuned_scores)
        ]
        return PatchReport(
            tool=f"sparsity-audit {__version__}",
            base=base,
            tuned=tuned,
            source=self.question.source,
            verifier=verifier,
            completions=self.completions,
            num_prompts=len(self.question.prompts),
            num_completions=len(self.sequences),
            positions=len(before.js),
            limit=self.limit,
            divergent=int((before.js > self.limit).sum()),
            mean_js=float(before.js.mean()),
            seed=self.seed,
            base_accuracy=means[0],
            tuned_accuracy=means[1],
            tuned_take_over=self.take_over_by(self.tuned),
            rows=tuple(rows),
            failed=self.question.failed,
            notes=self.question.notes,
        )
