"""From the sweeps of `lab study --full` to its jobs, and what they will cost.

Contract: pure. Bases come first, then runs, then what is measured on them; a base that two parts need is one
job. `smoke` shrinks every number and no structure: it tests the machinery and says nothing of the claims.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sparsity_audit.api.study_full_sweeps import (
    CRITICAL_TASKS,
    DEGREE,
    GRID,
    GRID_CONTROL,
    PARTS,
    SWEEPS,
    Sweep,
)
from sparsity_audit.api.study_plan import Job
from sparsity_audit.errors import UsageError

__all__ = ["RUN_ORDER", "FullPlan", "PartPlan", "cpu_s_of", "full_plan", "parts_of"]

RUN_ORDER = ("a", "b", "e", "f", "c", "d")
"""In which parts are run: those that pretrain much come last, so that what is cheap lands first."""

_GRID_CRITERIA = {"value": "value", "top-1pct": "top:1%"}
_CRITICAL_PROMPTS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class PartPlan:
    """One part: its sweeps and its jobs, each behind those it waits for."""

    part: str
    sweeps: tuple[Sweep, ...]
    jobs: tuple[Job, ...]

    @property
    def cpu_s(self) -> float:
        """About how many CPU seconds it takes; a base that another part makes as well is counted in both."""
        return sum(cpu_s_of(job) for job in self.jobs)


@dataclass(frozen=True, slots=True, kw_only=True)
class FullPlan:
    """A full study before it runs."""

    size: str
    parts: tuple[PartPlan, ...]

    def part(self, key: str) -> PartPlan:
        """The part of that letter."""
        return next(part for part in self.parts if part.part == key)


def parts_of(only: Sequence[str] | None) -> tuple[str, ...]:
    """The parts asked for, in the order in which they run; all by default. Raises UsageError."""
    if only is None:
        return RUN_ORDER
    unknown = [part for part in only if part not in PARTS]
    if unknown or not only:
        raise UsageError(
            "--only",
            f"{', '.join(map(repr, unknown)) or 'nothing'}",
            expected=f"some of {', '.join(PARTS)}, by comma",
        )
    return tuple(part for part in RUN_ORDER if part in only)


def full_plan(*, smoke: bool) -> FullPlan:
    """All parts, in the order in which they run."""
    sweeps = [_shrunk(sweep) for sweep in SWEEPS] if smoke else list(SWEEPS)
    parts = []
    for part in RUN_ORDER:
        own = tuple(sweep for sweep in sweeps if sweep.part == part)
        jobs: dict[str, Job] = {}
        for sweep in own:
            jobs |= {job.name: job for job in _jobs_of(sweep)}
        jobs |= {job.name: job for job in _measurements(own)}
        parts.append(PartPlan(part=part, sweeps=own, jobs=tuple(_ordered(jobs.values()))))
    return FullPlan(size="full-smoke" if smoke else "full", parts=tuple(parts))


def _ordered(jobs: Iterable[Job]) -> list[Job]:
    """By kind; the long ones of a kind first, so that two processes end together."""
    kinds = ("pretrain", "judge-base", "train", "judge", "critical", "grid")
    return sorted(jobs, key=lambda job: (kinds.index(job.kind), -cpu_s_of(job)))


def _jobs_of(sweep: Sweep) -> list[Job]:
    jobs = []
    for arm, settings in sweep.arms.items():
        for seed in sweep.seeds:
            options = {**sweep.common, **settings}
            base = options.pop("base")
            base_seed, base_job = None, None
            if base in sweep.bases:
                base_seed, base_job = _pretraining(sweep, base, seed)
                jobs.append(base_job)
            own = (options.get("task", "addition"), options.get("lengths", 4))
            tests = list(dict.fromkeys([own, *((test.task, test.digits) for test in sweep.tests)]))
            jobs += _run_and_judge(sweep, arm, options, seed=seed, base=(base, base_seed), tests=tests)
    return jobs


def _run_and_judge(
    sweep: Sweep,
    arm: str,
    options: Mapping[str, Any],
    *,
    seed: int,
    base: tuple[str, int | None],
    tests: Sequence[tuple[str, int]],
) -> list[Job]:
    name, (base_name, base_seed) = f"{sweep.key}-{arm}-seed{seed}", base
    made = base_seed is not None
    place = f"{base_name}-seed{base_seed}" if made else base_name
    waits = (f"pretrain-{place}",) if made else ()
    train = Job(
        name=name,
        kind="train",
        asked={"base": place, "is_made": made, "seed": seed, **options},
        after=waits,
    )
    judge = Job(
        name=f"judge-{name}",
        kind="judge",
        asked={
            "run": name,
            "sweep": sweep.key,
            "arm": arm,
            "base": base_name,
            "base_seed": base_seed,
            "tests": tests,
            "num_prompts": sweep.num_prompts,
        },
        after=(name,),
    )
    bases = [
        Job(
            name=f"judge-base-{sweep.key}-{place}-{task}-{digits}",
            kind="judge-base",
            asked={
                "sweep": sweep.key,
                "base": base_name,
                "base_seed": base_seed,
                "task": task,
                "digits": digits,
                "num_prompts": sweep.num_prompts,
            },
            after=waits,
        )
        for task, digits in tests
    ]
    return [*bases, train, judge]


def _pretraining(sweep: Sweep, base: str, seed: int) -> tuple[int, Job]:
    """The seed of a run's base, and the job that makes it."""
    spec = sweep.bases[base]
    base_seed = seed if seed in spec.seeds else spec.seeds[0]
    asked = {"recipe": spec.recipe, "seed": base_seed, "options": dict(spec.options), "place": base}
    return base_seed, Job(name=f"pretrain-{base}-seed{base_seed}", kind="pretrain", asked=asked)


