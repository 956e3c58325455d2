"""The command line: streams, exit codes, messages, lightness."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import sparsity_audit


def run(*args: str | Path, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sparsity_audit.cli.main", *map(str, args)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        timeout=120,
        cwd=cwd,
        env={**os.environ, **env},
    )


@pytest.fixture
def pair(addition: Path) -> tuple[Path, Path]:
    return addition / "base-bf16", addition / "grpo-bf16-lr1e-4-seed0"


def test_the_table_goes_to_stdout_and_exit_is_zero(pair) -> None:
    done = run("diff", *pair)
    assert done.returncode == 0
    assert done.stderr == ""
    assert "81.5 %" in done.stdout
    assert "compared 148,928 + skipped 0 + leftover 0 = 148,928" in done.stdout


def test_json_on_stdout_is_the_report(pair) -> None:
    done = run("diff", *pair, "--json")
    report = json.loads(done.stdout)
    value = next(row for row in report["headlines"] if row["criterion"] == "value")
    assert (value["compared"], value["changed"]) == (148_928, 27_481)


def test_quiet_prints_nothing(pair) -> None:
    done = run("diff", *pair, "--format", "quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_failed_expectation_is_exit_1_with_the_reason_on_stderr(pair) -> None:
    done = run("diff", *pair, "--expect-frozen", "*mlp*", "--format", "quiet")
    assert done.returncode == 1
    assert "expectation failed: expect-frozen *mlp*: 9 moved" in done.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("diff", "nowhere", "elsewhere"), "nowhere: no such file or directory"),
        (("dif",), "Did you mean 'diff'?"),
        (("diff", "a"), "Missing argument 'TUNED'"),
        (("diff", "a", "b", "--criterion", "abs:1"), "bitwise, value, atol:X"),
        (("diff", "a", "b", "--map", "nonsense"), "REGEX=REPL"),
        (("diff", "a", "b", "--min-sparsity", "95"), "0<=x<=1"),
        (("diff", "a", "b", "--config", "missing.yaml"), "missing.yaml"),
    ],
)
def test_a_mistake_is_exit_2_with_one_clear_message(tmp_path, args, message) -> None:
    done = run(*args, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_corrupt_checkpoint_is_exit_2_and_names_the_file(tmp_path, pair) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "model.safetensors").write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    done = run("diff", pair[0], bad)
    assert done.returncode == 2
    assert f"{bad}/model.safetensors: header claims {1 << 60} bytes" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_uncaught_error_is_exit_2_and_not_the_exit_of_a_failed_gate(pair) -> None:
    code = (
        "import sys, sparsity_audit.api.diff as d\n"
        "d.diff = lambda *a, **k: 1 / 0\n"
        f"sys.argv = ['sparsity-audit', 'diff', {str(pair[0])!r}, {str(pair[1])!r}]\n"
        "from sparsity_audit.cli.main import entry_point\nentry_point()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "ZeroDivisionError" in done.stderr
    assert "bug in sparsity-audit" in done.stderr


def test_an_unwritable_output_is_exit_2(tmp_path, pair) -> None:
    (tmp_path / "file").write_text("")
    done = run("diff", *pair, "-o", tmp_path / "file" / "out")
    assert done.returncode == 2
    assert "Not a directory" in done.stderr
    assert "Traceback" not in done.stderr


def test_sigint_is_exit_130_without_a_traceback_and_leaves_no_report(tmp_path, pair) -> None:
    code = (
        "import signal, sys, time\nfrom sparsity_audit import seams\n"
        # A suite that was started in the background ignores SIGINT, and its children inherit that.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def observer(point):\n    print(point, flush=True)\n    time.sleep(5)\n"
        "seams.observer = observer\n"
        f"sys.argv = ['x', 'diff', {str(pair[0])!r}, {str(pair[1])!r}, '-o', {str(tmp_path / 'out')!r}]\n"
        "from sparsity_audit.cli.main import entry_point\nentry_point()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "interrupted" in errors
    assert not (tmp_path / "out" / "report.json").exists()


def test_a_config_file_has_the_keys_of_the_flags_and_flags_win(tmp_path, pair) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("format: json\ncriterion: [ulp:1]\nmin-sparsity: 0.99\n")
    done = run("diff", *pair, "--config", config, "--min-sparsity", "0.1")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["mask_criterion"] == "ulp:1"
    config.write_text("critereon: value\n")
    done = run("diff", *pair, "--config", config)
    assert done.returncode == 2
    assert "unknown keys critereon" in done.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("min-sparsity: [1]", "min-sparsity: [1] is not a value of this flag"),
        ("criterion: {atol: 1}", "expected: a text or a number, or a list of them"),
        ("criterion: [[value]]", "['value'] is not a value of this flag"),
        ("overwrite: 3", "overwrite: 3 is neither on nor off"),
        ("output: true", "output: True is not a value of this flag"),
        ("config: other.yaml", "unknown keys config"),
        ("workers: many", "'many' is not a valid integer"),
    ],
)
def test_a_config_value_of_the_wrong_type_is_one_message_that_names_its_key(tmp_path, pair, text, message):
    (tmp_path / "run.yaml").write_text(text)
    done = run("diff", *pair, "--config", tmp_path / "run.yaml")
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_config_file_may_give_one_value_without_a_list_and_leave_keys_empty(tmp_path, pair) -> None:
    (tmp_path / "run.yaml").write_text(
        "criterion: ulp:1\nlr: 1.0e-6\nweights-dtype: bf16\nmask:\noutput: 5\n"
    )
    done = run("diff", *pair, "--config", tmp_path / "run.yaml", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["mask_criterion"] == "ulp:1"
    assert (tmp_path / "5" / "report.json").exists()


@pytest.mark.parametrize("option", ["-o", "--mask"])
def test_an_empty_output_path_is_refused_and_nothing_is_written(tmp_path, pair, option) -> None:
    done = run("diff", *pair, option, "", cwd=tmp_path)
    assert done.returncode == 2
    assert "the path is empty" in done.stderr
    assert not list(tmp_path.iterdir())


def test_an_empty_reference_is_refused_and_not_the_working_directory(pair) -> None:
    done = run("diff", "", pair[1], cwd=pair[0])
    assert done.returncode == 2
    assert "the text is empty" in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.parametrize("command", ["diff", "help"])
def test_a_terminal_without_unicode_shows_the_table_all_the_same(pair, encoding, command) -> None:
    args = ("diff", *pair) if command == "diff" else ("diff", "--help")
    done = run(*args, PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def test_a_dry_run_prints_the_plan_and_reads_nothing(pair, tmp_path) -> None:
    done = run("diff", *pair, "--dry-run", "-o", tmp_path / "out")
    assert "would compare 148,928 entries in 30 pairs: 595,712 bytes" in done.stdout
    assert not (tmp_path / "out").exists()


def _modules_after(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stdout.split()}


HEAVY = {
    "torch",
    "transformers",
    "numba",
    "matplotlib",
    "jinja2",
    "rich",
    "pydantic",
    "huggingface_hub",
    "yaml",
}


def test_help_imports_nothing_heavy() -> None:
    code = (
        "from click.testing import CliRunner\nfrom sparsity_audit.cli.main import cli\n"
        "for args in (['--help'], ['diff', '--help'], ['mask', '--help'], ['inspect', '--help']):\n"
        "    assert CliRunner().invoke(cli, args).exit_code == 0\nsys.stdout.flush()"
    )
    assert not _modules_after(code) & (HEAVY | {"numpy", "safetensors"})


def test_a_diff_on_the_cpu_never_imports_torch_or_the_hub_library(addition) -> None:
    base, tuned = str(addition / "base-fp32"), str(addition / "sft-fp32")
    for kernel in ("numpy", "numba"):
        call = f"diff({base!r}, {tuned!r}, kernel={kernel!r}, device='cpu')"
        code = f"import sparsity_audit\nsparsity_audit.{call}"
        assert not _modules_after(code) & {
            "torch",
            "transformers",
            "huggingface_hub",
            "rich",
            "matplotlib",
            "jinja2",
        }


def test_reports_are_imported_only_after_the_pass(addition) -> None:
    base, tuned = str(addition / "base-bf16"), str(addition / "sft-bf16")
    code = (
        "import sparsity_audit\nfrom sparsity_audit import seams\n"
        "def observer(point):\n"
        "    if point == 'pass finished':\n        sys.exit('\\n'.join(sys.modules))\n"
        "seams.observer = observer\n"
        "try:\n"
        f"    sparsity_audit.diff({base!r}, {tuned!r}, kernel='numpy')\n"
        "except SystemExit as stop:\n"
        "    seen = {m.partition('.')[0] for m in str(stop.code).split()}\n"
        f"    assert not seen & {HEAVY!r}, seen & {HEAVY!r}\n"
        "else:\n    raise AssertionError('never finished')"
    )
    _modules_after(code)


def test_the_version_is_the_packages() -> None:
    assert sparsity_audit.__version__ in run("--version").stdout


@pytest.mark.parametrize(
    "command",
    [
        ("diff",),
        ("inspect",),
        ("mask", "info"),
        ("mask", "ops"),
        ("mask", "convert"),
        ("mask", "random"),
        ("mask", "export"),
    ],
)
def test_every_help_ends_with_an_example_of_that_command(command) -> None:
    text = run(*command, "--help").stdout
    assert f"sparsity-audit {' '.join(command)} " in text.partition("Options:")[0].partition("Example")[2]


def test_rates_as_served_stand_beside_the_very_tensors_they_belong_to(write_checkpoint) -> None:
    import numpy as np

    base = {"wide": np.full((8, 8), 0.5, dtype=np.float32), "half": np.full((8, 8), 0.5, dtype=np.float16)}
    tuned = {name: values * values.dtype.type(1.5) for name, values in base.items()}
    both = run("diff", write_checkpoint("base", base), write_checkpoint("tuned", tuned))
    assert both.returncode == 0, both.stderr
    assert "changed as served" not in both.stdout, "one served table holds the tensors of both dtypes"
    alone = [write_checkpoint(f"{side}-wide", {"wide": c["wide"]}) for side, c in (("b", base), ("t", tuned))]
    assert "changed as served" in run("diff", *alone).stdout
