"""Recovery end to end: real runs, runs whose truth is known by construction, refusals, files."""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from addition_runs import load, values
from coded_checkpoint import write
from jsonschema import Draft202012Validator

import sparsity_audit as sa
from sparsity_audit.api import recovery_inputs
from sparsity_audit.checkpoint.opening import open_checkpoint
from sparsity_audit.errors import AlignmentError, MaskError, OutputError, UsageError
from sparsity_audit.report.recovery import recovery_json_schema, recovery_to_json
from sparsity_audit.report.recovery_files import FILE_NAMES

BASE, FULL, SEED1 = "base-bf16", "grpo-bf16-lr1e-4-seed0", "grpo-bf16-lr1e-4-seed1"
SCORES = {
    "metric": "pass@1",
    "base": {"accuracy": 0.363, "n": 512},
    "full": {"accuracy": 0.754, "n": 512},
    "sub": {"correct": 386, "n": 512},
    "random": {"accuracy": 0.48, "n": 512},
}


@pytest.fixture(scope="module")
def pruned(addition, tmp_path_factory) -> dict[str, Path]:
    """Runs made of the full one: exactly its entries inside a mask, and the complement; and the mask."""
    folder = tmp_path_factory.mktemp("pruned")
    base, full = addition / BASE, addition / FULL
    sa.mask_export(base, full, folder / "mask", criterion="top:5%")
    keep = [f"mask:{folder / 'mask'}"]
    sa.prune(base, full, folder / "sub", keep=keep)
    sa.prune(base, full, folder / "rest", keep=keep, complement=True)
    return {"base": base, "full": full, **{name: folder / name for name in ("mask", "sub", "rest")}}


def _report(pruned, **options):
    return sa.recovery(pruned["base"], pruned["full"], pruned["sub"], **options)


def test_the_base_agrees_with_a_full_run_as_often_as_the_frozen_answers_say(addition) -> None:
    report = sa.recovery(addition / BASE, addition / FULL, addition / SEED1)
    base, sub = report.runs
    assert round(base.parts.overall.shares["value"], 4) == 0.8155
    assert round(base.parts.overall.shares["atol:1e-5"], 3) == 0.816
    assert base.parts.inside.shares["value"] == 0.0
    assert base.parts.outside.shares["value"] == 1.0
    assert base.parts.overall.relative_l2 == 1.0
    codes = [np.concatenate([a[n].reshape(-1) for n in sorted(a)]) for a in map(load, (BASE, FULL, SEED1))]
    w, x, y = (values(c).astype(np.float64) for c in codes)
    inside = w != x
    assert report.inside == inside.sum()
    assert sub.parts.inside.equal["bitwise"] == (codes[1] == codes[2])[inside].sum()
    assert sub.parts.outside.equal["atol:1e-4"] == (np.abs(y - x) <= 1e-4)[~inside].sum()
    assert (
        sub.parts.inside.equal["rel:1e-3"]
        == (np.abs(y - x) <= 1e-3 * np.maximum(np.abs(x), np.abs(y)))[inside].sum()
    )
    # Sums of 1.5e5 products in another order.
    found = np.linalg.norm(y - x) / np.linalg.norm(x - w)
    assert abs(sub.parts.overall.relative_l2 - found) < 1e-12
    cosine = (
        (x - w)[inside] @ (y - w)[inside] / np.linalg.norm((x - w)[inside]) / np.linalg.norm((y - w)[inside])
    )
    assert abs(sub.parts.inside.cosine - cosine) < 1e-12
    assert sub.frozen is not None
    assert sub.frozen.moved == ((codes[0] != codes[2]) & ~inside).sum() == 1255
    assert not any("not frozen" in warning for warning in report.warnings)
    assert any("sub moved 1,255 entries that full left alone" in note for note in report.notes)


def test_a_run_with_the_full_values_inside_its_mask_and_the_base_elsewhere(pruned) -> None:
    report = _report(
        pruned,
        mask=pruned["mask"],
        controls={"rest": pruned["rest"]},
        control_masks={"rest": pruned["mask"]},
    )
    _, sub, rest = report.runs
    assert (report.mask, report.criterion) == (str(pruned["mask"]), "top:5%")
    assert report.inside == sa.mask_info(pruned["mask"]).selected == 7446
    assert set(sub.parts.inside.shares.values()) == {1.0}
    assert (sub.parts.inside.cosine, sub.parts.inside.relative_l2) == (pytest.approx(1.0, abs=1e-12), 0.0)
    assert sub.parts.outside.equal == report.runs[0].parts.outside.equal
    assert sub.frozen is not None
    assert (sub.frozen.moved, sub.frozen.first, sub.frozen.entries) == (0, None, 148928 - 7446)
    assert rest.parts.inside.shares["bitwise"] == 0.0
    assert rest.parts.outside.shares["bitwise"] == 1.0
    assert rest.frozen is not None
    assert rest.frozen.moved > 10_000
    assert rest.frozen.first is not None
    assert any(warning.startswith("rest is not frozen") for warning in report.warnings)


