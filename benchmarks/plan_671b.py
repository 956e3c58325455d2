"""Plan the audit of a 671 B mixture of experts from headers alone: seconds, memory, what the plan says.

    python benchmarks/plan_671b.py [--json PATH] [--workdir DIR]

Writes a pair of 673 GB each side as sparse files (41 MB on the disk; benchmarks/moe_shape.py says how it
looks) and runs `diff --dry-run` on it in a process of its own, three times.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import shutil
import sys
import tempfile
from pathlib import Path

from harness import machine, run, versions
from moe_shape import moe_tensors, write_sparse

RSS_LIMIT_MB = 180
REPEATS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--workdir", type=Path)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="plan-671b-", dir=options.workdir))
    try:
        tensors = list(moe_tensors())
        sides = [folder / name for name in ("base", "tuned")]
        for side in sides:
            write_sparse(side, tensors, shards=163)
        runs = [_plan(sides) for _ in range(REPEATS)]
    finally:
        shutil.rmtree(folder)
    plan = runs[0].pop("plan")
    for other in runs[1:]:
        assert other.pop("plan") == plan, "two plans of one pair differ"
    peak = max(run["peak_rss_mb"] for run in runs)
    result = {
        "benchmark": "plan-671b",
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "command": "python benchmarks/plan_671b.py",
        "machine": machine(),
        "versions": versions(("sparsity-audit", "numpy")),
        "note": "1 MB is 1e6 bytes; above a load average of 1, CPU time is the tool's and wall time is not",
        "tensors": len(tensors),
        "shards": 163,
        "plan": {key: value for key, value in plan.items() if isinstance(value, (int, float))},
        "runs": runs,
        "bar": {
            "peak_rss_mb": peak,
            "limit": RSS_LIMIT_MB,
            "verdict": "met" if peak <= RSS_LIMIT_MB else "missed",
        },
    }
    print(json.dumps(result, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def _plan(sides: list[Path]) -> dict:
    command = [sys.executable, "-m", "sparsity_audit.cli.main", "diff", *sides, "--dry-run", "--json"]
    sample = run(command, capture=True)
    return sample.to_json() | {"plan": json.loads(sample.output)}


if __name__ == "__main__":
    main()
