"""What a full study measured: runs by sweep and arm, bases, the grid's overlaps, critical tokens.

Contract: plain data. Intervals are 95 %, over problems, unless a field says otherwise: what varies between
seeds is shown as seeds, because two or three of them make no interval. A part that was not run is absent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sparsity_audit.lab.critical import Critical
from sparsity_audit.lab.estimators import Estimate
from sparsity_audit.lab.evaluation import FormatRecord
from sparsity_audit.report.across_runs import FactorTable, OverlapMatrix

__all__ = [
    "BaseFacts",
    "CriticalFacts",
    "FullFacts",
    "FullRun",
    "GridFacts",
    "Outcome",
    "PairKind",
    "SweepTable",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A policy on one task at one length.

    Args:
        task: The task's name.
        digits: Length of the problems.
        accuracy: pass@1 at temperature 1, two samples a problem.
        formats: Share and accuracy by format.
        entropy: Nats a token.
        kl: KL(policy‖base), nats a completion; None for a base.
    """

    task: str
    digits: int
    accuracy: Estimate
    formats: tuple[FormatRecord, ...]
    entropy: float
    kl: float | None

    def share(self, fmt: str) -> float:
        """Share of a format."""
        return next((row.share for row in self.formats if row.format == fmt), 0.0)

    def accuracy_in(self, fmt: str) -> float | None:
        """Accuracy within a format; None where it did not occur."""
        return next((row.accuracy for row in self.formats if row.format == fmt), None)

    @property
    def winner(self) -> FormatRecord:
        """The format of the largest share."""
        return max(self.formats, key=lambda row: row.share)


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseFacts:
    """A base, judged for one sweep.

    Args:
        sweep: The sweep.
        name: The base.
        seed: Its seed of pretraining; None for a shipped one.
        command: The command line that makes it again; empty for a shipped one.
        parameters: Number of its parameters.
        tests: On each task and length that a run from it is judged on.
    """

    sweep: str
    name: str
    seed: int | None
    command: str
    parameters: int
    tests: tuple[Outcome, ...]

    def test(self, task: str, digits: int) -> Outcome:
        """The test of that task and length."""
        return _test(self.tests, task, digits)


@dataclass(frozen=True, slots=True, kw_only=True)
class FullRun:
    """One run, judged.

    Args:
        sweep: Its sweep.
        arm: Its arm.
        seed: Its seed.
        base: Its base.
        base_seed: Seed of the base; None for a shipped one.
        command: The command line that makes it again.
        precision: Its arm of precision.
        lr: Its learning rate.
        own: Task and length it was trained on.
        tests: Its own task and length, then others.
        sparsity: Update sparsity as stored (criterion value).
        served_sparsity: With both sides rounded to bf16.
        half_ulp: Lower end, value and upper end of the half-ULP law; None for fp32 and for SGD.
        updates: Updates that moved weights.
        clip_frac: Share of tokens that the clip silenced, mean over steps; None where there is no clip.
        weight_mean: Mean divergence weight over the run; None without weights.
        warnings: What the run said of itself.
    """

    sweep: str
    arm: str
    seed: int
    base: str
    base_seed: int | None
    command: str
    precision: str
    lr: float
    own: tuple[str, int]
    tests: tuple[Outcome, ...]
    sparsity: float
    served_sparsity: float
    half_ulp: tuple[float, float, float] | None
    updates: int
    clip_frac: float | None
    weight_mean: float | None
    warnings: tuple[str, ...]

    def test(self, task: str = "addition", digits: int = 4) -> Outcome:
        """The test of that task and length."""
        return _test(self.tests, task, digits)


def _test(tests: Iterable[Outcome], task: str, digits: int) -> Outcome:
    return next(test for test in tests if (test.task, test.digits) == (task, digits))


@dataclass(frozen=True, slots=True, kw_only=True)
class PairKind:
    """Pairs of runs that differ in the same factors, as means over them.

    Args:
        differs: The factors; `shuffled` for pairs with the control.
        pairs: Their number.
        jaccard: Observed.
        chance: Expected Jaccard by null.
        excess: Excess share by null.
        cosine: Of the whole updates.
    """

    differs: tuple[str, ...]
    pairs: int
    jaccard: float | None
    chance: Mapping[str, float | None]
    excess: Mapping[str, float | None]
    cosine: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class GridFacts:
    """The grid of runs under one criterion, as `overlap runs.yaml` says it.

    Args:
        criterion: What "changed" means.
        view: `native` or `served`.
        nulls: The nulls of the default table that all pairs have.
        kinds: Pairs by the factors in which they differ.
        factors: The factor table over the highest rung.
        matrix: All pairs.
        notes: What the overlap said.
    """

    criterion: str
    view: str
    nulls: tuple[str, ...]
    kinds: tuple[PairKind, ...]
    factors: FactorTable
    matrix: OverlapMatrix
    notes: tuple[str, ...]

    def kind(self, *differs: str) -> PairKind | None:
        """Pairs that differ in just these factors."""
        return next((kind for kind in self.kinds if set(kind.differs) == set(differs)), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticalFacts:
    """Critical tokens of one base, and what a run from it does to them.

    Args:
        arm: Arm of the run in the sweep.
        degree: Steps of pretraining.
        operands: `identical` or `varying` lengths.
        seed: Of base and run.
        found: The record of `lab critical`.
    """

    arm: str
    degree: int
    operands: str
    seed: int
    found: Critical


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepTable:
    """A sweep as it was run: its settings as a table.

    Args:
        key: The sweep.
        part: Its part.
        question: In words.
        common: Setting → value, shared by all runs.
        arms: Arm → setting → value.
        seeds: Seeds of every arm.
        num_prompts: Problems of a test.
    """

    key: str
    part: str
    question: str
    common: Mapping[str, str]
    arms: Mapping[str, Mapping[str, str]]
    seeds: tuple[int, ...]
    num_prompts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FullFacts:
    """All that was measured, of the parts that were run."""

    parts: tuple[str, ...]
    sweeps: tuple[SweepTable, ...]
    runs: tuple[FullRun, ...]
    bases: tuple[BaseFacts, ...]
    grids: tuple[GridFacts, ...]
    criticals: tuple[CriticalFacts, ...]

    def of(self, sweep: str, arm: str | None = None) -> tuple[FullRun, ...]:
        """The runs of a sweep, or of one of its arms, by seed."""
        return tuple(run for run in self.runs if run.sweep == sweep and arm in (None, run.arm))

    def seeds(self, sweep: str) -> tuple[int, ...]:
        """The seeds of a sweep."""
        return next((table.seeds for table in self.sweeps if table.key == sweep), ())

    def base_of(self, run: FullRun) -> BaseFacts:
        """The base of a run, judged on the run's own task and length."""
        return self._base(run, *run.own)

    def start_of(self, run: FullRun, digits: int | None = None) -> Outcome:
        """The base of a run on the run's own task, at its own length or another one."""
        task, length = run.own
        return self._base(run, task, digits or length).test(task, digits or length)

    def _base(self, run: FullRun, task: str, digits: int) -> BaseFacts:
        wanted = (run.sweep, run.base, run.base_seed, task, digits)
        return next(
            base
            for base in self.bases
            for test in base.tests
            if (base.sweep, base.name, base.seed, test.task, test.digits) == wanted
        )
