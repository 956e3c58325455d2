"""The committed record of a study: its verdicts, numbers, runs and cost, without every field of `study.json`.

Contract: reads a finished study's folder and measures nothing. What the record says of earlier recipes
(`history`, `earlier`) stays as it is. CPU seconds are of the call that ran all jobs; a study that went on
after a kill is refused, because its times are those of the last call alone.

    sparsity-audit lab study -o study
    python benchmarks/lab_study.py study --json benchmarks/results/lab-study.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sparsity_audit import __version__

_KEPT = ("history", "earlier")


def trimmed(folder: Path, *, machine_was: str) -> dict[str, Any]:
    """The record. Exits where the study's times are not those of all its jobs.

    Args:
        folder: A finished study.
        machine_was: What else the machine did, its load average with it.
    """
    study, times = (json.loads((folder / name).read_bytes()) for name in ("study.json", "run.json"))
    facts, by_job = study["facts"], times["cpu_s_by_job"]
    if any(by_job[run["name"]] < 1 for run in facts["runs"]):
        sys.exit("error: some runs were there already; time a study in a folder of its own")
    return {
        "command": "sparsity-audit lab study -o study",
        "date": time.strftime("%Y-%m-%d", time.localtime((folder / "study.json").stat().st_mtime)),
        "machine": f"{platform.platform()}, {os.cpu_count()} cores, {machine_was}",
        "versions": {"sparsity-audit": __version__, "torch": version("torch")},
        "size": study["size"],
        "seconds": {
            **{key: round(times[key]) for key in ("wall_s", "cpu_s")},
            "processes": times["processes"],
            "cpu_s_by_kind": _by_kind(by_job, {run["name"] for run in facts["runs"]}),
            "cpu_s_by_job": by_job,
        },
        "goals": facts["goals"],
        "num_prompts": facts["num_prompts"],
        "runs": {run["name"]: _run(run) for run in facts["runs"]},
        "claims": {claim["key"]: _claim(claim) for claim in study["claims"]},
    }


def _by_kind(by_job: dict[str, float], runs: set[str]) -> dict[str, float]:
    found: dict[str, float] = defaultdict(float)
    for name, seconds in by_job.items():
        found["train" if name in runs else name.partition("-")[0]] += seconds
    return {kind: round(seconds, 1) for kind, seconds in sorted(found.items(), key=lambda item: -item[1])}


def _run(run: dict[str, Any]) -> dict[str, Any]:
    return {
        **{key: round(run["accuracy"][key], 4) for key in ("value", "low", "high")},
        "share_S": round(run["share"], 4),
        "sparsity": [round(run["sparsity"], 4), round(run["served_sparsity"], 4)],
        "steps": run["steps"],
        "command": run["command"],
    }


def _claim(claim: dict[str, Any]) -> dict[str, Any]:
    kept = {key: claim[key] for key in ("title", "goal", "verdict", "reading")}
    return {**kept, "numbers": dict(claim["numbers"])}


def main() -> int:
    """Read, trim, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("study", type=Path, help="folder of a study")
    parser.add_argument("--json", type=Path, required=True, help="write the record here")
    parser.add_argument("--machine-was", default="otherwise idle", help="what else it did meanwhile")
    arguments = parser.parse_args()
    record = trimmed(arguments.study, machine_was=arguments.machine_was)
    before = json.loads(arguments.json.read_bytes()) if arguments.json.exists() else {}
    record |= {key: before[key] for key in _KEPT if key in before}
    text = json.dumps(record, indent=1, ensure_ascii=False)
    arguments.json.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
