"""`lab_track` and `lab_critical`: a run's outputs and positions, from its folder, with their files."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import jsonschema
import pytest

from sparsity_audit import lab_critical, lab_evaluate, lab_track, lab_train
from sparsity_audit.errors import CheckpointNotFoundError, CorruptCheckpointError, OutputError, UsageError
from sparsity_audit.lab.saved_run import read_run
from sparsity_audit.report.lab_critical import CRITICAL_FILES
from sparsity_audit.report.lab_track import TRACK_FILES, track_json_schema

BASE = Path(__file__).parents[1] / "data" / "addition" / "base-bf16"
SMALL = {"num_prompts": 12, "num_samples": 2}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("track") / "run"
    lab_train(folder, base=BASE, steps=3, prompts=4, samples=4, lengths=2, precision="fp32", lr=1e-3)
    return folder


@pytest.fixture(scope="module")
def tracked(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tracked") / "out"
    return lab_track(run, **SMALL, output=folder), folder


def test_the_saved_steps_are_judged_as_evaluate_does(run, tracked) -> None:
    track, _ = tracked
    assert [point.step for point in track.points] == [0, 1, 2, 3]
    alone = lab_evaluate(
        run / "checkpoint-2", digits=2, reference=run / "checkpoint-0", betas=track.betas, **SMALL
    )
    assert track.points[2].evaluation == alone


def test_the_first_point_is_the_base_without_any_drift(tracked) -> None:
    track, _ = tracked
    first, last = (track.points[place].evaluation.drift for place in (0, -1))
    assert first is not None
    assert last is not None
    assert first.kl_per_completion == 0.0
    assert last.kl_per_completion > 0.0


def test_the_runs_own_batches_stand_beside(run, tracked) -> None:
    track, _ = tracked
    assert [batch.step for batch in track.batches] == [1, 2, 3]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [batch.shares for batch in track.batches] == [row["format_shares"] for row in rows]


def test_the_table_says_what_the_record_says(tracked) -> None:
    track, folder = tracked
    assert {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} == set(TRACK_FILES)
    with (folder / "track.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [0, 1, 2, 3]
    for row, point in zip(rows, track.points, strict=True):
        assert float(row["accuracy"]) == point.evaluation.accuracy.value
        assert float(row["pass_at_2"]) == point.evaluation.pass_at[2].value
        assert sum(float(row[f"share_{name}"]) for name in ("S", "R", "C", "other")) == pytest.approx(1)
    stored = json.loads((folder / "track.json").read_bytes())
    jsonschema.validate(stored, track_json_schema())
    assert (stored["format"], stored["version"]) == ("sparsity-audit/lab-track", 1)
    assert stored["points"][3]["evaluation"]["accuracy"]["value"] == float(rows[3]["accuracy"])


def test_the_same_call_writes_the_same_bytes(run, tracked, tmp_path) -> None:
    _, folder = tracked
    lab_track(run, **SMALL, output=tmp_path / "again")
    for name in TRACK_FILES:
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes(), name


def test_a_folder_with_a_track_is_refused_and_a_run_is_no_place_for_one(run, tracked) -> None:
    _, folder = tracked
    with pytest.raises(OutputError, match=r"track\.json"):
        lab_track(run, **SMALL, output=folder)
    with pytest.raises(OutputError, match="holds what is read"):
        lab_track(run, **SMALL, output=run)


def test_a_run_that_kept_its_last_weights_is_judged_against_its_base(tmp_path) -> None:
    shutil.copytree(BASE, tmp_path / "base")
    options = {"steps": 1, "prompts": 2, "samples": 2, "lengths": 2, "checkpoints": "last"}
    lab_train(tmp_path / "run", base=tmp_path / "base", **options)
    found = read_run(tmp_path / "run")
    assert found.reference == tmp_path / "base"
    assert [step for step, _ in found.checkpoints] == [1]
    weights = tmp_path / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(CheckpointNotFoundError, match="has other weights now"):
        read_run(tmp_path / "run")


def test_what_is_no_run_is_said(tmp_path) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"no run\.json"):
        lab_track(tmp_path / "none")
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(CorruptCheckpointError, match="cannot be read"):
        lab_track(tmp_path)
    (tmp_path / "run.json").write_text('{"config": {"steps": 4}}')
    with pytest.raises(CheckpointNotFoundError, match="no saved weights yet"):
        lab_track(tmp_path)


def test_numbers_that_cannot_be_are_refused_before_anything_is_read(tmp_path) -> None:
    with pytest.raises(UsageError, match="prompts: 0"):
        lab_track(tmp_path / "none", num_prompts=0)
    with pytest.raises(UsageError, match="betas"):
        lab_track(tmp_path / "none", betas=(0.0,))
    with pytest.raises(UsageError, match="at least 2"):
        lab_critical(BASE, num_prompts=1)
    with pytest.raises(UsageError, match="below 1"):
        lab_critical(BASE, min_drop=1.0)
    with pytest.raises(UsageError, match="'X' is not known"):
        lab_critical(BASE, solution_format="X")


def test_critical_positions_follow_a_run_and_are_written(run, tmp_path) -> None:
    found = lab_critical(BASE, run=run, digits=2, num_prompts=16, output=tmp_path / "out")
    assert [step.step for step in found.steps] == [0, 1, 2, 3]
    folder = tmp_path / "out"
    assert {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} == set(CRITICAL_FILES)
    with (folder / "critical.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(found.positions)
    assert float(rows[0]["right_probability[3]"]) == found.steps[3].by_position[0]
    assert [int(row["critical"]) for row in rows] == [int(p.critical) for p in found.positions]
