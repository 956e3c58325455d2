"""`diff --stream` from a Hub that sends at a stated rate: throughput, requests, bytes sent again.

    python benchmarks/hub_stream.py [--entries 5e8] [--rates 60,125,250] [--json PATH] [--workdir DIR]

Makes its own pairs (benchmarks/pairs.py) and starts shaped_hub.py, a server process on loopback that shares
one line of the stated rate among all connections. Throughput is that of the difference of two pairs of
different size, as in diff.py: start-up, headers and report cost the same in both.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import statistics
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diff import HERE, PACKAGES, Bench, Pair, open_workdir, write_json
from harness import Sample, machine, run, summary, versions, warm

CUTS = 20
MIN_SHARE, MAX_LOST = 0.9, 0.02


@contextmanager
def shaped(pair: Pair, rate_mb: float, *, cuts: int = 0, seed: int = 0) -> Iterator[str]:
    """A server of the pair; its address."""
    command = [sys.executable, HERE / "shaped_hub.py", *pair.sides, "--rate-mb", rate_mb]
    command += ["--cuts", cuts, "--seed", seed]
    server = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        yield server.stdout.readline().strip()
    finally:
        server.terminate()
        server.wait()


def streamed(pair: Pair, url: str, *, workers: int) -> Sample:
    """One quiet diff of both sides from the server."""
    args = [sys.executable, "-m", "sparsity_audit.cli.main", "diff", "hf://org/base", "hf://org/tuned"]
    args += ["--stream", "--structure", "off", "--format", "json", "--workers", str(workers)]
    home = pair.folder.parent / "no-cache"
    return run(args, capture=True, env={"HF_ENDPOINT": url, "HF_HOME": str(home), "NO_PROXY": "*"})


def stats(url: str) -> dict[str, Any]:
    """What the server has sent."""
    with urllib.request.urlopen(f"{url}/stats") as answer:
        return json.load(answer)


def throughput(bench: Bench, rate_mb: float) -> dict[str, Any]:
    """Bytes a second beyond start-up, at one rate; round after round of the small and the large pair."""
    rounds = []
    for _ in range(bench.repeats):
        found = {}
        for name, pair in (("small", bench.small()), ("large", bench.pair(bench.entries))):
            with shaped(pair, rate_mb) as url:
                sample = streamed(pair, url, workers=bench.workers)
                found[name] = (sample, stats(url), pair.num_bytes)
        (small, _, small_bytes), (large, sent, large_bytes) = found["small"], found["large"]
        steady = (large_bytes - small_bytes) / (large.wall_s - small.wall_s)
        rounds.append(
            {
                "share_of_rate": steady / (rate_mb * 1e6),
                "whole_process_share": large_bytes / large.wall_s / (rate_mb * 1e6),
                "requests_per_gb": sent["requests"] / (large_bytes / 1e9),
                "sent_beyond_needed": sent["sent_bytes"] / large_bytes - 1,
                "samples": {"small": small, "large": large},
            }
        )
    result: dict[str, Any] = {
        key: statistics.median(r[key] for r in rounds)
        for key in ("share_of_rate", "whole_process_share", "requests_per_gb", "sent_beyond_needed")
    }
    samples = {name: [r["samples"][name] for r in rounds] for name in ("small", "large")}
    return {"rate_mb": rate_mb, **result, "commands": summary(samples)}


def report_of(sample: Sample) -> dict[str, Any]:
    """The report that a diff printed."""
    return json.loads(sample.output)


def resumed(bench: Bench, rate_mb: float) -> dict[str, Any]:
    """Bytes sent once more because of CUTS random breaks, and whether the report is the same."""
    pair, lost = bench.pair(bench.entries), []
    with shaped(pair, rate_mb) as url:
        whole = streamed(pair, url, workers=bench.workers)
        needed = stats(url)["sent_bytes"]
    for seed in range(bench.repeats):
        with shaped(pair, rate_mb, cuts=CUTS, seed=seed) as url:
            sample = streamed(pair, url, workers=bench.workers)
            sent = stats(url)
        if report_of(sample) != report_of(whole):
            raise SystemExit(f"seed {seed}: the report is another after {sent['broken']} broken connections")
        lost.append({"seed": seed, "broken": sent["broken"], "lost": sent["sent_bytes"] / needed - 1})
    return {"cuts": CUTS, "needed_bytes": needed, "runs": lost, "worst_lost": max(r["lost"] for r in lost)}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--entries", type=float, default=5e8)
    parser.add_argument("--rates", default="60,125,250", help="MB/s of both sides together")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--workdir", type=Path)
    parser.add_argument("--keep", action="store_true")
    return parser.parse_args()


def main() -> None:
    options = parse_args()
    command = f"python benchmarks/hub_stream.py --entries {options.entries:.10g} --rates {options.rates}"
    facts = {
        "benchmark": "hub_stream",
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "command": f"{command} --repeats {options.repeats} --workers {options.workers}",
        "machine": machine(),
        "versions": versions((*PACKAGES, "huggingface_hub")),
    }
    with open_workdir(options) as bench:
        measure(bench, [float(rate) for rate in options.rates.split(",")])
        facts["bytes_both_sides"] = bench.pair(bench.entries).num_bytes
    for bar in bench.bars:
        print(bar.to_line())
    if options.json is not None:
        bars = [bar.to_json() for bar in bench.bars]
        write_json(options.json, {**facts, "bars": bars, "rows": bench.rows})


def measure(bench: Bench, rates: list[float]) -> None:
    """Fill the bench's rows and bars."""
    warm([*bench.small().files, *bench.pair(bench.entries).files])
    for rate in rates:
        row = bench.rows[f"throughput at {rate:g} MB/s"] = throughput(bench, rate)
        name = f"both sides together, of a line of {rate:g} MB/s"
        bench.add("throughput", name, row["share_of_rate"], MIN_SHARE, at_least=True)
        peak = row["commands"]["large"]["peak_rss_mb"]
        bench.add("throughput", f"peak memory at {rate:g} MB/s", peak, unit="MB")
        bench.add("requests", f"requests per GB at {rate:g} MB/s", row["requests_per_gb"], unit="")
    row = bench.rows["resume"] = resumed(bench, rates[-1])
    name = f"sent again after {CUTS} random breaks, worst of {bench.repeats} runs"
    bench.add("resume", name, row["worst_lost"], MAX_LOST, unit="of all")


if __name__ == "__main__":
    main()
