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
