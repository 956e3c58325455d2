"""Does training the largest movements alone recover the gain, and what else does?

Contract: under each recipe trains a full run and another seed's with `lab train`, then calls `retrain` once
for each new seed with the controls of the method, their learning rates chosen on validation prompts; and
once, as the sanity check it is, in bf16 with the run's own seed. What is finished in the work directory is
not repeated. One thread, one run at a time. Exit 1 when a goal is missed. The goals are those of one update
a step, for which they were stated; several updates a step are reported beside them.

    python benchmarks/masked_recovery.py --workdir DIR --json benchmarks/results/masked-recovery.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

from sparsity_audit import __version__, lab_train, mask_export, retrain
from sparsity_audit.report.retrain import RetrainedRun
from sparsity_audit.stats.scores import Accuracy, wilson_interval

ALL = ("random", "magnitude", "complement", "other:mask-1", "seed", "layer:1")
_GRPO: dict[str, Any] = {"algorithm": "grpo", "base": "mix"}
RECIPES: dict[str, dict[str, Any]] = {
    "one-update": {**_GRPO, "precision": "fp32", "steps": 60},
    "clipped": {**_GRPO, "precision": "fp32", "steps": 40, "epochs": 2, "minibatches": 4},
    "bf16": {**_GRPO, "precision": "bf16", "lr": 2e-4, "steps": 60, "epochs": 2, "minibatches": 4},
}
"""`one-update` is what the goals were stated for, at 60 steps, where the gain is .35 and not the .24 of 40: a
share of a small gain is mostly noise. `clipped` makes 8 updates on each step's rollouts, and gains more.
`bf16` is the recipe of `examples/`: at 1e-4 a bf16 run hardly learns, which leaves no gain to recover."""

RATES = (1.0, 3.0, 10.0)
CRITERIA = {"one-update": "top:5%", "clipped": "top:5%", "bf16": "value"}
RETRAININGS: tuple[tuple[str, int, tuple[str, ...], tuple[float, ...]], ...] = (
    ("one-update", 3, ALL, RATES),
    ("one-update", 4, ALL, RATES),
    ("clipped", 3, ALL, RATES),
    ("clipped", 4, ("random", "magnitude", "complement", "seed"), RATES),
    ("bf16", 0, ("random",), (1.0,)),
)
"""Recipe, seed, controls, multiples of the learning rate. Masks are of seed 0, the other run's of seed 1."""
PROMPTS, VALIDATION = 1024, 512
GOALS = {"sub": ("least", 0.8), "random": ("most", 0.5)}
"""Of the full run's gain, in each seed, with one update a step."""


def full_runs(workdir: Path, recipe: str) -> None:
    """The runs that masks are made of, and the masks."""
    for seed, run, mask in ((0, "full", "mask"), (1, "full-1", "mask-1")):
        if recipe == "bf16" and seed:
            continue
        lab_train(workdir / run, **RECIPES[recipe], seed=seed, on_note=_say)
        if not (workdir / mask).exists():
            sides = workdir / run / "checkpoint-0", workdir / run / "final"
            mask_export(*sides, workdir / mask, criterion=CRITERIA[recipe])


def command(seed: int, controls: tuple[str, ...], rates: tuple[float, ...]) -> str:
    """A retraining as a command line, in its recipe's directory."""
    tuned = "" if len(rates) == 1 else f" --control-lrs {','.join(f'{rate:g}' for rate in rates)}"
    asked = f"--run full --mask mask --seed {seed} --controls {','.join(controls)}{tuned}"
    return f"sparsity-audit retrain {asked} -o retrained-seed{seed}"


