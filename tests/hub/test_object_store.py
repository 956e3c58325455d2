"""Checkpoints in object stores: the same report, exact ranges, and no byte of a replaced object."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from streaming import QUICK, SMALL, checkpoint, local, numbers, save

from sparsity_audit.api.diff import diff
from sparsity_audit.api.inspect import inspect
from sparsity_audit.api.patch import patch_make
from sparsity_audit.checkpoint import object_store
from sparsity_audit.checkpoint.object_store import is_object_reference
from sparsity_audit.checkpoint.opening import open_checkpoint
from sparsity_audit.checkpoint.read_ahead import with_pace
from sparsity_audit.checkpoint.spelling import adapted_parts
from sparsity_audit.errors import (
    ChangedInputError,
    CheckpointNotFoundError,
    MissingExtraError,
    ObjectStoreError,
    UsageError,
)

SIDES = {"base": checkpoint(0), "tuned": checkpoint(1, moved=(0, 2))}


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "_FIRST_WAIT_S", 0.001)


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Any]:
    """fsspec's own store, with both sides in it and on the disk."""
    from fsspec.implementations.memory import MemoryFileSystem

    MemoryFileSystem.store.clear()
    system = MemoryFileSystem()
    for side, files in SIDES.items():
        save(files, tmp_path / side)
        for name, data in files.items():
            system.pipe_file(f"/bucket/{side}/{name}", data)
    yield system
    MemoryFileSystem.store.clear()


def from_store(scheme: str = "memory", **options):
    with with_pace(SMALL):
        return diff(f"{scheme}://bucket/base", f"{scheme}://bucket/tuned", **{**QUICK, **options})


def test_the_report_is_that_of_a_disk(memory, tmp_path):
    report = from_store(criteria=["top:10%"], structure="on")
    assert numbers(report) == numbers(local(tmp_path, criteria=["top:10%"], structure="on"))
    assert report.base.resolved == "memory://bucket/base"


def test_one_file_of_a_store_is_a_checkpoint(memory, tmp_path):
    name = "model-00001-of-00003.safetensors"
    found = inspect(f"memory://bucket/base/{name}")
    assert found.tensors == inspect(str(tmp_path / "base" / name)).tensors


def test_requests_are_exact_ranges(memory, monkeypatch):
    asked = []
    cat_file = type(memory).cat_file

    def counted(self, path, start=None, end=None, **more):
        asked.append((path.rpartition("/")[2], start, end))
        return cat_file(self, path, start=start, end=end, **more)

    monkeypatch.setattr(type(memory), "cat_file", counted)
    diff("memory://bucket/base", "memory://bucket/tuned", **QUICK)
    data = [(a, b) for name, a, b in asked if name.endswith(".safetensors") and a]
    assert len(data) == 6
    assert sum(b - a for a, b in data) == 2 * 3 * 2 * (12 * 40 + 40 * 24 + 40)


def test_an_object_that_is_replaced_in_the_middle_is_an_error(memory, monkeypatch):
    cat_file = type(memory).cat_file
    name = "/bucket/tuned/model-00003-of-00003.safetensors"

    def replacing(self, path, start=None, end=None, **more):
        data = cat_file(self, path, start=start, end=end, **more)
        if path == name and start:
            self.pipe_file(name, bytes(reversed(SIDES["tuned"][name.rpartition("/")[2]])))
        return data

    monkeypatch.setattr(type(memory), "cat_file", replacing)
    with pytest.raises(ChangedInputError, match="was replaced during the run") as caught:
        from_store()
    assert str(caught.value).startswith("memory://bucket/tuned/model-00003-of-00003.safetensors: ")


def test_an_object_that_is_removed_in_the_middle_is_an_error(memory):
    catalogue = open_checkpoint("memory://bucket/base")
    memory.rm_file("/bucket/base/model-00002-of-00003.safetensors")
    with pytest.raises(ChangedInputError, match="was removed during the run"):
        diff(catalogue, "memory://bucket/tuned", **QUICK)


def test_another_state_of_an_object_is_another_plan_so_that_no_journal_mixes_them(memory, tmp_path):
    from sparsity_audit.api.diff import plan_diff

    first = open_checkpoint("memory://bucket/base").files
    for name, data in SIDES["base"].items():
        memory.pipe_file(f"/bucket/base/{name}", data)
    second = open_checkpoint("memory://bucket/base").files
    assert all(a.version and a.version != b.version for a, b in zip(first, second, strict=True))
    assert plan_diff("memory://bucket/base", "memory://bucket/tuned").num_pairs == 9


