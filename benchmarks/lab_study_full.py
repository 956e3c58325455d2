"""The committed record of a full study: its verdicts, tables and runs, without every field of `study.json`.

Contract: reads a finished study's folder and measures nothing. CPU seconds are those of
calls that ended; on a machine that did other work they are no measure of speed.

    sparsity-audit lab study --full -o DIR
    python benchmarks/lab_study_full.py DIR --json benchmarks/results/lab-study-full.json
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

from sparsity_audit import __version__

COMMAND = "sparsity-audit lab study --full -o DIR"


def trimmed(study: dict[str, Any], times: dict[str, Any], *, machine_was: str) -> dict[str, Any]:
    """The record.

    Args:
        study: `study.json`.
        times: `run.json`.
        machine_was: What else the machine did.
    """
    return {
        "command": COMMAND,
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.platform()}, {os.cpu_count()} cores, {machine_was}",
        "versions": {"sparsity-audit": __version__, "torch": torch.__version__},
        "seconds": {
            part: {key: round(found[key]) for key in ("wall_s", "cpu_s")} for part, found in times.items()
        },
        "parts": study["facts"]["parts"],
        "claims": {claim["key"]: _claim(claim) for claim in study["claims"]},
        "bases": {
            f"{base['name']}-seed{base['seed']}": base["command"]
            for base in study["facts"]["bases"]
            if base["command"]
        },
        "runs": {
            f"{run['sweep']}/{run['arm']}/seed{run['seed']}": _run(run) for run in study["facts"]["runs"]
        },
    }


def _claim(claim: dict[str, Any]) -> dict[str, Any]:
    explained = f" by {claim['explained_by']}" if claim["explained_by"] else ""
    return {
        "title": claim["title"],
        "goal": claim["goal"],
        "verdict": claim["verdict"] + explained,
        "reading": claim["reading"],
        "tables": [
            {"title": table["title"], "rows": [" | ".join(row) for row in (table["head"], *table["rows"])]}
            for table in claim["tables"]
        ],
    }


def _run(run: dict[str, Any]) -> dict[str, Any]:
    return {
        "tests": {
            f"{test['task']}-{test['digits']}": [
                *(round(test["accuracy"][key], 4) for key in ("value", "low", "high")),
                None if test["kl"] is None else round(test["kl"], 4),
            ]
            for test in run["tests"]
        },
        "sparsity": [round(run["sparsity"], 4), round(run["served_sparsity"], 4)],
        "command": run["command"],
        **({"warnings": run["warnings"]} if run["warnings"] else {}),
    }


def main() -> int:
    """Read, trim, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("study", type=Path, help="folder of a full study")
    parser.add_argument("--json", type=Path, required=True, help="write the record here")
    parser.add_argument("--machine-was", default="otherwise idle", help="what else it did meanwhile")
    arguments = parser.parse_args()
    study, times = (json.loads((arguments.study / name).read_bytes()) for name in ("study.json", "run.json"))
    record = trimmed(study, times, machine_was=arguments.machine_was)
    arguments.json.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
