"""What Ray costs: `diff` on a local cluster of two CPUs against two threads, on the same two cores.

    python benchmarks/ray_overhead.py [--entries 2.56e8] [--rounds 5] [--json PATH] [--workdir DIR]

Needs the extra `ray`. One Ray session serves all rounds; its start is timed apart. In each round both run in
turn, in changing order, in this process, warm, all statistics and a mask. CPU seconds count every process of
Ray. `empty_unit_ms` is what a unit takes that does nothing, in batches of 32.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from harness import machine, versions, warm
from pairs import write_pair

from sparsity_audit import diff, plan_diff
from sparsity_audit.passes.engine import Engine

LIMIT = 1.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--entries", type=float, default=2.56e8)
    parser.add_argument("--rounds", type=int, default=5)
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
    facts = machine()
    started = time.monotonic()
    with RayEngine(slots=2) as engine:
        start_s = time.monotonic() - started
        first_s, _ = _run(sides, folder, "ray")  # imports numba in the workers
        _run(sides, folder, "threads")
        found: dict[str, list[tuple[float, float]]] = {"threads": [], "ray": []}
        for number in range(rounds):
            order = ("threads", "ray") if number % 2 == 0 else ("ray", "threads")
            for name in order:
                found[name].append(_run(sides, folder, name))
        empty_ms = [_empty_unit_ms(engine) for _ in range(3)]
    walls, cpus = (
        {name: [round(sample[kind], 3) for sample in samples] for name, samples in found.items()}
        for kind in (0, 1)
    )
    value = round(_ratio(walls), 3)
    extra = statistics.median(walls["ray"]) - statistics.median(walls["threads"])
    return {
        "benchmark": "ray-overhead",
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "command": f"python benchmarks/ray_overhead.py --entries {entries:g} --rounds {rounds}",
        "machine": facts | {"load_average_at_end": [round(load, 2) for load in os.getloadavg()]},
        "versions": versions(("sparsity-audit", "numpy", "numba", "ray")),
        "entries": plan.num_entries,
        "bytes": plan.num_bytes,
        "units": plan.num_units,
        "cluster_start_s": round(start_s, 2),
        "first_run_on_ray_s": round(first_s, 2),
        "walls_s": walls,
        "cpu_s": cpus,
        "ratios": [round(a / b, 3) for a, b in zip(walls["ray"], walls["threads"], strict=True)],
        "cpu_ratio": round(_ratio(cpus), 3),
        "overhead_per_unit_ms": round(1000 * extra / plan.num_units, 2),
        "empty_unit_ms": [round(each, 3) for each in empty_ms],
        "bar": {"ray / threads": value, "limit": LIMIT, "verdict": "met" if value <= LIMIT else "missed"},
    }


def _ratio(samples: dict[str, list[float]]) -> float:
    """Median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(samples["ray"], samples["threads"], strict=True))


def _run(sides: tuple[Path, Path], folder: Path, engine: str) -> tuple[float, float]:
    """Wall seconds, and CPU seconds of this process and all that it started."""
    mask = folder / "mask"
    shutil.rmtree(mask, ignore_errors=True)
    wall, cpu = time.monotonic(), _tree_cpu_s()
    diff(*sides, mask=mask, engine=engine, workers=2, structure="off")
    return time.monotonic() - wall, _tree_cpu_s() - cpu


def _empty_unit_ms(engine: Engine, *, units: int = 2048) -> float:
    """Wall milliseconds that a unit takes which does nothing."""
    started = time.monotonic()
    assert sum(1 for _ in engine.map(_nothing, range(units))) == units
    return 1000 * (time.monotonic() - started) / units


def _nothing(unit: int) -> int:
    return unit


def _tree_cpu_s() -> float:
    """CPU seconds of this process and its descendants, those included that have ended."""
    ticks, children = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            pid = int(stat.parent.name)
            ticks[pid] = sum(map(int, fields[11:15]))
            children.setdefault(int(fields[1]), []).append(pid)
    found, queue = 0, [os.getpid()]
    while queue:
        pid = queue.pop()
        found += ticks.get(pid, 0)
        queue += children.get(pid, [])
    return found / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
