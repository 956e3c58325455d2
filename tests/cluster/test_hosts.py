"""Ray on two hosts that are network namespaces, one of which dies or falls silent in the middle of a unit.

Each host has its own address, processes and /tmp/ray; a wire joins them. Both need the token, and neither
starts where the driver does. Where this user may not make namespaces the tests are skipped and say why; CI's
machines may.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from sparsity_audit import diff

pytest.importorskip("ray", reason="the extra `ray` is not installed")
pytestmark = [pytest.mark.extras, pytest.mark.timeout(180)]

TOKEN = "of-the-tests-with-two-hosts"
ADDRESSES = {"head": "198.51.100.1", "node": "198.51.100.2"}  # RFC 5737: never routed
UNITS_BEFORE_LOSS = 3
IMPATIENCE = {
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "4",
    "RAY_grpc_client_keepalive_time_ms": "1000",
    "RAY_grpc_client_keepalive_timeout_ms": "2000",
}
"""With Ray's own settings a silent host is given up after 65 s, and the run ends after 127 s."""

OBSERVER = """
    import os, time
    from pathlib import Path
    from sparsity_audit import seams

    folder, host = Path(os.environ["HOSTS"]), os.environ["HOST"]
    done = 0

    def wait_for(name):
        while not (folder / name).exists():
            time.sleep(0.02)

    def observer(point):
        global done
        if point != "unit done by a worker":
            return
        done += 1
        if host == "node" and done == {units}:
            (folder / "holds a unit").touch()
            wait_for("never")
        if host == "head" and done == 1:
            wait_for("node is lost")

    seams.observer = observer
"""


