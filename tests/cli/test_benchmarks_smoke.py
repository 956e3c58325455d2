"""The end-to-end benchmarks run and say what they measured; no time is judged here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(script: str, *args: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / script), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)


def load(folder: Path) -> dict[str, np.ndarray]:
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) == 2
    return {name: array for file in files for name, array in load_file(file).items()}


def test_a_generated_pair_holds_what_it_says(tmp_path) -> None:
    folder = tmp_path / "pair"
    assert run("pairs.py", folder, "--entries", "1e6", "--dtype", "fp32", "--copy").returncode == 0
    facts = json.loads((folder / "pair.json").read_text())
    base, tuned, copy = (load(folder / side) for side in ("base", "tuned", "copy"))
    assert facts["tensors"] == len(base)
    assert facts["counts"]["entries"] == sum(array.size for array in base.values()) >= 1_000_000
    assert facts["counts"]["value"] == sum(int((base[name] != tuned[name]).sum()) for name in base)
    assert facts["counts"]["value"] / facts["counts"]["entries"] == pytest.approx(0.15, abs=0.005)
    assert all(np.array_equal(base[name], copy[name]) for name in base)
    assert all(np.isfinite(array).all() for array in tuned.values())
    index = json.loads((folder / "tuned" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tuned.keys()


def test_a_pair_that_is_there_is_used_again_and_another_question_makes_it_anew(tmp_path) -> None:
    folder = tmp_path / "pair"
    stamps = []
    for entries in ("1e5", "1e5", "2e5"):
        assert run("pairs.py", folder, "--entries", entries).returncode == 0
        stamps.append((folder / "pair.json").stat().st_mtime_ns)
    assert stamps[0] == stamps[1] != stamps[2]


def test_rows_and_bars_of_the_diff_benchmark_are_complete(tmp_path) -> None:
    result, work = tmp_path / "out" / "diff.json", tmp_path / "work"
    rows = ["warm-counts", "cold"]
    args = ("--entries", "1e6", "--repeats", "1", "--rows", ",".join(rows))
    done = run("diff.py", *args, "--json", result, "--workdir", work)
    assert done.returncode == 0, done.stderr
    found = json.loads(result.read_text())
    assert found.keys() >= {"date", "command", "machine", "versions", "pairs", "bars", "rows"}
    assert found["machine"].keys() >= {"cpu", "cpus", "memory_gb", "kernel"}
    assert found["versions"].keys() >= {"python", "numpy", "numba", "sparsity-audit", "cat"}
    assert found["is_at_the_size_of_the_bars"] is False
    assert str(tmp_path) not in result.read_text()
    assert list(found["rows"]) == rows
    assert {bar["row"] for bar in found["bars"]} == set(rows)
    verdicts = {bar["verdict"] for bar in found["bars"]}
    assert verdicts <= {"met", "missed", "reported", "not measured"}
    for bar in found["bars"]:
        assert (bar["value"] is None) == (bar["verdict"] == "not measured")
        assert bar["bar"] in done.stdout
    runs = found["rows"]["warm-counts"]["runs"]
    assert list(runs) == ["cat", "cmp", "diff", "diff of the small pair"]
    assert all(len(each["samples"]) == 1 for each in runs.values())
    cold = found["rows"]["cold"]
    assert cold["dropping_the_cache_worked"] == all(s < 0.01 for s in cold["resident_share_after_dropping"])
    assert list(work.iterdir()) == []


def test_an_unknown_row_is_refused_with_the_known_ones() -> None:
    done = run("diff.py", "--rows", "warm-counts,hot")
    assert done.returncode == 2
    assert "hot; rows are warm-counts" in done.stderr


def test_the_masked_optimizer_benchmark_counts_state_and_compares_in_one_run(tmp_path) -> None:
    args = ("--entries", "8e4", "--densities", "0.2", "--threads", "1", "--repeats", "1", "--crossover")
    done = run("masked_optimizer.py", *args, "--json", tmp_path / "found.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found.keys() >= {"date", "command", "machine", "versions", "rows", "bars", "crossover"}
    assert str(tmp_path) not in (tmp_path / "found.json").read_text()
    (row,) = found["rows"]
    assert row["entries"] == 80_000
    assert row["state_bytes_per_parameter"]["SubnetworkAdamW"] == row["state_bytes_per_parameter"]["12 d"]
    assert len(row["ratios_to_the_floor"]) == 4
    assert [bar["limit"] for bar in found["bars"]] == [0.75]
    assert [each["density"] for each in found["crossover"]] == [0.1, 0.3, 0.5, 0.7, 0.9]


def test_the_cross_sampling_benchmark_measures_every_rule(tmp_path) -> None:
    done = run("tokens_cross.py", "--smoke", "--rounds", "1", "--json", tmp_path / "speed.json")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "speed.json").read_text())
    assert set(report["rows"][0]["ratio"]) == {"js > 0.1", "js > 0", "first position"}
