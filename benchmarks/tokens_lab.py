"""The goal of the lab's token audit: JS above .1 at no more than a tenth of the positions, in both bases.

Contract: reads finished runs of `lab study` (GRPO, fp32, lr 3e-4, 60 steps, two seeds a base), samples 512
new prompts a seed, four completions each by base and tuned model, and writes every figure of both sets with
its interval, and the series over the saved steps. Nothing is trained.

    sparsity-audit lab study -o study
    python benchmarks/tokens_lab.py study/runs --json benchmarks/results/tokens-lab.json
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness import machine, versions

import sparsity_audit

RUNS = {
    ("mix", 0): "grpo-fp32-seed0",
    ("mix", 1): "grpo-fp32-seed1",
    ("single", 0): "single-fp32-seed0",
    ("single", 1): "single-fp32-seed1",
}
_GOAL = 0.1
_LEFT_OUT = ("curve", "by_position", "by_share", "histogram")


def row(base: str, seed: int, runs: Path, *, prompts: int, samples: int) -> dict[str, Any]:
    """One base and seed: both sets of completions, and the series."""
    run = runs / RUNS[base, seed]
    options: dict[str, Any] = {"task": "addition", "lengths": (4,), "num_prompts": prompts, "seed": seed}
    found = sparsity_audit.tokens_diverge(base, run / "final", num_samples=samples, top_p=0.7, **options)
    series = sparsity_audit.tokens_series(base, run, **options)
    flags = f"--task addition --lengths 4 --num-prompts {prompts} --seed {seed}"
    final = f"study/runs/{run.name}/final"
    sets = {}
    for one in found.sets:
        figures = {k: v for k, v in asdict(one.summary).items() if k not in _LEFT_OUT}
        first = one.summary.by_position[0]
        held = first.positions * (first.mean_js or 0.0)
        total = one.summary.positions * (one.summary.mean_js.value or 0.0)
        sets[one.name] = {
            "accuracy": one.accuracy,
            "truncated": one.truncated,
            **figures,
            "first_position_mean_js": first.mean_js,
            "first_position_share_of_js": held / total,
            "tokens": [asdict(token) for token in one.shifted_tokens[:8]],
            "goal": f"share of JS > .1 ≤ {_GOAL}",
            "met": (one.summary.above.value or 0.0) <= _GOAL,
        }
    return {
        "row": f"{base}, seed {seed}",
        "run": RUNS[base, seed],
        "commands": [
            f"sparsity-audit tokens diverge {base} {final} {flags} --num-samples {samples} --top-p 0.7",
            f"sparsity-audit tokens series {base} study/runs/{run.name} {flags}",
        ],
        "sets": sets,
        "series": {
            one.name: {
                "labels": [step.label for step in series.steps],
                "mean_grows": one.series.mean_grows,
                "monotone": one.series.monotone,
                "mean_js": [step.mean_js.value for step in one.series.steps],
                "above": [step.above.value for step in one.series.steps],
                "js_p99": [step.js_percentiles[99] for step in one.series.steps],
                "jaccard": [step.jaccard for step in one.series.steps],
                "jaccard_top": [step.jaccard_top for step in one.series.steps],
                "chance_jaccard_top": one.series.steps[-1].chance_jaccard_top,
            }
            for one in series.sets
        },
    }


def main() -> int:
    """Measure and write; 1 where a goal is missed."""
    parser = argparse.ArgumentParser(description="Token divergence on the lab's runs.")
    parser.add_argument("runs", type=Path, help="the `runs` folder of a study")
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    for base, seed in RUNS:
        rows.append(row(base, seed, arguments.runs, prompts=arguments.prompts, samples=arguments.samples))
        for name, one in rows[-1]["sets"].items():
            above = one["above"]
            print(
                f"{rows[-1]['row']}, {name}'s samples: JS > .1 at {above['value']:.3f} "
                f"({above['low']:.3f} to {above['high']:.3f}) of {one['positions']:,}, "
                f"goal {'met' if one['met'] else 'missed'}",
                flush=True,
            )
    if arguments.json is not None:
        report = {
            "date": datetime.now(UTC).date().isoformat(),
            "command": "python benchmarks/tokens_lab.py study/runs --json benchmarks/results/tokens-lab.json",
            "machine": machine(),
            "versions": versions(["sparsity-audit", "torch", "numpy"]),
            "prompts": arguments.prompts,
            "samples": arguments.samples,
            "rows": rows,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    return 0 if all(one["met"] for found in rows for one in found["sets"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
