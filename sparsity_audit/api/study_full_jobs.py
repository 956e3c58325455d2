"""What each job of `lab study --full` does, and the file its result is kept in.

Contract: a job writes below the study's folder alone: `bases/NAME`, `runs/NAME`, `measured/NAME.json`. It
calls what a user would call (`lab pretrain`, `lab train`, `lab evaluate`, `diff`, `overlap runs.yaml`, `lab
critical`) and adds no statistics of its own but means over pairs of runs.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sparsity_audit.api.diff import diff
from sparsity_audit.api.lab import lab_evaluate, lab_pretrain
from sparsity_audit.api.lab_critical import lab_critical
from sparsity_audit.api.lab_train import lab_train
from sparsity_audit.api.overlap import overlap
from sparsity_audit.api.study_plan import Job
from sparsity_audit.api.study_results import half_ulp_of, has_result, keep_result, sparsity_of, stored_result
from sparsity_audit.lab.folder import load_model, resolve_base
from sparsity_audit.lab.saved_run import SavedRun, read_run
from sparsity_audit.report.output import write_below
from sparsity_audit.report.overlap import OverlapReport, PairRecord
from sparsity_audit.report.study_full_facts import (
    BaseFacts,
    CriticalFacts,
    FullRun,
    GridFacts,
    Outcome,
    PairKind,
)
from sparsity_audit.stats.overlap import NULL_ORDER
from sparsity_audit.types import View

__all__ = ["FULL_MEASURED", "do_full_job", "full_result_of"]

_SEED = 7
"""Of the judges' problems: none of the runs' own seeds."""

_FACTORS = ("seed", "algorithm", "data")


def do_full_job(folder: Path, job: Job) -> None:
    """Do one job, unless its result is there. Raises SparsityAuditError."""
    if job.kind == "train":
        _train(folder, job.name, **job.asked)
    elif job.kind == "pretrain":
        _pretrain(folder, job)
    else:
        kind, measure = _MEASURES[job.kind]
        keep_result(folder, job, kind, measure)


def full_result_of(folder: Path, job: Job) -> Any:
    """What a finished measurement found; None where it was not made."""
    return stored_result(folder, job.name, _MEASURES[job.kind][0]) if has_result(folder, job) else None


def _pretrain(folder: Path, job: Job) -> None:
    output = _base(folder, job.asked["place"], job.asked["seed"])
    if has_result(folder, job) and output.exists():
        return
    output.parent.mkdir(exist_ok=True)

    def make(_folder: Path, *, recipe: str, seed: int, options: Mapping[str, Any], place: str) -> dict:  # noqa: ARG001
        made = lab_pretrain(recipe, output, seed=seed, overwrite=output.exists(), **options)
        return {"steps": made.steps, "converged": made.converged, "overshot": made.overshot}

    keep_result(folder, job, dict, make)


def _train(folder: Path, name: str, *, base: str, is_made: bool, **options: Any) -> None:
    start = folder / "bases" / base if is_made else base
    lab_train(folder / "runs" / name, base=start, **options)


def _base(folder: Path, name: str, seed: int | None) -> Path:
    """A base that was made here, or a shipped one."""
    return resolve_base(name) if seed is None else folder / "bases" / f"{name}-seed{seed}"


# Judging


def _judge_base(
    folder: Path,
    *,
    sweep: str,
    base: str,
    base_seed: int | None,
    task: str,
    digits: int,
    num_prompts: int,
) -> BaseFacts:
    path = _base(folder, base, base_seed)
    return BaseFacts(
        sweep=sweep,
        name=base,
        seed=base_seed,
        command="" if base_seed is None else _pretrain_command(path),
        parameters=sum(weight.numel() for weight in load_model(path).parameters()),
        tests=(_tested(path, task, digits, num_prompts=num_prompts),),
    )


def _pretrain_command(path: Path) -> str:
    made = json.loads((path / "pretrain.json").read_bytes())
    (parts, steps, target), seed = (made["recipe"][key] for key in ("parts", "steps", "target")), made["seed"]
    name = "both" if len(parts) > 1 else "mix"
    formats = ",".join(f"{key}={value:g}" for key, value in parts[0]["formats"].items())
    size = {128: " --size small", 256: " --size medium"}.get(made["config"]["hidden_size"], "")
    until = "" if target else f" --steps {steps} --no-target"
    mixture = f" --formats {formats}" if name == "mix" else ""
    return f"sparsity-audit lab pretrain --base {name} --seed {seed}{size}{mixture}{until} -o {path.name}"


def _tested(
    path: Path, task: str, digits: int, *, num_prompts: int, reference: Path | None = None
) -> Outcome:
    found = lab_evaluate(
        path,
        task=task,
        digits=digits,
        num_prompts=num_prompts,
        num_samples=2,
        seed=_SEED,
        reference=reference,
        betas=(1.0,),
    )
    return Outcome(
        task=task,
        digits=digits,
        accuracy=found.accuracy,
        formats=found.formats,
        entropy=found.entropy_per_token,
        kl=None if found.drift is None else found.drift.kl_per_completion,
    )


def _judge(
    folder: Path,
    *,
    run: str,
    sweep: str,
    arm: str,
    base: str,
    base_seed: int | None,
    tests: Sequence[tuple[str, int]],
    num_prompts: int,
) -> FullRun:
    saved = read_run(folder / "runs" / run)
    config, final = saved.config, saved.path / "final"
    start = _base(folder, base, base_seed)
    is_lawful = config["precision"] == "bf16" and config["optimizer"] == "adamw"
    law = {"lr": config["lr"], "weights_dtype": "bf16"} if is_lawful else {}
    report = diff(saved.reference, final, structure="off", workers=1, **law)
    return FullRun(
        sweep=sweep,
        arm=arm,
        seed=config["seed"],
        base=base,
        base_seed=base_seed,
        command=_train_command(run, config, start.name if base_seed is not None else base),
        precision=config["precision"],
        lr=config["lr"],
        own=tests[0],
        tests=tuple(
            _tested(final, task, digits, num_prompts=num_prompts, reference=start) for task, digits in tests
        ),
        sparsity=sparsity_of(report, View.NATIVE),
        served_sparsity=sparsity_of(report, View.SERVED),
        half_ulp=half_ulp_of(report),
        updates=sum(row["updates"] for row in saved.metrics),
        clip_frac=_mean_of(saved, "clip_frac"),
        weight_mean=_mean_of(saved, "weight_mean"),
        warnings=tuple(json.loads((saved.path / "result.json").read_bytes()).get("warnings", ())),
    )


def _mean_of(saved: SavedRun, name: str) -> float | None:
    known = [row[name] for row in saved.metrics if row.get(name) is not None]
    return statistics.fmean(known) if known else None


_COMMAND_FLAGS = ("algorithm", "task", "seed", "precision", "optimizer", "lr", "steps", "prompts", "samples")
_OPTIONAL_FLAGS = {
    "epochs": ("--epochs", 1),
    "minibatches": ("--minibatches", 1),
    "clip": ("--clip", 0.2),
    "kl": ("--kl", "none"),
    "kl_priority": ("--kl-priority", "none"),
    "divergence_scale": ("--divergence-weight", 0.0),
    "divergence_alpha": ("--divergence-alpha", 1.0),
    "divergence_control": ("--divergence-control", "none"),
}


def _train_command(run: str, config: Mapping[str, Any], base: str) -> str:
    flags = [f"--{flag} {config[flag]}" for flag in _COMMAND_FLAGS]
    lengths = ",".join(
        f"{n}={w:g}" if len(config["lengths"]) > 1 else n for n, w in config["lengths"].items()
    )
    flags.append(f"--digits {lengths}")
    flags += [
        f"{flag} {config[name]}" for name, (flag, usual) in _OPTIONAL_FLAGS.items() if config[name] != usual
    ]
    if config["kl"] != "none":
        flags.append(f"--kl-coefficient {config['kl_coefficient']:g}")
    shuffled = " --shuffle-rewards" * config["shuffle_rewards"]
    return f"sparsity-audit lab train --base {base} {' '.join(flags)}{shuffled} -o {run}"


# The grid


def _grid(folder: Path, *, criterion: str, rows: Sequence[Mapping[str, Any]], reference: str) -> GridFacts:
    first = read_run(folder / "runs" / rows[0]["run"])
    name = f"grid-{criterion.replace(':', '-').replace('%', 'pct')}.yaml"
    write_below(folder, name, _runs_yaml(first.reference, criterion, rows, folder=folder))
    report = overlap(folder / name, reference=folder / "runs" / reference / "final", workers=1)
    return GridFacts(
        criterion=report.criterion,
        view=report.view,
        nulls=tuple(null for null in NULL_ORDER if all(null in pair.overall.nulls for pair in report.pairs)),
        kinds=_kinds(report, rows),
        factors=_required(report.factors),
        matrix=_required(report.matrix),
        notes=report.notes,
    )


def _required(found: Any) -> Any:
    assert found is not None, "a file of three runs and more, with factors, has these"
    return found


def _runs_yaml(base: Path, criterion: str, rows: Sequence[Mapping[str, Any]], *, folder: Path) -> bytes:
    lines = [f"base: {_below(base, folder)}", f'criterion: "{criterion}"', "runs:"]
    for row in rows:
        levels = ", ".join(f"{factor}: {row[factor]}" for factor in _FACTORS)
        label = f"{row['algorithm']} {row['data']} {row['seed']}"
        lines.append(f"  - {{run: runs/{row['run']}/final, label: {label}, {levels}}}")
    return ("\n".join(lines) + "\n").encode()


def _below(path: Path, folder: Path) -> Path:
    return path.resolve().relative_to(folder.resolve())


def _kinds(report: OverlapReport, rows: Sequence[Mapping[str, Any]]) -> tuple[PairKind, ...]:
    levels = {f"{row['algorithm']} {row['data']} {row['seed']}": row for row in rows}
    control = next(run.label for run in report.runs if run.is_reference)
    found: dict[tuple[str, ...], list[PairRecord]] = {}
    for pair in report.pairs:
        if control in (pair.a, pair.b):
            differs: tuple[str, ...] = ("shuffled",)
        else:
            a, b = levels[pair.a], levels[pair.b]
            differs = tuple(factor for factor in _FACTORS if a[factor] != b[factor])
        found.setdefault(differs, []).append(pair)
    return tuple(
        _kind(differs, found[differs])
        for differs in sorted(found, key=lambda names: ("shuffled" in names, len(names)))
    )


def _kind(differs: tuple[str, ...], pairs: Sequence[PairRecord]) -> PairKind:
    nulls = [null for null in NULL_ORDER if all(null in pair.overall.nulls for pair in pairs)]
    return PairKind(
        differs=differs,
        pairs=len(pairs),
        jaccard=_mean([pair.overall.jaccard for pair in pairs]),
        chance={null: _mean([pair.overall.nulls[null].jaccard for pair in pairs]) for null in nulls},
        excess={null: _mean([pair.overall.nulls[null].excess_share for pair in pairs]) for null in nulls},
        cosine=_mean([None if pair.delta is None else pair.delta.cosine_overall for pair in pairs]),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    """None where one of them is: leaving pairs out would favour a kind."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if len(known) == len(values) else None


# Critical tokens


def _critical(
    folder: Path, *, run: str, arm: str, seed: int, degree: int, operands: str, num_prompts: int
) -> CriticalFacts:
    saved = read_run(folder / "runs" / run)
    found = lab_critical(
        saved.reference, run=saved.path, task=saved.task, num_prompts=num_prompts, seed=_SEED
    )
    # So that the record does not depend on where the study lies.
    found = replace(found, checkpoint=str(saved.reference.relative_to(folder)))
    return CriticalFacts(arm=arm, degree=degree, operands=operands, seed=seed, found=found)


_MEASURES: dict[str, tuple[type, Callable[..., Any]]] = {
    "judge-base": (BaseFacts, _judge_base),
    "judge": (FullRun, _judge),
    "grid": (GridFacts, _grid),
    "critical": (CriticalFacts, _critical),
}

FULL_MEASURED = tuple(_MEASURES)
"""Kinds of jobs whose results are facts."""