def test_parts_of_the_model_add_up(pruned) -> None:
    report = _report(pruned)
    for groups in (report.sub.by_module, report.sub.by_tensor):
        for part in ("inside", "outside", "overall"):
            whole = getattr(report.sub.parts, part)
            found = [getattr(group.parts, part) for group in groups]
            assert sum(f.entries for f in found) == whole.entries
            assert sum(f.equal["bitwise"] for f in found) == whole.equal["bitwise"]
    assert [group.key for group in report.sub.by_layer] == ["0", "1", "2"]


def test_scores_give_the_verdict_beside_every_control(pruned) -> None:
    report = _report(pruned, controls={"random": pruned["rest"]}, metrics=SCORES)
    assert report.verdict.startswith(
        "the mask recovers 100 % of the gain [95 %: 87 to 115 %]; random 30 % of the gain [95 %: 16 to 43 %]"
    )
    assert report.sub.score is not None
    assert report.runs[2].score is not None
    assert report.runs[2].score.lead is not None
    assert report.runs[2].score.lead.low > 0.2
    assert not any("not shown to be worse" in warning for warning in report.warnings)


def test_seeds_and_precision_are_read_from_a_labs_run(pruned, tmp_path) -> None:
    def run(name: str, source: Path, seed: int, precision: str) -> Path:
        shutil.copytree(source, tmp_path / name / "final")
        config = {"config": {"seed": seed, "precision": precision}}
        (tmp_path / name / "run.json").write_text(json.dumps(config))
        return tmp_path / name / "final"

    full = run("full", pruned["full"], 0, "bf16")
    for seed, precision, text in (
        (0, "bf16", "same seed and weights rounded to bf16"),
        (0, "fp32", "full and retrained run have one seed"),
        (1, "bf16", None),
    ):
        sub = run(f"sub-{seed}-{precision}", pruned["sub"], seed, precision)
        report = sa.recovery(pruned["base"], full, sub)
        assert (report.full_seed, report.sub.seed, report.sub.precision) == (0, seed, precision)
        found = [warning for warning in report.warnings if "seed" in warning]
        assert len(found) == (text is not None)
        assert text is None or found[0].startswith(text)
    assert recovery_inputs.run_facts(open_checkpoint(pruned["base"])).seed is None


def test_another_programs_run_json_tells_nothing(pruned, tmp_path) -> None:
    for number, text in enumerate(('{"argv": []}', "[1]", "no json")):
        shutil.copytree(pruned["sub"], tmp_path / str(number))
        (tmp_path / str(number) / "run.json").write_text(text)
        assert recovery_inputs.run_facts(open_checkpoint(tmp_path / str(number))).seed is None


def test_files_are_complete_equal_and_described_by_the_schema(pruned, tmp_path) -> None:
    options = {"controls": {"random": pruned["rest"]}, "metrics": SCORES, "figures": True}
    report = _report(pruned, output=tmp_path / "one", workers=1, **options)
    _report(pruned, output=tmp_path / "two", workers=3, **options)
    files = {str(p.relative_to(tmp_path / "one")): p for p in (tmp_path / "one").rglob("*") if p.is_file()}
    assert set(files) == set(FILE_NAMES)
    for name, path in files.items():
        assert path.read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    record = json.loads(files["recovery.json"].read_bytes())
    assert record == json.loads(recovery_to_json(report))
    Draft202012Validator(recovery_json_schema()).validate(record)
    assert (record["format"], record["version"]) == ("sparsity-audit/recovery", 1)
    rows = list(csv.DictReader(io.StringIO(files["recovery.csv"].read_text())))
    inside = next(r for r in rows if (r["run"], r["level"], r["part"]) == ("sub", "overall", "inside"))
    assert int(inside["equal[bitwise]"]) == report.sub.parts.inside.equal["bitwise"]
    assert float(inside["cosine"]) == report.sub.parts.inside.cosine
    summary = files["summary.md"].read_text()
    for text in (report.verdict, "by construction", "| random |", "pass@1", "down_proj", "0.754"):
        assert text in summary
    assert r"\begin{tabular}{lrrrrrrrrrr}" in files["tables/recovery.tex"].read_text()
    svg = files["figures/recovery.svg"].read_text()
    assert "share of the full run's gain" in svg
    assert "rel:1e-3" in svg
    assert report.verdict in files["figures/recovery.txt"].read_text()


def test_without_scores_the_figure_is_of_agreement_alone(pruned, tmp_path) -> None:
    _report(pruned, output=tmp_path / "out", figures=True)
    assert "gain" not in (tmp_path / "out" / "figures" / "recovery.svg").read_text()
    assert "no task metrics" in (tmp_path / "out" / "summary.md").read_text()
    with pytest.raises(OutputError, match="which this run would replace"):
        _report(pruned, output=tmp_path / "out")
    _report(pruned, output=tmp_path / "out", overwrite=True)


