"""`lab track`, `lab critical` and `lab study` on the command line."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
from click.testing import CliRunner, Result

from sparsity_audit import lab_critical, lab_study, lab_study_full, lab_track, lab_train
from sparsity_audit.cli.lab_measure_commands import critical, study, track
from sparsity_audit.cli.main import cli
from sparsity_audit.errors import CheckpointNotFoundError
from sparsity_audit.report.lab_critical import critical_json_schema

BASE = Path(__file__).parents[1] / "data" / "addition" / "base-bf16"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "run"
    lab_train(folder, base=BASE, steps=2, prompts=2, samples=2, lengths=2)
    return folder


def _command(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["lab", *map(str, arguments)])


def test_track_prints_a_line_a_saved_step(run) -> None:
    done = _command("track", run, "--prompts", 8, "--samples", 2)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].endswith("8 prompts × 2 samples")
    assert "pass@2" in lines[1]
    assert [line.split()[0] for line in lines[2:]] == ["0", "1", "2"]


def test_track_prints_its_record_as_json(run) -> None:
    done = _command("track", run, "--prompts", 4, "--samples", 2, "--json")
    record = json.loads(done.stdout)
    assert [point["step"] for point in record["points"]] == [0, 1, 2]


def test_critical_marks_the_positions_and_follows_the_run(run, tmp_path) -> None:
    arguments = ("critical", BASE, "--run", run, "--digits", 2, "--prompts", 16, "-o", tmp_path / "out")
    done = _command(*arguments)
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "out" / "critical.json").read_bytes())
    jsonschema.validate(record, critical_json_schema())
    marked = [line for line in done.stdout.splitlines() if line.startswith("  *")]
    assert len(marked) == sum(position["critical"] for position in record["positions"])
    assert "step 2: p(right token)" in done.stdout


def test_a_run_that_is_not_there_is_one_error(tmp_path) -> None:
    done = _command("track", tmp_path / "none")
    assert isinstance(done.exception, CheckpointNotFoundError)


def test_the_help_of_the_study_imports_neither_torch_nor_matplotlib() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from sparsity_audit.cli.main import cli\n"
        "found = CliRunner().invoke(cli, ['lab', 'study', '--help'])\n"
        "sys.exit(found.exit_code or 3 * bool({'torch', 'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


@pytest.mark.parametrize(
    ("command", "function", "of_the_command"),
    [
        (track, lab_track, {"as_json"}),
        (critical, lab_critical, {"as_json"}),
        (study, lab_study, {"full", "only"}),
        (study, lab_study_full, {"full"}),
    ],
)
def test_every_option_is_one_of_the_function_with_the_same_default(command, function, of_the_command) -> None:
    parameters = inspect.signature(function).parameters
    options = {option.name: option for option in command.params if option.name not in of_the_command}
    assert set(options) == {name for name in parameters if not name.startswith("on_") and name != "betas"}
    for name, option in options.items():
        default = option.default if isinstance(option.default, (str, int, float)) else None
        if parameters[name].default is not inspect.Parameter.empty:
            assert (default or None) == (parameters[name].default or None), name
