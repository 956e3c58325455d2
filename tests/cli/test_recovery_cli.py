"""`sparsity-audit recovery`: data on stdout, notes on stderr, exit codes."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from sparsity_audit.cli.main import cli
from sparsity_audit.errors import SparsityAuditError


def _run(*arguments):
    return CliRunner().invoke(cli, ["recovery", *map(str, arguments)], catch_exceptions=False)


@pytest.fixture
def runs(addition) -> list:
    return [addition / name for name in ("base-fp32", "grpo-fp32-seed0", "grpo-fp32-seed1")]


@pytest.fixture
def scores(tmp_path):
    path = tmp_path / "scores.json"
    found = {"base": 0.363, "full": 0.754, "sub": 0.74, "shuffled": 0.125}
    path.write_text(json.dumps({label: {"accuracy": value, "n": 512} for label, value in found.items()}))
    return path


def test_the_verdict_comes_first_and_traps_are_said(addition, runs, scores, tmp_path) -> None:
    control = f"shuffled={addition / 'shuffled-reward-fp32'}"
    result = _run(*runs, "--control", control, "--metrics", scores, "-o", tmp_path / "out", "--no-figures")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].startswith(
        "the mask recovers 96 % of the gain [95 %: 84 to 111 %]; shuffled −61 % of the gain"
    )
    for text in (
        "! the seeds are not known",
        "equal to full, inside",
        "0.550",
        "share of the gain",
        "down_proj",
    ):
        assert text in result.stdout
    assert "no frozen check of shuffled" in result.stdout
    assert (tmp_path / "out" / "recovery.json").is_file()
    assert not (tmp_path / "out" / "figures").exists()


def test_json_is_the_record_and_notes_go_to_stderr(runs) -> None:
    result = _run(*runs, "--view", "served", "--json")
    record = json.loads(result.stdout)
    assert record["view"] == "served"
    assert [run["label"] for run in record["runs"]] == ["base", "sub"]
    assert round(1 - record["density"], 4) == 0.1237
    assert "reading 3 checkpoints" in result.stderr
    assert _run(*runs, "--format", "quiet").stdout == ""


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--control", "noname"], "is not NAME=PATH"),
        (["--control", "=path"], "is not NAME=PATH"),
        (["--view", "some"], "served"),
    ],
)
def test_a_mistyped_option_is_answered_with_what_is_expected(options, text) -> None:
    result = _run("a", "b", "c", *options)
    assert result.exit_code == 2
    assert text in result.stderr


def test_a_name_given_twice_is_refused() -> None:
    with pytest.raises(SparsityAuditError, match="'x' is given twice"):
        _run("a", "b", "c", "--control", "x=d", "--control", "x=e")
