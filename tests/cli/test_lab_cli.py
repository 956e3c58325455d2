"""`sparsity-audit lab`: data on stdout, progress on stderr, and an exit status for a base that failed."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from sparsity_audit.cli.lab_commands import lab
from sparsity_audit.lab.recipes import RECIPES


def run(*arguments: str) -> Result:
    return CliRunner().invoke(lab, list(arguments), catch_exceptions=False)


def test_a_base_is_pretrained_with_progress_on_stderr(tmp_path: Path) -> None:
    done = run("pretrain", "--base", "single", "-o", str(tmp_path / "b"), "--steps", "1", "--no-target")
    assert done.exit_code == 0
    assert done.stdout == f"{tmp_path / 'b'}\n"
    assert "1 steps" in done.stderr
    assert (tmp_path / "b" / "model.safetensors").exists()


def test_a_base_that_misses_its_target_exits_with_1_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RECIPES, "mix", replace(RECIPES["mix"], final_prompts=64))
    done = run(
        *("pretrain", "--base", "mix", "-o", str(tmp_path / "b"), "--steps", "1", "--lengths", "1"),
        *("--formats", "R=2,S=1", "--target", "0.5", "0.6"),
    )
    assert done.exit_code == 1
    assert "step 1: loss 2.99" in done.stderr
    assert "did not converge" in done.stderr
    assert "accuracy 0.000" in done.stdout
    assert json.loads((tmp_path / "b" / "pretrain.json").read_text())["converged"] is False


def test_target_and_no_target_exclude_each_other(tmp_path: Path) -> None:
    done = run(
        *("pretrain", "--base", "mix", "-o", str(tmp_path / "b"), "--no-target", "--target", "0.5", "0.6")
    )
    assert done.exit_code == 2
    assert "exclude each other" in done.stderr


@pytest.mark.parametrize("text", ["4=x", "a=1", "3=1,3=2", ""])
def test_a_mixture_that_is_none_is_a_usage_error(text: str) -> None:
    assert run("evaluate", "mix", "--digits", text).exit_code == 2


def test_an_evaluation_is_a_table_or_json_with_the_same_figures() -> None:
    arguments = (
        "evaluate",
        "single",
        "--prompts",
        "8",
        "--samples",
        "2",
        "--digits",
        "2",
        "--reference",
        "mix",
    )
    table, record = run(*arguments), run(*arguments, "--json")
    assert table.exit_code == record.exit_code == 0
    found = json.loads(record.stdout)
    assert f"pass@1    {found['accuracy']['value']:.3f}" in table.stdout
    assert f"pass@2    {found['pass_at']['2']['value']:.3f}" in table.stdout
    assert f"{found['drift']['kl_per_token']:.4f} nats a token" in table.stdout
    assert found["num_samples"] == 2


def test_help_imports_no_torch() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from sparsity_audit.cli.main import cli;"
        "[CliRunner().invoke(cli, ['lab', *words, '--help'], catch_exceptions=False)"
        " for words in ([], ['pretrain'], ['evaluate'])];"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
