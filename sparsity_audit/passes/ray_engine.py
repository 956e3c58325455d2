"""Run work units on a Ray cluster: the only module that imports ray (extra `ray`).

Contract: `work` is shipped once and kept by each worker process; units travel in batches, at most 32 in one
task, twice as many tasks in flight as the cluster has slots. Results come back to this process, which alone
writes; so a killed driver goes on from its journal. Ray runs a task again when its worker or node is lost,
never when the unit itself failed: that error is raised here once, with the unit and the host. A task asks
for one CPU and a stated amount of memory, and for a GPU only when the engine was made for it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import traceback
import uuid
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self, TypeVar

from sparsity_audit.errors import ClusterError, MissingExtraError, SparsityAuditError
from sparsity_audit.passes.engine import Ahead
from sparsity_audit.passes.ray_errors import explained, lost, name_of
from sparsity_audit.seams import reached

__all__ = ["RayEngine"]

_Result = TypeVar("_Result")
_Unit = TypeVar("_Unit")

_MAX_BATCH = 32
"""Units of one task: 64 MB a side each, so 2 GB; the mask bits of a batch are at most an eighth of that."""

_SHARE_A_SLOT = 2
"""A batch is at most half of what a slot would get of the units that are left: large first, single units at
the end, so that no slot waits long for another, and few tasks."""

_TASK_MEMORY_BYTES = 1 << 30
"""An estimate, generous: numba, buffers and the plan of 90 k tensors stayed below half of it."""

_LOCAL_STORE_BYTES = 512 << 20
_MAX_RETRIES = 3
_CONNECT_S = 20.0
_PATIENCE_S = 600.0
"""How long a cluster may take to offer the first slot: an autoscaler starts nodes in minutes."""


class RayEngine:
    """An `Engine` over a Ray cluster; a context manager that leaves a cluster it started itself.

    Args:
        address: `host:port`, `auto` or `ray://…`; default `RAY_ADDRESS`, and without that a cluster of this
            machine's cores, which ends with the engine. A driver that is connected already stays so.
        slots: At most so many tasks at once; default what the cluster offers.
        gpus: Whether each task gets a CUDA device of its own.

    Raises:
        MissingExtraError: ray is not installed.
        ClusterError: The cluster cannot be reached, is of another version, asks for a token, or its nodes
            lack this package.
    """

    def __init__(self, *, address: str | None = None, slots: int | None = None, gpus: bool = False) -> None:
        try:
            import ray  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise MissingExtraError(
                "--engine ray", "ray is not installed", remedy="pip install 'sparsity-audit[ray]'"
            ) from error
        self._ray = ray
        self._slots, self.gpus = slots, gpus
        self._owned = not ray.is_initialized()
        if self._owned:
            _connect(ray, address or os.environ.get("RAY_ADDRESS") or None, slots)
        self._options: dict[str, Any] = {
            "num_cpus": 1,
            "num_gpus": 1 if gpus else 0,
            "memory": _TASK_MEMORY_BYTES,
            "max_retries": _MAX_RETRIES,
            "retry_exceptions": False,
        }
        try:
            self._verify_nodes()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect, and end a cluster that was started for this engine."""
        if self._owned and self._ray.is_initialized():
            self._ray.shutdown()

    def map(
        self, work: Callable[[_Unit], _Result], units: Iterable[_Unit], *, ahead: Ahead | None = None
    ) -> Generator[tuple[_Unit, _Result], None, None]:
        """Each unit with its result, as they come back.

        Raises:
            ClusterError: A task lost its worker more than three times.
            SparsityAuditError: As the work raises it.
        """
        ray, todo = self._ray, list(units)
        if not todo:
            return
        from ray import cloudpickle  # pyright: ignore[reportMissingImports]

        shipped = ray.put(cloudpickle.dumps((work, ahead)))
        key, task = uuid.uuid4().hex, ray.remote(_run_batch).options(**self._options)
        here = str(Path.cwd())
        queue = iter(_batches(todo, self.num_slots()))
        running: dict[Any, list[_Unit]] = {}
        try:
            while True:
                while len(running) < 2 * self.num_slots() and (batch := next(queue, None)) is not None:
                    running[task.remote(key, [shipped], batch, here)] = batch
                if not running:
                    return
                ray.wait(list(running), num_returns=1)
                finished, _ = ray.wait(list(running), num_returns=len(running), timeout=0)
                for ref in finished:
                    yield from self._results(ref, running.pop(ref))
        finally:
            for ref in running:
                ray.cancel(ref)

    def num_slots(self) -> int:
        """Tasks that the cluster runs at once now, at least 1."""
        there = self._ray.cluster_resources()
        found = [int(there.get("CPU", 0)), int(there.get("memory", 0)) // _TASK_MEMORY_BYTES]
        if self.gpus:
            found.append(int(there.get("GPU", 0)))
        if self._slots is not None:
            found.append(self._slots)
        return max(min(found), 1)

    def _results(self, ref: Any, batch: Sequence[_Unit]) -> Generator[tuple[_Unit, Any], None, None]:
        try:
            done: _Done = self._ray.get(ref)
        except self._ray.exceptions.RayError as error:
            raise lost(error, batch, tries=_MAX_RETRIES + 1) from error
        yield from zip(batch, done.results, strict=False)
        if done.failure is not None:
            _raise(done, batch[len(done.results)])

    def _verify_nodes(self) -> None:
        """One small task: some node must offer what a task asks for, and have this version of the package."""

        def installed() -> str | None:
            from importlib.metadata import PackageNotFoundError, version

            try:
                return version("sparsity-audit")
            except PackageNotFoundError:
                return None

        from importlib.metadata import version

        ray, mine = self._ray, version("sparsity-audit")
        try:
            found = ray.get(ray.remote(installed).options(**self._options).remote(), timeout=_PATIENCE_S)
        except ray.exceptions.GetTimeoutError as error:
            asked = f"1 CPU, {_TASK_MEMORY_BYTES >> 20} MiB of memory" + (" and 1 GPU" if self.gpus else "")
            raise ClusterError(
                "the Ray cluster",
                f"no node offered {asked} within {_PATIENCE_S:.0f} s",
                remedy="see `ray status`; start nodes that are large enough, or leave out --device cuda",
            ) from error
        except ray.exceptions.RayError as error:
            raise explained(error, "the Ray cluster") from error
        if found != mine:
            raise ClusterError(
                "the Ray cluster",
                "its nodes lack sparsity-audit"
                if found is None
                else f"its nodes have sparsity-audit {found}",
                expected=f"sparsity-audit {mine} on every node",
                remedy=f"pip install 'sparsity-audit[ray]=={mine}' on every node, or put it into their image",
            )


def _connect(ray: Any, address: str | None, slots: int | None) -> None:
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        options |= {
            "num_cpus": slots or len(os.sched_getaffinity(0)),
            "object_store_memory": _LOCAL_STORE_BYTES,
            "include_dashboard": False,
        }
    listens = address is not None and _verify_reachable(address)
    try:
        ray.init(address=address or "local", **options)
    except (ray.exceptions.RayError, ConnectionError, RuntimeError, ValueError, OSError) as error:
        subject = f"the Ray cluster {address or 'of this machine'}"
        raise explained(error, subject, listens=listens) from error


def _verify_reachable(address: str) -> bool:
    """Raise ClusterError where nobody listens: Ray itself would try for minutes, without a word.

    False where that cannot be told, as for `auto`, which Ray resolves itself.
    """
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return False
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except OSError as error:
        raise explained(ConnectionError(str(error)), f"the Ray cluster {address}") from error
    return True


def _batches(units: Sequence[_Unit], slots: int) -> list[list[_Unit]]:
    found: list[list[_Unit]] = []
    start = 0
    while start < len(units):
        size = min(max((len(units) - start) // (slots * _SHARE_A_SLOT), 1), _MAX_BATCH)
        found.append(list(units[start : start + size]))
        start += size
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Done:
    """What a task sends back: results up to the first unit that failed, and that failure."""

    results: list[Any]
    failure: Exception | None = None
    trace: str = ""
    host: str = ""


_works: dict[str, tuple[Callable[[Any], Any], Ahead | None]] = {}
"""In a worker process: the one `work` it runs and what reads ahead for it, by key. The next pass's takes its
place."""


def _run_batch(key: str, shipped: list[Any], units: list[Any], driver_folder: str) -> _Done:
    """The task. `shipped` is a list because Ray would fetch and unpickle a bare reference for every task.

    Workers start where `ray start` was called; a relative path means the driver's.
    """
    results: list[Any] = []
    folder = driver_folder if Path(driver_folder).is_dir() else "."
    try:
        with contextlib.chdir(folder):
            work, ahead = _works.get(key) or _load(key, shipped[0])
            if ahead is not None:
                ahead.announce(units)
            for unit in units:
                results.append(work(unit))
                reached("unit done by a worker")
    except Exception as error:  # noqa: BLE001 - it is raised in the driver, once, and not tried again
        return _Done(results=results, failure=error, trace=traceback.format_exc(), host=socket.gethostname())
    return _Done(results=results)


def _load(key: str, shipped: Any) -> tuple[Callable[[Any], Any], Ahead | None]:
    import ray  # pyright: ignore[reportMissingImports]
    from ray import cloudpickle  # pyright: ignore[reportMissingImports]

    _works.clear()
    _works[key] = cloudpickle.loads(ray.get(shipped))
    return _works[key]


def _raise(done: _Done, unit: Any) -> NoReturn:
    error = done.failure
    assert error is not None
    where = f"{name_of(unit)} on host {done.host}"
    if isinstance(error, SparsityAuditError):
        raise type(error)(
            error.subject, f"{error.found} ({where})", expected=error.expected, remedy=error.remedy
        )
    error.add_note(f"{where}:\n{done.trace}")
    raise error
