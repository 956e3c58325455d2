"""`patch make|apply|info` on the command line."""

import json
from pathlib import Path

from click.testing import CliRunner
from safetensors.torch import load_file

from sparsity_audit.cli.main import cli

DATA = Path(__file__).parents[1] / "data" / "addition"
BASE, TUNED = str(DATA / "base-bf16"), str(DATA / "grpo-bf16-lr1e-4-seed0")


def run(*arguments: str) -> str:
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_make_apply_and_info(tmp_path):
    made = json.loads(run("patch", "make", BASE, TUNED, "-o", str(tmp_path / "p"), "--json"))
    assert made["changed"] == 27_481
    assert json.loads(run("patch", "info", str(tmp_path / "p"), "--json")) == made
    table = run("patch", "info", str(tmp_path / "p"))
    assert "27,481 of 148,928 entries stored (18.45 %)" in table
    assert "bit mask + values" in table
    run("patch", "apply", BASE, str(tmp_path / "p"), "-o", str(tmp_path / "out"))
    found, wanted = (load_file(Path(f) / "model.safetensors") for f in (tmp_path / "out", TUNED))
    assert all((found[name].view(-1) == wanted[name].view(-1)).all() for name in wanted)


def test_what_was_written_is_said_beside_the_data(tmp_path):
    made = CliRunner().invoke(cli, ["patch", "make", BASE, TUNED, "-o", str(tmp_path / "p"), "--json"])
    assert f"patch written to {tmp_path / 'p'}" in made.stderr
    assert json.loads(made.stdout)["changed"] == 27_481
    applied = CliRunner().invoke(
        cli, ["patch", "apply", BASE, str(tmp_path / "p"), "-o", str(tmp_path / "o")]
    )
    assert f"checkpoint written to {tmp_path / 'o'}" in applied.stderr
    assert "..." not in CliRunner().invoke(cli, ["patch", "--help"]).stdout.partition("Commands:")[2]


def test_a_series_gives_one_record_a_step(tmp_path):
    other = str(DATA / "grpo-bf16-lr1e-4-seed1")
    records = json.loads(run("patch", "make", BASE, TUNED, other, "-o", str(tmp_path / "p"), "--json"))
    assert [Path(record["path"]).name for record in records] == ["0001", "0002"]
    assert records[1]["base_digest"] == records[0]["tuned_digest"]
    run("patch", "apply", BASE, str(tmp_path / "p"), "-o", str(tmp_path / "out"))
