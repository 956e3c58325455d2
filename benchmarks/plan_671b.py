"""Plan the audit of a 671 B mixture of experts from headers alone: seconds, memory, what the plan says.

    python benchmarks/plan_671b.py [--json PATH] [--workdir DIR]

Writes a pair of 673 GB each side as sparse files (41 MB on the disk; benchmarks/moe_shape.py says how it
looks) and runs `diff --dry-run` on it in a process of its own, three times.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness import machine, versions
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
        "note": "the machine was shared with other heavy processes: wall time is not the tool's; CPU time is",
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
    command = [
        sys.executable,
        "-m",
        "sparsity_audit.cli.main",
        "diff",
        *map(str, sides),
        "--dry-run",
        "--json",
    ]
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    text = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, status
    return {
        "wall_s": round(time.monotonic() - started, 2),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_rss_mb": round(usage.ru_maxrss / 1024, 1),
        "plan": json.loads(text),
    }


if __name__ == "__main__":
    main()
