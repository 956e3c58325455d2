"""`sparsity-audit series`: data on stdout, refusals with exit 2."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from sparsity_audit.cli.main import cli


def _run(*arguments):
    return CliRunner().invoke(cli, ["series", *map(str, arguments)], catch_exceptions=False)


@pytest.fixture
def steps(addition):
    return [addition / "base-bf16", addition / "grpo-bf16-lr1e-4-seed0", addition / "grpo-bf16-lr1e-4-seed1"]


def test_the_headline_and_the_steps_are_printed(steps) -> None:
    result = _run(*steps, "--lags", "1,2")
    assert result.exit_code == 0
    assert result.stdout.startswith("2 saved steps: 0.807 of 148,928 entries never changed")
    for text in ("S_2", "27,481", "down_proj", "as fine as the saved steps"):
        assert text in result.stdout


def test_json_is_the_record(steps, tmp_path) -> None:
    record = json.loads(_run(*steps, "--json", "-o", tmp_path / "out", "--no-figures").stdout)
    assert record["lags"] == [1, 2, 5]
    assert [step["changed"] for step in record["overall"]["steps"]] == [27_481, 27_760]
    assert not (tmp_path / "out" / "figures").exists()


@pytest.mark.parametrize(
    ("options", "text"), [(["--lags", "0"], "1,2,5"), (["--criterion", "some"], "not understood")]
)
def test_a_mistyped_option_is_answered_with_what_is_expected(steps, options, text) -> None:
    result = CliRunner().invoke(cli, ["series", *map(str, steps), *options])
    assert result.exit_code == 2
    assert text in result.stderr
