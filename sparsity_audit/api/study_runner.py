"""How studies run: a folder of their own, jobs in processes of one thread, nothing done twice.

Contract: a folder belongs to the study whose mark it holds; another one, or another kind, is refused. Each
job starts once those it waits for are done. A killed study leaves a folder that goes on.
"""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sparsity_audit.api.study_plan import Job
from sparsity_audit.errors import OutputError
from sparsity_audit.report.output import write_below

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Used", "claimed", "run_jobs"]

_MARK = "study.plan.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Used:
    """What jobs cost.

    Args:
        cpu_s: CPU seconds of this process and its children, starting them included.
        by_job: CPU seconds within each job.
    """

    cpu_s: float
    by_job: Mapping[str, float]


@contextmanager
def claimed(folder: Path, size: str) -> Iterator[None]:
    """The folder for a study of this size alone. Raises OutputError."""
    mark = folder / _MARK
    text = f"{json.dumps({'size': size}, indent=1)}\n"
    if folder.exists() and not folder.is_dir():
        raise OutputError(str(folder), "is a file", expected="a directory", remedy="choose another -o")
    if folder.is_dir() and any(folder.iterdir()):
        if not mark.exists():
            raise OutputError(str(folder), "is not empty, and not a study", remedy="choose another -o")
        if mark.read_text() != text:
            raise OutputError(
                str(folder), f"holds a study of another size than {size!r}", remedy="choose another -o"
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


def run_jobs(
    folder: Path,
    jobs: Sequence[Job],
    do: Callable[[Path, Job], None],
    *,
    processes: int,
    on_job: Callable[[str, int, int], None],
) -> Used:
    """Do all jobs, each after those it waits for; of those that are ready, the first in order.

    Args:
        folder: The study's folder.
        jobs: Each stands behind those it waits for.
        do: Does one job; a function of a module, so that a process can be told of it.
        processes: Jobs at a time.
        on_job: Called with a finished job's name, jobs done and jobs in all.
    """
    before, by_job = _cpu_s(), dict[str, float]()
    if processes == 1:
        for number, job in enumerate(jobs, start=1):
            by_job[job.name] = _timed(do, folder, job)
            on_job(job.name, number, len(jobs))
        return Used(cpu_s=_cpu_s() - before, by_job=by_job)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        waiting, done = list(jobs), set[str]()
        going: dict[Future[float], Job] = {}
        try:
            while waiting or going:
                ready = [job for job in waiting if done.issuperset(job.after)]
                for job in ready[: processes - len(going)]:
                    waiting.remove(job)
                    going[pool.submit(_timed, do, folder, job)] = job
                for future in wait(going, return_when=FIRST_COMPLETED).done:
                    used = future.result()
                    name = going.pop(future).name
                    by_job[name] = used
                    done.add(name)
                    on_job(name, len(done), len(jobs))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return Used(cpu_s=_cpu_s() - before, by_job=by_job)


def _timed(do: Callable[[Path, Job], None], folder: Path, job: Job) -> float:
    """Do a job; CPU seconds of the process that did it."""
    started = time.process_time()
    do(folder, job)
    return time.process_time() - started


def _cpu_s() -> float:
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(part.ru_utime + part.ru_stime for part in used)
