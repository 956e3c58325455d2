"""`diff` as a function: what it writes, how it resumes, what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from sparsity_audit import Expectations, diff, plan_diff
from sparsity_audit.errors import AlignmentError, OutputError, UsageError
from sparsity_audit.report.schema import from_json, json_schema, to_json

SAME = {"stats": "full", "criteria": ["value"]}


def _files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file() and p.name != "run.json"}


@pytest.fixture
def pair(addition, monkeypatch) -> tuple[str, str]:
    """A pair named relatively, so that reports hold no path of this machine."""
    monkeypatch.chdir(addition)
    return "base-fp32", "grpo-fp32-seed0"


@pytest.mark.parametrize("criterion", ["value", "atol:1e-3", "top:3%"])
@pytest.mark.parametrize("view", ["native", "served"])
def test_every_output_byte_is_the_same_for_any_workers_units_and_kernel(
    tmp_path, pair, criterion, view
) -> None:
    runs = [
        {"workers": 1, "kernel": "numpy"},
        {"workers": 3, "kernel": "numpy", "unit_bytes": 2000},
        {"workers": 2, "kernel": "numba", "unit_bytes": 30_000},
    ]
    found = []
    for number, options in enumerate(runs):
        out, mask = tmp_path / f"out{number}", tmp_path / f"mask{number}"
        diff(*pair, output=out, mask=mask, criteria=[criterion], view=view, **options)
        found.append((_files(out), _files(mask)))
    assert found[0] == found[1] == found[2]
    assert "report.json" in found[0][0]
    assert "mask.safetensors.index.json" in found[0][1]


KILLED_RUN = """
    import os, signal, sys
    from sparsity_audit import seams, diff
    left = {count}
    def observer(point):
        global left
        if point == {point!r}:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
    seams.observer = observer
    options = dict(output={out!r}, mask={mask!r}, unit_bytes=20000, workers={workers}, kernel="numpy")
    diff({base!r}, {tuned!r}, **options)
