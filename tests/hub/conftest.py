"""The loopback Hub, and a client in a process of its own.

The Hub library reads its environment when it is imported, so each case runs in a fresh interpreter: that is
also what a user's shell does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # importlib mode leaves test folders off the path

from hub_server import HubServer
from streaming import checkpoint, reset, save

_CLIENT = """
import json, sys
from sparsity_audit.checkpoint import hub_calls
from sparsity_audit.checkpoint.opening import open_checkpoint
from sparsity_audit.errors import SparsityAuditError
hub_calls.WAITS_S = (0.05, 0.1)
try:
    c = open_checkpoint(sys.argv[1])
except SparsityAuditError as e:
    print(json.dumps({"error": type(e).__name__, "message": str(e), "exit_code": e.exit_code}))
else:
    print(json.dumps({
        "reference": c.reference, "resolved": c.resolved, "notes": c.notes, "config": dict(c.config),
        "files": [f.name for f in c.files], "tensors": list(c.tensors),
        "bytes": [f.path.stat().st_size for f in c.stored_files],
    }))
"""


@dataclass(frozen=True)
class Answer:
    """What the client printed: one JSON object on stdout, anything on stderr."""

    value: dict[str, Any]
    stderr: str

    def __getitem__(self, key: str) -> Any:
        return self.value[key]

    @property
    def message(self) -> str:
        return self.value["message"]


@pytest.fixture
def hub() -> Iterator[HubServer]:
    server = HubServer()
    yield server
    server.close()


@pytest.fixture
def open_reference(hub: HubServer, tmp_path: Path) -> Callable[..., Answer]:
    """Open a reference in a fresh process; keyword arguments are environment variables (None removes one)."""

    def run(reference: str, *, cwd: Path | None = None, preexec: Any = None, **env: str | None) -> Answer:
        clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
        clean |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}
        clean |= {k: v for k, v in env.items() if v is not None}
        done = subprocess.run(
            [sys.executable, "-c", _CLIENT, reference],
            capture_output=True,
            text=True,
            env=clean,
            cwd=cwd or tmp_path,
            preexec_fn=preexec,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.splitlines()) == 1, done.stdout
        return Answer(json.loads(done.stdout), done.stderr)

    return run


@pytest.fixture(scope="module")
def near_server() -> Iterator[HubServer]:
    made = HubServer()
    yield made
    made.close()


@pytest.fixture
def near_hub(near_server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """The loopback Hub, with this process as its client."""
    from huggingface_hub import HfApi, constants

    from sparsity_audit.checkpoint import hub_calls, hub_file

    for name in [n for n in os.environ if n.startswith("HF_") or n.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(hub_calls, "WAITS_S", (0.001, 0.001))
    monkeypatch.setattr(hub_file, "FIRST_WAIT_S", 0.001)
    api = HfApi(endpoint=near_server.url, library_name="sparsity-audit")
    monkeypatch.setattr("sparsity_audit.checkpoint.hub_stream.hub_api", lambda: api)
    near_server.repos.clear()
    reset(near_server)
    return near_server


@pytest.fixture
def pair(near_hub: HubServer, tmp_path: Path) -> dict[str, dict[str, bytes]]:
    sides = {"base": checkpoint(0), "tuned": checkpoint(1, moved=(0, 1, 2))}
    for name, files in sides.items():
        near_hub.add(f"org/{name}", files)
        save(files, tmp_path / name)
    return sides
