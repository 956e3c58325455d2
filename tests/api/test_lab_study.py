"""The smoke study: its numbers, verdicts that follow from them, and going on after a kill."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
from study_runs import smoke_study

from sparsity_audit import lab_study
from sparsity_audit.api.study_plan import longest_first, study_plan
from sparsity_audit.errors import OutputError, UsageError
from sparsity_audit.report.study import StudyReport, study_json_schema
from sparsity_audit.report.study_claims import study_claims

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> tuple[StudyReport, Path]:
    return smoke_study(tmp_path_factory)


@pytest.fixture
def report(study) -> StudyReport:
    return study[0]


def _verdicts(report: StudyReport) -> dict[str, str]:
    return {claim.key: claim.verdict for claim in report.claims}


def test_true_rewards_teach_and_shuffled_ones_do_not(report) -> None:
    gains = {run.name: run.gain for run in report.facts.runs}
    assert min(gains["grpo-fp32-seed0"], gains["grpo-fp32-seed1"]) > 0.08
    assert gains["shuffled-fp32-seed2"] < 0.08
    assert _verdicts(report)["learning"] == "reproduces"


def test_sparsity_is_the_half_ulp_law_in_bf16_and_nothing_in_fp32(report) -> None:
    for run in report.facts.runs:
        if run.precision == "fp32":
            assert run.sparsity < 0.02
            assert run.half_ulp is None
        else:
            assert run.half_ulp is not None
            assert run.half_ulp[0] <= run.sparsity <= run.half_ulp[2]
    assert _verdicts(report)["sparsity"] == "is explained by rounding"


def test_masks_cannot_tell_the_control_but_movements_can(report) -> None:
    seeds = report.facts.overlap("value", "grpo-bf16-seed0", "grpo-bf16-seed1")
    control = report.facts.overlap("value", "grpo-bf16-seed0", "shuffled-bf16-seed2")
    assert seeds is not None
    assert control is not None
    assert abs(seeds.jaccard - control.jaccard) < 0.05
    assert seeds.jaccard > 5 * seeds.chance("uniform").jaccard
    assert seeds.chance("magnitude").excess_share < 0.3
    assert seeds.cosine > control.cosine + 0.03


def test_after_one_step_the_mask_is_nearly_the_final_one(report) -> None:
    first = {part.run: part.points[0] for part in report.facts.series}
    assert {point.step for point in first.values()} == {1}
    assert min(point.coverage for point in first.values()) > 0.95


def test_the_largest_movements_are_shared_between_seeds_alone(report) -> None:
    seeds = report.facts.overlap("top:1%", "grpo-fp32-seed0", "grpo-fp32-seed1")
    control = report.facts.overlap("top:1%", "grpo-fp32-seed0", "shuffled-fp32-seed2")
    assert seeds.jaccard > 4 * control.jaccard
    assert seeds.jaccard > 5 * seeds.chance("per-tensor").jaccard


def test_the_largest_movements_carry_more_of_the_gain_than_random_ones(report) -> None:
    (pruned,) = report.facts.prunings
    points = {point.keep: point for point in pruned.points}
    assert points["top:5%"].accuracy.value > points["random:5%"].accuracy.value + 0.03
    assert points["top:5%"].fraction == pytest.approx(0.05, abs=1e-4)


def test_the_critical_positions_hold_the_format(report) -> None:
    assert report.facts.critical is not None
    assert 0 in report.facts.critical.critical
    assert _verdicts(report)["critical"] == "reproduces"


def test_what_a_smoke_study_leaves_out_is_said(report) -> None:
    verdicts = _verdicts(report)
    assert (verdicts["algorithms"], verdicts["retraining"]) == ("not measured", "not measured")


def test_verdicts_follow_from_the_numbers(report) -> None:
    """Change a number and the verdict changes: nothing is written by hand."""

    def verdict(key: str, facts) -> str:
        return next(claim.verdict for claim in study_claims(facts) if claim.key == key)

    facts = report.facts
    sparse = tuple(replace(r, sparsity=0.9) if r.precision == "fp32" else r for r in facts.runs)
    assert verdict("sparsity", replace(facts, runs=sparse)) == "reproduces"
    dense = tuple(replace(r, sparsity=0.1) for r in facts.runs)
    assert verdict("sparsity", replace(facts, runs=dense)) == "does not reproduce"
    idle = tuple(replace(r, accuracy=r.base_accuracy) for r in facts.runs)
    assert verdict("learning", replace(facts, runs=idle)) == "does not reproduce"
    strict = replace(facts.goals, rounding_excess=-1.0)
    assert verdict("overlap", replace(facts, goals=strict)) == "reproduces"
    late = tuple(
        replace(part, points=tuple(replace(p, coverage=0.3) for p in part.points)) for part in facts.series
    )
    assert verdict("first-step", replace(facts, series=late)) == "reproduces"
    most = tuple(
        replace(part, points=tuple(replace(p, coverage=0.9) for p in part.points)) for part in facts.series
    )
    assert verdict("first-step", replace(facts, series=most)) == "does not reproduce"
    alike = replace(facts.goals, seed_lift=1e9)
    assert verdict("largest", replace(facts, goals=alike)) == "does not reproduce"


def test_the_folder_holds_the_page_the_record_and_every_figure(study) -> None:
    report, folder = study
    stored = json.loads((folder / "study.json").read_bytes())
    jsonschema.validate(stored, study_json_schema())
    assert (stored["format"], stored["version"], stored["size"]) == ("sparsity-audit/lab-study", 1, "smoke")
    assert {claim["key"]: claim["verdict"] for claim in stored["claims"]} == _verdicts(report)
    keys = {
        "learning",
        "format",
        "critical",
        "tokens",
        "sparsity",
        "overlap",
        "cosines",
        "largest",
        "first-step",
    }
    drawn = {path.name for path in (folder / "figures").iterdir()}
    assert drawn == {f"{key}.{s}" for key in (*keys, "pruning") for s in ("pdf", "svg", "png", "txt")}
    page = (folder / "index.html").read_text()
    assert page.count("<svg ") == len(keys) + 1
    for claim in report.claims:
        assert f'id="{claim.key}"' in page
    assert "fitted to what short runs give" in page, "the page says what was changed after looking"


def test_a_finished_study_is_not_repeated_and_ends_in_the_same_bytes(study) -> None:
    _, folder = study
    before = {name: (folder / name).read_bytes() for name in ("index.html", "study.json")}
    changed = {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*.safetensors")}
    done = []
    lab_study(folder, smoke=True, processes=1, on_job=lambda name, *_: done.append(name))
    assert done == [job.name for job in longest_first(study_plan(smoke=True).jobs)]
    cpu_s = json.loads((folder / "run.json").read_bytes())["cpu_s_by_job"]
    assert cpu_s.keys() == set(done)
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert {path: path.stat().st_mtime_ns for path in changed} == changed


def test_a_killed_study_leaves_a_folder_that_goes_on(tmp_path) -> None:
    code = (
        "import sys, sparsity_audit as sa\n"
        "sa.lab_study(sys.argv[1], smoke=True, processes=1, on_job=lambda *_: None)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out")], start_new_session=True)
    metrics = tmp_path / "out" / "runs" / "grpo-fp32-seed0" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 2):
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert (tmp_path / "out" / "study.plan.json").exists()
    done = []

    def stop(name: str, *_: int) -> None:
        done.append(name)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lab_study(tmp_path / "out", smoke=True, processes=1, on_job=stop)
    assert done == ["grpo-fp32-seed0"]
    assert metrics.read_bytes().count(b"\n") == 30


def test_an_error_of_a_worker_reaches_the_caller_whole() -> None:
    error = OutputError("out", "is a file", expected="a directory", remedy="choose another -o")
    copied = pickle.loads(pickle.dumps(error))
    assert type(copied) is OutputError
    assert str(copied) == str(error)
    assert (copied.subject, copied.remedy) == ("out", "choose another -o")


def test_a_folder_of_something_else_is_refused(tmp_path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(OutputError, match="not a study"):
        lab_study(tmp_path / "mine", smoke=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        lab_study(tmp_path / "file", smoke=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "study.plan.json").write_text('{\n "size": "study"\n}\n')
    with pytest.raises(OutputError, match="another size"):
        lab_study(tmp_path / "full", smoke=True)
    with pytest.raises(UsageError, match="at least 1"):
        lab_study(tmp_path / "out", processes=0)


@pytest.mark.parametrize("smoke", [True, False])
def test_every_job_comes_after_those_it_waits_for(smoke) -> None:
    seen: set[str] = set()
    for job in longest_first(study_plan(smoke=smoke).jobs):
        assert seen.issuperset(job.after), job.name
        assert job.name not in seen
        seen.add(job.name)


def test_what_has_the_longest_way_before_it_starts_first() -> None:
    order = [job.name for job in longest_first(study_plan(smoke=False).jobs)]
    assert order[0] == "grpo-fp32-seed0", "masks, masked runs and their judges wait for it"
    assert order.index("masks") < order.index("sft-fp32-seed0") < order.index("judge-grpo-fp32-seed0")
    assert order[-1].startswith(("series", "judge", "overlap"))


def test_a_plan_does_not_depend_on_how_strings_are_hashed() -> None:
    """Sets of names once gave another order of runs, and so another question, in every process."""
    code = "from sparsity_audit.api.study_plan import study_plan; print(study_plan(smoke=False).jobs)"
    plans = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "11", "12")
    }
    assert len(plans) == 1
