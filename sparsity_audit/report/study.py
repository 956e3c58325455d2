"""The records of a study: what was measured, and what each published claim becomes on it.

Contract: everything a claim says is computed from the measurements in the same record. What a smaller study
did not measure is None or absent, and a claim that needs it is `not measured`, never passed over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from sparsity_audit.lab.critical import Critical
from sparsity_audit.lab.estimators import Estimate
from sparsity_audit.lab.track import Track
from sparsity_audit.report.study_tokens import TokenFacts

__all__ = [
    "STUDY_FORMAT",
    "STUDY_VERSION",
    "Claim",
    "Goals",
    "Judged",
    "NullFacts",
    "OverlapFacts",
    "PairFacts",
    "PruneFacts",
    "PrunePoint",
    "RunFacts",
    "SeriesFacts",
    "SeriesPoint",
    "StudyFacts",
    "StudyReport",
    "Verdict",
    "study_json_schema",
    "study_to_json",
]

STUDY_FORMAT = "sparsity-audit/lab-study"
STUDY_VERSION = 1

Verdict = Literal["reproduces", "does not reproduce", "is explained by rounding", "not measured"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Goals:
    """What the numbers must reach for a claim to hold; printed beside each verdict.

    Args:
        gain: Least gain in accuracy of every GRPO seed.
        shuffled_gain: Most gain of the shuffled control.
        share: Least share of the winning format at the end.
        algorithm_gain: Least gain of every other algorithm.
        rounding_excess: Most excess share over the magnitude null of a pair of bf16 masks.
        seed_lift: Least ratio of the seeds' top-1 % Jaccard to tensor chance.
        shuffled_lift: Most ratio of the shuffled pair's.
        first_step_coverage: Least share of the final mask that the first step's mask holds.
        kept_gain: Least share of the gain that the 5 % largest movements carry.
        random_gain: Most share of it that as many random ones carry.
    """

    gain: float
    shuffled_gain: float
    share: float
    algorithm_gain: float = 0.1
    rounding_excess: float = 0.15
    seed_lift: float = 10.0
    shuffled_lift: float = 2.0
    first_step_coverage: float = 0.99
    kept_gain: float = 0.8
    random_gain: float = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A checkpoint on the study's prompts: accuracies, and the share of format S."""

    accuracy: Estimate
    greedy_accuracy: Estimate
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """One run, judged.

    Args:
        name: What tables and figures call it.
        role: `seed`, `shuffled`, `algorithm` or `masked`.
        base: Its base.
        algorithm: Its algorithm.
        precision: Its arm.
        lr: Its learning rate.
        steps: Its steps.
        command: The command line that makes it again; None for a run with an update mask.
        accuracy: pass@1 at temperature 1 on the study's prompts.
        base_accuracy: Of the weights it started from, on the same prompts.
        greedy_accuracy: Greedy pass@1.
        share: Share of format S.
        base_share: Of the weights it started from.
        sparsity: Update sparsity as stored (`value`, native view).
        served_sparsity: With both sides rounded to bf16.
        half_ulp: Lower end, value and upper end of the half-ULP law; None outside the bf16 arm.
    """

    name: str
    role: Literal["seed", "shuffled", "algorithm", "masked"]
    base: str
    algorithm: str
    precision: str
    lr: float
    steps: int
    command: str | None
    accuracy: Estimate
    base_accuracy: Estimate
    greedy_accuracy: Estimate
    share: float
    base_share: float
    sparsity: float
    served_sparsity: float
    half_ulp: tuple[float, float, float] | None

    @property
    def gain(self) -> float:
        """Accuracy gained."""
        return self.accuracy.value - self.base_accuracy.value


