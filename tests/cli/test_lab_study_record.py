"""The record of full studies: each part once, and nothing that belongs to one machine."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "benchmarks" / "results" / "lab-study-full.json"


def _study(folder: Path, *parts: str, command: str = "sparsity-audit lab train -o x") -> Path:
    """A folder with what the record reads of a study: a claim and a run a part."""
    claims = [
        {
            "key": f"claim-{part}",
            "part": part,
            "title": "",
            "goal": "",
            "reading": "read",
            "verdict": "undecided" if part in parts else "not measured",
            "explained_by": None,
            "tables": [{"title": "t", "head": ["a"], "rows": [["1"]]}],
        }
        for part in "abc"
    ]
    run = {"arm": "one", "seed": 0, "tests": [], "sparsity": 0.1, "served_sparsity": 0.2, "warnings": []}
    runs = [{**run, "sweep": part, "command": command} for part in parts]
    facts = {"parts": list(parts), "bases": [], "runs": runs}
    folder.mkdir()
    (folder / "study.json").write_text(json.dumps({"facts": facts, "claims": claims}))
    (folder / "run.json").write_text(json.dumps({part: {"wall_s": 1.4, "cpu_s": 2.0} for part in parts}))
    return folder


def _record(*folders: Path, into: Path) -> subprocess.CompletedProcess[str]:
    script = ROOT / "benchmarks" / "lab_study_full.py"
    command = [sys.executable, str(script), *map(str, folders), "--json", str(into)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_parts_of_several_folders_and_of_the_record_come_together_each_with_its_command(tmp_path) -> None:
    into = tmp_path / "record.json"
    assert _record(_study(tmp_path / "one", "a"), _study(tmp_path / "two", "c"), into=into).returncode == 0
    assert _record(_study(tmp_path / "three", "b"), into=into).returncode == 0
    found = json.loads(into.read_text())
    assert list(found["parts"]) == ["a", "b", "c"]
    assert found["parts"]["b"]["command"] == "sparsity-audit lab study --full --only b -o DIR"
    assert found["parts"]["b"]["seconds"] == {"wall_s": 1, "cpu_s": 2}
    assert [(claim["part"], claim["verdict"]) for claim in found["claims"].values()] == [
        (part, "undecided") for part in "abc"
    ]
    assert sorted(found["runs"]) == ["a/one/seed0", "b/one/seed0", "c/one/seed0"]


@pytest.mark.parametrize(
    ("parts", "command", "said"),
    [
        ("b", "sparsity-audit lab train -o x", "part b is there twice"),
        ("c", "sparsity-audit lab train --base {folder}/base", "the record would name"),
    ],
)
def test_a_part_in_two_folders_and_a_path_of_this_machine_are_refused(tmp_path, parts, command, said) -> None:
    first = _study(tmp_path / "one", "a", "b")
    second = _study(tmp_path / "two", parts, command=command.format(folder=tmp_path / "two"))
    done = _record(first, second, into=tmp_path / "record.json")
    assert done.returncode == 1
    assert said in done.stderr
    assert not (tmp_path / "record.json").exists()


def test_the_committed_record_has_every_part_and_names_no_place() -> None:
    text = COMMITTED.read_text()
    found = json.loads(text)
    assert list(found["parts"]) == list("abcdef")
    assert "not measured" not in {claim["verdict"] for claim in found["claims"].values()}
    assert re.search(r'[ "=]/\w', text) is None


def test_the_committed_study_measured_every_claim_on_runs_that_learned() -> None:
    text = (COMMITTED.parent / "lab-study.json").read_text()
    found = json.loads(text)
    assert "not measured" not in {claim["verdict"] for claim in found["claims"].values()}
    assert re.search(r'[ "=]/\w', text) is None
    base = float(found["claims"]["learning"]["numbers"]["base mix"])
    for precision in ("fp32", "bf16"):
        for seed in (0, 1):
            assert found["runs"][f"grpo-{precision}-seed{seed}"]["low"] > base + 0.05


def test_a_study_that_went_on_after_a_kill_has_no_time_to_report(tmp_path) -> None:
    folder = tmp_path / "study"
    folder.mkdir()
    (folder / "study.json").write_text(json.dumps({"facts": {"runs": [{"name": "grpo"}]}}))
    (folder / "run.json").write_text(json.dumps({"cpu_s_by_job": {"grpo": 0.1}}))
    script = ROOT / "benchmarks" / "lab_study.py"
    command = [sys.executable, str(script), str(folder), "--json", str(tmp_path / "record.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert "some runs were there already" in done.stderr