"""


@pytest.mark.parametrize(
    ("point", "count", "resumable"),
    [
        ("unit compared", 1, False),
        ("unit compared", 7, True),
        ("unit journaled", 1, True),
        ("unit journaled", 20, True),
        ("pass finished", 1, True),
        ("mask finished", 1, True),
        ("file written", 2, True),
    ],
)
def test_a_killed_run_resumes_and_ends_in_the_same_bytes(tmp_path, pair, point, count, resumable) -> None:
    out, mask = tmp_path / "out", tmp_path / "mask"
    diff(*pair, output=tmp_path / "whole", mask=tmp_path / "whole-mask", unit_bytes=20000)
    code = KILLED_RUN.format(
        count=count, point=point, base=pair[0], tuned=pair[1], out=str(out), mask=str(mask), workers=2
    )
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert not (out / "report.json").exists()
    notes: list[str] = []
    diff(*pair, output=out, mask=mask, unit_bytes=20000, on_note=notes.append)
    assert any("resuming" in note for note in notes) == resumable
    assert _files(out) == _files(tmp_path / "whole")
    assert _files(mask) == _files(tmp_path / "whole-mask")


def test_an_unfinished_run_with_other_options_is_refused_not_mixed(tmp_path, pair) -> None:
    code = KILLED_RUN.format(
        count=3,
        point="unit journaled",
        base=pair[0],
        tuned=pair[1],
        out=str(tmp_path / "out"),
        mask=None,
        workers=1,
    ).replace("mask='None'", "mask=None")
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False, timeout=120)
    with pytest.raises(OutputError, match="other inputs or options"):
        diff(*pair, output=tmp_path / "out", unit_bytes=10_000)
    diff(*pair, output=tmp_path / "out", unit_bytes=10_000, overwrite=True)


def test_a_finished_output_is_not_overwritten_unless_asked(tmp_path, pair) -> None:
    diff(*pair, output=tmp_path / "out")
    before = _files(tmp_path / "out")
    with pytest.raises(OutputError, match="--overwrite"):
        diff("base-fp32", "sft-fp32", output=tmp_path / "out")
    assert _files(tmp_path / "out") == before
    diff("base-fp32", "sft-fp32", output=tmp_path / "out", overwrite=True)
    assert _files(tmp_path / "out") != before


def test_overwriting_leaves_files_that_are_not_ours(tmp_path, pair) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    diff(*pair, output=tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_files_of_somebody_else_are_not_replaced_unless_asked(tmp_path, pair) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "summary.md").write_text("mine")
    with pytest.raises(OutputError, match=r"holds summary\.md, which a run would replace"):
        diff(*pair, output=tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["summary.md"]
    assert (tmp_path / "out" / "summary.md").read_text() == "mine"
    diff(*pair, output=tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "summary.md").read_text() != "mine"


@pytest.mark.parametrize("side", ["base", "tuned"])
def test_results_are_not_written_into_a_checkpoint_that_is_compared(write_checkpoint, side) -> None:
    pair = _frozen_tower(write_checkpoint)
    folder = dict(zip(("base", "tuned"), pair, strict=True))[side]
    before = sorted(folder.iterdir())
    with pytest.raises(OutputError, match="holds a checkpoint that is compared"):
        diff(*pair, output=f"{folder}/../{folder.name}", overwrite=True)
    assert sorted(folder.iterdir()) == before


def test_a_run_that_goes_on_keeps_its_output_and_its_mask(tmp_path, pair) -> None:
    refused = []

    def start_a_second_run(_done: int, _total: int) -> None:
        for overwrite in (False, True):
            with pytest.raises(OutputError, match="another run is writing here") as error:
                diff(*pair, output=tmp_path / "out", mask=tmp_path / "mask", overwrite=overwrite)
            refused.append(error.value)

    diff(*pair, output=tmp_path / "out", mask=tmp_path / "mask", on_progress=start_a_second_run)
    diff(*pair, output=tmp_path / "alone", mask=tmp_path / "alone-mask")
    assert refused
    assert _files(tmp_path / "out") == _files(tmp_path / "alone")
    assert _files(tmp_path / "mask") == _files(tmp_path / "alone-mask")


def test_an_unfinished_mask_with_another_criterion_is_refused_not_dropped(tmp_path, pair) -> None:
    out, mask = tmp_path / "out", tmp_path / "mask"
    code = KILLED_RUN.format(
        count=9, point="unit journaled", base=pair[0], tuned=pair[1], out=str(out), mask=str(mask), workers=1
    )
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False, timeout=120)
    for criterion in ("atol:1e-3", "top:1%"):
        with pytest.raises(OutputError, match="other inputs or options"):
            diff(*pair, output=out, mask=mask, unit_bytes=20000, criteria=[criterion])
    notes: list[str] = []
    diff(*pair, output=out, mask=mask, unit_bytes=20000, on_note=notes.append)
    assert any("resuming: 9 " in note for note in notes)


def test_a_mask_directory_with_other_content_is_refused_every_time(tmp_path, pair) -> None:
    (tmp_path / "mask").mkdir()
    (tmp_path / "mask" / "notes.txt").write_text("mine")
    for _ in range(2):
        with pytest.raises(OutputError, match="not empty"):
            diff(*pair, output=tmp_path / "out", mask=tmp_path / "mask")
    assert [p.name for p in (tmp_path / "mask").iterdir()] == ["notes.txt"]


def test_the_working_directory_can_be_the_mask_directory(tmp_path, pair, monkeypatch) -> None:
    sides = [Path(side).absolute() for side in pair]
    (tmp_path / "mask").mkdir()
    monkeypatch.chdir(tmp_path / "mask")
    diff(*sides, mask=".")
    assert {p.name for p in tmp_path.iterdir()} == {"mask"}
    assert "mask.safetensors.index.json" in {p.name for p in Path.cwd().iterdir()}


@pytest.mark.parametrize("lr", [float("nan"), float("inf"), 0.0, -1e-6])
def test_a_learning_rate_that_is_no_positive_number_is_refused(pair, lr) -> None:
    with pytest.raises(UsageError, match="learning rate"):
        diff(*pair, lr=lr, weights_dtype="bf16")


def test_the_report_reads_back_equal_and_fits_its_published_schema(tmp_path, pair) -> None:
    report = diff(*pair, output=tmp_path / "out", criteria=["top:1%"])
    data = (tmp_path / "out" / "report.json").read_bytes()
    assert from_json(data) == report
    assert to_json(from_json(data)) == data
    jsonschema.validate(json.loads(data), json_schema())

    def refuse(text: str) -> None:
        raise AssertionError(text)

    json.loads(data, parse_constant=refuse)  # NaN and infinities would call it
    assert str(tmp_path).encode() not in data


def test_without_an_output_nothing_is_written(tmp_path, pair) -> None:
    before = sorted(Path.cwd().rglob("*"))
    diff(*pair)
    assert sorted(Path.cwd().rglob("*")) == before


def test_identical_paths_are_refused(addition) -> None:
    with pytest.raises(UsageError, match="same checkpoint"):
        diff(addition / "base-bf16", f"{addition}/../addition/base-bf16")


def test_a_directory_and_its_own_file_are_the_same_checkpoint(addition) -> None:
    with pytest.raises(UsageError, match="same checkpoint"):
        diff(addition / "base-bf16", addition / "base-bf16" / "model.safetensors")


def test_checkpoints_without_a_common_tensor_are_refused(write_checkpoint) -> None:
    one = write_checkpoint("one", {"a": np.zeros((2, 2), dtype=np.float32)})
    two = write_checkpoint("two", {"b": np.zeros((2, 3), dtype=np.float32)})
    with pytest.raises(AlignmentError, match="--map"):
        diff(one, two)


def test_a_learning_rate_without_the_dtype_of_the_weights_is_refused(pair) -> None:
    with pytest.raises(UsageError, match="--weights-dtype"):
        diff(*pair, lr=1e-4)


def test_a_dry_run_reads_headers_only_and_accounts_for_everything(pair, monkeypatch) -> None:
    monkeypatch.setattr("sparsity_audit.api.diff.run_plan", lambda *_a, **_k: pytest.fail("data was read"))
    summary = plan_diff(*pair)
    assert (summary.num_entries, summary.num_bytes) == (148_928, 2 * 4 * 148_928)
    assert json.loads(json.dumps(summary.to_json()))["accounts"]["base"]["total"] == 148_928


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_is_one_error_and_the_run_can_go_on_elsewhere(tmp_path, pair) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], check=False, capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip("this machine does not allow mounting a file system; covered by the next test")
    try:
        with pytest.raises(OutputError, match="No space left"):
            diff(*pair, output=small / "out", mask=small / "mask")
        assert not (small / "out" / "report.json").exists()
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_write_that_fails_for_lack_of_space_is_one_output_error(tmp_path, pair, monkeypatch) -> None:
    import errno

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("sparsity_audit.passes.journal.os.write", full)
    with pytest.raises(OutputError, match="No space left"):
        diff(*pair, output=tmp_path / "out")
    assert not (tmp_path / "out" / "report.json").exists()


def _frozen_tower(write_checkpoint) -> tuple[Path, Path]:
    ones = np.ones((8, 8), dtype=np.float32)
    base = {"tower.a": ones, "tower.b": ones, "head": ones}
    tuned = {"tower.a": ones, "tower.b": ones.copy(), "head": ones * 2}
    tuned["tower.b"][3, 3] = np.nextafter(np.float32(1), np.float32(2))
    return write_checkpoint("base", base), write_checkpoint("tuned", tuned)


def test_a_frozen_tower_that_moved_by_one_bit_fails_the_gate_and_is_named(write_checkpoint) -> None:
    report = diff(*_frozen_tower(write_checkpoint), expectations=Expectations(frozen=("tower.*",)))
    (gate,) = report.gates
    assert not gate.passed
    assert "tower.b (1 of 64 entries changed)" in gate.detail
    assert "tower.a" not in gate.detail


def test_tensors_a_trainer_left_at_their_initial_value_fail_the_gate(write_checkpoint) -> None:
    report = diff(*_frozen_tower(write_checkpoint), expectations=Expectations(changed=("*",)))
    assert [gate.passed for gate in report.gates] == [False]
    assert "tower.a" in report.gates[0].detail


def test_gates_are_bitwise_whatever_the_criterion(write_checkpoint) -> None:
    expectations = Expectations(frozen=("tower.*",))
    report = diff(*_frozen_tower(write_checkpoint), criteria=["atol:1e-5"], expectations=expectations)
    assert not report.gates[0].passed


def test_a_pattern_that_matches_nothing_is_an_error_not_a_passed_gate(write_checkpoint) -> None:
    with pytest.raises(UsageError, match="matches no tensor"):
        diff(*_frozen_tower(write_checkpoint), expectations=Expectations(frozen=("vision.*",)))


def test_sparsity_gates_use_criterion_and_view(write_checkpoint) -> None:
    pair = _frozen_tower(write_checkpoint)  # 65 of 192 changed; by more than 1e-5: 64
    limit = Expectations(min_sparsity=(192 - 64) / 192)
    assert not diff(*pair, expectations=limit).gates[0].passed
    assert diff(*pair, criteria=["atol:1e-5"], expectations=limit).gates[0].passed
    assert not diff(*pair, expectations=Expectations(max_sparsity=0.5)).gates[0].passed


def test_a_leftover_fails_the_gate_that_forbids_it(write_checkpoint) -> None:
    ones = np.ones((2, 2), dtype=np.float32)
    base = write_checkpoint("base", {"a": ones, "b": ones})
    tuned = write_checkpoint("tuned", {"a": ones})
    report = diff(base, tuned, expectations=Expectations(no_leftover=True, frozen=("b",)))
    assert [gate.passed for gate in report.gates] == [False, False]
    assert report.accounts.base.leftover == 4
