"""safetensors headers: what the reference writer writes is read, everything malformed is one clear error."""

import json
import struct
import time
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsity_audit.checkpoint.opening import open_checkpoint
from sparsity_audit.checkpoint.reading import read_entries
from sparsity_audit.checkpoint.safetensors_io import MAX_TENSORS, read_header
from sparsity_audit.checkpoint.store import FileEntry, LocalFile
from sparsity_audit.errors import CorruptCheckpointError, UnsupportedFormatError
from sparsity_audit.types import DType

F = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def write(path: Path, header: object, *, data: bytes = bytes(8), length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def test_what_the_reference_writer_writes_is_read(tmp_path):
    torch.manual_seed(0)
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.int64)
    state = {str(d): torch.randn(3, 5).to(d) for d in (*dtypes, torch.bool, torch.uint8, torch.float8_e5m2)}
    state |= {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 4), "naïve ✓": torch.ones(1)}
    save_file(state, tmp_path / "m.safetensors", metadata={"format": "pt"})
    catalogue = open_checkpoint(tmp_path / "m.safetensors")
    loaded = load_file(tmp_path / "m.safetensors")
    assert set(catalogue.tensors) == set(loaded)
    with LocalFile(catalogue.files[0]) as source:
        for name, tensor in loaded.items():
            spec = catalogue.tensors[name]
            assert spec.shape == tuple(tensor.shape)
            out = bytearray(spec.num_bytes)
            read_entries(source, spec, 0, memoryview(out))
            flat = tensor.reshape(-1)
            assert bytes(out) == (flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""), name


def test_the_metadata_is_returned_apart(tmp_path):
    path = write(tmp_path / "m.safetensors", {"__metadata__": {"format": "pt"}, "w": F})
    tensors, metadata = read_header(FileEntry.from_path(path), file=3)
    assert metadata == {"format": "pt"}
    assert tensors["w"].file == 3
    assert tensors["w"].dtype is DType.F32


@pytest.mark.parametrize("shape", [[2**40, 0], [0, 2**40], [2**20, 0, 2**20], [0, 2**62, 2**62]])
def test_an_empty_tensor_of_absurd_sizes_is_refused_as_nothing_bounds_its_counters(tmp_path, shape):
    path = write(tmp_path / "m.safetensors", record(shape=shape, data_offsets=[0, 0]), data=b"")
    with pytest.raises(CorruptCheckpointError, match=r"tensor 'w' has shape .*no entries, yet large"):
        open_checkpoint(path)


def record(**changes) -> dict:
    return {"w": F | changes}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "not a JSON object"),
        (b"{}x", "not JSON"),
        (b"\xff\xfe{}", "not JSON"),
        (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "not JSON"),
        (b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"x":NaN}}', "not JSON"),
        (b'{"w":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}', "not JSON"),
        (b'{"w":' + json.dumps(F).encode() + b',"w":' + json.dumps(F).encode() + b"}", "names 'w' twice"),
        (b'{"w":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "names 'dtype' twice"),
        (b'{"\\ud800":' + json.dumps(F).encode() + b"}", "text without control"),
        ({"a\x1b[2J": F}, r"a tensor is named 'a\\x1b\[2J'"),
        ({"__metadata__": {"a": 1}, "w": F}, "__metadata__"),
        ({"__metadata__": None, "w": F}, "__metadata__"),
        ({"w": [1]}, "tensor 'w' lacks dtype, shape or data_offsets"),
        ({"w": {"dtype": "F32", "shape": [2]}}, "tensor 'w' lacks dtype, shape or data_offsets"),
        (record(dtype="F33"), "tensor 'w' has dtype 'F33'"),
        (record(dtype=None), "tensor 'w' has dtype a NoneType"),
        (record(dtype=["F32"]), r"tensor 'w' has dtype \['F32'\]"),
        (record(dtype={"a": 1}), "tensor 'w' has dtype a dict"),
        (record(shape=2), "tensor 'w' has shape 2"),
        (record(shape=[-2]), r"tensor 'w' has shape \[-2\]"),
        (record(shape=[2.0]), r"tensor 'w' has shape \[2.0\]"),
        (record(shape=[True, 2]), r"tensor 'w' has shape \[True, 2\]"),
        (record(shape=["2"]), r"tensor 'w' has shape \['2'\]"),
        (record(shape=[2**63]), r"tensor 'w' has shape \[9223372036854775808\]"),
        (record(shape=[2**40, 2**40]), r"more than 2\^63 bytes"),
        (record(shape=[1] * 65), "tensor 'w' has shape"),
        (record(shape=[3]), "tensor 'w' spans 8 bytes\n  expected: 12 bytes"),
        (record(shape=[]), "tensor 'w' spans 8 bytes\n  expected: 4 bytes"),
        (record(data_offsets=[8, 0]), "begin ≤ end"),
        (record(data_offsets=[0]), "begin ≤ end"),
        (record(data_offsets=[0, 8, 8]), "begin ≤ end"),
        (record(data_offsets=[-8, 0]), "begin ≤ end"),
        (record(data_offsets=[0, 8.0]), "begin ≤ end"),
        (record(data_offsets="08"), "begin ≤ end"),
        (record(data_offsets=[8, 16]), "tensor 'w' ends at byte"),
        (record(data_offsets=[2**62, 2**62 + 8]), "tensor 'w' ends at byte"),
        (record(data_offsets=[0, 4], shape=[1]), "4 bytes after the last tensor"),
        (record(data_offsets=[4, 8], shape=[1]), "4 bytes before tensor 'w'"),
        ({"w": F, "v": F}, "tensors 'w' and 'v' overlap"),
        ({"w": F, "v": {"dtype": "U8", "shape": [1], "data_offsets": [7, 8]}}, "tensors 'w' and 'v' overlap"),
        ({"w": F, "v": {"dtype": "U8", "shape": [0], "data_offsets": [4, 4]}}, "tensors 'w' and 'v' overlap"),
        ({"w": F, "v": {"dtype": "U8", "shape": [0], "data_offsets": [99, 99]}}, "tensor 'v' ends at byte"),
        ({}, "8 bytes after the last tensor"),
    ],
)
def test_a_malformed_header_is_corrupt_and_names_file_and_tensor(tmp_path, header, message):
    path = write(tmp_path / "m.safetensors", header)
    with pytest.raises(CorruptCheckpointError, match=message) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000
    str(caught.value).encode()


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F6_E3M2"])
def test_packed_dtypes_are_refused_with_a_remedy(tmp_path, dtype):
    path = write(tmp_path / "m.safetensors", record(dtype=dtype))
    with pytest.raises(UnsupportedFormatError, match=rf"tensor 'w': stored as {dtype}(.|\n)*de-quantise"):
        open_checkpoint(path)


