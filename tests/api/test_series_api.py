"""`series` end to end: order of steps, refusals, files, what is said."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import jsonschema
import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsity_audit import series
from sparsity_audit.api.series_steps import saved_steps
from sparsity_audit.errors import AlignmentError, OutputError, UsageError
from sparsity_audit.report.series import series_json_schema
from sparsity_audit.report.series_figures import render_series_figures


def _model(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = folder.glob("*.safetensors")
    return load_file(path)


def _save(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture
def run(addition, tmp_path) -> Path:
    """A real update that arrives layer by layer, and whose layer 0 is taken back at the end."""
    base, tuned = _model(addition / "base-bf16"), _model(addition / "grpo-bf16-lr1e-4-seed0")
    folder = tmp_path / "run"

    def mixed(layers: set[str]) -> dict[str, torch.Tensor]:
        return {
            name: tuned[name] if any(f"layers.{n}." in name for n in layers) else base[name] for name in base
        }

    for step, layers in ((90, {"0"}), (200, {"0", "1"}), (1000, {"1", "2"})):
        _save(folder / f"checkpoint-{step}", mixed(layers))
    return folder


def test_a_folder_is_taken_by_number_and_counted_once(addition, run) -> None:
    report = series(addition / "base-bf16", [run])
    assert [step.label for step in report.steps] == ["90", "200", "1000"]
    by_layer = {part.key: part.trajectory for part in report.by_layer}
    assert by_layer["0"].final == 0
    assert by_layer["0"].cancelled == by_layer["0"].steps[0].changed > 0
    assert by_layer["2"].cancelled == 0
    overall = report.overall
    assert overall.final == sum(by_layer[n].final for n in "12")
    assert overall.never + overall.cancelled + overall.final == overall.entries == 148_928
    assert overall.steps[1].died == 0
    assert overall.steps[2].died == overall.cancelled
    assert overall.steps[0].coverage == 0
    assert overall.steps[2].coverage == 1
    for parts in (report.by_module, report.by_tensor):
        assert sum(part.trajectory.final for part in parts) == overall.final


def test_steps_given_one_by_one_keep_their_order_and_a_note_says_when_numbers_do_not_ascend(
    addition, run
) -> None:
    steps = [run / "checkpoint-1000", run / "checkpoint-90"]
    report = series(addition / "base-bf16", steps)
    assert [step.number for step in report.steps] == [1000, 90]
    assert any("do not ascend" in note for note in report.notes)


def test_weights_beside_numbered_folders_are_named_and_not_taken(addition, run) -> None:
    _save(run / "final", _model(run / "checkpoint-1000"))
    report = series(addition / "base-bf16", [run])
    assert len(report.steps) == 3
    assert any("final, which has weights too" in note for note in report.notes)
    longer = series(addition / "base-bf16", [run, run / "final"])
    assert longer.steps[-1].label == "final"
    assert longer.overall.steps[-1].lags[0].moved == 0
    assert any("no code differs from the saved step before at: final" in note for note in longer.notes)


def test_numbers_are_read_in_the_names_trainers_give(tmp_path) -> None:
    for name in ("global_step_20", "global_step_3", "step-7", "logs", "checkpoint-best"):
        (tmp_path / name).mkdir()
    assert [step.label for step in saved_steps([tmp_path])] == ["3", "7", "20"]
    (tmp_path / "step_3").mkdir()
    with pytest.raises(UsageError, match="both step 3"):
        saved_steps([tmp_path])


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"criterion": "top:1%"}, UsageError, "as large at every step"),
        ({"lags": [0]}, UsageError, "1 or more"),
        ({"steps": []}, UsageError, "no saved step"),
        ({"twice": True}, UsageError, "given twice"),
    ],
)
def test_what_makes_no_sense_is_refused(addition, run, options, error, text) -> None:
    steps = options.pop("steps", [run])
    steps = [*steps, run / "checkpoint-90"] if options.pop("twice", False) else steps
    with pytest.raises(error, match=text):
        series(addition / "base-bf16", steps, **options)


def test_checkpoints_of_another_model_are_refused(addition, tmp_path) -> None:
    other = _save(tmp_path / "other", {"elsewhere": torch.ones(3)})
    with pytest.raises(AlignmentError, match="no tensor is compared in every step"):
        series(addition / "base-bf16", [other])


def test_output_holds_record_tables_and_figures_and_is_not_overwritten_unasked(
    addition, run, tmp_path
) -> None:
    out = tmp_path / "out"
    report = series(addition / "base-bf16", [run], output=out, figures=True)
    record = json.loads((out / "series.json").read_bytes())
    jsonschema.validate(record, series_json_schema())
    assert (record["format"], record["version"]) == ("sparsity-audit/series", 1)
    assert record["overall"]["cancelled"] == report.overall.cancelled
    rows = list(csv.DictReader((out / "series.csv").open()))
    assert len(rows) == 3 * (1 + 3 + len(report.by_module) + len(report.by_tensor))
    assert int(rows[2]["changed"]) == report.overall.final
    assert rows[0]["moved_2"] == ""
    assert "as fine as the saved steps" in (out / "summary.md").read_text()
    assert r"\toprule" in (out / "tables" / "series.tex").read_text()
    for name in ("trajectory", "steps", "coverage"):
        assert (out / "figures" / f"{name}.pdf").stat().st_size > 1000
        assert "never changed" in (out / "figures" / f"{name}.txt").read_text()
    with pytest.raises(OutputError, match="would replace"):
        series(addition / "base-bf16", [run], output=out)
    with pytest.raises(OutputError, match="holds a run"):
        series(addition / "base-bf16", [run / "checkpoint-90"], output=run / "checkpoint-90")


def test_figures_are_drawn_alike_twice(addition, run) -> None:
    report = series(addition / "base-bf16", [run])
    assert render_series_figures(report) == render_series_figures(report)


def test_workers_do_not_matter(addition, run) -> None:
    reports = [series(addition / "base-bf16", [run], workers=workers) for workers in (1, 3)]
    assert reports[0] == reports[1]
