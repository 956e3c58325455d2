"""`read_entries` gives the bytes torch and numpy give, for every layout."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsity_audit.checkpoint import reading
from sparsity_audit.checkpoint.reading import read_entries
from sparsity_audit.checkpoint.store import FileEntry, LocalFile
from sparsity_audit.errors import ChangedInputError
from sparsity_audit.types import ByteRange, DType, TensorSpec

DTYPE_OF_SIZE = {1: DType.U8, 2: DType.BF16, 4: DType.F32, 8: DType.F64}


def write_storage(folder: Path, *, num_bytes: int) -> tuple[FileEntry, bytes]:
    data = np.random.default_rng(7).integers(0, 256, num_bytes, dtype=np.uint8).tobytes()
    path = folder / "storage"
    path.write_bytes(data)
    return FileEntry.from_path(path), data


def spec_of(shape, strides, *, itemsize, offset=0, big_endian=False) -> TensorSpec:
    span = sum((s - 1) * t for s, t in zip(shape, strides, strict=True)) + 1
    return TensorSpec(
        name="w",
        dtype=DTYPE_OF_SIZE[itemsize],
        shape=shape,
        file=0,
        extent=ByteRange(start=offset * itemsize, stop=(offset + span) * itemsize),
        strides=strides,
        big_endian=big_endian,
    )


def expected(data: bytes, spec: TensorSpec) -> bytes:
    order = ">" if spec.big_endian else "<"
    words = np.frombuffer(data, dtype=f"{order}u{spec.dtype.itemsize}", offset=spec.extent.start)
    view = np.lib.stride_tricks.as_strided(
        words, spec.shape, [s * spec.dtype.itemsize for s in spec.strides or ()]
    )
    return view.astype(f"<u{spec.dtype.itemsize}").tobytes()


def read(entry: FileEntry, spec: TensorSpec, start: int, stop: int) -> bytes:
    out = bytearray((stop - start) * spec.dtype.itemsize)
    with LocalFile(entry) as source:
        read_entries(source, spec, start, memoryview(out))
    return bytes(out)


@st.composite
def strided_cases(draw):
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=4)))
    strides = tuple(draw(st.integers(0, 40)) for _ in shape)
    itemsize = draw(st.sampled_from([1, 2, 4, 8]))
    spec = spec_of(
        shape, strides, itemsize=itemsize, offset=draw(st.integers(0, 50)), big_endian=draw(st.booleans())
    )
    start = draw(st.integers(0, spec.num_entries))
    return spec, start, draw(st.integers(start, spec.num_entries))


@settings(deadline=None, max_examples=300)
@given(
    case=strided_cases(),
    max_span=st.sampled_from([8, 64, 1 << 22]),
    max_gap=st.sampled_from([0, 16, 1 << 16]),
)
def test_any_range_of_any_strided_tensor_equals_numpy(tmp_path_factory, case, max_span, max_gap):
    spec, start, stop = case
    entry, data = write_storage(tmp_path_factory.getbasetemp(), num_bytes=4096)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "MAX_SPAN_BYTES", max_span)
        patch.setattr(reading, "_MAX_GAP_BYTES", max_gap)
        got = read(entry, spec, start, stop)
    item = spec.dtype.itemsize
    assert got == expected(data, spec)[start * item : stop * item]


def test_a_transposed_matrix_is_read_with_bounded_scratch(tmp_path):
    rows, cols = 1500, 2000
    entry, data = write_storage(tmp_path, num_bytes=rows * cols * 2)
    spec = spec_of((cols, rows), (1, cols), itemsize=2)
    sizes = []

    class Recording(LocalFile):
        def read_into(self, buffer, offset):
            sizes.append(len(buffer))
            super().read_into(buffer, offset)

    out = bytearray(64 * rows * 2)
    with Recording(entry) as source:
        read_entries(source, spec, 100 * rows, memoryview(out))
    assert bytes(out) == expected(data, spec)[100 * rows * 2 : 164 * rows * 2]
    assert max(sizes) <= reading.MAX_SPAN_BYTES
    assert sum(sizes) <= len(data)
    assert len(sizes) <= 3


def test_rows_far_apart_are_read_one_by_one(tmp_path):
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(1 << 30)
        for i in range(4):
            file.seek(i << 28)
            file.write(bytes([i + 1]) * 8)
    spec = spec_of((8, 4), (1, 1 << 28), itemsize=1)
    assert read(FileEntry.from_path(path), spec, 0, 32) == bytes([1, 2, 3, 4]) * 8


def test_a_contiguous_tensor_takes_exactly_one_read(tmp_path):
    entry, data = write_storage(tmp_path, num_bytes=1 << 16)
    spec = TensorSpec(
        name="w", dtype=DType.BF16, shape=(100, 200), file=0, extent=ByteRange(start=66, stop=40066)
    )
    calls = []

    class Counting(LocalFile):
        def read_into(self, buffer, offset):
            calls.append((len(buffer), offset))
            super().read_into(buffer, offset)

    out = bytearray(3000)
    with Counting(entry) as source:
        read_entries(source, spec, 17, memoryview(out))
    assert calls == [(3000, 66 + 34)]
    assert bytes(out) == data[100:3100]


def test_contiguous_big_endian_codes_are_swapped(tmp_path):
    entry, data = write_storage(tmp_path, num_bytes=80)
    spec = TensorSpec(
        name="w", dtype=DType.F64, shape=(10,), file=0, extent=ByteRange(start=0, stop=80), big_endian=True
    )
    assert read(entry, spec, 2, 9) == np.frombuffer(data, ">u8")[2:9].astype("<u8").tobytes()


def test_the_two_halves_of_a_big_endian_complex_entry_keep_their_order(tmp_path):
    entry, data = write_storage(tmp_path, num_bytes=16)
    spec = TensorSpec(
        name="w", dtype=DType.C64, shape=(2,), file=0, extent=ByteRange(start=0, stop=16), big_endian=True
    )
    assert read(entry, spec, 0, 2) == np.frombuffer(data, ">u4").astype("<u4").tobytes()


def test_scalars_and_empty_ranges_are_read(tmp_path):
    entry, data = write_storage(tmp_path, num_bytes=16)
    scalar = TensorSpec(name="s", dtype=DType.F32, shape=(), file=0, extent=ByteRange(start=4, stop=8))
    assert read(entry, scalar, 0, 1) == data[4:8]
    assert read(entry, scalar, 1, 1) == b""


def test_a_buffer_of_wider_items_is_filled_by_bytes(tmp_path):
    entry, data = write_storage(tmp_path, num_bytes=64)
    spec = TensorSpec(name="w", dtype=DType.U16, shape=(32,), file=0, extent=ByteRange(start=0, stop=64))
    out = np.zeros(8, dtype=np.uint16)
    with LocalFile(entry) as source:
        read_entries(source, spec, 4, memoryview(out))
    assert out.tobytes() == data[8:24]


@pytest.mark.parametrize("strides", [None, (1, 10)])
def test_a_file_that_shrank_is_a_changed_input(tmp_path, strides):
    entry, _ = write_storage(tmp_path, num_bytes=100)
    spec = TensorSpec(
        name="w", dtype=DType.U8, shape=(10, 10), file=0, extent=ByteRange(start=0, stop=100), strides=strides
    )
    (tmp_path / "storage").write_bytes(b"x" * 50)
    with pytest.raises(ChangedInputError, match=r"storage.*ends at byte 50"):
        read(entry, spec, 0, 100)
