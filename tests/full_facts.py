"""Facts of a full study made up by hand, so that a test can change one number and look at the verdict."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sparsity_audit.api.study_full_sweeps import (
    CRITICAL_TASKS,
    DEGREE,
    DEGREES,
    DIVERGENCE,
    FRONTIER,
    MIXTURES,
    SCALE,
    SPARSITY,
    TRANSFER,
    Sweep,
)
from sparsity_audit.lab.critical import Critical, Position, StepProbabilities
from sparsity_audit.lab.estimators import Estimate, Interval
from sparsity_audit.lab.evaluation import FormatRecord
from sparsity_audit.report.study_full_facts import (
    BaseFacts,
    CriticalFacts,
    FullFacts,
    FullRun,
    Outcome,
    SweepTable,
)

__all__ = ["accurate", "changed", "full_facts", "outcome"]

ERROR = 0.01
"""Standard error of every accuracy: a difference of .03 is beyond its interval, one of .02 is not."""


def accurate(value: float) -> Estimate:
    """An accuracy with the error of all of them."""
    return Estimate(
        value=value, standard_error=ERROR, low=value - 2 * ERROR, high=value + 2 * ERROR, num_prompts=512
    )


def outcome(
    accuracy: float, *, kl: float | None = 1.0, digits: int = 4, task: str = "addition", **shares
) -> Outcome:
    """A test; shares by format, with accuracies .8 in S, .4 in C, .1 in R."""
    shares = shares or {"S": 0.3, "C": 0.35, "R": 0.35}
    within = {"S": 0.8, "C": 0.4, "R": 0.1}
    formats = tuple(FormatRecord(format=f, share=s, accuracy=within[f]) for f, s in shares.items())
    return Outcome(task=task, digits=digits, accuracy=accurate(accuracy), formats=formats, entropy=0.2, kl=kl)


def _runs(sweep: Sweep, **fields: Any) -> list[FullRun]:
    """Every arm and seed, all alike."""
    return [
        FullRun(
            **{
                "sweep": sweep.key,
                "arm": arm,
                "seed": seed,
                "base": settings.get("base", sweep.common.get("base", "mix")),
                "base_seed": None,
                "command": "sparsity-audit lab train",
                "precision": {**sweep.common, **settings}.get("precision", "bf16"),
                "lr": 3e-4,
                "own": (settings.get("task", "addition"), settings.get("lengths", 4)),
                "tests": (outcome(0.7, task=settings.get("task", "addition")), outcome(0.8, digits=3)),
                "sparsity": 0.5,
                "served_sparsity": 0.5,
                "half_ulp": None,
                "updates": 24,
                "clip_frac": 0.01,
                "weight_mean": 1.01,
                "warnings": (),
                **fields,
            }
        )
        for arm, settings in sweep.arms.items()
        for seed in sweep.seeds
    ]


def _critical(degree: int, operands: str, seed: int) -> CriticalFacts:
    zero = Interval(value=0.0, low=-0.01, high=0.01, num_prompts=128)
    less = Interval(value=-0.1, low=-0.12, high=-0.08, num_prompts=128)
    hesitant = (0, 4) if operands == "identical" else (0, 9)
    positions = tuple(
        Position(
            index=index,
            example="S",
            num_tokens=1,
            certainty=0.9,
            delta_certainty=less if index in hesitant else zero,
            right_probability=0.6,
            accuracy_right=accurate(0.6),
            accuracy_wrong=accurate(0.1),
            drop=Interval(value=0.5, low=0.45, high=0.55, num_prompts=128),
            critical=index in hesitant,
        )
        for index in range(12)
    )
    rise = Interval(value=0.1, low=0.08, high=0.12, num_prompts=128)
    steps = (StepProbabilities(step=16, by_position=(0.8,) * 12, critical=rise, others=zero, gain=rise),)
    found = Critical(
        checkpoint="base",
        task=CRITICAL_TASKS[operands],
        length=4,
        solution_format="S",
        num_prompts=128,
        min_drop=0.1,
        example="1234+1234=",
        mean_certainty=0.95 if operands == "identical" else 0.9,
        positions=positions,
        run="a run",
        steps=steps,
    )
    return CriticalFacts(arm=f"{degree}-{operands}", degree=degree, operands=operands, seed=seed, found=found)


def full_facts() -> FullFacts:
    """Every sweep but the grid, all runs at .7 from bases at .4: no arm differs from another."""
    sweeps = (SPARSITY, TRANSFER, MIXTURES, SCALE, DEGREE, FRONTIER, DIVERGENCE)
    runs = [run for sweep in sweeps for run in _runs(sweep)]
    bases = {
        (run.sweep, run.base, task, digits): BaseFacts(
            sweep=run.sweep,
            name=run.base,
            seed=None,
            command="",
            parameters=1000,
            tests=(outcome(0.4, kl=None, digits=digits, task=task),),
        )
        for run in runs
        for task in ("addition", "addition-varying")
        for digits in (3, 4)
    }
    return FullFacts(
        parts=("a", "c", "d", "e", "f"),
        sweeps=tuple(
            SweepTable(
                key=sweep.key,
                part=sweep.part,
                question=sweep.question,
                common={},
                arms={arm: {} for arm in sweep.arms},
                seeds=sweep.seeds,
                num_prompts=512,
            )
            for sweep in sweeps
        ),
        runs=tuple(runs),
        bases=tuple(bases.values()),
        grids=(),
        criticals=tuple(
            _critical(degree, operands, seed)
            for degree in DEGREES
            for operands in CRITICAL_TASKS
            for seed in DEGREE.seeds
        ),
    )


def changed(facts: FullFacts, sweep: str, arm: str, seed: int | None = None, **fields: Any) -> FullFacts:
    """The facts with other values in the runs of an arm (whose name may end in `*`), or in one of them."""
    prefix = arm.removesuffix("*")
    return replace(
        facts,
        runs=tuple(
            replace(run, **fields)
            if run.sweep == sweep
            and (run.arm == arm or (prefix != arm and run.arm.startswith(prefix)))
            and seed in (None, run.seed)
            else run
            for run in facts.runs
        ),
    )
