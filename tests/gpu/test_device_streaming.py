"""Streaming through a device against the thread pool on the CPU, and its order, reuse and errors.

Stands alone; run as `test_device_equality` says.
"""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsity_audit.align.records import Alignment, Pair, TensorSlice
from sparsity_audit.checkpoint.store import Catalogue, FileEntry
from sparsity_audit.compare.device_kernel import DeviceKernel
from sparsity_audit.compare.numpy_kernel import NumpyKernel
from sparsity_audit.compare.pair import PairSpec
from sparsity_audit.errors import ChangedInputError
from sparsity_audit.passes.device_stream import Reader, stream_blocks, stream_units
from sparsity_audit.passes.execute import run_plan
from sparsity_audit.passes.open_files import OpenFiles
from sparsity_audit.passes.plan import default_criteria, make_plan
from sparsity_audit.types import ByteRange, Criterion, DType, TensorSpec, View

CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    ],
)
on_each_device = pytest.mark.parametrize("device", ["cpu", CUDA])

TENSORS = (
    ("bf16", DType.BF16, DType.BF16, (33, 40)),
    ("bias", DType.BF16, DType.BF16, (7,)),
    ("empty", DType.F32, DType.F32, (0, 4)),
    ("fp8", DType.F8_E4M3, DType.F8_E4M3, (5, 3)),
    ("long row", DType.F16, DType.F16, (1, 3001)),
    ("mixed floats", DType.F32, DType.BF16, (19, 21)),
    ("mixed fp16", DType.F16, DType.F32, (8, 9)),
    ("mixed ints", DType.I32, DType.I8, (9, 11)),
    ("no columns", DType.F32, DType.F32, (3, 0)),
    ("odd rows", DType.F32, DType.F32, (3, 1001)),
    ("scalar", DType.I64, DType.I64, ()),
    ("transposed", DType.F32, DType.F32, (12, 10)),
    ("uint64", DType.U64, DType.U64, (17, 5)),
)


