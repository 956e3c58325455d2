"""Which tokens carry the gain, end to end: `tokens cross-sample`.

Contract: `tokens_cross_sample` lets two models take turns on the same prompts, under every rule asked for and
its controls, judges all completions, and returns a `CrossReport`; with `output` finished points are kept, a
killed run goes on from them, and a later call adds points. Defaults live here and nowhere below.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from sparsity_audit import __version__
from sparsity_audit.api.token_models import ModelDType
from sparsity_audit.api.token_sets import OnProgress
from sparsity_audit.api.token_verifier import Verifier, judge_required, score_completion
from sparsity_audit.api.tokens_cross_points import (
    CONTROLS,
    Control,
    DonePoint,
    run_direction,
    settings_of,
)
from sparsity_audit.api.tokens_cross_records import cross_report
from sparsity_audit.api.tokens_cross_store import CrossStore, weights_identity
from sparsity_audit.api.tokens_diverge import Question, VocabularyRule, ask, one_thread_for
from sparsity_audit.errors import UsageError
from sparsity_audit.models.noise import row_seed
from sparsity_audit.report.cross import CrossReport, Direction
from sparsity_audit.report.output import verify_free, write_below
from sparsity_audit.tokens.intervention import CrossSamples, cross_sample
from sparsity_audit.tokens.rules import Rule

if TYPE_CHECKING:
    from sparsity_audit.models.protocol import LanguageModel

__all__ = ["DIRECTIONS", "tokens_cross_sample"]

DIRECTIONS: tuple[Direction, ...] = ("forward", "reverse")
_THRESHOLDS = (0.4, 0.2, 0.1, 0.05, 0.02, 0.01, 0.001)
_BUDGETS = (1, 2, 4)


def tokens_cross_sample(
    base: str | Path,
    tuned: str | Path,
    *,
    prompts: str | Path | None = None,
    task: str | None = None,
    lengths: Sequence[int] = (4,),
    num_prompts: int | None = None,
    verifier: str | Verifier | None = None,
    thresholds: Sequence[float] | None = None,
    shares: Sequence[float] = (),
    budgets: Sequence[int] | None = None,
    directions: Sequence[Direction] = DIRECTIONS,
    controls: Sequence[Control] = CONTROLS,
    num_samples: int = 1,
    temperature: float = 1.0,
    max_new_tokens: int | None = None,
    vocabulary: VocabularyRule = "same",
    template: Literal["base", "tuned"] = "tuned",
    device: str = "cpu",
    dtype: ModelDType = "auto",
    seed: int = 0,
    batch_tokens: int = 16_384,
    output: str | Path | None = None,
    overwrite: bool = False,
    figures: bool = True,
    on_progress: OnProgress = lambda _stage, _done, _all: None,
    on_note: Callable[[str], None] = lambda _note: None,
) -> CrossReport:
    """Let one model write and the other take over where a rule says so, and judge what comes out.

    Args:
        base: A model folder, a Hub reference, or `mix` or `single` for a base of the lab.
        tuned: The model that was trained from it.
        prompts: A JSONL file with `prompt` or `messages` on each line; the whole object goes to the verifier.
        task: A task of the lab instead of a file; it judges by itself.
        lengths: Digits of its problems, in equal shares.
        num_prompts: Problems to draw (default 64), or lines to read at most (default all).
        verifier: `module:function`, `file.py:function` or a function: (JSON object, completion) → truth value
            or number in [0, 1]. With `task` the lab's is built in.
        thresholds: Of the JS, nats: the other model takes over above. Default .4 to .001 where neither shares
            nor budgets are given.
        shares: Shares of positions; the threshold is the quantile of the JS along the primary model's own
            completions.
        budgets: Tokens a completion; the first ones above the largest threshold that spends the budget in
            95 % of the primary model's own completions. Default 1, 2, 4 where nothing else is given.
        directions: `forward`: the base writes; `reverse`: the tuned model writes.
        controls: Beside every rule: `random`, `entropy`, and for budgets `first`.
        num_samples: Completions of each prompt.
        temperature: Of the distributions that are drawn from and compared.
        max_new_tokens: Limit of a completion; default 512, and for the lab what no right solution reaches.
        vocabulary: `same` refuses different vocabularies, `common-prefix` draws from the ids before the first
            difference.
        template: Whose tokenizer, and chat template, encodes the prompts.
        device: `cpu`, `cuda`, `cuda:1`, …: both models are there.
        dtype: Of weights and arithmetic; `auto` is as stored.
        seed: Of problems, noise, random positions and resamples.
        batch_tokens: Padded tokens of a batch at most.
        output: Directory for points, record, table and figure; nothing is written without it.
        overwrite: Replace what a run with other settings left there.
        figures: Draw the figure into `output` as well.
        on_progress: Called with a stage, what is done of it, and all of it.
        on_note: Called with lines for the user.

    Raises:
        UsageError: No prompts, no verifier, different vocabularies, a number that cannot be, or a verifier
            that judged nothing.
        MissingExtraError: A model needs `transformers`, which is not installed.
        OutputError: `output` holds another run's points, or cannot be written.
        SparsityAuditError: A model cannot be read, or is not a causal language model.
    """
    from sparsity_audit.report.cross_files import CROSS_FILES, render_cross

    if thresholds is None and budgets is None and not shares:
        thresholds, budgets = _THRESHOLDS, _BUDGETS
    settings = settings_of(thresholds or (), shares, budgets or ())
    _check(directions, controls, num_samples=num_samples)
    judge_name, judge = judge_required(verifier, task)
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
    identity = _identity(question, judge_name, num_samples=num_samples, temperature=temperature, seed=seed)
    folder = None if output is None else Path(output)
    if folder is not None:
        # A record beside its own points only grows: it is replaced without asking.
        own = overwrite or (folder / "points" / "settings.json").is_file()
        inputs = [path for path in (base, tuned, prompts) if path is not None]
        verify_free(folder, CROSS_FILES, inputs=inputs, overwrite=own)
    store = CrossStore(folder, identity, restart=overwrite)
    run = _Run(
        question=question,
        verifier=judge,
        num_samples=num_samples,
        temperature=temperature,
        seed=seed,
        batch_tokens=batch_tokens,
        on_progress=on_progress,
        on_note=on_note,
    )
    points: list[DonePoint] = []
    with one_thread_for(question):
        for direction in DIRECTIONS:
            # The other direction's primary model alone is this one's goal.
            asked = settings if direction in directions else ()
            points += run_direction(
                direction,
                asked,
                controls,
                rows=run.rows,
                seed=seed,
                store=store,
                sample=run.sample,
                judge=run.judge,
            )
    report = cross_report(
        question,
        points,
        rows=run.rows,
        verifier=judge_name,
        num_samples=num_samples,
        temperature=temperature,
        seed=seed,
        tool=f"sparsity-audit {__version__}",
    )
    for note in report.notes:
        on_note(note)
    if folder is not None:
        for name, data in render_cross(report, figures=figures).items():
            write_below(folder, name, data)
    return report


@dataclass(slots=True, kw_only=True)
class _Run:
    """Models that are loaded when the first point needs them, and the rows they complete."""

    question: Question
    verifier: Verifier | None
    num_samples: int
    temperature: float
    seed: int
    batch_tokens: int
    on_progress: OnProgress
    on_note: Callable[[str], None]
    models: tuple[LanguageModel, LanguageModel] | None = field(default=None, init=False)

    @property
    def rows(self) -> list[tuple[int, int]]:
        """(prompt number, sample) of each row."""
        return [(p.number, sample) for p in self.question.prompts for sample in range(self.num_samples)]

    def sample(self, key: str, direction: Direction, rule: Rule) -> CrossSamples:
        """Completions of all rows under a rule."""
        if self.models is None:
            base, tuned = (source.load(on_note=self.on_note) for source in self.question.sources)
            self.models = base, tuned
        primary, intervening = self.models if direction == "forward" else self.models[::-1]
        done = 0

        def count(num: int) -> None:
            nonlocal done
            done += num
            self.on_progress(key, done, len(self.rows))

        return cross_sample(
            primary,
            intervening,
            [prompt.ids for prompt in self.question.prompts for _ in range(self.num_samples)],
            rule=rule,
            seeds=[row_seed(self.seed, "cross", *row) for row in self.rows],
            eos_ids=self.question.vocabulary.eos_ids,
            max_new_tokens=self.question.max_new_tokens,
            temperature=self.temperature,
            batch_tokens=self.batch_tokens,
            vocab_size=self.question.vocabulary.size,
            on_rows=count,
        )

    def judge(self, key: str, samples: CrossSamples) -> tuple[np.ndarray, dict[int, str]]:
        """Scores of all rows; a row whose logits were no numbers has none."""
        scores, reasons = np.full(len(self.rows), np.nan), {}
        lines = [prompt.line for prompt in self.question.prompts for _ in range(self.num_samples)]
        for row, line in enumerate(lines):
            reason: str | None = "the logits are no numbers (NaN or infinite)"
            if not samples.failed[row]:
                scores[row], reason = score_completion(
                    line,
                    samples.completion(row),
                    verifier=self.verifier,
                    tokenizer=self.question.tokenizer,
                    eos_ids=self.question.vocabulary.eos_ids,
                )
            if reason is not None:
                reasons[row] = reason
        if np.isnan(scores).all():
            raise UsageError(
                f"completions of {key}", f"none has a score; the first: {reasons[0]}", expected="verdicts"
            )
        return scores, reasons


def _check(directions: Sequence[Any], controls: Sequence[Any], *, num_samples: int) -> None:
    for name, values, known in (("directions", directions, DIRECTIONS), ("controls", controls, CONTROLS)):
        unknown = [value for value in values if value not in known]
        if unknown:
            raise UsageError(name, f"{unknown[0]!r} is not known", expected=f"some of {', '.join(known)}")
    if not directions:
        raise UsageError("directions", "none is named", expected="forward, reverse or both")
    if num_samples < 1:
        raise UsageError("num_samples", str(num_samples), expected="at least 1")


def _identity(
    question: Question, verifier: str, *, num_samples: int, temperature: float, seed: int
) -> dict[str, Any]:
    """What all points of a folder have in common."""
    asked = [[prompt.number, list(prompt.ids)] for prompt in question.prompts]
    return {
        "base": weights_identity(question.sources[0].reference),
        "tuned": weights_identity(question.sources[1].reference),
        "models": [asdict(source) | {"reference": str(source.reference)} for source in question.sources],
        "prompts": hashlib.sha256(json.dumps(asked).encode()).hexdigest(),
        "verifier": verifier,
        "num_samples": num_samples,
        "temperature": temperature,
        "max_new_tokens": question.max_new_tokens,
        "vocab_size": question.vocabulary.size,
        "seed": seed,
        "version": __version__,
    }
