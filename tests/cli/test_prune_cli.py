"""`sparsity-audit prune`: data on stdout, notes on stderr, exit codes; light."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from sparsity_audit.cli.main import cli


def _run(*arguments):
    return CliRunner().invoke(cli, ["prune", *map(str, arguments)], catch_exceptions=False)


@pytest.fixture
def pair(addition) -> tuple:
    return addition / "base-fp32", addition / "grpo-fp32-seed0"


def test_one_row_a_checkpoint(pair, tmp_path) -> None:
    result = _run(*pair, "-o", tmp_path / "out", "--keep", "top:5%", "--keep", "bottom:80%")
    assert result.exit_code == 0
    assert "148,928 entries compared, 148,928 moved" in result.stdout
    top, bottom = (line.split() for line in result.stdout.splitlines() if line.startswith(("top", "bottom")))
    assert top[:8] == [
        "top:5%",
        "7,446",
        "7,446",
        "5.00",
        "%",
        "43.79",
        "%",
        str(tmp_path / "out" / "top-5pct"),
    ]
    assert bottom[:7] == ["bottom:80%", "119,142", "119,142", "80.00", "%", "24.27", "%"]
    assert "selecting top:5%" in result.stderr
    assert (tmp_path / "out" / "bottom-80pct" / "model.safetensors").is_file()


def test_json_is_the_record_or_a_list_of_them(pair, tmp_path) -> None:
    one = json.loads(_run(*pair, "-o", tmp_path / "one", "--keep", "top:100", "--json").stdout)
    assert one == json.loads((tmp_path / "one" / "prune.json").read_bytes())
    options = ["--keep", "top:100", "--keep", "random:100", "--seed", "7", "--json"]
    two = json.loads(_run(*pair, "-o", tmp_path / "two", *options).stdout)
    assert [(record["keep"], record["seed"]) for record in two] == [("top:100", None), ("random:100", 7)]


def test_leftovers_are_printed(tmp_path, pair, write_checkpoint) -> None:
    import numpy as np

    ones = np.ones((2, 3), dtype=np.float32)
    base = write_checkpoint("base", {"w": ones, "gone": ones})
    tuned = write_checkpoint("tuned", {"w": 2 * ones, "new": ones})
    text = _run(base, tuned, "-o", tmp_path / "out", "--keep", "all").stdout
    assert "base gone: 6 entries not written: only on this side" in text
    assert "tuned new: 6 entries written as they are: only on this side" in text


def test_errors_exit_with_2_and_no_traceback(pair, tmp_path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    for options, text in (
        (["-o", tmp_path / "full", "--keep", "all"], "not empty"),
        (["-o", tmp_path / "out", "--keep", "most"], "not understood"),
    ):
        command = [sys.executable, "-m", "sparsity_audit.cli.main", "prune", *map(str, (*pair, *options))]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 2
        assert text in result.stderr
        assert "Traceback" not in result.stderr


def test_torch_is_not_imported(pair, tmp_path) -> None:
    options = f"{str(tmp_path / 'out')!r}, keep=['top:1%', 'random:1%']"
    code = f"""
import sys, sparsity_audit as sa
sa.prune({str(pair[0])!r}, {str(pair[1])!r}, {options})
assert not {{"torch", "transformers", "matplotlib", "rich"}} & sys.modules.keys(), sorted(sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