@dataclass(frozen=True, slots=True, kw_only=True)
class NullFacts:
    """One null of a pair."""

    null: str
    jaccard: float | None
    excess_share: float | None
    z: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PairFacts:
    """Two runs' masks and movements.

    Args:
        a: The first run.
        b: The second.
        jaccard: Of their masks.
        nulls: Chance, by null.
        cosine: Of the whole updates.
        sign_agreement: On the intersection of the masks.
        independent_signs: The same expected of independent signs.
    """

    a: str
    b: str
    jaccard: float | None
    nulls: tuple[NullFacts, ...]
    cosine: float | None
    sign_agreement: float | None
    independent_signs: float | None

    def chance(self, null: str) -> NullFacts | None:
        """The null of that name; None where it was not computed."""
        return next((part for part in self.nulls if part.null == null), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class OverlapFacts:
    """Overlaps of some runs under one criterion."""

    criterion: str
    view: str
    pairs: tuple[PairFacts, ...]

    def pair(self, a: str, b: str) -> PairFacts | None:
        """The pair of two runs, either way round."""
        return next((pair for pair in self.pairs if {pair.a, pair.b} == {a, b}), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class SeriesPoint:
    """One saved step: its update sparsity, and how much of the final mask is there."""

    step: int
    sparsity: float | None
    coverage: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SeriesFacts:
    """A run's mask along its saved steps."""

    run: str
    points: tuple[SeriesPoint, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunePoint:
    """The base with a part of the update.

    Args:
        keep: The selection, `top:5%`.
        kind: `top`, `random` or `bottom`.
        fraction: Share of the compared entries that is kept.
        accuracy: Of the pruned checkpoint.
    """

    keep: str
    kind: str
    fraction: float
    accuracy: Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneFacts:
    """A pruning curve of a run's update: evaluation only, nothing is trained.

    Args:
        run: The run.
        base_accuracy: Without the update.
        accuracy: With all of it.
        points: In between.
    """

    run: str
    base_accuracy: Estimate
    accuracy: Estimate
    points: tuple[PrunePoint, ...]

    def kept_gain(self, keep: str) -> float | None:
        """The share of the gain that a selection carries; None where not asked for, or nothing gained."""
        gain = self.accuracy.value - self.base_accuracy.value
        found = next((point for point in self.points if point.keep == keep), None)
        return (
            None if found is None or gain <= 0 else (found.accuracy.value - self.base_accuracy.value) / gain
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyFacts:
    """All that was measured."""

    goals: Goals
    num_prompts: int
    runs: tuple[RunFacts, ...]
    overlaps: tuple[OverlapFacts, ...]
    series: tuple[SeriesFacts, ...]
    prunings: tuple[PruneFacts, ...]
    tracks: dict[str, Track]
    critical: Critical | None
    tokens: tuple[TokenFacts, ...] = ()

    def run(self, name: str) -> RunFacts | None:
        """The run of that name."""
        return next((run for run in self.runs if run.name == name), None)

    def overlap(self, criterion: str, a: str, b: str) -> PairFacts | None:
        """A pair under a criterion."""
        found = (part.pair(a, b) for part in self.overlaps if part.criterion == criterion)
        return next((pair for pair in found if pair is not None), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A published claim, and what becomes of it here.

    Args:
        key: Short name; its figure's as well.
        title: The claim, a full sentence.
        source: Where it was published.
        goal: What the numbers must show.
        numbers: (what, value) as printed.
        verdict: Computed from the numbers and the goal.
        reading: What the numbers say, in a sentence or two.
        caption: What the figure shows; empty without one.
    """

    key: str
    title: str
    source: str
    goal: str
    numbers: tuple[tuple[str, str], ...]
    verdict: Verdict
    reading: str
    caption: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyReport:
    """A study.

    Args:
        format: `sparsity-audit/lab-study`.
        version: Version of this record.
        tool: Name and version of the writer.
        size: `smoke` or `study`.
        facts: What was measured.
        claims: What follows.
    """

    format: str = STUDY_FORMAT
    version: int = STUDY_VERSION
    tool: str
    size: Literal["smoke", "study"]
    facts: StudyFacts
    claims: tuple[Claim, ...]

    def claim(self, key: str) -> Claim:
        """The claim of that name."""
        return next(claim for claim in self.claims if claim.key == key)


def study_to_json(report: StudyReport) -> bytes:
    """`study.json`: indented UTF-8 with a final newline."""
    import json
    from dataclasses import asdict

    plain: dict[str, Any] = asdict(report)
    return f"{json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False)}\n".encode()


def study_json_schema() -> dict[str, Any]:
    """The JSON Schema of `study.json`."""
    from pydantic import TypeAdapter

    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"{STUDY_FORMAT} {STUDY_VERSION}",
        **TypeAdapter(StudyReport).json_schema(mode="serialization"),
    }
