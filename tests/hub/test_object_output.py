"""Results for object stores: the bytes of a local run, the marker last, nothing half-claimed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from streaming import QUICK, checkpoint, save

import sparsity_audit
from sparsity_audit import diff, finish_upload, object_output
from sparsity_audit.checkpoint import object_output as module
from sparsity_audit.checkpoint.object_output import ObjectStage, upload_order
from sparsity_audit.cli.main import cli
from sparsity_audit.errors import MissingExtraError, ObjectStoreError, OutputError, UsageError

SIDES = {"base": checkpoint(0), "tuned": checkpoint(1, moved=(0, 2))}
FAST = ["--kernel", "numpy", "--workers", "2", "--structure", "off", "--no-figures"]
RUN = "memory://bucket/run"


class Store:
    """fsspec's own store; what is put there is recorded, and puts can be made to fail."""

    def __init__(self, system: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.system, self.puts, self.fails = system, [], lambda _path: False
        put_file = type(system).put_file

        def recorded(instance, lpath, rpath, **more):
            if self.fails(rpath):
                raise PermissionError("signature of AKIASECRET does not match")
            put_file(instance, lpath, rpath, **more)
            self.puts.append(rpath.removeprefix("/bucket/"))

        monkeypatch.setattr(type(system), "put_file", recorded)

    def names(self, prefix: str = "run") -> set[str]:
        path = f"/bucket/{prefix}"
        found = self.system.find(path) if self.system.exists(path) else []
        return {name.removeprefix(f"{path}/") for name in found}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "_FIRST_WAIT_S", 0.001)
    return tmp_path / "cache" / "sparsity-audit" / "outputs"


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    from fsspec.implementations.memory import MemoryFileSystem

    MemoryFileSystem.store.clear()
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
    yield Store(MemoryFileSystem(), monkeypatch)
    MemoryFileSystem.store.clear()


@pytest.fixture
def pair(tmp_path: Path) -> list[str]:
    return [save(files, tmp_path / side) for side, files in SIDES.items()]


def call(*arguments: str):
    return CliRunner().invoke(cli, [str(a) for a in arguments], standalone_mode=False)


def stages(cache: Path) -> list[Path]:
    return sorted(cache.iterdir()) if cache.exists() else []


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def fill(reference: str, *names: str) -> None:
    with object_output(reference) as folder:
        for name in names:
            (folder / name).write_text("{}")


def fails_at(count: int):
    """True from the `count`-th put on, counted from 0."""
    seen = iter(range(10**6))
    return lambda _path: next(seen) >= count


@pytest.mark.parametrize("of", ["python", "command line"])
def test_the_objects_are_the_files_of_a_local_run_and_the_report_comes_last(store, pair, tmp_path, cache, of):
    diff(*pair, output=tmp_path / "local", mask=tmp_path / "mask", figures=False, **QUICK)
    if of == "python":
        with object_output(RUN) as output, object_output("memory://bucket/mask") as mask:
            diff(*pair, output=output, mask=mask, figures=False, **QUICK)
    else:
        unit = ["--unit-bytes", "700"]
        done = call("diff", *pair, "-o", RUN, "--mask", "memory://bucket/mask", *FAST, *unit)
        assert done.return_value == 0, done.output
        assert f"{RUN}\n" in done.stdout
        assert str(cache) not in done.output
        assert store.puts[-1] == "run/report.json"
    for name, folder in (("run", "local"), ("mask", "mask")):
        expected = files_of(tmp_path / folder)
        assert store.names(name) == set(expected)
        found = {key: store.system.cat_file(f"/bucket/{name}/{key}") for key in expected}
        for record in (found, expected):
            record.pop("run.json", None)
        assert found == expected
    assert [n for n in store.puts if n.startswith("run/")][-1] == "run/report.json"
    assert [n for n in store.puts if n.startswith("mask/")][-1] == "mask/mask.safetensors.index.json"
    assert stages(cache) == []


def test_what_marks_a_result_as_finished_is_uploaded_last():
    assert upload_order(["report.json", "run.json", "a.csv", "figures/x.pdf", "axis.safetensors"])[-1] == (
        "report.json"
    )
    assert upload_order(["model.safetensors", "config.json"]) == ["config.json", "model.safetensors"]
    names = ["model.safetensors.index.json", "model-2.safetensors", "config.json"]
    assert upload_order(names)[-1] == "model.safetensors.index.json"
    assert upload_order(["patch.json", "values.safetensors", "files/config.json"])[-1] == "patch.json"
    deep = upload_order(["pairs.json", "a/report.json", "a/z.csv", "pairs.csv"])
    assert deep == ["a/z.csv", "pairs.csv", "a/report.json", "pairs.json"]


