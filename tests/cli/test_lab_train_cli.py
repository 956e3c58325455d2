"""`lab train` on the command line is `lab_train`, its progress on stderr and its errors in one message."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

from click.testing import CliRunner, Result

from sparsity_audit import lab_train
from sparsity_audit.cli.lab_train_command import train
from sparsity_audit.cli.main import cli
from sparsity_audit.errors import UsageError
from sparsity_audit.lab.config import ALGORITHMS

BASE = Path(__file__).parents[1] / "data" / "addition" / "base-bf16"
SMALL_RUN = ("--base", str(BASE), "--steps", "3", "--prompts", "2", "--samples", "2", "--digits", "2")


def _command(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["lab", "train", *map(str, arguments)])


def test_the_command_prints_its_result_and_shows_progress_on_stderr(tmp_path) -> None:
    done = _command(*SMALL_RUN, "--precision", "fp32", "-o", tmp_path / "out")
    assert done.exit_code == 0
    assert done.stdout.splitlines()[0] == str(tmp_path / "out" / "final")
    assert "updates in 3 steps" in done.stdout
    assert [line.split(",")[0] for line in done.stderr.splitlines()] == [
        f"step {step} of 3" for step in (1, 2, 3)
    ]
    again = _command(*SMALL_RUN, "--precision", "fp32", "-o", tmp_path / "out", "--json")
    assert json.loads(again.stdout)["steps"] == 3
    assert "finished; nothing was done" in again.stderr


def test_the_options_reach_the_run(tmp_path) -> None:
    options = ("--algorithm", "ppo", "--minibatches", "2", "--kl", "k3", "--kl-priority", "shannon")
    _command(*SMALL_RUN, *options, "--digits", "1=1,2=3", "--optimizer", "sgd", "-o", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "run.json").read_bytes())["config"]
    assert config["algorithm"] == "ppo"
    assert config["lengths"] == {"1": 1.0, "2": 3.0}
    assert (config["minibatches"], config["optimizer"]) == (2, "sgd")
    assert (config["kl"], config["kl_coefficient"], config["kl_priority"]) == ("k3", 0.1, "shannon")


def test_a_config_file_has_the_same_keys_as_the_flags(tmp_path) -> None:
    (tmp_path / "run.yaml").write_text(
        f"base: {BASE}\nsteps: 1\nprompts: 2\nsamples: 2\ndigits: 2\nlr: 0.001\n"
    )
    _command("--config", tmp_path / "run.yaml", "-o", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "run.json").read_bytes())["config"]
    assert (config["lr"], config["lengths"]) == (1e-3, {"2": 1.0})


def test_a_wrong_option_is_one_error_and_leaves_no_folder(tmp_path) -> None:
    done = _command("--base", BASE, "--algorithm", "dpo", "--kl", "k3", "-o", tmp_path / "out")
    assert isinstance(done.exception, UsageError)
    assert str(done.exception).startswith("--kl: k3 with dpo")
    assert not (tmp_path / "out").exists()


def test_the_help_of_the_command_does_not_import_torch() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from sparsity_audit.cli.main import cli\n"
        "found = CliRunner().invoke(cli, ['lab', 'train', '--help'])\n"
        "sys.exit(found.exit_code or ('torch' in sys.modules) * 3)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_the_help_names_every_algorithm() -> None:
    text = next(option.help for option in train.params if option.name == "algorithm")
    assert all(name in text for name in ALGORITHMS)


def test_every_option_of_the_command_is_one_of_the_function_with_the_same_default() -> None:
    options = {option.name for option in train.params} - {"output_format", "as_json", "config", "help"}
    parameters = inspect.signature(lab_train).parameters
    assert options == set(parameters) - {"update_mask", "state_every", "on_step", "on_note"}
    for option in train.params:
        if option.name in options - {"output", "lengths"}:
            # A flag that is off has no default in click, or an unset one.
            stated = option.default if isinstance(option.default, (str, int, float)) else None
            assert (stated or None) == (parameters[option.name].default or None), option.name
