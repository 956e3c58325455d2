"""Run a plan: read both sides block by block, compare, write mask bits, merge tallies.

Contract: memory is a few blocks a worker, whatever the checkpoint's size. Results do not depend on the
number of workers or on interruption: tallies are exact and merge in any order. Each unit ends with a
check that its files are still the catalogued ones, before it is journaled.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from typing import Protocol, TypeVar

import numpy as np

from sparsity_audit.align.records import Pair, TensorSlice
from sparsity_audit.checkpoint.reading import read_entries
from sparsity_audit.checkpoint.store import Catalogue, LocalFile
from sparsity_audit.compare.accumulate import CODE_DTYPE, Kernel
from sparsity_audit.compare.pair import UnitComparer
from sparsity_audit.passes.journal import Journal
from sparsity_audit.passes.plan import BLOCK_BYTES, Block, Plan, WorkUnit, blocks_of
from sparsity_audit.seams import reached
from sparsity_audit.stats.tally import Tally

__all__ = ["BitSink", "OpenFiles", "in_threads", "read_blocks", "run_plan"]

_Result = TypeVar("_Result")


class BitSink(Protocol):
    """Where mask bits go; safe to call from several threads for different places."""

    def write(self, pair: Pair, *, first_row: int, first_col: int, bits: np.ndarray) -> None:
        """Take the packed bits of rows (or a part of one row) of a pair."""
        ...


class OpenFiles:
    """The open files of one checkpoint, opened when first read."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._files: dict[int, LocalFile] = {}
        self._lock = threading.Lock()

    def __getitem__(self, number: int) -> LocalFile:
        with self._lock:
            if number not in self._files:
                self._files[number] = LocalFile(self._catalogue.files[number])
            return self._files[number]

    def close(self) -> None:
        """Close all of them."""
        for file in self._files.values():
            file.close()


def run_plan(
    plan: Plan,
    *,
    kernel: Kernel,
    workers: int = 1,
    journal: Journal | None = None,
    bits: BitSink | None = None,
    on_unit: Callable[[WorkUnit], None] | None = None,
) -> tuple[Tally, ...]:
    """Compare all pairs of a plan; one merged tally a pair, in plan order.

    Args:
        plan: What to do.
        kernel: The kernel all workers use.
        workers: Threads; kernels release the interpreter lock.
        journal: Where finished units are recorded, and found again.
        bits: Where mask bits go.
        on_unit: Called in the main thread for each unit done, journaled ones included.

    Raises:
        ChangedInputError: A file changed during the run.
    """
    tallies = [Tally()] * len(plan.pairs)
    todo = []
    for unit in plan.units:
        known = journal.done.get(unit.key) if journal is not None else None
        if known is None:
            todo.append(unit)
        else:
            tallies[unit.pair] = tallies[unit.pair].merge(known)
            if on_unit is not None:
                on_unit(unit)
    base, tuned = OpenFiles(plan.base), OpenFiles(plan.tuned)

    try:
        results = _results(plan, todo, base=base, tuned=tuned, kernel=kernel, bits=bits, workers=workers)
        with closing(results):  # reads end before their files are closed
            for unit, tally in results:
                reached("unit compared")
                if journal is not None:
                    journal.append(unit.key, tally)
                    reached("unit journaled")
                tallies[unit.pair] = tallies[unit.pair].merge(tally)
                if on_unit is not None:
                    on_unit(unit)
    finally:
        base.close()
        tuned.close()
    reached("pass finished")
    return tuple(tallies)


def _results(
    plan: Plan,
    units: list[WorkUnit],
    *,
    base: OpenFiles,
    tuned: OpenFiles,
    kernel: Kernel,
    bits: BitSink | None,
    workers: int,
) -> Generator[tuple[WorkUnit, Tally], None, None]:
    if kernel.name != "device":
        return in_threads(
            lambda unit: _run_unit(plan, unit, base=base, tuned=tuned, kernel=kernel, bits=bits),
            units,
            workers=workers,
        )
    from sparsity_audit.compare.device_kernel import DeviceKernel
    from sparsity_audit.passes.device_stream import stream_units

    assert isinstance(kernel, DeviceKernel)
    return stream_units(plan, units, kernel=kernel, base=base, tuned=tuned, bits=bits)


def in_threads(
    work: Callable[[WorkUnit], _Result], units: Iterable[WorkUnit], *, workers: int
) -> Generator[tuple[WorkUnit, _Result], None, None]:
    """Results as they finish; at most two units a worker are queued, so that an error stops soon."""
    if workers == 1:
        for unit in units:
            yield unit, work(unit)
        return
    queue = iter(units)
    with ThreadPoolExecutor(max_workers=workers, thread_name_prefix="compare") as pool:
        running: dict[Future[_Result], WorkUnit] = {}
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


_buffers = threading.local()


def _buffer(name: str, num_bytes: int) -> memoryview:
    """This thread's reused buffer; a fresh one per block would fault its pages again and again."""
    held: bytearray | None = getattr(_buffers, name, None)
    if held is None or len(held) < num_bytes:
        held = bytearray(max(num_bytes, BLOCK_BYTES))
        setattr(_buffers, name, held)
    return memoryview(held)[:num_bytes]


def read_blocks(
    plan: Plan, unit: WorkUnit, *, base: OpenFiles, tuned: OpenFiles
) -> Iterator[tuple[Block, np.ndarray, np.ndarray]]:
    """The unit's blocks with both sides' stored codes, in buffers that the next block overwrites."""
    pair, spec = plan.pairs[unit.pair], plan.specs[unit.pair]
    cols = pair.base.rows_cols[1]
    for block in blocks_of(unit, itemsize=max(spec.base.itemsize, spec.tuned.itemsize)):
        first, shape = block.row * cols + block.col, (block.num_rows, block.num_cols)
        yield (
            block,
            _read(pair.base, base, "base", first, shape),
            _read(pair.tuned, tuned, "tuned", first, shape),
        )
    plan.base.files[pair.base.spec.file].verify_unchanged()
    plan.tuned.files[pair.tuned.spec.file].verify_unchanged()


def _read(part: TensorSlice, files: OpenFiles, side: str, first_entry: int, shape: tuple[int, int]) -> np.ndarray:
    itemsize = part.spec.dtype.itemsize
    view = _buffer(side, shape[0] * shape[1] * itemsize)
    if len(view):
        read_entries(files[part.spec.file], part.spec, part.start_entry + first_entry, view)
    return np.frombuffer(view, dtype=CODE_DTYPE[itemsize]).reshape(shape)


def _run_unit(
    plan: Plan, unit: WorkUnit, *, base: OpenFiles, tuned: OpenFiles, kernel: Kernel, bits: BitSink | None
) -> Tally:
    pair, spec = plan.pairs[unit.pair], plan.specs[unit.pair]
    rows, cols = pair.base.rows_cols
    comparer = UnitComparer(spec, kernel, rows=rows, cols=cols, first_entry=unit.first_entry)
    for block, base_codes, tuned_codes in read_blocks(plan, unit, base=base, tuned=tuned):
        packed = None
        if bits is not None:
            packed = np.empty((block.num_rows, -(-block.num_cols // 8)), dtype=np.uint8)
        comparer.add(base_codes, tuned_codes, first_row=block.row, first_col=block.col, bits=packed)
        if bits is not None and packed is not None:
            bits.write(pair, first_row=block.row, first_col=block.col, bits=packed)
    return comparer.tally()