def _measurements(sweeps: Sequence[Sweep]) -> list[Job]:
    jobs = []
    for sweep in sweeps:
        if sweep.key == GRID.key:
            control = next(other for other in sweeps if other.key == GRID_CONTROL.key)
            jobs += _grids(sweep, control)
        if sweep.key == DEGREE.key:
            jobs += _criticals(sweep)
    return jobs


def _grids(grid: Sweep, control: Sweep) -> list[Job]:
    rows = [
        {
            "run": f"{grid.key}-{arm}-seed{seed}",
            "seed": seed,
            "data": settings["task"],
            "algorithm": settings["algorithm"],
        }
        for arm, settings in grid.arms.items()
        for seed in grid.seeds
    ]
    reference = f"{control.key}-{next(iter(control.arms))}-seed{control.seeds[0]}"
    after = (*(str(row["run"]) for row in rows), reference)
    return [
        Job(
            name=f"grid-{name}",
            kind="grid",
            asked={"criterion": criterion, "rows": rows, "reference": reference},
            after=after,
        )
        for name, criterion in _GRID_CRITERIA.items()
    ]


def _criticals(sweep: Sweep) -> list[Job]:
    operands = {task: name for name, task in CRITICAL_TASKS.items()}
    prompts = min(_CRITICAL_PROMPTS, sweep.num_prompts)
    return [
        Job(
            name=f"critical-{sweep.key}-{arm}-seed{seed}",
            kind="critical",
            asked={
                "run": f"{sweep.key}-{arm}-seed{seed}",
                "arm": arm,
                "seed": seed,
                "degree": int(arm.partition("-")[0]),
                "operands": operands[settings["task"]],
                "num_prompts": prompts,
            },
            after=(f"{sweep.key}-{arm}-seed{seed}",),
        )
        for arm, settings in sweep.arms.items()
        for seed in sweep.seeds
    ]


# What it costs


_STEP_S, _UPDATE_S, _LOSS_KL_S = 0.4, 0.1, 0.05
_PRETRAIN_STEP_S, _LOOK_S = 0.12, 1.2
_TEST_S = {512: 4.5, 1024: 9.0}
_SIZES = {"small": 4.0, "medium": 12.0}
"""CPU seconds on one 2.5 GHz core, for the tiny size; see benchmarks/results/lab-study-full.json."""


def cpu_s_of(job: Job) -> float:
    """About how many CPU seconds a job takes."""
    asked = job.asked
    size = _SIZES.get(str(asked.get("base", "")).partition("-")[0], 1.0)
    if job.kind == "train":
        updates = asked.get("epochs", 1) * asked.get("minibatches", 1)
        rows = asked.get("prompts", 16) * asked.get("samples", 8) / 128
        penalty = _LOSS_KL_S * updates if asked.get("kl_coefficient") else 0.0
        return 1 + asked["steps"] * rows * size * (_STEP_S + _UPDATE_S * updates + penalty)
    if job.kind == "pretrain":
        options, is_both = asked["options"], asked["recipe"] == "both"
        steps = options.get("steps", 1150 if is_both else 430)
        looks = 0 if "target" in options else 60 if is_both else 15
        return _SIZES.get(options.get("size", ""), 1.0) * (_PRETRAIN_STEP_S * steps + _LOOK_S * looks)
    if job.kind in ("judge", "judge-base"):
        return size * len(asked.get("tests", [None])) * _TEST_S.get(asked["num_prompts"], 1.0)
    return 20.0 if job.kind == "critical" else 30.0


def _shrunk(sweep: Sweep) -> Sweep:
    """The same sweep in a minute or so: few steps of few prompts, from bases that have learned nothing."""
    small = {"prompts": 4, "samples": 4, "steps": 3}
    arms = {
        arm: {key: value for key, value in settings.items() if key != "steps"}
        for arm, settings in sweep.arms.items()
    }
    bases = {
        name: replace(
            spec,
            options={**{k: v for k, v in spec.options.items() if k != "size"}, "steps": 12, "target": None},
        )
        for name, spec in sweep.bases.items()
    }
    return replace(
        sweep, common={**sweep.common, **small}, arms=arms, bases=bases, seeds=sweep.seeds[:2], num_prompts=32
    )
