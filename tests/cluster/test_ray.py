"""Real Ray on two CPUs: the same bytes, through killed workers, failing units and a killed driver.

Each test is a driver of its own in a process group of its own, which is killed with all that Ray started when
the test ends; a core test (`tests/passes/test_engine.py`) covers every pass with a pickling engine.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sparsity_audit import diff, mask_ops, overlap, series

pytest.importorskip("ray", reason="the extra `ray` is not installed")
pytestmark = [pytest.mark.extras, pytest.mark.timeout(180)]

SESSION = """
    import os, signal, sys
    from pathlib import Path
    import ray
    from sparsity_audit import diff, mask_ops, overlap, seams, series

    def start(setup=None):
        env = {} if setup is None else {"worker_process_setup_hook": setup}
        ray.init("local", num_cpus=2, object_store_memory=80 << 20, include_dashboard=False,
                 log_to_driver=False,
                 logging_level="ERROR", runtime_env=env)
"""


@pytest.fixture
def driver(tmp_path, addition, monkeypatch):
    """Run code in a driver of its own; returns exit status and output."""
    monkeypatch.chdir(addition)

    def run(code: str, *, timeout: float = 120, **env: str) -> tuple[int, str]:
        script = tmp_path / "driver.py"
        script.write_text(textwrap.dedent(SESSION) + textwrap.dedent(code))
        full = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_TOKEN": "of-the-tests"} | env
        with (tmp_path / "log").open("w+") as log:
            process = subprocess.Popen(
                [sys.executable, str(script)], env=full, stdout=log, stderr=log, start_new_session=True
            )
            try:
                status = process.wait(timeout)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            log.seek(0)
            return status, log.read()

    return run


def _files(folder: Path) -> dict[str, bytes]:
    found = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: data for name, data in found.items() if name != "run.json"}


def test_every_command_on_ray_writes_the_bytes_of_one_process(tmp_path, driver) -> None:
    status, log = driver(
        f"""
        out = Path({str(tmp_path)!r}) / "ray"
        start()
        asked = dict(engine="ray", unit_bytes=20_000, structure="on", kernel="numpy")
        diff("base-bf16", "grpo-bf16-seed0", output=out / "diff", mask=out / "a", **asked)
        diff("base-bf16", "grpo-bf16-seed1", output=out / "top", mask=out / "b", criteria=["top:2%"], **asked)
        runs = ["grpo-bf16-seed0", "grpo-bf16-seed1"]
        overlap(runs, base="base-bf16", output=out / "overlap", engine="ray")
        series("base-bf16", runs, output=out / "series", engine="ray")
        mask_ops("and", [out / "a", out / "b"], out / "both", engine="ray", force=True)
        """
    )
    assert status == 0, log
    here = tmp_path / "here"
    asked = {"unit_bytes": 20_000, "structure": "on", "kernel": "numpy"}
    diff("base-bf16", "grpo-bf16-seed0", output=here / "diff", mask=here / "a", **asked)
    diff("base-bf16", "grpo-bf16-seed1", output=here / "top", mask=here / "b", criteria=["top:2%"], **asked)
    runs = ["grpo-bf16-seed0", "grpo-bf16-seed1"]
    overlap(runs, base="base-bf16", output=here / "overlap")
    series("base-bf16", runs, output=here / "series")
    shutil.copytree(here, tmp_path / "moved")
    for name in ("diff", "top", "a", "b", "overlap", "series"):
        assert _files(tmp_path / "ray" / name) == _files(here / name), name
    mask_ops("and", [tmp_path / "ray/a", tmp_path / "ray/b"], tmp_path / "both", force=True)
    assert _files(tmp_path / "ray" / "both") == _files(tmp_path / "both")


def test_a_worker_that_is_killed_is_replaced_and_the_bytes_are_the_same(tmp_path, driver) -> None:
    flag = tmp_path / "killed"
    status, log = driver(
        f"""
        def setup():
            import os, signal
            from sparsity_audit import seams
            left = [3]
            def observer(point):
                left[0] -= point == "unit done by a worker"
                if left[0] == 0:
                    try:
                        os.close(os.open({str(flag)!r}, os.O_CREAT | os.O_EXCL))
                    except FileExistsError:
                        return
                    os.kill(os.getpid(), signal.SIGKILL)
            seams.observer = observer
        start(setup)
        out = Path({str(tmp_path)!r})
        diff("base-bf16", "grpo-bf16-seed0", output=out / "ray", mask=out / "ray-mask", unit_bytes=20_000,
             engine="ray", kernel="numpy")
        """
    )
    assert status == 0, log
    assert flag.exists(), "no worker was killed"
    diff("base-bf16", "grpo-bf16-seed0", output=tmp_path / "here", mask=tmp_path / "here-mask")
    shared = {name for name in _files(tmp_path / "here") if name != "journal.jsonl"}
    assert shared == _files(tmp_path / "ray").keys()
    assert _files(tmp_path / "ray") == _files(tmp_path / "here")
    assert _files(tmp_path / "ray-mask") == _files(tmp_path / "here-mask")


def test_a_unit_that_fails_is_reported_once_and_the_run_goes_on_when_it_is_mended(
    tmp_path, addition, driver
) -> None:
    """A shard that is cut short while the cluster reads it."""
    shutil.copytree(addition / "grpo-bf16-seed0", tmp_path / "tuned")
    attempts = tmp_path / "attempts"
    status, log = driver(
        f"""
        def setup():
            from sparsity_audit.passes import execute
            real = execute._run_unit
            def counted(plan, unit, **rest):
                try:
                    return real(plan, unit, **rest)
                except Exception:
                    with open({str(attempts)!r}, "a") as file:
                        file.write(unit.key + "\\n")
                    raise
            execute._run_unit = counted
        shard = Path({str(tmp_path / "tuned" / "model.safetensors")!r})
        whole, status = shard.read_bytes(), shard.stat()
        def cut(point):
            if point == "unit journaled" and shard.stat().st_size == len(whole):
                os.truncate(shard, 4096)
        start(setup)
        seams.observer = cut
        asked = dict(output={str(tmp_path / "out")!r}, unit_bytes=20_000, engine="ray", kernel="numpy")
        try:
            diff("base-bf16", str(shard.parent), **asked)
        except Exception as error:
            print("FAILED", type(error).__name__, str(error).replace("\\n", " | "))
        seams.observer = None
        shard.write_bytes(whole)
        os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
        diff("base-bf16", str(shard.parent), **asked, on_note=print)
        """
    )
    assert status == 0, log
    assert log.count("FAILED ChangedInputError") == 1, log
    assert "(work unit " in log
    assert " on host " in log
    assert "resuming: " in log
    failed = attempts.read_text().split()
    assert len(failed) == len(set(failed)), "a unit that failed for its own reason was tried again"
    diff("base-bf16", tmp_path / "tuned", output=tmp_path / "here")
    assert _files(tmp_path / "out") == _files(tmp_path / "here")


def test_a_driver_that_is_killed_goes_on_from_its_journal(tmp_path, driver) -> None:
    status, log = driver(
        f"""
        left = 9
        def observer(point):
            global left
            left -= point == "unit journaled"
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        seams.observer = observer
        out = Path({str(tmp_path)!r})
        diff("base-bf16", "grpo-bf16-seed0", output=out / "out", mask=out / "mask", unit_bytes=20_000,
             engine="ray", workers=2, kernel="numpy")
        """,
        RAY_ADDRESS="",
    )
    assert status == -signal.SIGKILL, log
    notes: list[str] = []
    where = {"output": tmp_path / "out", "mask": tmp_path / "mask", "unit_bytes": 20_000}
    diff("base-bf16", "grpo-bf16-seed0", **where, on_note=notes.append)
    assert any(note.startswith("resuming: 9 of") for note in notes)
    diff("base-bf16", "grpo-bf16-seed0", output=tmp_path / "here", mask=tmp_path / "here-mask")
    assert _files(tmp_path / "out") == _files(tmp_path / "here")
    assert _files(tmp_path / "mask") == _files(tmp_path / "here-mask")


@pytest.fixture(scope="module")
def guarded(tmp_path_factory) -> Iterator[str]:
    """The address of a Ray head that asks for a token."""
    log = tmp_path_factory.mktemp("head") / "log"
    command = [
        *(Path(sys.executable).with_name("ray"), "start", "--head", "--block", "--port=0", "--num-cpus=1"),
        *("--include-dashboard=false", "--object-store-memory=80000000", "--disable-usage-stats"),
    ]
    env = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "the-token-of-the-cluster"}
    with log.open("w") as file:
        head = subprocess.Popen(command, env=env, stdout=file, stderr=file, start_new_session=True)
    try:
        for _ in range(600):
            found = re.search(r"--address='([^']+)'", log.read_text())
            if found:
                break
            time.sleep(0.1)
        assert found, log.read_text()
        yield found[1]
    finally:
        head.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            head.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGKILL)


@pytest.mark.parametrize("token", ["the-token-of-somebody-else", None])
def test_a_cluster_with_another_token_says_what_to_set(driver, guarded, tmp_path, token) -> None:
    """Ray says nothing but `Failed to connect` for a wrong token; it names a missing one."""
    home = {"RAY_AUTH_TOKEN": token} if token else {"RAY_AUTH_TOKEN": "", "HOME": str(tmp_path)}
    status, log = driver(
        """
        diff("base-bf16", "grpo-bf16-seed0", engine="ray")
        """,
        RAY_ADDRESS=guarded,
        RAY_AUTH_MODE="token",
        **home,
    )
    assert status == 1, log
    assert "ClusterError" in log, log
    assert "RAY_AUTH_TOKEN_PATH" in log
    assert ("listens, but does not let this driver in" if token else "does not accept this driver") in log


@pytest.mark.parametrize(
    "fake", ["ray.__version__ = '2.9.0'", "sys.version_info = (*sys.version_info[:2], 99)"]
)
def test_a_cluster_of_another_version_of_ray_or_python_says_which(driver, guarded, fake) -> None:
    """The driver claims to be another version; what compares the two and what is said is Ray's own."""
    status, log = driver(
        f"""
        {fake}
        diff("base-bf16", "grpo-bf16-seed0", engine="ray")
        """,
        RAY_ADDRESS=guarded,
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN="the-token-of-the-cluster",
    )
    assert status == 1, log
    assert "ClusterError" in log, log
    assert "runs another version of Ray or Python (Version mismatch: The cluster was started with" in log
    assert "expected: the same version of Ray and of Python, here and on every node" in log
    assert "RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL=minor" in log


def test_a_cluster_that_is_not_there_says_what_to_check(tmp_path, driver) -> None:
    status, log = driver(
        """
        diff("base-bf16", "grpo-bf16-seed0", engine="ray")
        """,
        RAY_ADDRESS="127.0.0.1:1",
        timeout=60,
    )
    assert status == 1, log
    assert "ClusterError" in log, log
    assert "check RAY_ADDRESS" in log