def test_an_upload_that_fails_leaves_no_marker_and_the_same_command_makes_nothing_again(
    store, pair, cache, monkeypatch
):
    store.fails = fails_at(3)
    arguments = ("diff", *pair, "-o", RUN, *FAST, "--min-sparsity", "1")
    first = call(*arguments)
    assert isinstance(first.exception, ObjectStoreError)
    assert "the store forbids to write there" in str(first.exception)
    assert "AKIASECRET" not in str(first.exception) + first.output
    assert "run the same command again" in first.stderr
    assert len(store.names()) == 3
    assert "report.json" not in store.names()
    other = call("diff", *pair, "-o", RUN, *FAST)
    assert isinstance(other.exception, OutputError)
    assert "waits for its upload" in str(other.exception)

    def compared(*_args, **_more):
        pytest.fail("compared again")

    store.fails = lambda _path: False
    before = list(store.puts)
    with monkeypatch.context() as patch:
        patch.setattr("sparsity_audit.api.diff.diff", compared)
        again = call(*arguments)
    assert again.return_value == 1, again.output  # the status of the run that was finished
    assert "nothing was made again" in again.stderr
    assert "report.json" in store.names()
    assert len(set(store.puts)) == len(store.puts)
    assert store.puts[: len(before)] == before
    assert stages(cache) == []


def test_a_finished_result_of_python_is_uploaded_by_name(store, cache):
    store.fails = fails_at(1)
    with pytest.raises(ObjectStoreError):
        fill(RUN, "a.csv", "report.json")
    with pytest.raises(OutputError, match="waits for its upload") as caught, object_output(RUN):
        pytest.fail("entered")
    assert f"finish_upload('{RUN}')" in str(caught.value)
    store.fails = lambda _path: False
    finish_upload(RUN)
    assert store.puts == ["run/a.csv", "run/report.json"]
    assert stages(cache) == []
    with pytest.raises(OutputError, match="no finished result"):
        finish_upload(RUN)


@pytest.mark.parametrize("name", ["run/x.txt", "run"])
def test_a_prefix_that_holds_something_is_refused_before_anything_is_read(store, cache, name):
    store.system.pipe_file(f"/bucket/{name}", b"x")
    done = call("diff", "/absent/base", "/absent/tuned", "-o", RUN, "--overwrite")
    assert isinstance(done.exception, OutputError)
    assert "holds 1 objects already" in str(done.exception)
    assert "--overwrite is for directories alone" in str(done.exception)
    assert stages(cache) == []


def test_a_prefix_that_somebody_fills_meanwhile_is_left_alone(store):
    stage = ObjectStage(RUN)
    (stage.begin() / "report.json").write_text("{}")
    store.system.pipe_file("/bucket/run/theirs", b"x")
    stage.seal()
    with pytest.raises(OutputError, match=r"holds 1 objects already \(theirs\)"):
        stage.upload()
    stage.close()
    assert store.names() == {"theirs"}


def test_a_failed_expectation_is_a_finished_run(store, pair):
    done = call("diff", *pair, "-o", RUN, *FAST, "--min-sparsity", "1")
    assert done.return_value == 1
    assert "report.json" in store.names()


def test_pairs_of_which_one_failed_are_uploaded_when_it_is_measured(store, pair, tmp_path):
    late = tmp_path / "late"
    tuned = {"a": pair[1], "b": late}
    lines = [f"  - {{name: {name}, base: {pair[0]}, tuned: {path}}}" for name, path in tuned.items()]
    (tmp_path / "pairs.yaml").write_text("\n".join(["pairs:", *lines]))
    arguments = ("diff", "--pairs", tmp_path / "pairs.yaml", "-o", RUN, "--no-figures")
    first = call(*arguments)
    assert first.return_value == 2, first.output
    assert "not finished, so nothing was uploaded" in first.stderr
    assert store.names() == set()
    save(SIDES["tuned"], late)
    again = call(*arguments)
    assert again.return_value == 0, again.output
    assert store.puts[-1] == "run/pairs.json"
    assert {"a/report.json", "b/report.json"} <= store.names()


def test_a_run_that_fails_uploads_nothing_and_the_same_command_goes_on(store, pair, cache, monkeypatch):
    from sparsity_audit.passes.journal import Journal

    arguments = ("diff", *pair, "-o", RUN, *FAST, "--unit-bytes", "700")
    append, count = Journal.append, []

    def interrupted(self, unit_key, tally):
        count.append(unit_key)
        if len(count) == 4:
            raise KeyboardInterrupt
        append(self, unit_key, tally)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", interrupted)
        first = call(*arguments)
    assert isinstance(first.exception, BaseException)
    assert "nothing was uploaded; the same command goes on" in first.output
    assert store.names() == set()
    assert len(stages(cache)) == 1
    count.clear()
    monkeypatch.setattr(Journal, "append", lambda *a: (count.append(a[1]), append(*a))[1])
    second = call(*arguments)
    assert second.return_value == 0, second.output
    assert "report.json" in store.names()
    total = call("diff", *pair, "--dry-run", "--json", "--unit-bytes", "700", "-o", "memory://bucket/other")
    assert total.return_value == 0
    assert stages(cache) == []
    count_first = len(count)
    count.clear()
    assert call("diff", *pair, "-o", "memory://bucket/whole", *FAST, "--unit-bytes", "700").return_value == 0
    assert count_first == len(count) - 3


