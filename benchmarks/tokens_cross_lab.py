"""The goals of the lab's cross-sampling, and from tokens to weights, on finished runs of `lab study`.

Contract: reads runs of `lab study` (GRPO, fp32, lr 3e-4, 60 steps, two seeds a base); nothing is trained. For
each base and seed: cross-sampling in both directions with all controls, patching by layer, by module type and
of pruned updates, and forced substitution at the most divergent token of each of the base's completions. Each
figure has its interval over prompts; a goal that is missed is written as missed. Points of the cross-sampling
are kept in the work folder, so that the script goes on after a kill.

    sparsity-audit lab study -o study
    python benchmarks/tokens_cross_lab.py study/runs --work work --json benchmarks/results/tokens-cross.json
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness import machine, versions

import sparsity_audit
from sparsity_audit.lab.folder import resolve_base
from sparsity_audit.report.cross import CrossPoint, CrossReport

RUNS = {
    ("mix", 0): "grpo-fp32-seed0",
    ("mix", 1): "grpo-fp32-seed1",
    ("single", 0): "single-fp32-seed0",
    ("single", 1): "single-fp32-seed1",
}
THRESHOLDS = (0.4, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01, 0.003, 0.001)
SHARES, BUDGETS = (0.05,), (1, 2, 4)
KEEPS = ("top:0.5%", "top:2%", "top:5%", "top:20%", "random:2%", "random:20%")
TAKE_OVER = 0.05


def goals(base: str, report: CrossReport) -> list[dict[str, Any]]:
    """What `lab.md` asks of the forward direction."""
    by_key = {point.key: point for point in report.points}

    def goal(name: str, key: str, sense: str, limit: float) -> dict[str, Any]:
        found = by_key[key].recovered
        value = found.value if found.value is not None else 0.0
        met = value >= limit if sense == "at least" else value <= limit
        return {"goal": name, "point": key, "sense": sense, "limit": limit, **asdict(found), "met": met}

    if base == "single":
        return [
            goal("5 % of the tokens by JS", "forward-js-share-0.05", "at least", 0.6),
            goal("5 % at random", "forward-random-share-0.05", "at most", 0.2),
        ]
    return [goal("one token of a completion by JS", "forward-js-budget-1", "at least", 0.7)]


def short(point: CrossPoint) -> dict[str, Any]:
    """A point without what the settings say."""
    left_out = ("direction", "selector", "matches", "completions")
    return {name: value for name, value in asdict(point).items() if name not in left_out}


def cross(base: str, tuned: Path, work: Path, options: dict[str, Any]) -> dict[str, Any]:
    report = sparsity_audit.tokens_cross_sample(
        base,
        tuned,
        thresholds=THRESHOLDS,
        shares=SHARES,
        budgets=BUDGETS,
        batch_tokens=65_536,
        output=work / "cross",
        **options,
    )
    return {
        "base_accuracy": asdict(report.base_accuracy),
        "tuned_accuracy": asdict(report.tuned_accuracy),
        "gap": asdict(report.gap),
        "goals": goals(base, report),
        "points": [short(point) for point in report.points],
        "notes": list(report.notes),
    }


def patch(base: str, tuned: Path, work: Path, options: dict[str, Any]) -> dict[str, Any]:
    folder = work / "pruned"
    shutil.rmtree(folder, ignore_errors=True)
    made = sparsity_audit.prune(resolve_base(base), tuned, folder, keep=KEEPS, upcast=True)
    report = sparsity_audit.tokens_patch(
        base,
        tuned,
        pruned=[one.path for one in made],
        take_over=TAKE_OVER,
        batch_tokens=65_536,
        output=work / "patch",
        overwrite=True,
        **options,
    )
    rows = [asdict(row) | {"name": Path(row.name).name} for row in report.rows]
    over = report.tuned_take_over
    return {
        "positions": report.positions,
        "divergent": report.divergent,
        "mean_js": report.mean_js,
        "base_accuracy": asdict(report.base_accuracy) if report.base_accuracy else None,
        "tuned_accuracy": asdict(report.tuned_accuracy) if report.tuned_accuracy else None,
        "tuned_take_over": asdict(over) if over else None,
        "rows": rows,
    }


def critical(base: str, tuned: Path, work: Path, options: dict[str, Any]) -> dict[str, Any]:
    sparsity_audit.tokens_diverge(
        base, tuned, output=work / "diverge", overwrite=True, figures=False, page_prompts=1, **options
    )
    found = {}
    for name, extra in (("divergent", {"divergent": work / "diverge"}), ("least certain", {})):
        report = sparsity_audit.tokens_critical(
            base,
            output=work / f"critical-{name.replace(' ', '-')}",
            overwrite=True,
            batch_tokens=65_536,
            **extra,
            **options,
        )
        found[name] = {
            "groups": [asdict(group) for group in report.groups],
            "lead": asdict(report.lead),
            "mean_certainty": report.mean_certainty,
        }
    return found


def main() -> int:
    """Measure and write; 1 where a goal is missed."""
    parser = argparse.ArgumentParser(description="Cross-sampling and patching on the lab's runs.")
    parser.add_argument("runs", type=Path, help="the `runs` folder of a study")
    parser.add_argument("--work", type=Path, required=True, help="where outputs go; a killed run goes on")
    parser.add_argument("--prompts", type=int, default=1024, help="of cross-sampling")
    parser.add_argument("--fewer-prompts", type=int, default=512, help="of patching and forced substitution")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    for (base, seed), run in RUNS.items():
        tuned, work = arguments.runs / run / "final", arguments.work / f"{base}-seed{seed}"
        options: dict[str, Any] = {"task": "addition", "lengths": (4,), "seed": seed}
        more, fewer = (options | {"num_prompts": num} for num in (arguments.prompts, arguments.fewer_prompts))
        row = {"row": f"{base}, seed {seed}", "run": run, "cross": cross(base, tuned, work, more)}
        for goal in row["cross"]["goals"]:
            print(row["row"], goal["goal"], goal["value"], "met" if goal["met"] else "missed", flush=True)
        row |= {"patch": patch(base, tuned, work, fewer), "critical": critical(base, tuned, work, fewer)}
        rows.append(row)
        print(row["row"], "done", flush=True)
    if arguments.json is not None:
        report = {
            "date": dt.datetime.now(dt.UTC).date().isoformat(),
            "command": "python benchmarks/tokens_cross_lab.py study/runs --work work --json "
            "benchmarks/results/tokens-cross.json",
            "machine": machine(),
            "versions": versions(["sparsity-audit", "torch", "numpy"]),
            "cross_prompts": arguments.prompts,
            "patch_and_critical_prompts": arguments.fewer_prompts,
            "samples": 1,
            "intervals": "95 %, over prompts: bootstrap for means, Fieller's set for shares of the gap",
            "rows": rows,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    return 0 if all(goal["met"] for row in rows for goal in row["cross"]["goals"]) else 1


if __name__ == "__main__":
    sys.exit(main())