class Bits:
    """A sink that keeps every bit in one padded matrix a pair."""

    def __init__(self) -> None:
        self.masks: dict[str, np.ndarray] = {}
        self._lock = threading.Lock()

    def write(self, pair: Pair, *, first_row: int, first_col: int, bits: np.ndarray) -> None:
        rows, cols = pair.base.rows_cols
        with self._lock:
            mask = self.masks.setdefault(pair.name, np.zeros((rows, -(-cols // 8)), dtype=np.uint8))
            mask[first_row : first_row + bits.shape[0], first_col // 8 : first_col // 8 + bits.shape[1]] = (
                bits
            )


def make_plan_of_all_kinds(folder: Path, *, view: View, unit_bytes: int):
    """Two files of random codes, the tuned one a partly changed copy where the dtypes agree."""
    rng = np.random.default_rng(11)
    sides: dict[str, list[TensorSpec]] = {"base": [], "tuned": []}
    content = {"base": bytearray(), "tuned": bytearray()}
    for name, base, tuned, shape in TENSORS:
        count = int(np.prod(shape, dtype=np.int64))
        codes = rng.integers(0, 256, count * base.itemsize, dtype=np.uint8)
        other = rng.integers(0, 256, count * tuned.itemsize, dtype=np.uint8)
        if base is tuned:
            other = np.where(rng.random(len(codes)) < 0.2, other, codes)
        for side, dtype, data in (("base", base, codes), ("tuned", tuned, other)):
            start = len(content[side])
            content[side] += data.tobytes()
            strides = (1, 12) if name == "transposed" and side == "tuned" else None
            extent = ByteRange(start=start, stop=len(content[side]))
            sides[side].append(
                TensorSpec(name=name, dtype=dtype, shape=shape, file=0, extent=extent, strides=strides)
            )
    catalogues = {}
    for side, specs in sides.items():
        path = folder / f"{side}.bin"
        path.write_bytes(content[side])
        catalogues[side] = Catalogue(
            reference=side,
            resolved=side,
            files=(FileEntry.from_path(path),),
            tensors={spec.name: spec for spec in specs},
        )
    pairs = tuple(
        Pair(name=a.name, base=TensorSlice.whole(a), tuned=TensorSlice.whole(b), rule="exact")
        for a, b in zip(sides["base"], sides["tuned"], strict=True)
    )
    criteria = default_criteria((Criterion.parse("ulp:3"),))
    specs = tuple(
        PairSpec(
            base=p.base.spec.dtype,
            tuned=p.tuned.spec.dtype,
            criteria=criteria,
            view=view,
            shrink=1e-4 if p.base.spec.dtype is DType.F32 else None,
        )
        for p in pairs
    )
    totals = {"base": catalogues["base"].num_entries, "tuned": catalogues["tuned"].num_entries}
    alignment = Alignment(pairs=pairs, skipped=(), leftovers=(), findings=(), totals=totals)
    return make_plan(catalogues["base"], catalogues["tuned"], alignment, specs=specs, unit_bytes=unit_bytes)


def stream(plan, *, device: str, bits: Bits, slots: int, slot_bytes: int):
    """The merged tallies of a plan, by pair, and the units in the order they came."""
    base, tuned = OpenFiles(plan.base), OpenFiles(plan.tuned)
    tallies, units = {}, []
    kernel = DeviceKernel(device)
    try:
        for unit, tally in stream_units(
            plan,
            plan.units,
            kernel=kernel,
            base=base,
            tuned=tuned,
            bits=bits,
            slots=slots,
            slot_bytes=slot_bytes,
        ):
            units.append(unit)
            tallies[unit.pair] = tallies[unit.pair].merge(tally) if unit.pair in tallies else tally
    finally:
        base.close()
        tuned.close()
    return tuple(tallies[number] for number in range(len(plan.pairs))), units


@on_each_device
@pytest.mark.parametrize("view", list(View))
@pytest.mark.parametrize(
    ("slots", "slot_bytes", "unit_bytes"), [(1, 512, 700), (3, 900, 4000), (4, 1 << 20, 1 << 20)]
)
def test_a_streamed_plan_gives_the_tallies_and_bits_of_the_thread_pool(
    tmp_path, view, slots, slot_bytes, unit_bytes, device
):
    plan = make_plan_of_all_kinds(tmp_path, view=view, unit_bytes=unit_bytes)
    expected_bits, got_bits = Bits(), Bits()
    expected = run_plan(plan, kernel=NumpyKernel(), bits=expected_bits)
    got, units = stream(plan, device=device, bits=got_bits, slots=slots, slot_bytes=slot_bytes)
    assert units == list(plan.units)
    assert got == expected
    assert {n: m.tobytes() for n, m in got_bits.masks.items() if m.size} == {
        n: m.tobytes() for n, m in expected_bits.masks.items() if m.size
    }


@on_each_device
def test_a_pass_with_the_device_kernel_streams_and_gives_the_same_result(tmp_path, device):
    plan = make_plan_of_all_kinds(tmp_path, view=View.NATIVE, unit_bytes=2000)
    seen = []
    got = run_plan(plan, kernel=DeviceKernel(device), on_unit=seen.append)
    assert got == run_plan(plan, kernel=NumpyKernel())
    assert seen == list(plan.units)


@on_each_device
def test_a_file_that_ends_early_is_one_error(tmp_path, device):
    plan = make_plan_of_all_kinds(tmp_path, view=View.NATIVE, unit_bytes=1 << 20)
    path = tmp_path / "tuned.bin"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ChangedInputError, match=r"tuned\.bin"):
        stream(plan, device=device, bits=Bits(), slots=2, slot_bytes=1 << 12)


@on_each_device
def test_blocks_come_in_order_and_slots_are_reused_only_after_use(device):
    sent = [np.random.default_rng(n).integers(0, 256, (2, n * 97 % 640), dtype=np.uint8) for n in range(40)]

    def reader(data: np.ndarray) -> Reader:
        def read(buffer: memoryview) -> None:
            buffer[:] = data.tobytes()

        return Reader(num_bytes=len(data), read=read)

    blocks = ((n, reader(base), reader(tuned)) for n, (base, tuned) in enumerate(sent))
    for n, got in enumerate(stream_blocks(blocks, device=device, slots=3, slot_bytes=640)):
        assert got.block == n
        assert got.base.device.type == torch.device(device).type
        assert got.base.cpu().numpy().tobytes() == sent[n][0].tobytes()
        assert got.tuned.cpu().numpy().tobytes() == sent[n][1].tobytes()
    assert n == len(sent) - 1


@on_each_device
def test_no_more_blocks_are_read_ahead_than_there_are_slots(device):
    started = []

    def blocks():
        for n in range(10):
            started.append(n)
            reader = Reader(num_bytes=8, read=lambda buffer: None)
            yield n, reader, reader

    stream_of_blocks = stream_blocks(blocks(), device=device, slots=2, slot_bytes=8)
    next(stream_of_blocks)
    assert started == [0, 1]
    next(stream_of_blocks)
    assert started == [0, 1, 2]
    stream_of_blocks.close()
    assert started == [0, 1, 2]


@on_each_device
def test_a_readers_error_comes_when_its_block_is_due(device):
    def fail(buffer: memoryview) -> None:
        raise OSError("unreadable sector")

    good = Reader(num_bytes=8, read=lambda buffer: None)
    blocks = [(0, good, good), (1, good, Reader(num_bytes=8, read=fail)), (2, good, good)]
    streamed = stream_blocks(blocks, device=device, slots=2, slot_bytes=8)
    assert next(streamed).block == 0
    with pytest.raises(OSError, match="unreadable sector"):
        next(streamed)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read")]


@on_each_device
def test_nothing_to_stream_gives_nothing(device):
    assert list(stream_blocks([], device=device)) == []
