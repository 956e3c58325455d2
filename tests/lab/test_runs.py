"""A run's folder: complete, repeatable, resumable after a kill at any named point, closed to other runs."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from lab_runs import ADDITION, base, config

from sparsity_audit.errors import OutputError
from sparsity_audit.lab.config import TrainConfig
from sparsity_audit.lab.folder import load_model
from sparsity_audit.lab.runs import TrainResult, run_training

RUN = config("grpo", steps=4, minibatches=2)


def _run(settings: TrainConfig, output: Path, **changes) -> tuple[TrainResult, list[str]]:
    notes: list[str] = []
    options = {
        "update_mask": None,
        "overwrite": False,
        "state_every": 2,
        "on_step": lambda _metrics: None,
        **changes,
    }
    return run_training(settings, base(), output, on_note=notes.append, **options), notes


def _files(folder: Path) -> dict[str, bytes]:
    """All bytes that are a function of the config."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("run.json", "timings.jsonl")
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "whole"
    _run(RUN, output)
    return output


def test_a_run_leaves_checkpoints_final_weights_tables_config_and_result(finished) -> None:
    assert sorted(path.name for path in finished.iterdir()) == [
        *("checkpoint-0", "checkpoint-1", "checkpoint-2", "checkpoint-4", "final"),
        *("metrics.csv", "metrics.jsonl", "result.json", "run.json", "timings.jsonl"),
    ]
    record = json.loads((finished / "run.json").read_bytes())
    assert record["config"] == json.loads(json.dumps(RUN.to_json()))
    assert record["precision"]["matmuls"] == "fp32"
    assert "emulated" in record["precision"]["weights"]
    assert {"argv", "host", "versions"} <= record["environment"].keys()


def test_the_first_checkpoint_is_the_base_and_the_last_one_is_final(finished) -> None:
    first, reference = load_model(finished / "checkpoint-0"), base()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), reference.parameters(), strict=True))
    weights = [(finished / name / "model.safetensors").read_bytes() for name in ("checkpoint-4", "final")]
    assert weights[0] == weights[1]
    assert weights[0] != (finished / "checkpoint-2" / "model.safetensors").read_bytes()


def test_both_tables_have_the_same_steps_and_figures(finished) -> None:
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    rows = list(csv.DictReader((finished / "metrics.csv").open()))
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [float(row["entropy"]) for row in rows] == [line["entropy"] for line in lines]
    assert [float(row["share_S"]) for row in rows] == [line["format_shares"]["S"] for line in lines]
    timings = [json.loads(line) for line in (finished / "timings.jsonl").read_text().splitlines()]
    assert all(timing["tokens_per_s"] > 0 for timing in timings)


def test_the_result_compares_policy_and_base_on_the_same_problems(finished) -> None:
    result, notes = _run(RUN, finished)
    assert "finished; nothing was done" in notes[0]
    assert result.steps == 4
    assert result.updates <= 8
    assert result.accuracy.num_prompts == result.base_accuracy.num_prompts == 256
    assert result.warnings == ()


def test_a_rerun_gives_the_same_bytes(finished, tmp_path) -> None:
    again, _ = _run(RUN, tmp_path / "again")
    assert _files(tmp_path / "again") == _files(finished)
    assert again == _run(RUN, tmp_path / "again")[0]


KILLED = """
    import os, signal, sys
    sys.path.insert(0, {tests!r})
    from pathlib import Path
    from lab_runs import base, config
    from sparsity_audit import seams
    from sparsity_audit.lab.runs import run_training
    left = {count}
    def observer(point):
        global left
        if point == {point!r}:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
    seams.observer = observer
    ignore = lambda _: None
    options = dict(update_mask=None, overwrite=False, state_every=2, on_step=ignore, on_note=ignore)
    run_training(config({algorithm!r}, **{changes!r}), base(), Path({output!r}), **options)
"""


