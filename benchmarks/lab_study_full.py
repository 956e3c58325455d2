"""The committed record of full studies: their verdicts, tables and runs, without every field of `study.json`.

Contract: reads finished studies' folders and measures nothing. Each part has its own command, machine and
seconds; parts that the record holds already stay as they are. A part that two folders hold, or a folder and
the record, is refused, and so is a record that names a place on this machine. CPU seconds are those of calls
that ended; on a machine that did other work they are no measure of speed.

    sparsity-audit lab study --full --only a,b -o ONE
    sparsity-audit lab study --full --only c -o TWO
    python benchmarks/lab_study_full.py ONE TWO --json benchmarks/results/lab-study-full.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sparsity_audit import __version__

_KEYED = ("parts", "claims", "bases", "runs")


def trimmed(folder: Path, *, machine_was: str) -> dict[str, Any]:
    """What the record keeps of one folder: its parts, and their claims, bases and runs.

    Args:
        folder: A finished full study.
        machine_was: What else the machine did.
    """
    study, times = (json.loads((folder / name).read_bytes()) for name in ("study.json", "run.json"))
    facts = study["facts"]
    about = {
        "command": f"sparsity-audit lab study --full --only {','.join(facts['parts'])} -o DIR",
        "date": time.strftime("%Y-%m-%d", time.localtime((folder / "study.json").stat().st_mtime)),
        "machine": f"{platform.platform()}, {os.cpu_count()} cores, {machine_was}",
        "versions": {"sparsity-audit": __version__, "torch": version("torch")},
    }
    return {
        "parts": {
            part: {**about, "seconds": {key: round(times[part][key]) for key in ("wall_s", "cpu_s")}}
            for part in facts["parts"]
        },
        "claims": {
            claim["key"]: _claim(claim) for claim in study["claims"] if claim["part"] in facts["parts"]
        },
        "bases": {
            f"{base['name']}-seed{base['seed']}": base["command"]
            for base in facts["bases"]
            if base["command"]
        },
        "runs": {f"{run['sweep']}/{run['arm']}/seed{run['seed']}": _run(run) for run in facts["runs"]},
    }


def merged(records: list[dict[str, Any]]) -> dict[str, Any]:
    """One record of several, in the order of the parts' letters. Exits on what two of them hold."""
    found: dict[str, Any] = {kind: {} for kind in _KEYED}
    for record in records:
        if twice := sorted(found["parts"].keys() & record["parts"].keys()):
            sys.exit(f"error: part {', '.join(twice)} is there twice; give each part once")
        for kind in _KEYED:
            for key, value in record[kind].items():
                if found[kind].setdefault(key, value) != value:
                    sys.exit(f"error: {kind} {key} is there twice, and not the same")
    found["parts"] = dict(sorted(found["parts"].items()))
    found["claims"] = dict(sorted(found["claims"].items(), key=lambda item: item[1]["part"]))
    return found


def _claim(claim: dict[str, Any]) -> dict[str, Any]:
    explained = f" by {claim['explained_by']}" if claim["explained_by"] else ""
    return {
        "part": claim["part"],
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
    """Read, trim, merge, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("studies", type=Path, nargs="+", help="folders of full studies")
    parser.add_argument("--json", type=Path, required=True, help="the record; parts it holds already stay")
    parser.add_argument("--machine-was", default="otherwise idle", help="what else it did meanwhile")
    arguments = parser.parse_args()
    before = [json.loads(arguments.json.read_bytes())] if arguments.json.exists() else []
    parts = [trimmed(folder, machine_was=arguments.machine_was) for folder in arguments.studies]
    text = json.dumps(merged([*before, *parts]), indent=1, ensure_ascii=False)
    for place in {str(folder.resolve()) for folder in arguments.studies} | {str(Path.home())}:
        if place in text:
            sys.exit(f"error: the record would name {place}")
    arguments.json.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
