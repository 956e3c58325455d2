"""Find the positions that decide the outcome, end to end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from sparsity_audit.api.lab_outputs import verify_folder
from sparsity_audit.errors import UsageError
from sparsity_audit.lab.critical import Critical, find_critical, right_probabilities
from sparsity_audit.lab.determinism import one_thread, stream
from sparsity_audit.lab.folder import load_model, resolve_base
from sparsity_audit.lab.saved_run import read_run
from sparsity_audit.lab.tasks import named_task
from sparsity_audit.report.lab_critical import CRITICAL_FILES, render_critical
from sparsity_audit.report.output import write_below

__all__ = ["lab_critical"]


def lab_critical(
    checkpoint: str | Path,
    *,
    run: str | Path | None = None,
    task: str = "addition",
    digits: int = 4,
    solution_format: str = "S",
    num_prompts: int = 256,
    min_drop: float = 0.1,
    seed: int = 0,
    output: str | Path | None = None,
    overwrite: bool = False,
    on_position: Callable[[int, int], None] = lambda _done, _all: None,
) -> Critical:
    """Where a policy hesitates and the outcome hangs on it, by forced substitution.

    Args:
        checkpoint: A model folder, or `mix` or `single` for a shipped base.
        run: A run's folder: the probability of the right token is followed over its saved steps.
        task: The task's name.
        digits: Length of the problems.
        solution_format: Format of the written solutions that give the prefixes.
        num_prompts: Problems, ≥ 2.
        min_drop: Least drop of accuracy that is called decisive, in [0, 1).
        seed: Of problems and noise.
        output: Directory for record, table and figure; nothing is written without it.
        overwrite: Replace what an earlier call left there.
        on_position: Called with positions done and in all.

    Raises:
        UsageError: An unknown task or format, or a number that cannot be.
        OutputError: `output` holds such a record, or cannot be written.
        SparsityAuditError: A checkpoint or the run cannot be read.
    """
    if num_prompts < 2:
        raise UsageError(
            "prompts", str(num_prompts), expected="at least 2: an interval is taken over prompts"
        )
    if not 0 <= min_drop < 1:
        raise UsageError("min_drop", str(min_drop), expected="from 0 to below 1")
    asked = named_task(task)
    problems = asked.sample(num_prompts, lengths={digits: 1.0}, generator=stream(seed, "critical problems"))
    asked.write(problems[0], solution_format)
    saved = None if run is None else read_run(run)
    if output is not None:
        inputs = [] if saved is None else [saved.path]
        verify_folder(Path(output), CRITICAL_FILES, overwrite=overwrite, inputs=inputs)
    with one_thread():
        found = find_critical(
            load_model(resolve_base(checkpoint)),
            problems,
            task=asked,
            fmt=solution_format,
            checkpoint=str(checkpoint),
            min_drop=min_drop,
            generator=stream(seed, "critical noise"),
            on_position=on_position,
        )
        if saved is not None:
            models = [(step, load_model(folder)) for step, folder in saved.checkpoints]
            steps = right_probabilities(found, models, problems, task=asked)
            found = replace(found, run=saved.title, steps=steps)
    if output is not None:
        for name, data in render_critical(found).items():
            write_below(Path(output), name, data)
    return found
