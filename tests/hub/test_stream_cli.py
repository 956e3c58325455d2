"""`--stream` as a user types it, in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

from streaming import checkpoint, save


def test_ctrl_c_does_not_wait_for_a_silent_server(hub, tmp_path):
    """A server that falls silent keeps its requests for minutes: reads, waits and attempts again."""
    for name, moved in (("base", ()), ("tuned", (0, 1))):
        hub.add(f"org/{name}", checkpoint(1, moved=moved))
    silent, ended = threading.Event(), threading.Event()

    def fall_silent(request) -> None:
        if request.host == "storage" and not request.headers["Range"].startswith("bytes=0-"):
            silent.set()
            ended.wait(60)

    hub.on_request = fall_silent
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "*"}
    env |= {"HF_HUB_DOWNLOAD_TIMEOUT": "100"}
    code = (
        "import signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "sys.argv = ['x', 'diff', 'hf://org/base', 'hf://org/tuned', '--stream', '--workers', '2']\n"
        "from sparsity_audit.cli.main import entry_point\nentry_point()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=env)
    try:
        assert silent.wait(60)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    finally:
        ended.set()
        process.kill()
    assert process.returncode == 130
    assert "interrupted" in errors
    assert "Traceback" not in errors


def test_the_command_line_streams_and_refuses_two_ways_at_once(hub, tmp_path):
    for name, moved in (("base", ()), ("tuned", (0, 1))):
        files = checkpoint(1, moved=moved)
        hub.add(f"org/{name}", files)
        save(files, tmp_path / name)
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "*"}

    def ran(*args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "sparsity_audit.cli.main", "diff", *args, "--json"]
        return subprocess.run(command, capture_output=True, text=True, env=env, check=False)

    there = ran("hf://org/base", "hf://org/tuned", "--stream")
    here = ran(str(tmp_path / "base"), str(tmp_path / "tuned"))
    assert there.returncode == here.returncode == 0, there.stderr
    assert json.loads(there.stdout)["headlines"] == json.loads(here.stdout)["headlines"]
    assert not list(tmp_path.joinpath("home").rglob("*.safetensors"))
    both = ran("hf://org/base", "hf://org/tuned", "--stream", "--evict")
    assert both.returncode == 2
    assert "--stream" in both.stderr
    assert "--evict" in both.stderr
    assert "Traceback" not in both.stderr
