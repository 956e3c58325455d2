"""`recovery` end to end: verdict, warnings, files, refusals."""

from __future__ import annotations

import csv
import json

import jsonschema
import pytest
from click.testing import CliRunner

from sparsity_audit import diff, prune, recovery
from sparsity_audit.cli.main import cli
from sparsity_audit.errors import OutputError, UsageError
from sparsity_audit.report.recovery import recovery_json_schema

SCORES = {
    "base": {"accuracy": 0.36, "n": 512},
    "full": {"accuracy": 0.75, "n": 512},
    "sub": {"accuracy": 0.74, "n": 512},
    "random": {"accuracy": 0.48, "n": 512},
}


@pytest.fixture
def runs(addition, tmp_path):
    """Base, full, and as retrained run the full run's largest movements, with a random part as control."""
    base, full = addition / "base-bf16", addition / "grpo-bf16-seed0"
    for keep, name in (("top:5%", "sub"), ("random:5%", "random")):
        prune(base, full, output=tmp_path / name, keep=[keep])
    return base, full, tmp_path / "sub", tmp_path / "random"


def test_agreement_inside_and_outside_stands_beside_that_of_the_base(runs) -> None:
    base, full, sub, random = runs
    report = recovery(base, full, sub, controls={"random": random})
    assert [run.label for run in report.runs] == ["base", "sub", "random"]
    changed = diff(base, full, stats="counts").headlines[1].changed
    assert report.inside == changed == 92_308
    untouched, kept, control = report.runs
    inside = {run.label: run.parts.inside.shares["bitwise"] for run in report.runs}
    # A pruned update is the full run where it was kept, and the base in all other changed entries.
    assert inside == {"base": 0.0, "sub": 7446 / changed, "random": control.parts.inside.shares["bitwise"]}
    assert {run.parts.outside.shares["bitwise"] for run in report.runs} == {1.0}
    assert kept.frozen.moved == 0
    assert kept.frozen.entries == report.compared - changed
    assert untouched.parts.overall.relative_l2 == 1.0


def test_scores_give_a_verdict_with_an_interval_beside_every_control(runs) -> None:
    base, full, sub, random = runs
    report = recovery(base, full, sub, controls={"random": random}, metrics=SCORES)
    assert report.verdict.startswith("the mask recovers 97 % of the gain [95 %:")
    assert "random 31 % of the gain [95 %:" in report.verdict
    share = report.runs[1].score.share
    assert share.interval.low < share.value < share.interval.high


def test_what_must_not_be_concluded_is_said(runs, addition) -> None:
    base, full, *_ = runs
    report = recovery(base, full, addition / "grpo-bf16-seed1")
    text = " ".join(report.warnings)
    assert "no task metrics" in text
    assert "is not frozen: 2,672 entries outside of its mask differ from the base" in text
    assert "by construction" in text
    assert report.runs[1].frozen.first.tensor == "lm_head.weight"


def test_output_follows_its_schema_and_is_not_overwritten_unasked(runs, tmp_path) -> None:
    base, full, sub, random = runs
    out = tmp_path / "out"
    report = recovery(base, full, sub, controls={"random": random}, metrics=SCORES, output=out, figures=True)
    record = json.loads((out / "recovery.json").read_bytes())
    jsonschema.validate(record, recovery_json_schema())
    assert (record["format"], record["version"]) == ("sparsity-audit/recovery", 1)
    assert report.verdict in (out / "summary.md").read_text()
    assert r"\toprule" in (out / "tables" / "recovery.tex").read_text()
    assert len(list(csv.DictReader((out / "recovery.csv").open()))) > 3
    assert (out / "figures" / "recovery.pdf").stat().st_size > 1000
    with pytest.raises(OutputError, match="would replace"):
        recovery(base, full, sub, output=out)


def test_scores_of_other_runs_and_one_checkpoint_twice_are_refused(runs) -> None:
    base, full, sub, _ = runs
    with pytest.raises(UsageError, match="is no run"):
        recovery(base, full, sub, metrics=SCORES)
    with pytest.raises(UsageError, match="the same checkpoint"):
        recovery(base, full, full)


def test_the_command_prints_the_verdict_first(runs, tmp_path) -> None:
    base, full, sub, random = map(str, runs)
    (tmp_path / "scores.json").write_text(json.dumps(SCORES))
    options = ["--control", f"random={random}", "--metrics", str(tmp_path / "scores.json")]
    result = CliRunner().invoke(cli, ["recovery", base, full, sub, *options], catch_exceptions=False)
    assert result.exit_code == 0
    assert result.stdout.startswith("the mask recovers 97 % of the gain")
    record = CliRunner().invoke(cli, ["recovery", base, full, sub, "--json"], catch_exceptions=False)
    assert json.loads(record.stdout)["inside"] == 92_308
    wrong = CliRunner().invoke(cli, ["recovery", base, full, sub, "--control", "random"])
    assert wrong.exit_code == 2
    assert "NAME=PATH" in wrong.stderr
