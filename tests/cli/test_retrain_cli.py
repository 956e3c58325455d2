"""`sparsity-audit retrain`: what is printed, and what the flags mean."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from retrain_runs import full_run, mask_of

from sparsity_audit.cli.main import cli
from sparsity_audit.errors import UsageError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    run = full_run(folder / "full", steps=1, prompts=2)
    return {"--run": run, "--mask": mask_of(run, folder / "mask"), "-o": folder / "out"}


def _run(options, *more):
    arguments = [str(part) for pair in options.items() for part in pair]
    command = ["retrain", *arguments, "--prompts", "12", "--validation-prompts", "8", *more]
    return CliRunner().invoke(cli, command, catch_exceptions=False)


def test_the_verdict_comes_first_then_one_row_a_run_and_json_is_the_record(made) -> None:
    more = ("--controls", "random, complement", "--control-lrs", "3,1", "--seed", "4", "--no-figures")
    result = _run(made, *more)
    assert result.exit_code == 0
    assert result.stdout.startswith("the mask recovers")
    rows = [line.split()[0] for line in result.stdout.splitlines() if line.split()]
    assert [row for row in rows if row in ("base", "full", "sub", "random", "complement")] == [
        *("base", "full", "sub", "random", "complement")
    ]
    assert "0.0003, 0.0009" in result.stdout
    assert "runs/random-x3: seed 4, learning rate 0.0009" in result.stderr
    again = _run(made, *more, "--json")
    record = json.loads(again.stdout)
    assert record == json.loads((made["-o"] / "retrain.json").read_text())
    assert record["runs"][0]["seed"] == 4
    assert not (made["-o"] / "recovery" / "figures").exists()


def test_flags_that_are_no_lists_of_numbers_are_refused_by_name(made) -> None:
    result = _run(made, "--control-lrs", "1,much")
    assert result.exit_code == 2
    assert "'1,much' is not a list such as 1,3" in result.stderr


def test_without_a_run_or_a_config_the_user_is_told_both() -> None:
    with pytest.raises(UsageError, match=r"--run RUN, or --config FILE"):
        CliRunner().invoke(cli, ["retrain", "--mask", "m", "-o", "o"], catch_exceptions=False)