def test_empty_masks_and_masks_of_everything_have_no_undefined_number(tmp_path) -> None:
    def side(name: str, value: float) -> Path:
        codes = np.full((2, 8), value, dtype=np.float32).view(np.uint32)
        return write(tmp_path / name, {"w": ("F32", codes)})

    base, full, same, sub = side("base", 1), side("full", 2), side("same", 1), side("sub", 3)
    empty = sa.recovery(base, same, sub, output=tmp_path / "empty", figures=True)
    assert (empty.inside, empty.density, empty.verdict) == (0, 0.0, "the mask is empty")
    assert empty.sub.parts.overall.relative_l2 is None
    assert empty.sub.frozen is not None
    assert empty.sub.frozen.moved == 16
    everything = sa.recovery(base, full, sub, output=tmp_path / "all", figures=True)
    assert everything.sub.parts.overall.relative_l2 == 1.0
    assert everything.sub.parts.outside.shares["bitwise"] is None


def test_what_does_not_belong_together_is_refused(addition, pruned, tmp_path, write_checkpoint) -> None:
    base, full, sub = (pruned[name] for name in ("base", "full", "sub"))
    sa.mask_export(addition / "sft-bf16", full, tmp_path / "other")
    with pytest.raises(MaskError, match="made from a base with the fingerprint"):
        sa.recovery(base, full, sub, mask=tmp_path / "other")
    assert sa.recovery(base, full, sub, mask=tmp_path / "other", force=True).mask == str(tmp_path / "other")
    with pytest.raises(MaskError, match="made from a base with the fingerprint"):
        sa.recovery(base, full, sub, controls={"x": pruned["rest"]}, control_masks={"x": tmp_path / "other"})
    with pytest.raises(UsageError, match="same checkpoint"):
        sa.recovery(base, full, full)
    with pytest.raises(UsageError, match="same checkpoint"):
        sa.recovery(base, full, sub, controls={"again": sub})
    with pytest.raises(AlignmentError, match="no tensor that all of them hold"):
        sa.recovery(base, full, write_checkpoint("alien", {"z": np.ones((2, 2), dtype=np.float32)}))
    with pytest.raises(UsageError, match="is no name for a control"):
        sa.recovery(base, full, sub, controls={"full": pruned["rest"]})
    with pytest.raises(UsageError, match="there is no such control"):
        sa.recovery(base, full, sub, control_masks={"x": pruned["mask"]})
    for folder in (sub, pruned["mask"]):
        with pytest.raises(OutputError, match="holds a run that is compared"):
            sa.recovery(base, full, sub, mask=pruned["mask"], output=folder)


@pytest.mark.parametrize(
    ("metrics", "text"),
    [
        ({"base": {"accuracy": 0.3, "n": 10}}, "has no scores of full, sub"),
        (SCORES | {"stranger": {"accuracy": 0.3, "n": 10}}, "'stranger'.*is no run"),
        (SCORES | {"sub": {"accuracy": 1.3, "n": 10}}, "an accuracy of 1.3"),
        (SCORES | {"sub": {"accuracy": 0.3}}, '"n": 512'),
        (SCORES | {"sub": {"accuracy": 0.3, "correct": 3, "n": 10}}, "either accuracy or correct"),
        (SCORES | {"sub": {"accuracy": True, "n": 10}}, "a finite number"),
        (SCORES | {"sub": {"accuracy": 0.3, "n": 0}}, "trials > 0"),
        (SCORES | {"sub": 0.3}, '"n": 512'),
        (SCORES | {"metric": 3}, "a line of text"),
    ],
)
def test_scores_that_say_nothing_clear_are_refused(metrics, text) -> None:
    with pytest.raises(UsageError, match=text):
        recovery_inputs.read_metrics(metrics, labels=("base", "full", "sub", "random"))


def test_scores_come_from_a_file_and_may_have_a_standard_error(tmp_path) -> None:
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(SCORES | {"random": {"accuracy": 0.5, "n": 2048, "standard_error": 0.025}}))
    found = recovery_inputs.read_metrics(path, labels=("base", "full", "sub", "random"))
    assert found.metric == "pass@1"
    assert found.accuracies["random"].trials == pytest.approx(400)
    assert found.accuracies["sub"].value == 386 / 512
    for text in ("[]", "{"):
        path.write_text(text)
        with pytest.raises(UsageError, match="JSON"):
            recovery_inputs.read_metrics(path, labels=("base", "full", "sub"))


def test_torch_is_not_imported(pruned) -> None:
    code = f"""
import sys, sparsity_audit as sa
sides = {[str(pruned[name]) for name in ("base", "full", "sub")]!r}
sa.recovery(*sides, mask={str(pruned["mask"])!r})
assert not {{"torch", "transformers", "matplotlib", "rich"}} & sys.modules.keys(), sorted(sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