def measure(
    workdir: Path, recipe: str, seed: int, controls: tuple[str, ...], rates: tuple[float, ...]
) -> dict[str, Any]:
    """One retraining as a record."""
    found = retrain(
        workdir / f"retrained-seed{seed}",
        run=workdir / "full",
        mask=workdir / "mask",
        seed=seed,
        controls=[text.replace("other:", f"other:{workdir}/") for text in controls],
        control_lrs=rates,
        num_prompts=PROMPTS,
        num_validation=VALIDATION,
        on_note=_say,
    )
    report, recovered = found.report, found.recovery
    assert recovered is not None
    agreement = {
        own.label: {
            "inside": {key: _round(value) for key, value in own.parts.inside.shares.items()},
            "overall_bitwise": _round(own.parts.overall.shares["bitwise"]),
            "relative_l2": _round(own.parts.overall.relative_l2),
            "cosine": _round(own.parts.overall.cosine),
            "signs_agree_inside": _round(own.parts.inside.sign_agreement),
        }
        for own in recovered.runs
    }
    return {
        "recipe": recipe,
        "command": command(seed, controls, rates),
        "seed": seed,
        "mask": {"criterion": report.criterion, "density": _round(report.sub.density)},
        "base": _score(report.base_score),
        "full": _score(report.full_score),
        "runs": [_run(own) for own in report.runs],
        "agreement_with_the_full_run": agreement,
        "frozen_entries_that_moved": sum(own.frozen.moved for own in recovered.runs if own.frozen),
        "verdict": report.verdict,
        "warnings": list(report.warnings),
    }


def _run(run: RetrainedRun) -> dict[str, Any]:
    interval = None if run.share is None or run.share.interval is None else run.share.interval
    return {
        "run": run.label,
        "density": _round(run.density),
        "seed": run.seed,
        "lr": float(f"{run.lr:.6g}"),
        "rates": [
            {
                "lr": float(f"{rate.lr:.6g}"),
                "validation": None if rate.validation is None else _round(rate.validation.value),
                "failure": rate.failure,
            }
            for rate in run.rates
        ],
        "score": _score(run.score),
        "share_of_the_gain": None if run.share is None else _round(run.share.value),
        "share_interval": None if interval is None else [_round(interval.low), _round(interval.high)],
        "frozen_entries_proven": None if run.proof is None else run.proof.num_frozen,
    }


def _score(score: Accuracy | None) -> dict[str, Any] | None:
    if score is None:
        return None
    interval = wilson_interval(score)
    return {
        "accuracy": _round(score.value),
        "low": _round(interval.low),
        "high": _round(interval.high),
        "prompts": score.trials,
    }


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each goal in each seed, a control at the full run's rate and at the one that validated best."""
    found = []
    for row in rows:
        if row["recipe"] != "one-update":
            continue
        for run in row["runs"]:
            if run["run"] in GOALS:
                side, limit = GOALS[run["run"]]
                share = run["share_of_the_gain"]
                reached = share >= limit if side == "least" else share <= limit
                goal = {"seed": row["seed"], "run": run["run"], "lr": run["lr"], "goal": f"at {side} {limit}"}
                found.append({**goal, "share": share, "reached": reached})
    return found


def main() -> int:
    """Train, retrain, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workdir", type=Path, required=True, help="where runs are kept")
    parser.add_argument("--recipes", default=",".join(RECIPES), help="names by comma")
    parser.add_argument("--json", type=Path, help="write the record here")
    arguments = parser.parse_args()
    recipes = arguments.recipes.split(",")
    rows = []
    for recipe in recipes:
        full_runs(arguments.workdir / recipe, recipe)
        rows += [measure(arguments.workdir / recipe, *asked) for asked in RETRAININGS if asked[0] == recipe]
    record = {
        "command": "python benchmarks/masked_recovery.py --workdir DIR "
        f"--recipes {arguments.recipes} --json benchmarks/results/masked-recovery.json",
        "date": time.strftime("%Y-%m-%d"),
        "machine": platform.platform(),
        "load_average_at_the_end": [round(load, 1) for load in os.getloadavg()],
        "versions": {"sparsity-audit": __version__, "torch": torch.__version__},
        "full_runs": {recipe: _train_command(RECIPES[recipe]) for recipe in recipes},
        "test_prompts": PROMPTS,
        "validation_prompts": VALIDATION,
        "goals": goals(rows),
        "rows": rows,
    }
    for goal in record["goals"]:
        print(goal)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0 if all(goal["reached"] for goal in record["goals"]) else 1


def _train_command(options: dict[str, Any]) -> str:
    flags = " ".join(f"--{key} {value}" for key, value in options.items())
    return f"sparsity-audit lab train {flags} --seed 0 -o full"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