def _kill(output: Path, *, point: str, count: int, algorithm: str, changes: dict) -> None:
    code = KILLED.format(
        tests=str(ADDITION.parents[1]),
        point=point,
        count=count,
        algorithm=algorithm,
        changes=changes,
        output=str(output),
    )
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False, timeout=120)
    assert killed.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("point", "count", "resumed_after"),
    [
        ("step recorded", 1, None),
        ("checkpoint written", 2, None),
        ("training state written", 1, 2),
        ("step recorded", 4, 2),
        ("training state written", 2, 4),
        ("final weights written", 1, 4),
        ("metrics table written", 1, 4),
    ],
)
def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(finished, tmp_path, point, count, resumed_after):
    output = tmp_path / "out"
    _kill(output, point=point, count=count, algorithm="grpo", changes={"steps": 4, "minibatches": 2})
    assert not (output / "result.json").exists()
    _, notes = _run(RUN, output)
    expected = [] if resumed_after is None else [f"going on after step {resumed_after} of 4"]
    assert notes == expected
    assert _files(output) == _files(finished)


@pytest.mark.parametrize("algorithm", ["expert-iteration", "ppo", "prime"])
def test_runs_with_more_state_than_a_policy_survive_a_kill_too(tmp_path, algorithm) -> None:
    changes = {"steps": 4, "rounds": 1} if algorithm == "expert-iteration" else {"steps": 4}
    _run(config(algorithm, **changes), tmp_path / "whole")
    _kill(tmp_path / "out", point="step recorded", count=3, algorithm=algorithm, changes=changes)
    _, notes = _run(config(algorithm, **changes), tmp_path / "out")
    assert notes[0] == "going on after step 2 of 4"
    assert _files(tmp_path / "out") == _files(tmp_path / "whole")


def test_a_learning_rate_that_ruins_the_policy_is_said_and_the_run_ends_in_a_result(tmp_path) -> None:
    result, notes = _run(config("grpo", steps=8, lr=0.03), tmp_path / "out")
    assert any("accuracy" in note and "the run collapsed" in note for note in notes)
    assert result.accuracy.value < result.base_accuracy.value / 2
    assert sorted(f"warning: {text}" for text in result.warnings) == sorted(notes)


# What is refused


def test_the_folder_of_another_run_is_refused_naming_the_difference(finished, tmp_path) -> None:
    before = _files(finished)
    with pytest.raises(OutputError, match=r"holds another run: lr 0.0003 → 0.001(.|\n)*--overwrite"):
        _run(config("grpo", steps=4, minibatches=2, lr=1e-3), finished)
    assert _files(finished) == before


def test_overwriting_removes_the_run_and_nothing_else(tmp_path) -> None:
    output = tmp_path / "out"
    _run(config("grpo", steps=4), output)
    (output / "notes.txt").write_text("mine")
    settings = config("grpo", steps=1, seed=1)
    _run(settings, output, overwrite=True)
    assert (output / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-0", "checkpoint-1"]
    (output / "notes.txt").unlink()
    _run(settings, tmp_path / "fresh")
    assert _files(output) == _files(tmp_path / "fresh")


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_no_run_is_refused_even_when_overwriting(tmp_path, overwrite) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(OutputError, match="not empty, and not the folder of a training run"):
        _run(RUN, tmp_path, overwrite=overwrite)
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        _run(RUN, tmp_path / "file")


def test_a_second_run_cannot_write_at_the_same_time(tmp_path) -> None:
    output = tmp_path / "out"

    def try_again(_metrics) -> None:
        with pytest.raises(OutputError, match="another run is writing here"):
            _run(RUN, output)

    _run(config("grpo", steps=1), output, on_step=try_again)


def test_a_damaged_state_is_refused_with_the_remedy(tmp_path) -> None:
    output = tmp_path / "out"
    changes = {"steps": 4}
    _kill(output, point="training state written", count=1, algorithm="grpo", changes=changes)
    (output / "state.safetensors").write_bytes(b"not a state")
    with pytest.raises(OutputError, match=r"state.safetensors: cannot be read(.|\n)*--overwrite"):
        _run(config("grpo", **changes), output)
