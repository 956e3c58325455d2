"""The full study: sweeps that answer the papers' further claims, as one page that grows part by part.

Contract: as `lab_study`: a killed study goes on where it stopped and ends in the same `study.json`. Parts are
done one after another, and the page is written after each with every part that the folder holds complete.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sparsity_audit.api.study_full_jobs import FULL_MEASURED, do_full_job, full_result_of
from sparsity_audit.api.study_full_plan import FullPlan, PartPlan, full_plan, parts_of
from sparsity_audit.api.study_full_sweeps import PARTS, Sweep
from sparsity_audit.api.study_runner import claimed, run_jobs
from sparsity_audit.errors import UsageError
from sparsity_audit.masks.metadata import tool_name
from sparsity_audit.report.output import write_below
from sparsity_audit.report.study_full import FullReport, study_full_to_json
from sparsity_audit.report.study_full_claims import full_claims
from sparsity_audit.report.study_full_facts import FullFacts, SweepTable

__all__ = ["lab_study_full"]


def lab_study_full(
    output: str | Path,
    *,
    only: Sequence[str] | None = None,
    smoke: bool = False,
    processes: int = 2,
    on_job: Callable[[str, int, int], None] = lambda _name, _done, _all: None,
    on_note: Callable[[str], None] = lambda _text: None,
) -> FullReport:
    """Run the sweeps, judge, and write `index.html`.

    Args:
        output: The study's folder: `index.html`, `study.json`, `figures/`, `bases/`, `runs/`, `measured/`. A
            killed study goes on there, and further parts are added to it.
        only: Letters of the parts to run: `a` sparsity, `b` grid, `c` formats, `d` critical tokens, `e`
            frontier, `f` divergence weights; default all.
        smoke: The same structure with a few steps of a few prompts: a test of the machinery.
        processes: Jobs at a time; with more than one, a script needs the usual `if __name__ == "__main__"`.
        on_job: Called after each job with its name, jobs done and in all.
        on_note: Called with lines for the user: what it will cost, and which part is done.

    Raises:
        UsageError: An unknown part, or no process.
        OutputError: The folder holds something else, another study, or one that goes on.
        SparsityAuditError: As the jobs.
    """
    if processes < 1:
        raise UsageError("processes", str(processes), expected="at least 1")
    asked, folder, plan = parts_of(only), Path(output), full_plan(smoke=smoke)
    chosen = [plan.part(part) for part in asked]
    total = sum(len(part.jobs) for part in chosen)
    with claimed(folder, plan.size):
        _announce(chosen, processes, on_note)
        done, report = 0, None
        for part in chosen:
            started = time.perf_counter()
            used = run_jobs(
                folder,
                part.jobs,
                do_full_job,
                processes=processes,
                on_job=lambda name, number, _all, before=done: on_job(name, before + number, total),
            )
            done += len(part.jobs)
            wall_s = time.perf_counter() - started
            _note_times(folder, part.part, {"wall_s": wall_s, "cpu_s": used.cpu_s})
            report = _write(folder, plan)
            on_note(f"part {part.part} is done: {wall_s / 60:.1f} min")
    assert report is not None, "one part at least is asked for"
    return report


def _announce(chosen: Sequence[PartPlan], processes: int, on_note: Callable[[str], None]) -> None:
    minutes = {part.part: part.cpu_s / 60 for part in chosen}
    parts = ", ".join(f"{part} {cpu:.0f}" for part, cpu in minutes.items())
    cpu = sum(minutes.values())
    on_note(
        f"about {cpu:.0f} min of CPU ({parts}), {cpu / processes:.0f} min on {processes} free core"
        f"{'s' * (processes > 1)}; what is done already is not repeated"
    )


def _note_times(folder: Path, part: str, times: dict[str, float]) -> None:
    """Add the times of a part's call to those of its earlier ones."""
    path = folder / "run.json"
    found = json.loads(path.read_bytes()) if path.exists() else {}
    before = found.get(part, {})
    summed = {key: value + before.get(key, 0) for key, value in times.items()}
    write_below(folder, "run.json", f"{json.dumps({**found, part: summed}, indent=1)}\n".encode())


def _write(folder: Path, plan: FullPlan) -> FullReport:
    from sparsity_audit.report.study_full_page import render_full_study

    facts = _facts(folder, plan)
    report = FullReport(
        tool=tool_name(),
        size="smoke" if plan.size == "full-smoke" else "full",
        facts=facts,
        claims=full_claims(facts),
    )
    for name, data in render_full_study(report, questions=PARTS).items():
        write_below(folder, name, data)
    write_below(folder, "study.json", study_full_to_json(report))
    return report


def _facts(folder: Path, plan: FullPlan) -> FullFacts:
    """What the folder holds of parts that are complete, in the order of the page."""
    complete: list[PartPlan] = []
    found: dict[str, list[Any]] = {kind: [] for kind in FULL_MEASURED}
    for part in (plan.part(key) for key in PARTS):
        measured = [job for job in part.jobs if job.kind in FULL_MEASURED]
        results = [(job.kind, full_result_of(folder, job)) for job in sorted(measured, key=lambda j: j.name)]
        if any(result is None for _, result in results):
            continue
        complete.append(part)
        for kind, result in results:
            found[kind].append(result)
    sweeps = [sweep for part in complete for sweep in part.sweeps]
    return FullFacts(
        parts=tuple(part.part for part in complete),
        sweeps=tuple(_table(sweep) for sweep in sweeps),
        runs=tuple(sorted(found["judge"], key=lambda run: _place(sweeps, run))),
        bases=tuple(found["judge-base"]),
        grids=tuple(found["grid"]),
        criticals=tuple(found["critical"]),
    )


def _place(sweeps: Sequence[Sweep], run: Any) -> tuple[int, int, int]:
    """Runs stand as the sweeps list them."""
    number, sweep = next((n, sweep) for n, sweep in enumerate(sweeps) if sweep.key == run.sweep)
    return number, list(sweep.arms).index(run.arm), run.seed


def _table(sweep: Sweep) -> SweepTable:
    return SweepTable(
        key=sweep.key,
        part=sweep.part,
        question=sweep.question,
        common={key: _text(value) for key, value in sweep.common.items()},
        arms={arm: {k: _text(v) for k, v in settings.items()} for arm, settings in sweep.arms.items()},
        seeds=sweep.seeds,
        num_prompts=sweep.num_prompts,
    )


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
