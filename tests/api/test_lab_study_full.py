"""The full study: what it plans, what it refuses, and one part of it from end to end in a few seconds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from sparsity_audit import lab_study_full
from sparsity_audit.api.study_full_jobs import do_full_job
from sparsity_audit.api.study_full_plan import RUN_ORDER, cpu_s_of, full_plan, parts_of
from sparsity_audit.api.study_full_sweeps import GRID_CONTROL, PARTS, SWEEPS
from sparsity_audit.cli.main import cli
from sparsity_audit.errors import OutputError, UsageError
from sparsity_audit.lab import runs
from sparsity_audit.report.study_full import FullReport

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> tuple[FullReport, Path]:
    """Part f in small: three steps of every arm, from the shipped base."""
    folder = tmp_path_factory.mktemp("full") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "_HELD_OUT_PROMPTS", 4)
        return lab_study_full(folder, only=["f"], smoke=True, processes=1), folder


# The plan


def test_every_arm_has_two_seeds_and_differs_from_the_others() -> None:
    for sweep in SWEEPS:
        assert len(set(sweep.seeds)) >= 2 or sweep is GRID_CONTROL, sweep.key
        arms = [json.dumps({**sweep.common, **settings}, sort_keys=True) for settings in sweep.arms.values()]
        assert len(set(arms)) == len(arms), sweep.key
        assert sweep.part in PARTS


@pytest.mark.parametrize("smoke", [True, False])
def test_every_job_comes_after_those_it_waits_for_within_its_part(smoke) -> None:
    plan = full_plan(smoke=smoke)
    assert tuple(part.part for part in plan.parts) == RUN_ORDER
    for part in plan.parts:
        seen: set[str] = set()
        for job in part.jobs:
            assert seen.issuperset(job.after), job.name
            assert job.name not in seen
            seen.add(job.name)


def test_a_name_means_one_job_in_all_parts_so_that_a_base_is_made_once() -> None:
    jobs: dict[str, object] = {}
    for part in full_plan(smoke=False).parts:
        for job in part.jobs:
            assert jobs.setdefault(job.name, job) == job
    shared = [name for name in jobs if name.startswith("pretrain-degree-400")]
    assert len(shared) == 2, "parts c and d share it"


def test_the_estimate_counts_updates_sizes_and_pretraining() -> None:
    parts = full_plan(smoke=False).parts
    minutes = sum(part.cpu_s for part in parts) / 60
    assert 60 < minutes < 90
    jobs = {job.name: job for part in parts for job in part.jobs}
    on, off = jobs["sparsity-on-fp32-seed0"], jobs["sparsity-off-fp32-seed0"]
    assert cpu_s_of(off) > 1.3 * cpu_s_of(on)
    assert cpu_s_of(jobs["scale-small-seed0"]) > 3 * cpu_s_of(jobs["scale-tiny-seed0"])
    assert cpu_s_of(jobs["pretrain-degree-700-seed0"]) > 2 * cpu_s_of(jobs["pretrain-degree-250-seed0"])


def test_parts_run_in_one_order_however_they_are_asked_for() -> None:
    assert parts_of(["e", "a"]) == ("a", "e")
    assert parts_of(None) == RUN_ORDER
    assert set(RUN_ORDER) == set(PARTS)
    with pytest.raises(UsageError, match="'z'"):
        parts_of(["a", "z"])
    with pytest.raises(UsageError, match="nothing"):
        parts_of([])


# One part


def test_one_part_is_measured_and_the_others_are_said_to_be_missing(study) -> None:
    report, _ = study
    assert report.facts.parts == ("f",)
    assert {run.arm for run in report.facts.runs} == set(
        next(sweep for sweep in SWEEPS if sweep.key == "divergence").arms
    )
    missing = {claim.part for claim in report.claims if claim.verdict == "not measured"}
    assert missing == set(PARTS) - {"f"}


def test_arms_of_a_seed_begin_alike_and_the_settings_reach_the_runs(study) -> None:
    report, folder = study
    configs = {
        run.arm: json.loads((folder / "runs" / f"divergence-{run.arm}-seed0" / "run.json").read_bytes())
        for run in report.facts.runs
    }
    assert configs["strong-shuffled"]["config"]["divergence_control"] == "shuffled"
    assert configs["strong-negative"]["config"]["divergence_alpha"] == -30.0
    tables = [(folder / "runs" / f"divergence-{arm}-seed0" / "metrics.jsonl").read_text() for arm in configs]
    first = {json.loads(table.partition("\n")[0])["accuracy"] for table in tables}
    assert len(first) == 1, "the first rollouts of a seed are the same in every arm"
    weights = {run.arm: run.weight_mean for run in report.facts.runs if run.seed == 0}
    assert weights["baseline"] is None
    assert weights["strong-normalised"] == pytest.approx(1.0, abs=1e-6)
    assert weights["strong-negative"] < 1 < weights["strong"]


def test_a_command_in_the_record_is_one_that_the_command_line_takes(study) -> None:
    """Parsed up to the base, which is not there."""
    report, _ = study
    for run in report.facts.runs[::4]:
        words = run.command.split()[1:]
        words[words.index("--base") + 1] = "no-such-base"
        found = CliRunner().invoke(cli, words)
        assert "no-such-base" in str(found.exception) + found.output
        assert "No such option" not in found.output


def test_a_second_call_repeats_nothing_and_ends_in_the_same_bytes(study) -> None:
    report, folder = study
    before = {name: (folder / name).read_bytes() for name in ("index.html", "study.json")}
    changed = {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*.safetensors")}
    notes: list[str] = []
    again = lab_study_full(folder, only=["f"], smoke=True, processes=1, on_note=notes.append)
    assert again == report
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert {path: path.stat().st_mtime_ns for path in changed} == changed
    assert "min of CPU (f " in notes[0]


def test_a_result_that_is_gone_is_measured_again_and_is_the_same(study) -> None:
    _, folder = study
    job = next(j for j in full_plan(smoke=True).part("f").jobs if j.kind == "judge")
    path = folder / "measured" / f"{job.name}.json"
    before = path.read_bytes()
    path.unlink()
    do_full_job(folder, job)
    assert path.read_bytes() == before


def test_the_folder_of_a_small_study_is_refused(study, tmp_path) -> None:
    _, folder = study
    with pytest.raises(OutputError, match="another size than 'full'"):
        lab_study_full(folder, only=["f"], processes=1)
    with pytest.raises(UsageError, match="at least 1"):
        lab_study_full(tmp_path / "out", processes=0)


def test_only_without_full_is_refused_on_the_command_line(tmp_path) -> None:
    found = CliRunner().invoke(cli, ["lab", "study", "--only", "a", "-o", str(tmp_path / "out")])
    assert found.exit_code == 2
    assert "--only chooses parts of --full" in found.output