@pytest.mark.parametrize("shape", [[0], [3, 0], [0, 2**14, 2**14]])
def test_empty_tensors_between_others_are_read(tmp_path, shape):
    header = {"w": F, "e": {"dtype": "U8", "shape": shape, "data_offsets": [8, 8]}}
    catalogue = open_checkpoint(write(tmp_path / "m.safetensors", header))
    assert catalogue.tensors["e"].num_entries == 0


@pytest.mark.parametrize("length", [2**60, 2**64 - 1, 100_000_001])
def test_a_header_of_impossible_length_is_refused_before_it_is_allocated(tmp_path, length):
    path = write(tmp_path / "m.safetensors", record(), length=length)
    tracemalloc.start()
    try:
        with pytest.raises(CorruptCheckpointError, match=f"header claims {length} bytes"):
            open_checkpoint(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("keep", [1, 7, 8, 9, 40])
def test_a_truncated_header_names_file_and_size(tmp_path, keep):
    path = write(tmp_path / "m.safetensors", record())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CorruptCheckpointError, match=r"m\.safetensors") as caught:
        open_checkpoint(path)
    assert str(keep) in str(caught.value)


@pytest.mark.parametrize("cut", [1, 8])
def test_truncated_data_names_the_tensor_that_is_cut_and_the_remedy(tmp_path, cut):
    path = write(tmp_path / "m.safetensors", record(), data=bytes(8 - cut))
    with pytest.raises(CorruptCheckpointError, match=r"tensor 'w' ends at byte(.|\n)*truncated; download"):
        open_checkpoint(path)


def test_trailing_bytes_are_refused_as_the_reference_does(tmp_path):
    path = write(tmp_path / "m.safetensors", record(), data=bytes(9))
    with pytest.raises(CorruptCheckpointError, match="1 bytes after the last tensor"):
        open_checkpoint(path)
    with pytest.raises(Exception, match=r"incomplete|MetadataIncompleteBuffer"):
        load_file(path)


def test_a_header_of_a_hundred_thousand_tensors_is_read_in_reasonable_time(tmp_path):
    count = 100_000
    header = {f"l.{i}": {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i in range(count)}
    path = write(tmp_path / "m.safetensors", header, data=bytes(count))
    began = time.perf_counter()
    assert len(open_checkpoint(path).tensors) == count
    assert time.perf_counter() - began < 30


@pytest.mark.parametrize("unit", [b'"a":{},', b"[],", b"1.5,"])
def test_a_header_of_millions_of_values_is_refused_before_it_is_parsed(tmp_path, unit):
    path = write(tmp_path / "m.safetensors", b'{"x":[' + unit * (13 * MAX_TENSORS) + b"1]}")
    began = time.perf_counter()
    with pytest.raises(CorruptCheckpointError, match="too many tensors"):
        open_checkpoint(path)
    assert time.perf_counter() - began < 10
