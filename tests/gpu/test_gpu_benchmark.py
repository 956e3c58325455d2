"""The benchmark of the device kernel runs from end to end; its figures mean something on a GPU only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_gpu_benchmark_runs_on_the_cpu_and_writes_every_figure(tmp_path):
    output = tmp_path / "result.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        "--device",
        "cpu",
        "--entries",
        "1e6",
        "--repeats",
        "1",
    ]
    done = subprocess.run(
        [*command, "--folder", str(tmp_path), "--output", str(output)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("of its floor") == 4
    result = json.loads(output.read_text())
    assert result["entries_checked_against_numpy"] == 128 * 8192
    assert set(result["ratios"]) == {
        f"{what}, {level}" for what in ("streamed", "resident") for level in ("counts", "full")
    }
    assert all(rate > 0 for rate in result["gb_per_s"].values())
    assert list(tmp_path.iterdir()) == [output]