@dataclass(kw_only=True)
class Host:
    """A namespace, and what runs in it under one `unshare`, whose end is the end of all."""

    name: str
    namespace: str
    address: str
    init: subprocess.Popen | None = None

    def on_network(self, *command: str | Path) -> list[str]:
        """The command with the host's network, and this machine's files and processes."""
        return ["ip", "netns", "exec", self.namespace, *map(str, command)]

    def inside(self, *command: str | Path, cwd: Path) -> list[str]:
        """The command as one of the host's own processes."""
        assert self.init is not None
        pid = self.init.pid
        (first,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        entered = ("nsenter", f"--target={first}", "--mount", "--net", "--pid", "env", f"--chdir={cwd}")
        return [*entered, *map(str, command)]

    def start(self, *command: str | Path, log: Path, env: dict[str, str]) -> None:
        """Run a command as the host's first process: with its own processes and /tmp/ray."""
        script = 'mount -t tmpfs tmpfs /tmp/ray && exec "$@"'
        isolated = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", script, "sh")
        with log.open("w") as file:
            self.init = subprocess.Popen(
                self.on_network(*isolated, *command),
                env=env,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    def cut_off(self) -> None:
        """Unplug its wire: nobody is told, and its processes go on."""
        subprocess.run(self.on_network("ip", "link", "set", "eth0", "down"), check=True)

    def kill(self) -> None:
        """SIGKILL for every process of the host at once."""
        if self.init is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.init.pid, signal.SIGKILL)
            self.init.wait()
        found = subprocess.run(
            ["ip", "netns", "pids", self.namespace], capture_output=True, text=True, check=False
        )
        for pid in map(int, found.stdout.split()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def hosts() -> Iterator[dict[str, Host]]:
    """Two namespaces with a wire between them; skipped with the reason where they cannot be made."""
    if sys.platform != "linux" or not all(map(shutil.which, ("ip", "unshare", "nsenter"))):
        pytest.skip("network namespaces need Linux with `ip`, `unshare` and `nsenter`")
    made = {
        name: Host(name=name, namespace=f"sparsity-{os.getpid()}-{name}", address=address)
        for name, address in ADDRESSES.items()
    }
    try:
        _join(made)
        yield made
    finally:
        for host in made.values():
            host.kill()
            subprocess.run(["ip", "netns", "del", host.namespace], capture_output=True, check=False)


def _join(hosts: dict[str, Host]) -> None:
    def run(*command: str) -> None:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"this user may not make namespaces: {' '.join(command)}: {done.stderr.strip()}")

    for host in hosts.values():
        run("ip", "netns", "add", host.namespace)
        run(*host.on_network("ip", "link", "set", "lo", "up"))
    one, other = hosts.values()
    peer = ("peer", "name", "eth0", "netns", other.namespace)
    run(*one.on_network("ip", "link", "add", "eth0", "type", "veth", *peer))
    for host, neighbour in ((one, other), (other, one)):
        run(*host.on_network("ip", "address", "add", f"{host.address}/24", "dev", "eth0"))
        run(*host.on_network("ip", "link", "set", "eth0", "up"))
        run(*host.on_network("ip", "route", "add", "default", "via", neighbour.address))
    run(*one.on_network("unshare", "--pid", "--fork", "--mount-proc", "true"))


@pytest.fixture
def cluster(hosts, tmp_path) -> tuple[dict[str, Host], dict[str, str]]:
    """A Ray head on one host and a node on the other, one slot each; hosts and the driver's environment."""
    code = tmp_path / "code"
    code.mkdir()
    (code / "sitecustomize.py").write_text(textwrap.dedent(OBSERVER).format(units=UNITS_BEFORE_LOSS))
    Path("/tmp/ray").mkdir(exist_ok=True)
    env = (
        os.environ
        | IMPATIENCE
        | {
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": TOKEN,
            "HOSTS": str(tmp_path),
        }
    )
    ray, path = Path(sys.executable).with_name("ray"), os.environ.get("PYTHONPATH", "")
    asked = ("--num-cpus=1", "--object-store-memory=80000000", "--disable-usage-stats", "--block")
    where = {
        "head": ("--head", "--port=6379", "--include-dashboard=false"),
        "node": (f"--address={ADDRESSES['head']}:6379",),
    }
    for name, host in hosts.items():
        host.start(
            *(ray, "start", *where[name], f"--node-ip-address={host.address}", *asked),
            log=tmp_path / f"{name}.log",
            env=env | {"HOST": name, "PYTHONPATH": f"{code}:{path}".rstrip(":")},
        )
        log = tmp_path / f"{name}.log"
        _wait_for(lambda: "--block" in log.read_text(), f"Ray on {name}", log)  # noqa: B023 - called at once
    return hosts, env | {"RAY_ADDRESS": f"{ADDRESSES['head']}:6379"}


def _wait_for(is_there: Callable[[], bool], what: str, log: Path, *, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not is_there():
        assert time.monotonic() < end, f"{what} did not come within {seconds} s\n{log.read_text()}"
        time.sleep(0.05)


def _files(folder: Path) -> dict[str, bytes]:
    found = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: data for name, data in found.items() if name != "run.json"}


@pytest.mark.parametrize("end", [Host.kill, Host.cut_off])
def test_a_host_that_is_lost_in_the_middle_of_a_unit_is_done_without(
    cluster, tmp_path, addition, monkeypatch, end
) -> None:
    monkeypatch.chdir(addition)
    hosts, env = cluster
    log = tmp_path / "driver.log"
    asked = (
        "base-bf16",
        "grpo-bf16-seed0",
        "--unit-bytes",
        "20000",
        "--kernel",
        "numpy",
        "--engine",
        "ray",
        "--no-figures",
    )
    asked += ("-o", str(tmp_path / "ray"), "--mask", str(tmp_path / "ray-mask"))
    with log.open("w") as file:
        driver = subprocess.Popen(
            hosts["head"].inside(
                sys.executable, "-m", "sparsity_audit.cli.main", "diff", *asked, cwd=addition
            ),
            env=env,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        held = tmp_path / "holds a unit"
        _wait_for(lambda: held.exists() or driver.poll() is not None, "a unit on the second host", log)
        assert driver.poll() is None, log.read_text()
        end(hosts["node"])
        (tmp_path / "node is lost").touch()
        assert driver.wait(100) == 0, log.read_text()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    here = {"output": tmp_path / "here", "mask": tmp_path / "here-mask", "unit_bytes": 20_000}
    diff("base-bf16", "grpo-bf16-seed0", **here)
    assert _files(tmp_path / "ray") == _files(tmp_path / "here")
    assert _files(tmp_path / "ray-mask") == _files(tmp_path / "here-mask")
