"""What Ray costs: `diff` on a local cluster of two CPUs against two threads, on the same two cores.

    python benchmarks/ray_overhead.py [--entries 2.56e8] [--rounds 3] [--json PATH] [--workdir DIR]

Needs the extra `ray`. One Ray session serves all rounds; its start is timed apart. In each round both run in
turn, in this process, warm, all statistics and a mask.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from harness import machine, versions, warm
from pairs import write_pair

from sparsity_audit import diff, plan_diff

LIMIT = 1.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--entries", type=float, default=2.56e8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--workdir", type=Path)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="ray-overhead-", dir=options.workdir))
    try:
        result = _measure(folder, int(options.entries), options.rounds)
    finally:
        shutil.rmtree(folder)
    print(json.dumps(result, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def _measure(folder: Path, entries: int, rounds: int) -> dict:
    from sparsity_audit.passes.ray_engine import RayEngine

    write_pair(folder, entries, "bf16")
    sides = folder / "base", folder / "tuned"
    warm(path for side in sides for path in side.glob("*.safetensors"))
    plan = plan_diff(*sides)
    started = time.monotonic()
    with RayEngine(slots=2):
        start_s = time.monotonic() - started
        first_s = _run(sides, folder, "ray")  # imports numba in the workers
        _run(sides, folder, "threads")
        walls: dict[str, list[float]] = {"threads": [], "ray": []}
        for _ in range(rounds):
            for engine, found in walls.items():
                found.append(_run(sides, folder, engine))
    ratios = [ray / threads for ray, threads in zip(walls["ray"], walls["threads"], strict=True)]
    extra = statistics.median(walls["ray"]) - statistics.median(walls["threads"])
    value = round(statistics.median(ratios), 3)
    return {
        "benchmark": "ray-overhead",
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "command": f"python benchmarks/ray_overhead.py --entries {entries:g} --rounds {rounds}",
        "machine": machine(),
        "versions": versions(("sparsity-audit", "numpy", "numba", "ray")),
        "note": "the machine was shared with other heavy processes; ratios within one round are what counts",
        "entries": plan.num_entries,
        "bytes": plan.num_bytes,
        "units": plan.num_units,
        "cluster_start_s": round(start_s, 2),
        "first_run_on_ray_s": round(first_s, 2),
        "walls_s": {engine: [round(wall, 3) for wall in found] for engine, found in walls.items()},
        "ratios": [round(ratio, 3) for ratio in ratios],
        "overhead_per_unit_ms": round(1000 * extra / plan.num_units, 2),
        "bar": {"ray / threads": value, "limit": LIMIT, "verdict": "met" if value <= LIMIT else "missed"},
    }


def _run(sides: tuple[Path, Path], folder: Path, engine: str) -> float:
    mask = folder / "mask"
    shutil.rmtree(mask, ignore_errors=True)
    started = time.monotonic()
    diff(*sides, mask=mask, engine=engine, workers=2, structure="off")
    return time.monotonic() - started


if __name__ == "__main__":
    main()
