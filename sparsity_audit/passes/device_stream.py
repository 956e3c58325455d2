"""Stream both sides of a plan through a device: read, copy and compute at the same time.

Contract: same tallies, bits and errors as the thread pool of `execute`. Reader threads read straight into
page-locked slots and start the copies, each side on a copy stream of its own; the caller's stream
computes; only mask bits and counts come back. Host and device memory are `slots` blocks a side each.
On `cpu` the same code runs without page-locking and streams, so that it is tested everywhere.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from sparsity_audit.align.records import TensorSlice
from sparsity_audit.checkpoint.reading import read_entries
from sparsity_audit.compare.device_codes import block_codes
from sparsity_audit.compare.device_kernel import DeviceKernel
from sparsity_audit.compare.device_pair import DeviceUnitComparer
from sparsity_audit.passes.engine import BitSink
from sparsity_audit.passes.open_files import OpenFiles
from sparsity_audit.passes.plan import Block, Plan, WorkUnit, blocks_of
from sparsity_audit.stats.tally import Tally

__all__ = ["NUM_SLOTS", "SLOT_BYTES", "Reader", "StreamedBlock", "stream_blocks", "stream_units"]

SLOT_BYTES = 64 << 20
NUM_SLOTS = 4
_MIN_SLOT_BYTES = 512
"""Blocks are cut at multiples of 64 entries of at most 8 bytes."""

_Block = TypeVar("_Block")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """How one side of one block is read: `read` fills a buffer of `num_bytes`, in any thread."""

    num_bytes: int
    read: Callable[[memoryview], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamedBlock(Generic[_Block]):
    """A block on the device, valid until the next one is asked for.

    Args:
        block: What the caller asked to be read.
        base: Its base bytes, uint8.
        tuned: Its tuned bytes, uint8.
    """

    block: _Block
    base: torch.Tensor
    tuned: torch.Tensor


def stream_blocks(
    blocks: Iterable[tuple[_Block, Reader, Reader]],
    *,
    device: str,
    slots: int = NUM_SLOTS,
    slot_bytes: int = SLOT_BYTES,
) -> Generator[StreamedBlock[_Block], None, None]:
    """The blocks in order, read and copied up to `slots` blocks ahead of their use.

    Use the tensors on the stream that is current while iterating.

    Args:
        blocks: Blocks with the readers of the base and the tuned side, each at most `slot_bytes`.
        device: `cpu`, `cuda` or `cuda:i`.
        slots: Blocks in flight.
        slot_bytes: Bytes of one slot on one side.

    Raises:
        Exception: Whatever a reader raised, when its block's turn comes.
    """
    target, queue = torch.device(device), iter(blocks)
    streams = [torch.cuda.Stream(target) for _ in range(2)] if target.type == "cuda" else [None, None]
    in_flight: deque[tuple[_Slot, _Block, list[Future[torch.Tensor]]]] = deque()
    pool = ThreadPoolExecutor(max_workers=2 * slots, thread_name_prefix="read")

    def start(slot: _Slot | None) -> None:
        item = next(queue, None)
        if item is None:
            return
        slot = slot or _Slot(target, slot_bytes, streams)
        sides = zip(slot.sides, item[1:], strict=True)
        futures = [pool.submit(side.fill, reader, after=slot.consumed) for side, reader in sides]
        in_flight.append((slot, item[0], futures))

    try:
        for _ in range(slots):
            start(None)
        while in_flight:
            slot, block, futures = in_flight[0]
            base, tuned = (future.result() for future in futures)
            slot.wait_copied()
            yield StreamedBlock(block=block, base=base, tuned=tuned)
            slot.mark_consumed()
            in_flight.popleft()
            start(slot)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        for stream in streams:
            if stream is not None:
                stream.synchronize()


class _Slot:
    """Room for one block on both sides, on the host and on the device."""

    def __init__(
        self, device: torch.device, num_bytes: int, streams: list[torch.cuda.Stream] | list[None]
    ) -> None:
        self._device = device
        self.sides = [_Side(device, num_bytes, stream) for stream in streams]
        self.consumed = torch.cuda.Event() if device.type == "cuda" else None

    def wait_copied(self) -> None:
        """Let the current stream wait for the copies of both sides."""
        for side in self.sides:
            if side.copied is not None:
                torch.cuda.current_stream(self._device).wait_event(side.copied)

    def mark_consumed(self) -> None:
        """Note on the current stream that everything that uses the block has been queued."""
        if self.consumed is not None:
            self.consumed.record(torch.cuda.current_stream(self._device))


class _Side:
    def __init__(self, device: torch.device, num_bytes: int, stream: torch.cuda.Stream | None) -> None:
        self._host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=stream is not None)
        self._resident = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self._stream = stream
        self.copied = None
        if stream is not None:
            self.copied = torch.cuda.Event(blocking=True)
            # The memory may have been freed by work that is still queued on the caller's stream.
            stream.wait_stream(torch.cuda.current_stream(device))

    def fill(self, reader: Reader, *, after: torch.cuda.Event | None) -> torch.Tensor:
        """Read into the host's half and start the copy; returns the device's half."""
        if self.copied is not None:
            self.copied.synchronize()
        host, resident = self._host[: reader.num_bytes], self._resident[: reader.num_bytes]
        reader.read(host.numpy().data)
        with contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            if self._stream is not None and after is not None:
                self._stream.wait_event(after)
            resident.copy_(host, non_blocking=True)
            if self.copied is not None:
                self.copied.record(self._stream)
        return resident


def stream_units(
    plan: Plan,
    units: Iterable[WorkUnit],
    *,
    kernel: DeviceKernel,
    base: OpenFiles,
    tuned: OpenFiles,
    bits: BitSink | None,
    slots: int = NUM_SLOTS,
    slot_bytes: int = SLOT_BYTES,
) -> Generator[tuple[WorkUnit, Tally], None, None]:
    """Compare work units on the kernel's device; results in order, what `engine.map_units` gives.

    Raises:
        ChangedInputError: A file changed during the run.
    """
    units = list(units)
    largest = max((_unit_bytes(plan, unit) for unit in units), default=0)
    slot_bytes = max(min(slot_bytes, largest), _MIN_SLOT_BYTES)
    queue = _blocks(plan, units, base=base, tuned=tuned, block_bytes=slot_bytes)
    blocks = stream_blocks(queue, device=str(kernel.device), slots=slots, slot_bytes=slot_bytes)
    comparer = None
    with contextlib.closing(blocks):
        for streamed in blocks:
            unit, block, is_last = streamed.block
            pair, spec = plan.pairs[unit.pair], plan.specs[unit.pair]
            if comparer is None:
                rows, cols = pair.base.rows_cols
                first = unit.first_entry
                comparer = DeviceUnitComparer(spec, kernel, rows=rows, cols=cols, first_entry=first)
            shape, where = (block.num_rows, block.num_cols), {"first_row": block.row, "first_col": block.col}
            base_codes = block_codes(streamed.base, spec.base, shape)
            tuned_codes = block_codes(streamed.tuned, spec.tuned, shape)
            packed = comparer.add_tensors(base_codes, tuned_codes, **where, want_bits=bits is not None)
            if bits is not None and packed is not None:
                bits.write(pair, **where, bits=packed.cpu().numpy())
            if is_last:
                plan.base.files[pair.base.spec.file].verify_unchanged()
                plan.tuned.files[pair.tuned.spec.file].verify_unchanged()
                yield unit, comparer.tally()
                comparer = None


def _unit_bytes(plan: Plan, unit: WorkUnit) -> int:
    spec = plan.specs[unit.pair]
    return unit.num_entries * max(spec.base.itemsize, spec.tuned.itemsize)


def _blocks(
    plan: Plan, units: list[WorkUnit], *, base: OpenFiles, tuned: OpenFiles, block_bytes: int
) -> Iterator[tuple[tuple[WorkUnit, Block, bool], Reader, Reader]]:
    """Each unit's blocks, the last one marked; an empty unit has one empty block."""
    for unit in units:
        pair, spec = plan.pairs[unit.pair], plan.specs[unit.pair]
        itemsize = max(spec.base.itemsize, spec.tuned.itemsize)
        blocks = list(blocks_of(unit, itemsize=itemsize, block_bytes=block_bytes))
        if not blocks:
            (row, row_stop), (col, col_stop) = unit.rows, unit.cols
            blocks = [Block(row=row, num_rows=row_stop - row, col=col, num_cols=col_stop - col)]
        for block in blocks:
            first = block.row * pair.base.rows_cols[1] + block.col
            num_entries = block.num_rows * block.num_cols
            yield (
                (unit, block, block is blocks[-1]),
                _reader(pair.base, base, first, num_entries),
                _reader(pair.tuned, tuned, first, num_entries),
            )


def _reader(part: TensorSlice, files: OpenFiles, first_entry: int, num_entries: int) -> Reader:
    def read(buffer: memoryview) -> None:
        if num_entries:
            spec, start = part.source
            read_entries(files[spec.file], spec, start + first_entry, buffer)

    return Reader(num_bytes=num_entries * part.spec.dtype.itemsize, read=read)
