"""Run a plan: read both sides block by block, compare, write mask bits, merge tallies.

Contract: memory is a few blocks a worker, whatever the checkpoint's size. Results do not depend on the
number of workers or on interruption: tallies are exact and merge in any order. Each unit ends with a
check that its files are still the catalogued ones, before it is journaled.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing

import numpy as np

from sparsity_audit.align.records import TensorSlice
from sparsity_audit.checkpoint.reading import read_entries
from sparsity_audit.compare.accumulate import CODE_DTYPE, Kernel
from sparsity_audit.compare.dispatch import load_kernel
from sparsity_audit.compare.numpy_kernel import to_float64
from sparsity_audit.compare.pair import PairSpec, UnitComparer, unchanged_tally
from sparsity_audit.compare.scaled import Descaler, ScaledUnitComparer
from sparsity_audit.passes.ahead import Reads
from sparsity_audit.passes.engine import BitSink, Workers, map_bits
from sparsity_audit.passes.journal import Journal
from sparsity_audit.passes.open_files import OpenFiles
from sparsity_audit.passes.plan import BLOCK_BYTES, Block, Plan, WorkUnit, blocks_of
from sparsity_audit.seams import reached
from sparsity_audit.stats.tally import Tally

__all__ = [
    "BitSink",
    "descaler",
    "merge_tallies",
    "read_blocks",
    "read_part",
    "read_values",
    "run_plan",
]

_DEVICE_RUN = 16
"""Units that one task of an engine streams through its device: enough to hide start and end of the stream."""


def run_plan(
    plan: Plan,
    *,
    kernel: Kernel,
    workers: Workers = 1,
    journal: Journal | None = None,
    bits: BitSink | None = None,
    on_unit: Callable[[WorkUnit], None] | None = None,
) -> tuple[Tally, ...]:
    """Compare all pairs of a plan; one merged tally a pair, in plan order.

    Args:
        plan: What to do.
        kernel: The kernel all workers use.
        workers: Threads (kernels release the interpreter lock), or an engine.
        journal: Where finished units are recorded, and found again.
        bits: Where mask bits go.
        on_unit: Called in the main thread for each unit done, journaled ones included.

    Raises:
        ChangedInputError: A file changed during the run.
    """
    merged = _Merged(plan)
    todo = []
    for unit in plan.units:
        known = journal.done.get(unit.key) if journal is not None else None
        if known is None:
            todo.append(unit)
        else:
            merged.add(unit, known)
            if on_unit is not None:
                on_unit(unit)
    base, tuned = OpenFiles(plan.base), OpenFiles(plan.tuned)

    try:
        todo = Reads(plan.parts_of, (base, tuned)).ordered(todo)
        results = _results(plan, todo, base=base, tuned=tuned, kernel=kernel, bits=bits, workers=workers)
        with closing(results):  # reads end before their files are closed
            for unit, tally in results:
                reached("unit compared")
                if journal is not None:
                    journal.append(unit.key, tally)
                    reached("unit journaled")
                merged.add(unit, tally)
                if on_unit is not None:
                    on_unit(unit)
    finally:
        base.close()
        tuned.close()
    reached("pass finished")
    return tuple(merged.tallies)


def merge_tallies(plan: Plan, found: Iterable[tuple[WorkUnit, Tally]]) -> tuple[Tally, ...]:
    """One tally a pair, in plan order, from those of its units in any order."""
    merged = _Merged(plan)
    for unit, tally in found:
        merged.add(unit, tally)
    return tuple(merged.tallies)


class _Merged:
    """The pairs' tallies while units come in; a complete one is kept in little memory."""

    def __init__(self, plan: Plan) -> None:
        self.tallies = [Tally()] * len(plan.pairs)
        self._missing = Counter(unit.pair for unit in plan.units)

    def add(self, unit: WorkUnit, tally: Tally) -> None:
        total = self.tallies[unit.pair].merge(tally)
        self._missing[unit.pair] -= 1
        self.tallies[unit.pair] = total if self._missing[unit.pair] else total.compact()


def _results(
    plan: Plan,
    units: Sequence[WorkUnit],
    *,
    base: OpenFiles,
    tuned: OpenFiles,
    kernel: Kernel,
    bits: BitSink | None,
    workers: Workers,
) -> Generator[tuple[WorkUnit, Tally], None, None]:
    reads = Reads(plan.parts_of, (base, tuned))
    if kernel.name != "device":

        def compare(unit: WorkUnit, bits: BitSink | None) -> Tally:
            return _run_unit(plan, unit, base=base, tuned=tuned, kernel=kernel, bits=bits)

        yield from map_bits(compare, units, workers=workers, bits=bits, ahead=reads)
        return
    if not isinstance(workers, int):
        yield from _on_devices(plan, units, base=base, tuned=tuned, kernel=kernel, bits=bits, workers=workers)
        return
    from sparsity_audit.compare.device_kernel import DeviceKernel
    from sparsity_audit.passes.device_stream import stream_units

    assert isinstance(kernel, DeviceKernel)
    plain = [unit for unit in units if not _is_for_host(plan.specs[unit.pair])]
    reads.announce(plain)
    yield from stream_units(plan, plain, kernel=kernel, base=base, tuned=tuned, bits=bits)
    others = [unit for unit in units if _is_for_host(plan.specs[unit.pair])]
    if others:  # every kernel gives the same counts
        host = load_kernel("auto", num_bytes=plan.num_bytes)
        yield from _results(plan, others, base=base, tuned=tuned, kernel=host, bits=bits, workers=workers)


