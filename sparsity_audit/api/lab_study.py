"""The study: the papers' claims on runs of a few minutes, as one page.

Contract: a killed study goes on where it stopped, and ends in the same `study.json`; times stand in
`run.json` alone. Jobs run in `processes` processes of one thread each, because that is what repeats bit for
bit.
"""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import resource
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsity_audit.api.study_jobs import MEASURED, do_job, result_of
from sparsity_audit.api.study_plan import Job, StudyPlan, study_plan
from sparsity_audit.errors import OutputError, UsageError
from sparsity_audit.masks.metadata import tool_name
from sparsity_audit.report.output import write_below
from sparsity_audit.report.study import StudyFacts, StudyReport, study_to_json
from sparsity_audit.report.study_claims import study_claims

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["lab_study"]

_MARK = "study.plan.json"


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
    with _claimed(folder, plan):
        started = time.perf_counter()
        cpu_s = _run_all(folder, plan, processes=processes, on_job=on_job)
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
        timing = {"wall_s": time.perf_counter() - started, "cpu_s": cpu_s, "processes": processes}
        write_below(folder, "run.json", f"{json.dumps(timing, indent=1)}\n".encode())
        write_below(folder, "study.json", study_to_json(report))
    return report


@contextmanager
def _claimed(folder: Path, plan: StudyPlan) -> Iterator[None]:
    """The folder for this study alone. Raises OutputError."""
    mark = folder / _MARK
    text = f"{json.dumps({'size': plan.size}, indent=1)}\n"
    if folder.exists() and not folder.is_dir():
        raise OutputError(str(folder), "is a file", expected="a directory", remedy="choose another -o")
    if folder.is_dir() and any(folder.iterdir()):
        if not mark.exists():
            raise OutputError(str(folder), "is not empty, and not a study", remedy="choose another -o")
        if mark.read_text() != text:
            raise OutputError(
                str(folder), f"holds a study of another size than {plan.size!r}", remedy="choose another -o"
            )
    write_below(folder, _MARK, text.encode())
    with (folder / "study.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OutputError(
                str(folder), "another study is writing here", remedy="wait for it, or choose another -o"
            ) from error
        try:
            yield
        finally:
            (folder / "study.lock").unlink(missing_ok=True)


def _run_all(
    folder: Path, plan: StudyPlan, *, processes: int, on_job: Callable[[str, int, int], None]
) -> float:
    """Do all jobs, each after those it waits for; CPU seconds of this process and its children."""
    before = _cpu_s()
    if processes == 1:
        for number, job in enumerate(plan.jobs, start=1):  # each stands behind those it waits for
            do_job(folder, job)
            on_job(job.name, number, len(plan.jobs))
        return _cpu_s() - before
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        waiting, done = list(plan.jobs), set[str]()
        going: dict[Future[None], Job] = {}
        try:
            while waiting or going:
                ready = [job for job in waiting if done.issuperset(job.after)]
                for job in ready[: processes - len(going)]:
                    waiting.remove(job)
                    going[pool.submit(do_job, folder, job)] = job
                for future in wait(going, return_when=FIRST_COMPLETED).done:
                    future.result()
                    name = going.pop(future).name
                    done.add(name)
                    on_job(name, len(done), len(plan.jobs))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return _cpu_s() - before


def _cpu_s() -> float:
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(part.ru_utime + part.ru_stime for part in used)


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
    )
