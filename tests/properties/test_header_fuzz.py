"""Bytes of valid checkpoints are changed at random: they are read, or refused by one of our own errors."""

import contextlib
import io
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from sparsity_audit.checkpoint.opening import open_checkpoint
from sparsity_audit.checkpoint.reading import read_entries
from sparsity_audit.checkpoint.store import Catalogue, LocalFile
from sparsity_audit.checkpoint.torch_vocabulary import load_state
from sparsity_audit.errors import SparsityAuditError

MAX_READ_BYTES = 1 << 16


def torch_file() -> bytes:
    model = torch.nn.Linear(3, 2)
    state = {
        "epoch": 1,
        "model": {
            **model.state_dict(),
            "p": model.weight,
            "t": torch.ones(2, 3).t(),
            "f8": torch.ones(2).to(torch.float8_e4m3fn),
        },
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


TORCH = torch_file()
PICKLE = zipfile.ZipFile(io.BytesIO(TORCH)).read("archive/data.pkl")
SAFETENSORS = save(
    {"a.weight": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}, {"format": "pt"}
)


@st.composite
def mutations(draw, original: bytes) -> bytes:
    data = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        kind = draw(st.sampled_from(["set", "insert", "delete", "copy", "cut"]))
        if kind == "set" and at < len(data):
            data[at] = draw(st.one_of(st.integers(0, 255), st.sampled_from(b'\x00\xff[]{}":,0-9.(R')))
        elif kind == "insert":
            data[at:at] = draw(st.binary(max_size=12))
        elif kind == "delete":
            del data[at : at + draw(st.integers(1, 16))]
        elif kind == "copy":
            start = draw(st.integers(0, len(data)))
            piece = data[start : start + 24]
            data[at : at + len(piece)] = piece
        elif kind == "cut":
            del data[at:]
    return bytes(data)


def open_and_read(content: bytes, *, suffix: str) -> None:
    """Every outcome but an error of ours propagates."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"m{suffix}"
        path.write_bytes(content)
        try:
            catalogue = open_checkpoint(path)
        except SparsityAuditError as error:
            message = str(error)
        else:
            read_everything(catalogue, num_bytes=len(content))
            return
        assert str(path) in message
        assert len(message) < 3000
        message.encode()


def read_everything(catalogue: Catalogue, *, num_bytes: int) -> None:
    for name, spec in catalogue.tensors.items():
        name.encode()
        assert spec.extent.stop <= num_bytes
        count = min(spec.num_entries, MAX_READ_BYTES // spec.dtype.itemsize)
        out = bytearray(count * spec.dtype.itemsize)
        with LocalFile(catalogue.files[spec.file]) as source:
            read_entries(source, spec, spec.num_entries - count, memoryview(out))
    assert all(target in catalogue.tensors for target in catalogue.aliases.values())


FUZZ = settings(deadline=None, max_examples=400, suppress_health_check=[HealthCheck.too_slow])


@FUZZ
@given(content=mutations(SAFETENSORS))
@example(content=SAFETENSORS)
def test_a_mutated_safetensors_file_is_read_or_refused(content):
    open_and_read(content, suffix=".safetensors")


@FUZZ
@given(content=mutations(TORCH))
@example(content=TORCH)
def test_a_mutated_torch_archive_is_read_or_refused(content):
    open_and_read(content, suffix=".bin")


@FUZZ
@given(pickled=mutations(PICKLE))
@example(pickled=PICKLE)
def test_a_mutated_pickle_in_a_sound_archive_is_read_or_refused(pickled):
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(TORCH)) as archive, zipfile.ZipFile(buffer, "w") as changed:
        for info in archive.infolist():
            changed.writestr(
                info.filename, pickled if info.filename.endswith("data.pkl") else archive.read(info)
            )
    open_and_read(buffer.getvalue(), suffix=".bin")


@settings(deadline=None, max_examples=1500)
@given(
    pickled=st.lists(
        st.one_of(
            st.sampled_from(
                [bytes([b]) for b in b"\x80\x02}]()(utlesabRQ0N\x85\x86\x87\x88\x89\x8f\x90\x91\x94"]
            ),
            st.sampled_from([b"q\x00", b"h\x00", b"K\x01", b"ctorch\nFloatStorage\n", b"X\x01\x00\x00\x00a"]),
            st.sampled_from([b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n"]),
            st.binary(min_size=1, max_size=3),
        ),
        max_size=40,
    ).map(lambda parts: b"\x80\x02" + b"".join(parts) + b".")
)
def test_any_sequence_of_opcodes_is_read_or_refused(pickled):
    with contextlib.suppress(SparsityAuditError):
        load_state(pickled, subject="file")


def test_a_torch_archive_cut_anywhere_is_refused(tmp_path):
    path = tmp_path / "m.bin"
    for stop in range(0, len(TORCH), 5):
        path.write_bytes(TORCH[:stop])
        with pytest.raises(SparsityAuditError, match=r"m\.bin"):
            open_checkpoint(path)
