"""What each job of a study does, and the file its result is kept in.

Contract: a job writes below the study's folder alone: `runs/NAME`, `masks/NAME`, `measured/NAME.json`. A
measurement whose file holds the same question, asked by the same version of the tool, is not repeated; runs
go on by themselves.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsity_audit.api.diff import diff
from sparsity_audit.api.lab import lab_evaluate
from sparsity_audit.api.lab_critical import lab_critical
from sparsity_audit.api.lab_track import lab_track
from sparsity_audit.api.lab_train import lab_train
from sparsity_audit.api.masks import mask_ops, mask_random
from sparsity_audit.api.overlap import overlap
from sparsity_audit.api.prune import prune
from sparsity_audit.api.series import series
from sparsity_audit.api.study_plan import Job
from sparsity_audit.api.study_results import half_ulp_of, keep_result, sparsity_of, stored_result
from sparsity_audit.api.study_tokens_job import measure_tokens
from sparsity_audit.lab.critical import Critical
from sparsity_audit.lab.determinism import one_thread, stream
from sparsity_audit.lab.estimators import Estimate
from sparsity_audit.lab.evaluate import accuracy_alone
from sparsity_audit.lab.folder import load_model
from sparsity_audit.lab.saved_run import SavedRun, read_run
from sparsity_audit.lab.tasks import named_task
from sparsity_audit.lab.track import Track
from sparsity_audit.lab.update import UpdateMask
from sparsity_audit.masks.shards import INDEX_NAME
from sparsity_audit.report.study import (
    Judged,
    NullFacts,
    OverlapFacts,
    PairFacts,
    PruneFacts,
    PrunePoint,
    RunFacts,
    SeriesFacts,
    SeriesPoint,
)
from sparsity_audit.report.study_tokens import TokenFacts
from sparsity_audit.training.parameters import name_parameters
from sparsity_audit.training.update_masks import bind_mask
from sparsity_audit.types import View

__all__ = ["MEASURED", "do_job", "result_of"]

_SEED = 7
"""Of the judges' prompts: none of the runs' own seeds."""
_SAMPLES = 2
"""Of each prompt."""


def do_job(folder: Path, job: Job) -> None:
    """Do one job, unless its result is there. Raises SparsityAuditError."""
    if job.kind == "train":
        _train(folder, job)
        return
    if job.kind == "masks":
        _make_masks(folder, **job.asked)
        return
    kind, measure = _MEASURES[job.kind]
    keep_result(folder, job, kind, measure)


def result_of(folder: Path, job: Job) -> Any:
    """What a finished measurement found."""
    return stored_result(folder, job.name, _MEASURES[job.kind][0])


def _run(folder: Path, name: str) -> Path:
    return folder / "runs" / name


# Runs and masks


def _train(folder: Path, job: Job) -> None:
    options = {key: value for key, value in job.asked.items() if key != "mask"}
    update_mask = None
    if "mask" in job.asked:
        start = _run(folder, "grpo-fp32-seed0") / "checkpoint-0"
        options["base"] = start
        update_mask = _read_mask(folder / "masks" / job.asked["mask"], start)
    lab_train(_run(folder, job.name), update_mask=update_mask, **options)


def _read_mask(path: Path, base: Path) -> UpdateMask:
    """A mask directory as bool tensors by parameter name, once it is proven to be of this base."""
    model = load_model(base)
    bound = bind_mask(name_parameters(model), path)
    return {name: bound.selected[id(weight)] for name, weight in model.named_parameters()}


def _make_masks(folder: Path, *, run: str) -> None:
    top, drawn, rest = (folder / "masks" / name for name in ("top-5pct", "random-5pct", "complement"))
    base, tuned = _run(folder, run) / "checkpoint-0", _run(folder, run) / "final"
    top.parent.mkdir(exist_ok=True)
    if not (top / INDEX_NAME).exists():
        diff(base, tuned, criteria=["top:5%"], stats="counts", mask=top, workers=1)
    if not drawn.exists():
        mask_random(top, drawn, seed=0)
    if not rest.exists():
        mask_ops("not", [top], rest)


# Measurements


def _base(_folder: Path, *, base: str, num_prompts: int) -> Judged:
    return _judged(base, num_prompts)


def _judged(checkpoint: str | Path, num_prompts: int) -> Judged:
    found = lab_evaluate(checkpoint, num_prompts=num_prompts, num_samples=_SAMPLES, seed=_SEED)
    return Judged(
        accuracy=found.accuracy,
        greedy_accuracy=found.greedy_accuracy,
        share=next(row.share for row in found.formats if row.format == "S"),
    )


def _judge(folder: Path, *, run: str, role: Any, base: str, num_prompts: int) -> RunFacts:
    saved = read_run(_run(folder, run))
    config = saved.config
    start: Judged = stored_result(folder, f"base-{base}", Judged)
    end = _judged(saved.path / "final", num_prompts)
    law = {"lr": config["lr"], "weights_dtype": "bf16"} if config["precision"] == "bf16" else {}
    report = diff(saved.reference, saved.path / "final", structure="off", workers=1, **law)
    return RunFacts(
        name=run,
        role=role,
        base=base,
        algorithm=config["algorithm"],
        precision=config["precision"],
        lr=config["lr"],
        steps=config["steps"],
        command=_command(run, config),
        accuracy=end.accuracy,
        base_accuracy=start.accuracy,
        greedy_accuracy=end.greedy_accuracy,
        share=end.share,
        base_share=start.share,
        sparsity=sparsity_of(report, View.NATIVE),
        served_sparsity=sparsity_of(report, View.SERVED),
        half_ulp=half_ulp_of(report),
    )


def _command(run: str, config: Mapping[str, Any]) -> str | None:
    if config["update_mask_sha256"] is not None:
        return None
    flags = ["algorithm", "base", "seed", "precision", "lr", "steps", "prompts", "samples"]
    flags += [flag for flag in ("epochs", "minibatches") if config[flag] != 1]
    text = " ".join(f"--{flag} {config[flag]}" for flag in flags)
    return f"sparsity-audit lab train {text}{' --shuffle-rewards' * config['shuffle_rewards']} -o {run}"


def _overlap(folder: Path, *, criterion: str, runs: Sequence[str]) -> OverlapFacts:
    shuffled = next((run for run in runs if run.startswith("shuffled")), None)
    finals = {str(_run(folder, run) / "final"): run for run in runs}
    report = overlap(
        list(finals),
        base=_run(folder, runs[0]) / "checkpoint-0",
        reference=None if shuffled is None else _run(folder, shuffled) / "final",
        criterion=criterion,
        workers=1,
    )
    names = {run.label: finals[run.reference] for run in report.runs}
    pairs = tuple(
        PairFacts(
            a=names[pair.a],
            b=names[pair.b],
            jaccard=pair.overall.jaccard,
            nulls=tuple(
                NullFacts(null=name, jaccard=null.jaccard, excess_share=null.excess_share, z=null.z)
                for name, null in pair.overall.nulls.items()
            ),
            cosine=None if pair.delta is None else pair.delta.cosine_overall,
            sign_agreement=None if pair.delta is None else pair.delta.sign_agreement,
            independent_signs=None if pair.delta is None else pair.delta.independent_signs,
        )
        for pair in report.pairs
    )
    return OverlapFacts(criterion=report.criterion, view=report.view, pairs=pairs)


def _series(folder: Path, *, run: str) -> SeriesFacts:
    saved = read_run(_run(folder, run))
    steps = [(step, path) for step, path in saved.checkpoints if step]
    report = series(saved.reference, [path for _, path in steps], workers=1)
    points = tuple(
        SeriesPoint(step=step, sparsity=found.sparsity, coverage=found.coverage)
        for (step, _), found in zip(steps, report.overall.steps, strict=True)
    )
    return SeriesFacts(run=run, points=points)


def _prune(folder: Path, *, run: str, keeps: Sequence[str], num_prompts: int) -> PruneFacts:
    saved = read_run(_run(folder, run))
    whole: RunFacts = stored_result(folder, f"judge-{run}", RunFacts)
    with tempfile.TemporaryDirectory(prefix="sparsity-audit-") as scratch:
        found = prune(saved.reference, saved.path / "final", Path(scratch) / "pruned", keep=keeps, workers=1)
        points = tuple(
            PrunePoint(
                keep=keep,
                kind=keep.partition(":")[0],
                fraction=part.record.kept / part.record.compared,
                accuracy=_accuracy(part.path, saved, num_prompts),
            )
            for keep, part in zip(keeps, found, strict=True)
        )
    return PruneFacts(
        run=run,
        base_accuracy=whole.base_accuracy,
        accuracy=whole.accuracy,
        points=points,
    )


def _accuracy(checkpoint: Path, saved: SavedRun, num_prompts: int) -> Estimate:
    """The accuracy that `_judged` gives, without the rest."""
    with one_thread():
        return accuracy_alone(
            load_model(checkpoint),
            task=named_task(saved.task),
            lengths=saved.lengths,
            num_prompts=num_prompts,
            num_samples=_SAMPLES,
            generator=stream(_SEED, "evaluation"),
        )


def _track(folder: Path, *, run: str, num_prompts: int, num_samples: int) -> Track:
    return lab_track(_run(folder, run), num_prompts=num_prompts, num_samples=num_samples, seed=_SEED)


def _critical(folder: Path, *, checkpoint: str, run: str, num_prompts: int) -> Critical:
    return lab_critical(checkpoint, run=_run(folder, run), num_prompts=num_prompts, seed=_SEED)


_MEASURES: dict[str, tuple[type, Callable[..., Any]]] = {
    "base": (Judged, _base),
    "judge": (RunFacts, _judge),
    "overlap": (OverlapFacts, _overlap),
    "series": (SeriesFacts, _series),
    "prune": (PruneFacts, _prune),
    "track": (Track, _track),
    "critical": (Critical, _critical),
    "tokens": (TokenFacts, measure_tokens),
}

MEASURED = tuple(_MEASURES)
"""Kinds of jobs that leave a result."""
