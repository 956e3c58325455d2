"""The one map over work units: threads of this process, or an engine that runs elsewhere.

Contract: `map_units` yields each unit with its result as they finish, in any order and exactly once, holds
few results, and raises a unit's own error once. `work` must give the same result wherever it runs, and must
be picklable where it runs in another process: what it holds opens its files again there. Only this process
writes: `map_bits` brings mask bits back to it, so that workers need to see inputs alone.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from typing import Any, Protocol, TypeVar

import numpy as np

from sparsity_audit.align.records import Pair

__all__ = ["Ahead", "BitSink", "Engine", "Workers", "map_bits", "map_units"]

_Result = TypeVar("_Result")
_Unit = TypeVar("_Unit")


class Ahead(Protocol):
    """What reads ahead of the work, in the process that does it."""

    def announce(self, units: Sequence[Any]) -> None:
        """Take the units that will be done there next, in this order."""
        ...

    def stop(self) -> None:
        """End what is on its way, so that no unit waits for it any longer; called when a map ends early."""
        ...


class Engine(Protocol):
    """What runs work units outside of this process."""

    gpus: bool
    """Whether each unit may use a CUDA device."""

    def num_slots(self) -> int:
        """Units that run at once."""
        ...

    def map(
        self, work: Callable[[_Unit], _Result], units: Iterable[_Unit], *, ahead: Ahead | None
    ) -> Generator[tuple[_Unit, _Result], None, None]:
        """As `map_units`."""
        ...


Workers = int | Engine
"""Threads of this process, or an engine."""


class BitSink(Protocol):
    """Where mask bits go; safe to call from several threads for different places."""

    def write(self, pair: Pair, *, first_row: int, first_col: int, bits: np.ndarray) -> None:
        """Take the packed bits of rows (or a part of one row) of a pair."""
        ...


def map_units(
    work: Callable[[_Unit], _Result],
    units: Iterable[_Unit],
    *,
    workers: Workers,
    ahead: Ahead | None = None,
) -> Generator[tuple[_Unit, _Result], None, None]:
    """Each unit with what `work` gives of it, as they finish; close the generator to stop early."""
    if not isinstance(workers, int):
        yield from workers.map(work, units, ahead=ahead)
        return
    if ahead is not None:
        units = list(units)
        ahead.announce(units)
    if workers == 1:
        for unit in units:
            yield unit, work(unit)
    else:
        yield from _in_threads(work, units, workers, ahead)


def map_bits(
    work: Callable[[_Unit, BitSink | None], _Result],
    units: Iterable[_Unit],
    *,
    workers: Workers,
    bits: BitSink | None,
    ahead: Ahead | None = None,
) -> Generator[tuple[_Unit, _Result], None, None]:
    """`map_units` of work that also writes mask bits; a unit's bits are in `bits` before it is yielded."""
    if bits is None or isinstance(workers, int):
        yield from map_units(lambda unit: work(unit, bits), units, workers=workers, ahead=ahead)
        return

    def collecting(unit: _Unit) -> tuple[_Result, list[dict[str, Any]]]:
        held = _Collected()
        return work(unit, held), held.writes

    with closing(workers.map(collecting, units, ahead=ahead)) as results:
        for unit, (result, writes) in results:
            for write in writes:
                bits.write(**write)
            yield unit, result


class _Collected:
    """A `BitSink` that keeps what it is given: an eighth of the unit's entries."""

    def __init__(self) -> None:
        self.writes: list[dict[str, Any]] = []

    def write(self, pair: Pair, *, first_row: int, first_col: int, bits: np.ndarray) -> None:
        self.writes.append({"pair": pair, "first_row": first_row, "first_col": first_col, "bits": bits})


def _in_threads(
    work: Callable[[_Unit], _Result], units: Iterable[_Unit], workers: int, ahead: Ahead | None
) -> Generator[tuple[_Unit, _Result], None, None]:
    """At most two units a worker are queued, so that an error stops soon."""
    queue = iter(units)
    with ThreadPoolExecutor(max_workers=workers, thread_name_prefix="compare") as pool:
        running: dict[Future[_Result], _Unit] = {}
        try:
            while True:
                while len(running) < 2 * workers and (unit := next(queue, None)) is not None:
                    running[pool.submit(work, unit)] = unit
                if not running:
                    return
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    yield running.pop(future), future.result()
        finally:
            for future in running:
                future.cancel()
            if running and ahead is not None:
                ahead.stop()  # else the pool would wait for units that wait for a silent server
