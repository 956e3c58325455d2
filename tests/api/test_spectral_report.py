"""`--spectral` from the command line and from Python: cost first, then a record that reads back equal."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from sparsity_audit.api.diff import diff, plan_diff
from sparsity_audit.cli.main import cli
from sparsity_audit.errors import UsageError
from sparsity_audit.report.schema import from_json, to_json


def test_the_report_holds_the_spectra_and_reads_back_equal(addition) -> None:
    notes: list[str] = []
    report = diff(
        addition / "base-bf16",
        addition / "grpo-bf16-seed0",
        spectral=("*layers.1.self_attn.?_proj*", "*norm*"),
        on_note=notes.append,
    )
    assert any(note.startswith("--spectral: 4 matrices (7 more refused)") for note in notes)
    names = [record.name for record in report.spectral if not record.refused]
    assert names == [f"model.layers.1.self_attn.{part}_proj.weight" for part in "koqv"]
    assert from_json(to_json(report)) == report
    changed = {tensor.name: tensor.summary.native.counts for tensor in report.tensors}
    for record in report.spectral:
        if not record.refused:
            counts = {count.criterion: count.changed for count in changed[record.name]}
            assert record.changed == counts["value"]
            assert record.observed is not None
            assert record.full_rank == 64


def test_the_bytes_do_not_depend_on_workers_or_units(addition) -> None:
    found = {
        to_json(
            diff(
                addition / "base-fp32",
                addition / "grpo-fp32-seed0",
                spectral=("*layers.0*",),
                view="served",
                workers=workers,
                unit_bytes=unit_bytes,
            )
        )
        for workers, unit_bytes in ((1, None), (2, 4096))
    }
    assert len(found) == 1


def test_a_diff_without_the_option_measures_nothing(addition) -> None:
    report = diff(addition / "base-bf16", addition / "grpo-bf16-seed0")
    assert report.spectral == ()


def test_a_pattern_without_a_match_stops_before_anything_is_read(addition) -> None:
    for run in (diff, plan_diff):
        with pytest.raises(UsageError, match="matches no compared tensor"):
            run(addition / "base-bf16", addition / "grpo-bf16-seed0", spectral=("encoder.*",))


def test_a_dry_run_prints_the_cost_and_the_command_both_tables(addition) -> None:
    arguments = ["diff", str(addition / "base-bf16"), str(addition / "grpo-bf16-seed0")]
    arguments += ["--spectral", "model.layers.0.mlp.up_proj.weight"]
    planned = CliRunner().invoke(cli, [*arguments, "--dry-run"])
    assert "--spectral: 1 matrix, each with 3 random references: about" in planned.stdout
    shown = CliRunner().invoke(cli, arguments)
    assert shown.exit_code == 0
    assert "Spectrum of the update, beside its entries in random places" in shown.stdout
    assert "Share of the changed entries (value) in masks made from the base" in shown.stdout
    assert "float64 operations" in shown.stderr


def test_beyond_the_largest_dimension_the_json_says_estimate_and_why(addition) -> None:
    arguments = ["diff", str(addition / "base-bf16"), str(addition / "grpo-bf16-seed0"), "--json"]
    arguments += ["--spectral", "model.layers.0.*up_proj.weight", "--spectral-max-dim", "100"]
    found = CliRunner().invoke(cli, arguments)
    (record,) = json.loads(found.stdout)["spectral"]
    assert max(record["shape"]) > 100
    assert record["is_estimate"]
    assert "--spectral-max-dim 100" in record["estimate_reason"]
    assert record["observed"]["rank_float64"] is None
    assert record["observed"]["stable_rank"] > 1