def test_failures_that_pass_are_survived_and_others_are_named(memory, tmp_path, monkeypatch):
    cat_file, lock = type(memory).cat_file, threading.Lock()
    failing = {"left": 3}

    def unsteady(self, path, start=None, end=None, **more):
        with lock:
            failing["left"] -= 1
            if failing["left"] >= 0:
                raise TimeoutError("a text that may hold AKIASECRET")
        return cat_file(self, path, start=start, end=end, **more)

    monkeypatch.setattr(type(memory), "cat_file", unsteady)
    assert numbers(from_store()) == numbers(local(tmp_path))
    failing["left"] = 10**9
    with pytest.raises(ObjectStoreError, match="cannot be read: TimeoutError") as caught:
        from_store()
    assert "AKIASECRET" not in str(caught.value)


def test_a_question_of_state_that_fails_once_is_asked_again(memory, tmp_path, monkeypatch):
    sides = [open_checkpoint(f"memory://bucket/{side}") for side in SIDES]
    info, failing = type(memory).info, {"left": 2}

    def unsteady(self, path, **more):
        failing["left"] -= 1
        if failing["left"] >= 0:
            raise TimeoutError("busy")
        return info(self, path, **more)

    monkeypatch.setattr(type(memory), "info", unsteady)
    assert numbers(diff(*sides, **QUICK)) == numbers(local(tmp_path))
    assert failing["left"] < 0


def test_a_store_that_gives_fewer_bytes_is_an_error(memory, monkeypatch):
    cat_file = type(memory).cat_file
    monkeypatch.setattr(type(memory), "cat_file", lambda *a, **k: cat_file(*a, **k)[:-1])
    with pytest.raises(ObjectStoreError, match="bytes for a range"):
        open_checkpoint("memory://bucket/base/model-00001-of-00003.safetensors")


@pytest.mark.parametrize(("place", "found"), [("absent", "holds nothing"), ("other", "holds no checkpoint")])
def test_a_place_without_a_checkpoint_is_named(memory, place, found):
    memory.pipe_file("/bucket/other/readme.md", b"#")
    with pytest.raises(CheckpointNotFoundError, match=found):
        open_checkpoint(f"memory://bucket/{place}")


def test_a_missing_shard_is_named(memory):
    memory.rm_file("/bucket/base/model-00002-of-00003.safetensors")
    said = (
        r"names the shard model-00002-of-00003\.safetensors, which is not there\n.*1 missing\n  remedy: copy"
    )
    with pytest.raises(CheckpointNotFoundError, match=said):
        open_checkpoint("memory://bucket/base")


def test_a_library_that_is_not_installed_is_named_with_its_extra(monkeypatch):
    import fsspec.core

    def absent(*_args, **_more):
        raise ImportError("no", name="s3fs")

    monkeypatch.setattr(fsspec.core, "url_to_fs", absent)
    with pytest.raises(MissingExtraError, match=r"s3fs is not installed\n.*sparsity-audit\[s3\]"):
        open_checkpoint("s3://bucket/model")


def test_object_stores_are_told_from_everything_else():
    assert all(is_object_reference(f"{scheme}://b/k") for scheme in ("s3", "gs", "az", "memory"))
    assert not any(is_object_reference(text) for text in ("hf://o/m", "./s3:/b", "o/m", "s3", "file:///x"))


def test_a_key_may_hold_a_plus_and_an_adapter_names_its_store(memory):
    assert adapted_parts("s3://bucket/run+x/y") is None
    assert adapted_parts("s3://bucket/base+s3://bucket/lora") == ("s3://bucket/base", "s3://bucket/lora")
    assert adapted_parts("org/base+gs://bucket/lora") == ("org/base", "gs://bucket/lora")
    for name, data in SIDES["tuned"].items():
        memory.pipe_file(f"/bucket/run+x/y/{name}", data)
    assert len(open_checkpoint("memory://bucket/run+x/y").tensors) == 9


def test_what_lies_beside_the_weights_is_asked_for_before_a_patch_is_made(memory, tmp_path):
    with pytest.raises(UsageError, match=r"memory://bucket/base.*\n.*\n.*copy the checkpoint here"):
        patch_make("memory://bucket/base", ["memory://bucket/tuned"], tmp_path / "patch")
    assert not (tmp_path / "patch").exists()


@pytest.mark.parametrize(
    ("typed", "written"),
    [
        ("S3://bucket/run", "write s3://bucket/run"),
        ("s3:/bucket/run", "write s3://bucket/run"),
        ("HF:/org/model", "write hf://org/model"),
        ("file:///data/run", "write the path alone: /data/run"),
        ("https://huggingface.co/org/model/tree/main", "write hf://org/model"),
        ("https://example.org/model.safetensors", "download it first"),
    ],
)
def test_an_address_that_is_spelled_otherwise_is_told_how(typed, written):
    with pytest.raises(CheckpointNotFoundError, match=f"remedy: {written}"):
        open_checkpoint(typed)


def test_a_store_without_a_bucket_is_refused_before_it_is_asked():
    for text in ("s3://", "memory:///"):
        with pytest.raises(UsageError, match="names no bucket"):
            open_checkpoint(text)
