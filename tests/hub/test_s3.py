"""Checkpoints on S3: a server of its own (moto) on loopback, read through s3fs."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from streaming import QUICK, SMALL, checkpoint, local, numbers, save

from sparsity_audit.api.diff import diff
from sparsity_audit.checkpoint.object_output import finish_upload, object_output
from sparsity_audit.checkpoint.opening import open_checkpoint
from sparsity_audit.checkpoint.read_ahead import with_pace
from sparsity_audit.errors import ChangedInputError, CheckpointNotFoundError, ObjectStoreError, OutputError

pytestmark = [pytest.mark.extras, pytest.mark.timeout(120)]

SIDES = {"base": checkpoint(0), "tuned": checkpoint(1, moved=(0, 2))}
_START_S = 60.0


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of an S3 server process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    address = f"http://127.0.0.1:{port}"
    try:
        _await(address, process)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _await(address: str, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + _START_S
    while time.monotonic() < until:
        assert process.poll() is None, "the server ended"
        try:
            urllib.request.urlopen(address, timeout=5).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    pytest.fail(f"no S3 server within {_START_S:g} s")


@pytest.fixture(scope="module")
def s3(server: str) -> Iterator[Any]:
    """A client of the server, with both sides in a bucket."""
    settings = {"AWS_ENDPOINT_URL": server, "AWS_DEFAULT_REGION": "us-east-1"}
    settings |= {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        import s3fs

        system = s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True)
        system.mkdir("bucket")
        for side, files in SIDES.items():
            for name, data in files.items():
                system.pipe_file(f"bucket/{side}/{name}", data)
        yield system


def test_a_pair_is_compared_as_on_a_disk(s3, tmp_path):
    for side, files in SIDES.items():
        save(files, tmp_path / side)
    with with_pace(SMALL):
        report = diff("s3://bucket/base", "s3://bucket/tuned", **QUICK)
    assert numbers(report) == numbers(local(tmp_path))
    assert "ETag=" in open_checkpoint("s3://bucket/base").files[0].version


def test_an_object_that_is_replaced_in_the_middle_is_an_error(s3):
    catalogue = open_checkpoint("s3://bucket/tuned")
    name = "model-00002-of-00003.safetensors"
    data = SIDES["tuned"][name]
    s3.pipe_file(f"bucket/tuned/{name}", data[:-2] + bytes(2))
    try:
        with pytest.raises(ChangedInputError, match=f"s3://bucket/tuned/{name}: was replaced"):
            diff("s3://bucket/base", catalogue, **QUICK)
    finally:
        s3.pipe_file(f"bucket/tuned/{name}", data)


def test_results_go_to_a_bucket_and_come_last_with_what_marks_them(s3, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    question = {**QUICK, "figures": False}
    diff("s3://bucket/base", "s3://bucket/tuned", output=tmp_path / "local", **question)
    with object_output("s3://bucket/audits/run") as folder:
        diff("s3://bucket/base", "s3://bucket/tuned", output=folder, **question)
        (folder / "large.bin").write_bytes(bytes(120 << 20))  # in several parts, at s3fs's 50 MiB each
    found = {name.removeprefix("bucket/audits/run/"): name for name in s3.find("bucket/audits/run")}
    local = [path for path in (tmp_path / "local").rglob("*") if path.is_file()]
    assert set(found) == {path.relative_to(tmp_path / "local").as_posix() for path in local} | {"large.bin"}
    for name in ("report.json", "tensors.csv"):
        assert s3.cat_file(found[name]) == (tmp_path / "local" / name).read_bytes()
    assert s3.info(found["large.bin"])["size"] == 120 << 20
    times = {name: s3.info(key)["LastModified"] for name, key in found.items()}
    assert times["report.json"] == max(times.values())
    with pytest.raises(OutputError, match="objects already"), object_output("s3://bucket/audits/run"):
        pytest.fail("entered")
    assert not list((tmp_path / "cache" / "sparsity-audit" / "outputs").iterdir())


def test_results_for_a_bucket_that_is_not_there_are_kept(s3, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def write() -> None:
        with object_output("s3://later/run") as folder:
            (folder / "report.json").write_text("{}")

    with pytest.raises(ObjectStoreError, match=r"s3://later/run/report.json: the bucket is not there"):
        write()
    s3.mkdir("later")
    finish_upload("s3://later/run")
    assert s3.cat_file("later/run/report.json") == b"{}"


def test_a_bucket_that_is_not_there_is_named(s3):
    with pytest.raises((CheckpointNotFoundError, ObjectStoreError), match="s3://absent/model"):
        open_checkpoint("s3://absent/model")


def test_refused_credentials_are_said_without_showing_them(s3, monkeypatch):
    def refused(*_args: object, **_more: object) -> None:
        raise PermissionError("signature of AKIASECRET does not match")

    catalogue = open_checkpoint("s3://bucket/tuned")
    remote = catalogue.files[0].remote
    monkeypatch.setattr(remote._system, "cat_file", refused)
    with pytest.raises(ObjectStoreError, match="forbids") as caught:
        diff("s3://bucket/base", catalogue, **QUICK)
    assert "AKIASECRET" not in str(caught.value)
