"""The map over units: the same results from threads and from an engine that pickles all it is given."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
from fake_engine import FakeEngine, shipped

from sparsity_audit import diff, mask_export, mask_ops, overlap, series
from sparsity_audit.errors import ChangedInputError, MissingExtraError, UsageError
from sparsity_audit.passes.engine import map_units
from sparsity_audit.passes.ray_errors import explained, lost

RUNS = ["grpo-bf16-seed0", "grpo-bf16-seed1", "shuffled-reward-bf16"]


def _files(folder: Path) -> dict[str, bytes]:
    found = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: data for name, data in found.items() if name != "run.json"}


@pytest.fixture
def engine(monkeypatch) -> list[FakeEngine]:
    """`--engine ray` without Ray."""
    monkeypatch.setattr("sparsity_audit.passes.ray_engine.RayEngine", FakeEngine)
    monkeypatch.setattr(FakeEngine, "made", [])
    return FakeEngine.made


@pytest.fixture
def runs(addition, monkeypatch) -> list[str]:
    monkeypatch.chdir(addition)
    return list(RUNS)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_every_unit_is_mapped_once_whatever_the_threads(workers) -> None:
    found = dict(map_units(lambda unit: unit * unit, range(50), workers=workers))
    assert found == {unit: unit * unit for unit in range(50)}


@pytest.mark.parametrize("workers", [1, 3])
def test_an_error_of_a_unit_ends_the_map(workers) -> None:
    done = []

    def work(unit: int) -> int:
        if unit == 5:
            raise ChangedInputError("unit 5", "is not what it was")
        done.append(unit)
        return unit

    with pytest.raises(ChangedInputError, match="unit 5"):
        list(map_units(work, range(1000), workers=workers))
    assert len(done) < 20


def test_a_map_that_is_closed_runs_no_further_units() -> None:
    done: list[int] = []
    with closing(map_units(done.append, range(1000), workers=2)) as results:
        next(results)
    assert len(done) < 20


@pytest.mark.parametrize("criterion", ["atol:1e-4", "top:2%", "top:2%:tensor"])
@pytest.mark.parametrize("kernel", ["numpy", "numba"])
def test_an_engine_writes_the_bytes_of_threads(tmp_path, runs, engine, criterion, kernel) -> None:
    asked = {"criteria": [criterion], "view": "served", "structure": "on", "unit_bytes": 20_000}
    asked |= {"kernel": kernel}
    pair = "base-fp32", "grpo-fp32-seed0"
    for name, how in (("threads", {"workers": 2}), ("ray", {"engine": "ray"})):
        diff(*pair, output=tmp_path / name, mask=tmp_path / f"{name}-mask", **asked, **how)
    assert _files(tmp_path / "ray") == _files(tmp_path / "threads")
    assert _files(tmp_path / "ray-mask") == _files(tmp_path / "threads-mask")
    (made,) = engine
    assert made.num_units > 40
    assert not made.gpus


def test_an_overlap_on_an_engine_is_the_overlap(tmp_path, runs, engine) -> None:
    asked = {"base": "base-bf16", "nulls": "all"}
    for name, how in (("threads", {"workers": 1}), ("ray", {"engine": "ray"})):
        overlap(runs, output=tmp_path / name, **asked, **how)
    assert _files(tmp_path / "ray") == _files(tmp_path / "threads")
    assert sum(made.num_maps for made in engine) >= len(runs) + 3  # masks, counts, finer strata, Δ


def test_an_overlap_of_wide_weights_on_an_engine_is_the_overlap(
    tmp_path, addition, monkeypatch, engine
) -> None:
    monkeypatch.chdir(addition)
    runs, asked = ["grpo-fp32-seed0", "sft-fp32"], {"base": "base-fp32", "view": "served", "nulls": "all"}
    for name, how in (("threads", {"workers": 1}), ("ray", {"engine": "ray"})):
        overlap(runs, output=tmp_path / name, **asked, **how)
    assert _files(tmp_path / "ray") == _files(tmp_path / "threads")


def test_a_series_on_an_engine_is_the_series(tmp_path, runs, engine) -> None:
    for name, how in (("threads", {"workers": 1}), ("ray", {"engine": "ray"})):
        series("base-bf16", runs, output=tmp_path / name, **how)
    assert _files(tmp_path / "ray") == _files(tmp_path / "threads")
    assert engine[0].num_units > 10


@pytest.mark.parametrize("encoding", ["packed", "bool", "indices"])
def test_mask_operations_on_an_engine_give_the_same_masks(tmp_path, runs, engine, encoding) -> None:
    masks = [tmp_path / run for run in runs[:2]]
    for run, mask in zip(runs, masks, strict=False):
        mask_export("base-bf16", run, mask, encoding=encoding, engine="ray")
    mask_export("base-bf16", runs[0], tmp_path / "here", encoding=encoding)
    assert _files(masks[0]) == _files(tmp_path / "here")
    for op in ("and", "xor"):
        mask_ops(op, masks, tmp_path / op)
        mask_ops(op, masks, tmp_path / f"{op}-ray", engine="ray")
        assert _files(tmp_path / f"{op}-ray") == _files(tmp_path / op)


def test_threads_are_refused_where_masks_are_combined_in_one(tmp_path, runs) -> None:
    with pytest.raises(UsageError, match="one thread"):
        mask_ops("and", ["a", "b"], tmp_path / "out", workers=4)


def test_a_unit_that_fails_on_an_engine_leaves_a_run_that_goes_on(
    tmp_path, addition, runs, engine, monkeypatch
) -> None:
    asked = {"output": tmp_path / "out", "unit_bytes": 20_000}
    monkeypatch.setattr(FakeEngine, "map", _failing_after(7, FakeEngine.map))
    with pytest.raises(ChangedInputError, match="the eighth"):
        diff("base-bf16", runs[0], engine="ray", **asked)
    monkeypatch.undo()
    notes: list[str] = []
    monkeypatch.chdir(addition)
    diff("base-bf16", runs[0], **asked, on_note=notes.append)
    assert any(note.startswith("resuming: 7 of") for note in notes)


def _failing_after(count: int, real):
    def mapped(self, work, units, *, ahead):
        for number, found in enumerate(real(self, work, units, ahead=ahead)):
            if number == count:
                raise ChangedInputError("the eighth", "is not what it was")
            yield found

    return mapped


@pytest.mark.parametrize("device", ["cuda:1", "mps"])
def test_a_cluster_gives_tasks_a_device_and_takes_no_number(runs, device) -> None:
    with pytest.raises(UsageError, match="expected: cpu or cuda"):
        diff("base-bf16", runs[0], engine="ray", device=device)


def test_an_unknown_engine_is_refused(runs) -> None:
    with pytest.raises(UsageError, match="threads or ray"):
        diff("base-bf16", runs[0], engine="dask")


def test_without_ray_the_error_names_the_extra(runs, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'sparsity-audit\[ray\]'"):
        diff("base-bf16", runs[0], engine="ray")


class _Unauthenticated(Exception):
    pass


_Unauthenticated.__name__ = "AuthenticationError"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.9.0"),
            "pip install ray==",
        ),
        (_Unauthenticated("Token authentication is enabled"), "RAY_AUTH_TOKEN_PATH"),
        (RuntimeError("InvalidAuthToken: Unauthenticated: wrong token"), "RAY_AUTH_MODE=token"),
        (ConnectionError("Could not find any running Ray instance"), "check RAY_ADDRESS"),
        (ValueError("port out of range"), "cannot be used"),
    ],
)
def test_what_ray_says_becomes_what_to_set(error, said) -> None:
    text = str(explained(error, "the Ray cluster 10.0.0.1:6379"))
    assert said in text
    assert text.startswith("the Ray cluster 10.0.0.1:6379")
    assert len(text.splitlines()) <= 3


def test_a_task_that_loses_its_worker_too_often_is_named_with_its_units() -> None:
    class OutOfMemoryError(Exception):
        pass

    text = str(lost(OutOfMemoryError("killed"), ["a", "b"], tries=4))
    assert "'a' … work unit 'b': lost its worker 4 times" in text
    assert "more memory" in text


def test_an_error_of_a_worker_arrives_whole() -> None:
    error = ChangedInputError("file", "ends early", expected="more", remedy="wait")
    assert str(shipped(error)) == str(error)
    assert isinstance(shipped(error), ChangedInputError)