def test_an_error_names_the_reference_and_not_the_stage(store, pair, cache):
    stage = ObjectStage(RUN)
    (stage.begin() / "report.json").write_text("{}")
    stage.close()
    done = call("diff", *pair, "-o", RUN, *FAST)
    assert isinstance(done.exception, OutputError)
    assert str(done.exception).startswith(f"{RUN}: holds the report of a finished run")
    assert str(cache) not in done.output


def test_two_runs_at_once_are_kept_apart(store):
    with object_output(RUN) as folder:
        (folder / "report.json").write_text("{}")
        with pytest.raises(OutputError, match="another run is writing here"), object_output(f"{RUN}/"):
            pytest.fail("entered")
    assert store.names() == {"report.json"}


def test_a_mask_may_lie_below_the_report(store, pair):
    done = call("diff", *pair, "-o", RUN, "--mask", f"{RUN}/mask", *FAST)
    assert done.return_value == 0, done.output
    assert {"report.json", "mask/mask.safetensors.index.json"} <= store.names()
    assert store.puts[-1] == "run/report.json"
    turned = CliRunner().invoke(cli, ["diff", *pair, "--mask", "memory://b/r/mask", "-o", "memory://b/r"])
    assert turned.exit_code == 2
    assert "give memory://b/r first" in turned.output


def test_an_object_of_another_size_is_an_error_and_does_not_stay(store, monkeypatch):
    put_file = type(store.system).put_file

    def cut(self, lpath, rpath, **more):
        put_file(self, lpath, rpath, **more)
        self.pipe_file(rpath, b"")

    monkeypatch.setattr(type(store.system), "put_file", cut)
    with pytest.raises(ObjectStoreError, match=r"report.json: 0 bytes after"):
        fill(RUN, "report.json")
    assert store.names() == set()


def test_failures_that_pass_are_survived(store, monkeypatch):
    put_file, left = type(store.system).put_file, [1, 1]

    def unsteady(self, lpath, rpath, **more):
        if left:
            left.pop()
            raise TimeoutError
        put_file(self, lpath, rpath, **more)

    monkeypatch.setattr(type(store.system), "put_file", unsteady)
    fill(RUN, "report.json")
    assert store.names() == {"report.json"}


def test_other_commands_write_there_too(store, pair, tmp_path):
    assert call("patch", "make", *pair, "-o", "memory://bucket/patch").return_value is None
    assert store.puts[-1] == "patch/patch.json"
    assert store.names("patch") == {"patch.json", "patch.safetensors"}
    assert call("mask", "export", *pair, "-o", "memory://bucket/mask", "--json").exception is None
    assert "mask.safetensors.index.json" in store.names("mask")
    local = tmp_path / "local"
    diff(*pair, output=local, figures=False, **QUICK)
    done = call("report", local, "-o", "memory://bucket/again", "--no-figures")
    assert done.exception is None, done.output
    assert "memory://bucket/again/report.html" in done.stdout.split()
    assert "report.html" in store.names("again")
    share = ("--shard-index", "0", "--num-shards", "2")
    assert "A share goes to a disk" in str(call("diff", *pair, "-o", "memory://bucket/s", *share).exception)


def test_shares_on_a_disk_are_merged_into_a_store(store, pair, tmp_path):
    share = ("--shard-index", "0", "--num-shards", "1")
    assert call("diff", *pair, "-o", tmp_path / "s", *FAST[:4], *share).return_value == 0
    done = call("merge", tmp_path / "s", "-o", RUN, "--workers", "2")
    assert done.return_value == 0, done.output
    assert store.puts[-1] == "run/report.json"


@pytest.mark.parametrize("keyword", ["output", "mask"])
def test_python_refuses_a_reference_as_a_path_and_says_what_to_write(pair, keyword, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match=r"object_output\('s3://bucket/run'\)"):
        diff(*pair, **{keyword: "s3://bucket/run"}, **QUICK)
    assert not (tmp_path / "s3:").exists()


@pytest.mark.parametrize("reference", ["memory://", "ftp://host/x", "local/folder"])
def test_what_is_no_place_in_a_store_is_refused(reference):
    with pytest.raises(UsageError, match="names no place"), object_output(reference):
        pytest.fail("entered")
    if "://" in reference:
        assert CliRunner().invoke(cli, ["diff", "a", "b", "-o", reference]).exit_code != 0


def test_a_library_that_is_not_installed_is_named_with_its_extra(monkeypatch, cache):
    import fsspec.core

    def absent(*_args, **_more):
        raise ImportError("no", name="s3fs")

    monkeypatch.setattr(fsspec.core, "url_to_fs", absent)
    match = r"writing s3://: s3fs is not installed\n.*\[s3\]"
    with pytest.raises(MissingExtraError, match=match), sparsity_audit.object_output("s3://bucket/run"):
        pytest.fail("entered")
    assert stages(cache) == []
