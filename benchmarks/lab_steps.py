"""What a training step of each algorithm costs, on one thread.

Contract: trains the shipped `mix` base for a few steps of 16 prompts × 8 samples per algorithm, and reports
CPU seconds of a step, the median of all but the first, with sampling, readings and updates. Ratios to GRPO
travel better than seconds.

    python benchmarks/lab_steps.py --json benchmarks/results/lab-steps.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from sparsity_audit import __version__, lab_train
from sparsity_audit.lab.config import ALGORITHMS

OPTIONS: dict[str, dict[str, Any]] = {
    **{name: {"algorithm": name} for name in ALGORITHMS},
    "grpo, 2 epochs × 4 minibatches": {"algorithm": "grpo", "epochs": 2, "minibatches": 4},
    "grpo, exact KL": {"algorithm": "grpo", "kl": "exact"},
    "grpo, divergence weights": {"algorithm": "grpo", "minibatches": 4, "divergence_weight": 0.3},
}


def measure(name: str, *, steps: int, workdir: Path) -> dict[str, Any]:
    """CPU seconds of the steps of one algorithm."""
    marks = [time.process_time()]
    tokens: list[float] = []

    def mark(metrics: Any) -> None:
        marks.append(time.process_time())
        tokens.append((metrics.tokens_per_completion or 0.0) * metrics.rollouts)

    # Expert iteration samples once a round: a round a step makes its steps comparable.
    rounds = {"rounds": steps} if name == "expert-iteration" else {}
    lab_train(
        workdir / name.replace(" ", "-"),
        steps=steps,
        checkpoints="last",
        state_every=steps,
        on_step=mark,
        **OPTIONS[name],
        **rounds,
    )
    seconds = [after - before for before, after in itertools.pairwise(marks)][1:]
    median = statistics.median(seconds)
    return {
        "row": name,
        "cpu_s_per_step": round(median, 4),
        "spread": round(max(seconds) / min(seconds), 3),
        "sampled_tokens_per_cpu_s": round(statistics.median(tokens[1:]) / median),
    }


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rows", default=";".join(OPTIONS), help="names by semicolon")
    parser.add_argument("--json", type=Path, help="write the record here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as workdir:
        rows = [
            measure(name, steps=arguments.steps, workdir=Path(workdir)) for name in arguments.rows.split(";")
        ]
    reference = next((row["cpu_s_per_step"] for row in rows if row["row"] == "grpo"), None)
    for row in rows:
        row["relative_to_grpo"] = reference and round(row["cpu_s_per_step"] / reference, 2)
        print(
            f"{row['row']:<32} {row['cpu_s_per_step']:.3f} s  × {row['relative_to_grpo'] or 0:.2f}  "
            f"{row['sampled_tokens_per_cpu_s']:,} tokens/s"
        )
    record = {
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": platform.platform(),
        "versions": {"sparsity-audit": __version__, "torch": torch.__version__},
        "steps": arguments.steps,
        "rows": rows,
    }
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
