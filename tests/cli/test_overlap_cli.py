"""`sparsity-audit overlap`: data on stdout, notes on stderr, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from sparsity_audit import diff
from sparsity_audit.cli.main import cli


@pytest.fixture
def masks(addition, tmp_path) -> list[str]:
    folders = [tmp_path / f"seed{seed}" for seed in (0, 1)]
    for seed, folder in enumerate(folders):
        run = addition / f"grpo-bf16-lr1e-4-seed{seed}"
        diff(addition / "base-bf16", run, stats="counts", mask=folder)
    return [str(folder) for folder in folders]


def _run(*arguments):
    return CliRunner().invoke(cli, ["overlap", *map(str, arguments)], catch_exceptions=False)


def test_the_ladder_is_the_headline(addition, masks) -> None:
    result = _run(*masks, "--base", addition / "base-bf16")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0] == "seed0 × seed1"
    assert lines[1].startswith(
        "Jaccard .922: uniform chance .102, tensor densities .118, weight magnitude .916"
    )
    for word in ("per-tensor", "excess share over row-column-magnitude", "down_proj", "26,505"):
        assert word in result.stdout


def test_json_is_the_record_and_notes_go_to_stderr(addition) -> None:
    runs = [addition / f"grpo-bf16-seed{seed}" for seed in (0, 1)]
    options = ["--base", addition / "base-bf16", "--reference", addition / "shuffled-reward-bf16"]
    result = _run(*runs, *options, "--criterion", "top:1%", "--json")
    record = json.loads(result.stdout)
    assert record["criterion"] == "top:1%"
    assert [run["is_reference"] for run in record["runs"]] == [False, False, True]
    assert "making the mask of" in result.stderr


def test_the_same_question_by_a_yaml_file(addition, masks, tmp_path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(f"base: {addition / 'base-bf16'}\nformat: json\n")
    record = json.loads(_run(*masks, "--config", config).stdout)
    assert "magnitude" in record["pairs"][0]["overall"]["nulls"]


def test_output_is_written_and_named(masks, tmp_path) -> None:
    result = _run(*masks, "-o", tmp_path / "out", "--no-figures")
    assert f"written to {tmp_path / 'out'}" in result.stdout
    assert (tmp_path / "out" / "overlap.json").is_file()
    assert not (tmp_path / "out" / "figures").exists()


def test_masks_that_do_not_belong_together_exit_with_2_and_no_traceback(addition, masks, tmp_path) -> None:
    other = tmp_path / "other"
    diff(addition / "sft-bf16", addition / "grpo-bf16-seed0", stats="counts", mask=other)
    command = [sys.executable, "-m", "sparsity_audit.cli.main", "overlap", masks[0], str(other)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "base fingerprints" in result.stderr
    assert "--force" in result.stderr
    assert "Traceback" not in result.stderr


def test_quiet_prints_nothing(masks) -> None:
    assert _run(*masks, "--format", "quiet").stdout == ""


def test_several_criteria_give_a_table_or_a_list_of_records(addition) -> None:
    runs = [addition / f"grpo-fp32-seed{seed}" for seed in (0, 1)]
    options = ["--base", addition / "base-fp32", "--criterion", "top:1%,5%", "--nulls", "counts"]
    human = _run(*runs, *options)
    assert "top:5%: grpo-fp32-seed0 × grpo-fp32-seed1" in human.stdout
    assert "magnitude chance" in human.stdout
    records = json.loads(_run(*runs, *options, "--json").stdout)
    assert [record["criterion"] for record in records] == ["top:1%", "top:5%"]


def test_facts_beside_the_nulls_are_printed(addition) -> None:
    runs = [addition / f"grpo-bf16-lr1e-4-seed{seed}" for seed in (0, 1)]
    found = _run(*runs, "--base", addition / "base-bf16", "--walk", "120:1e-4", "--seed", "1").stdout
    for text in (
        "phantom: its own densities 0.185 and 0.186, observed 0.185 and 0.186",
        "heterogeneity over 23 tensors (no confidence interval)",
        "signs agree on 0.703 of 26,505 common entries (0.500 under independent-signs)",
        "walk of 120 steps of ±0.0001 rounded to bf16 (seed 1)",
        "tensor × 400 quantiles",
    ):
        assert text in found


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--walk", "120"], "STEPS:LR"),
        (["--criterion", "top:1%,1%"], "given twice"),
        (["--criterion", "value,5"], "not understood"),
        (["--nulls", "some"], "counts"),
    ],
)
def test_a_mistyped_option_is_answered_with_what_is_expected(options, text) -> None:
    result = CliRunner().invoke(cli, ["overlap", "a", "b", *options])
    assert result.exit_code == 2
    assert text in result.stderr


@pytest.fixture
def runs_file(addition, tmp_path):
    path = tmp_path / "runs.yaml"
    rows = [f"  - {{run: {addition}/grpo-bf16-seed{seed}, label: s{seed}, seed: {seed}}}" for seed in (0, 1)]
    rows.append(f"  - {{run: {addition}/shuffled-reward-bf16, label: control, seed: 0}}")
    path.write_text(f"base: {addition}/base-bf16\nreference: control\nruns:\n" + "\n".join(rows) + "\n")
    return path


def test_a_file_of_runs_gives_factors_and_a_matrix(runs_file, tmp_path) -> None:
    result = _run(runs_file, "--nulls", "counts", "-o", tmp_path / "out")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0] == "s0 × s1"
    for words in (
        "Factors: do runs that agree on one overlap more (excess share over magnitude)?",
        "3 distinct arrangements of the labels: a p needs at least 20",
        "Jaccard, observed below the diagonal, magnitude chance above it",
        "no interval: 2 runs: an interval over runs needs at least 4",
    ):
        assert words in result.stdout
    assert (tmp_path / "out" / "factors.csv").is_file()
    assert (tmp_path / "out" / "figures" / "matrix.pdf").is_file()
    options = ["--overwrite", "--format", "quiet", "--no-figures", "--nulls", "counts"]
    again = _run(runs_file, "-o", tmp_path / "out", *options)
    assert again.exit_code == 0
    assert not list((tmp_path / "out" / "figures").iterdir())


def test_flags_win_over_the_file_of_runs(addition, runs_file) -> None:
    options = ["--reference", "s1", "--criterion", "atol:1e-5", "--view", "served", "--json"]
    record = json.loads(_run(runs_file, *options).stdout)
    assert (record["criterion"], record["view"]) == ("atol:1e-5", "served")
    assert [run["label"] for run in record["runs"] if run["is_reference"]] == ["s1"]


def test_a_file_of_runs_that_is_not_understood_exits_with_2_and_says_where(tmp_path) -> None:
    path = tmp_path / "runs.yml"
    path.write_text("runs:\n  - {run: a, seed: 0}\n  - {run: b}\n")
    command = [sys.executable, "-m", "sparsity_audit.cli.main", "overlap", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "runs.yml: run 2: has no seed, which run 1 has" in result.stderr
    assert "Traceback" not in result.stderr