def _is_for_host(spec: PairSpec) -> bool:
    """Whether the host compares a pair: devices read both sides, and take codes for values."""
    return spec.scaled or spec.known_equal


def _on_devices(
    plan: Plan,
    units: Sequence[WorkUnit],
    *,
    base: OpenFiles,
    tuned: OpenFiles,
    kernel: Kernel,
    bits: BitSink | None,
    workers: Workers,
) -> Generator[tuple[WorkUnit, Tally], None, None]:
    """Runs of units, each streamed through the device of the process that gets it."""

    def stream(run: tuple[WorkUnit, ...], bits: BitSink | None) -> list[tuple[WorkUnit, Tally]]:
        return list(_results(plan, list(run), base=base, tuned=tuned, kernel=kernel, bits=bits, workers=1))

    runs = [tuple(units[i : i + _DEVICE_RUN]) for i in range(0, len(units), _DEVICE_RUN)]
    for _, found in map_bits(stream, runs, workers=workers, bits=bits):
        yield from found


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
    held = spec.of_values
    for block in blocks_of(unit, itemsize=max(held.base.itemsize, held.tuned.itemsize)):
        first, shape = block.row * cols + block.col, (block.num_rows, block.num_cols)
        base_codes = read_part(pair.base, base, "base", first, shape)
        if spec.known_equal:
            yield block, base_codes, base_codes
        else:
            yield block, base_codes, read_part(pair.tuned, tuned, "tuned", first, shape)
    for catalogue, part in ((plan.base, pair.base), (plan.tuned, pair.tuned)):
        catalogue.files[part.spec.file].verify_unchanged()
        if part.scale is not None:
            catalogue.files[part.scale.spec.file].verify_unchanged()


def descaler(part: TensorSlice, files: OpenFiles) -> Descaler:
    """What makes values of the slice's codes; reads its scales, 4 bytes for some 16 thousand codes."""
    if part.scale is None:
        return Descaler(part, None)
    spec = part.scale.spec
    codes = np.empty(spec.num_entries, dtype=CODE_DTYPE[spec.dtype.itemsize])
    if codes.size:
        read_entries(files[spec.file], spec, 0, codes.view(np.uint8).data)
    return Descaler(part, to_float64(codes, spec.dtype))


def read_values(
    plan: Plan, unit: WorkUnit, *, base: OpenFiles, tuned: OpenFiles
) -> Iterator[tuple[Block, np.ndarray, np.ndarray]]:
    """`read_blocks`, but where the pair is scaled fp64 codes of its values (see `PairSpec.of_values`)."""
    blocks, pair = read_blocks(plan, unit, base=base, tuned=tuned), plan.pairs[unit.pair]
    if not plan.specs[unit.pair].scaled:
        yield from blocks
        return
    of_base, of_tuned = descaler(pair.base, base), descaler(pair.tuned, tuned)
    for block, base_codes, tuned_codes in blocks:
        where = {"first_row": block.row, "first_col": block.col}
        yield block, of_base(base_codes, **where), of_tuned(tuned_codes, **where)


def read_part(
    part: TensorSlice, files: OpenFiles, side: str, first_entry: int, shape: tuple[int, int]
) -> np.ndarray:
    """Stored codes of some entries of a part, in this thread's buffer of that name, until the next."""
    itemsize = part.spec.dtype.itemsize
    view = _buffer(side, shape[0] * shape[1] * itemsize)
    if len(view):
        spec, start = part.source
        read_entries(files[spec.file], spec, start + first_entry, view)
    return np.frombuffer(view, dtype=CODE_DTYPE[itemsize]).reshape(shape)


def _run_unit(
    plan: Plan, unit: WorkUnit, *, base: OpenFiles, tuned: OpenFiles, kernel: Kernel, bits: BitSink | None
) -> Tally:
    pair, spec = plan.pairs[unit.pair], plan.specs[unit.pair]
    if spec.unread:
        assert bits is None, "a mask needs fingerprints"
        return unchanged_tally(spec, unit.num_entries)
    rows, cols = pair.base.rows_cols
    place = {"rows": rows, "cols": cols, "first_entry": unit.first_entry}
    if spec.scaled:
        descalers = descaler(pair.base, base), descaler(pair.tuned, tuned)
        comparer = ScaledUnitComparer(spec, kernel, **place, descalers=descalers)
    else:
        comparer = UnitComparer(spec, kernel, **place)
    for block, base_codes, tuned_codes in read_blocks(plan, unit, base=base, tuned=tuned):
        packed = None
        if bits is not None:
            packed = np.empty((block.num_rows, -(-block.num_cols // 8)), dtype=np.uint8)
        comparer.add(base_codes, tuned_codes, first_row=block.row, first_col=block.col, bits=packed)
        if bits is not None and packed is not None:
            bits.write(pair, first_row=block.row, first_col=block.col, bits=packed)
    return comparer.tally()
