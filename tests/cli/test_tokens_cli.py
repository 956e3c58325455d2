"""`sparsity-audit tokens`: figures and JSON on stdout, bad input as one message and exit status 2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from token_models import save_random

from sparsity_audit.cli.main import cli
from sparsity_audit.errors import UsageError


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return str(save_random(folder / "base", 0)), str(save_random(folder / "tuned", 1))


def run(*arguments: str):
    result = CliRunner().invoke(cli, ["tokens", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_diverge_prints_both_sets_and_writes_nothing(models, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("diverge", *models, "--task", "addition", "--num-prompts", "3", "--max-new-tokens", "6")
    assert result.exit_code == 0
    assert "base's samples" in result.stdout
    assert "tuned's samples" in result.stdout
    assert "JS > 0.1" in result.stdout
    assert list(Path().iterdir()) == []


def test_diverge_prints_its_record_as_json_alone(models) -> None:
    result = run("diverge", *models, "--task", "addition", "--num-prompts", "2", "--lengths", "1,2", "--json")
    record = json.loads(result.stdout)
    assert record["format"] == "sparsity-audit/tokens"
    assert record["source"] == "addition, 1, 2 digits, seed 0"
    assert (
        run("diverge", *models, "--task", "addition", "--num-prompts", "2", "--format", "quiet").stdout == ""
    )


def test_series_prints_a_row_for_each_step(models) -> None:
    result = run("series", models[0], *models, "--task", "addition", "--num-prompts", "3")
    assert result.exit_code == 0
    assert "Jaccard with the last" in result.stdout
    record = json.loads(
        run("series", models[0], *models, "--task", "addition", "--num-prompts", "2", "--json").stdout
    )
    assert [step["label"] for step in record["steps"]] == ["base", "tuned"]


def test_a_length_that_is_none_is_a_usage_error(models) -> None:
    result = run("diverge", *models, "--task", "addition", "--lengths", "4,x")
    assert result.exit_code == 2
    assert "not a list of lengths" in result.output
    with pytest.raises(UsageError, match="exactly one of a file and a task"):
        run("diverge", *models)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from sparsity_audit.cli.main import cli\n"
        "for name in ('diverge', 'series'):\n"
        "    try: cli(['tokens', name, '--help'])\n"
        "    except SystemExit: pass\n"
        "heavy = ('torch', 'numpy', 'transformers', 'matplotlib', 'rich', 'jinja2')\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


LAB = ("--task", "addition", "--lengths", "1", "--num-prompts", "4")


def test_cross_sample_prints_rules_and_controls_and_writes_nothing(models, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ("--thresholds", "0.1", "--shares", "5%", "--budgets", "1")
    result = run("cross-sample", *models, *LAB, *asked, "--directions", "forward")
    assert result.exit_code == 0
    assert "base writes, tuned takes over" in result.stdout
    assert "tuned writes" not in result.stdout
    for text in ("js > 0.1", "5 % of positions", "1 token a completion", "as many random positions"):
        assert text in result.stdout
    assert list(Path().iterdir()) == []


def test_cross_sample_takes_a_verifier_beside_the_user(models, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("verdicts_of_mine.py").write_text("def judge(line, text):\n    return line['right']\n")
    Path("prompts.jsonl").write_text(
        '{"prompt": "1+1=", "right": true}\n{"prompt": "2+2=", "right": false}\n'
    )
    asked = ("--prompts", "prompts.jsonl", "--verifier", "verdicts_of_mine:judge", "--max-new-tokens", "4")
    result = run("cross-sample", *models, *asked, "--thresholds", "0.1", "--controls", "none", "--json")
    record = json.loads(result.stdout)
    assert record["base_accuracy"]["value"] == 0.5
    assert {point["selector"] for point in record["points"]} == {"none", "js"}


def test_patch_and_critical_print_their_tables(models) -> None:
    result = run("patch", *models, *LAB, "--parts", "layer")
    assert result.exit_code == 0
    for text in ("layer 0", "head", "share of JS", "share of the gap"):
        assert text in result.stdout
    result = run("critical", models[0], *LAB, "--continuations", "2")
    assert result.exit_code == 0
    for text in ("chosen", "random", "at stake", "largest drops"):
        assert text in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cross-sample", "--thresholds", "high"), "is not x,x"),
        (("cross-sample", "--budgets", "1.5"), "is not n,n"),
        (("patch", "--parts", "neuron"), "'neuron' is not known"),
    ],
)
def test_numbers_and_names_are_checked_first(models, arguments, message) -> None:
    command, *rest = arguments
    if command == "patch":
        with pytest.raises(UsageError, match=message):
            run(command, *models, *LAB, *rest)
        return
    result = run(command, *models, *LAB, *rest)
    assert result.exit_code == 2
    assert message in result.output
