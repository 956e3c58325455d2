"""The study: the papers' claims on runs of a few minutes, as one page.

Contract: a killed study goes on where it stopped, and ends in the same `study.json`; times stand in
`run.json` alone. Jobs run in `processes` processes of one thread each, because that is what repeats bit for
bit.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparsity_audit.api.study_jobs import MEASURED, do_job, result_of
from sparsity_audit.api.study_plan import StudyPlan, longest_first, study_plan
from sparsity_audit.api.study_runner import claimed, run_jobs
from sparsity_audit.errors import UsageError
from sparsity_audit.masks.metadata import tool_name
from sparsity_audit.report.output import write_below
from sparsity_audit.report.study import StudyFacts, StudyReport, study_to_json
from sparsity_audit.report.study_claims import study_claims

__all__ = ["lab_study"]


def lab_study(
    output: str | Path,
    *,
    smoke: bool = False,
    processes: int = 2,
    on_job: Callable[[str, int, int], None] = lambda _name, _done, _all: None,
) -> StudyReport:
    """Train, measure, judge, and write `index.html`.

    Args:
        output: The study's folder: `index.html`, `study.json`, `figures/`, `runs/`, `masks/`, `measured/`. A
            killed study goes on there.
        smoke: A study of about a minute: shorter runs, two arms, no masked training.
        processes: Jobs at a time; with more than one, a script needs the usual `if __name__ == "__main__"`.
        on_job: Called after each job with its name, jobs done and in all.

    Raises:
        UsageError: No process.
        OutputError: The folder holds something else, another study, or one that goes on.
        SparsityAuditError: As the jobs.
    """
    if processes < 1:
        raise UsageError("processes", str(processes), expected="at least 1")
    folder, plan = Path(output), study_plan(smoke=smoke)
    with claimed(folder, plan.size):
        started = time.perf_counter()
        jobs = longest_first(plan.jobs)
        used = run_jobs(folder, jobs, do_job, processes=processes, on_job=on_job)
        facts = _facts(folder, plan)
        report = StudyReport(
            tool=tool_name(),
            size="smoke" if smoke else "study",
            facts=facts,
            claims=study_claims(facts),
        )
        from sparsity_audit.report.study_page import render_study

        for name, data in render_study(report).items():
            write_below(folder, name, data)
        timing = {
            "wall_s": time.perf_counter() - started,
            "cpu_s": used.cpu_s,
            "processes": processes,
            "cpu_s_by_job": {name: round(seconds, 1) for name, seconds in used.by_job.items()},
        }
        write_below(folder, "run.json", f"{json.dumps(timing, indent=1)}\n".encode())
        write_below(folder, "study.json", study_to_json(report))
    return report


def _facts(folder: Path, plan: StudyPlan) -> StudyFacts:
    found = {job.name: result_of(folder, job) for kind in MEASURED for job in plan.named(kind)}

    def of(kind: str) -> tuple[Any, ...]:
        return tuple(found[job.name] for job in plan.named(kind))

    return StudyFacts(
        goals=plan.goals,
        num_prompts=plan.num_prompts,
        runs=of("judge"),
        overlaps=of("overlap"),
        series=of("series"),
        prunings=of("prune"),
        tracks={job.asked["run"]: found[job.name] for job in plan.named("track")},
        critical=next(iter(of("critical")), None),
        tokens=of("tokens"),
    )
