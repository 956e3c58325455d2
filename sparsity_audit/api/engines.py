"""Where the passes of a capability run: threads of this process, or a Ray cluster.

Contract: the choice changes no result. An engine lives as long as the block that opened it; what it starts
ends there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from sparsity_audit.compare.dispatch import resolve_device
from sparsity_audit.errors import UsageError
from sparsity_audit.passes.engine import Workers

__all__ = ["EngineName", "engine_facts", "num_workers", "open_engine", "resolve_engine_device"]

EngineName = Literal["threads", "ray"]

_MAX_WORKERS = 8


def num_workers() -> int:
    """Threads when the user names no number: one a core this process may use, at most 8."""
    return min(_MAX_WORKERS, len(os.sched_getaffinity(0)))


@contextmanager
def open_engine(name: EngineName, *, workers: int | None, device: str = "cpu") -> Iterator[Workers]:
    """What runs work units.

    Args:
        name: `threads`, or `ray`: the cluster at `RAY_ADDRESS`, else one of this machine's cores.
        workers: Threads, or tasks at once; default one a core (at most 8), or what the cluster offers.
        device: What units compare on; a task asks for a GPU unless it is `cpu`.

    Raises:
        UsageError: An unknown name, or one device of many for a cluster.
        MissingExtraError: The engine's extra is not installed.
        ClusterError: The cluster cannot be used.
    """
    if name == "threads":
        yield workers or num_workers()
        return
    if name != "ray":
        raise UsageError("--engine", repr(name), expected="threads or ray")
    from sparsity_audit.passes.ray_engine import RayEngine

    with RayEngine(slots=workers, gpus=device != "cpu") as engine:
        yield engine


def resolve_engine_device(engine: EngineName, device: str) -> str:
    """`resolve_device`, but where a cluster runs the work its nodes count, not this one; GPUs only if asked.

    Raises:
        UsageError: The device is unknown, or not here; or for a cluster one of several is named.
    """
    if engine == "threads":
        return resolve_device(device)
    if device in ("auto", "cpu"):
        return "cpu"
    if device != "cuda":
        raise UsageError(
            f"device {device!r}", "a cluster gives each task a device of its own", expected="cpu or cuda"
        )
    return device


def engine_facts(name: EngineName, workers: Workers) -> dict[str, object]:
    """What `run.json` says of the engine."""
    return {"engine": name, "workers": workers if isinstance(workers, int) else workers.num_slots()}
