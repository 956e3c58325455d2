"""Files of torch.save are read like torch.load reads them; what must be refused is refused by name."""

import io
import pickle
import struct
import time
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsity_audit.checkpoint import torch_zip
from sparsity_audit.checkpoint.opening import open_checkpoint
from sparsity_audit.checkpoint.reading import read_entries
from sparsity_audit.checkpoint.restricted_pickle import MAX_OPERATIONS, MAX_PICKLE_BYTES
from sparsity_audit.checkpoint.store import Catalogue, LocalFile
from sparsity_audit.checkpoint.torch_vocabulary import load_state
from sparsity_audit.errors import (
    CorruptCheckpointError,
    SparsityAuditError,
    UnsafePickleError,
    UnsupportedFormatError,
)
from sparsity_audit.types import DType


def read(catalogue: Catalogue, name: str) -> bytes:
    spec = catalogue.tensors[catalogue.aliases.get(name, name)]
    out = bytearray(spec.num_bytes)
    with LocalFile(catalogue.files[spec.file]) as source:
        read_entries(source, spec, 0, memoryview(out))
    return bytes(out)


def torch_bytes(tensor: torch.Tensor) -> bytes:
    # A fresh tensor: `contiguous()` keeps any stride on an axis of size 1.
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().reshape(-1))
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def save(path: Path, value: object, **options) -> Path:
    torch.save(value, path, **options)
    return path


def rewrite(path: Path, **changes) -> Path:
    """The archive with members replaced (bytes), dropped (None) or added, stored without compression."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    root = next(iter(members)).partition("/")[0]
    for name, value in changes.items():
        members[f"{root}/{name}"] = value
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, value in members.items():
            if value is not None:
                archive.writestr(name, value)
    return path


def archive_of(path: Path, data_pkl: bytes, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", data_pkl)
        for name, value in members.items():
            archive.writestr(f"archive/data/{name.strip('_')}", value)
    return path


DTYPES = {
    torch.float64: DType.F64,
    torch.float32: DType.F32,
    torch.float16: DType.F16,
    torch.bfloat16: DType.BF16,
    torch.float8_e4m3fn: DType.F8_E4M3,
    torch.float8_e5m2: DType.F8_E5M2,
    torch.float8_e4m3fnuz: DType.F8_E4M3FNUZ,
    torch.float8_e5m2fnuz: DType.F8_E5M2FNUZ,
    torch.float8_e8m0fnu: DType.F8_E8M0,
    torch.int64: DType.I64,
    torch.int32: DType.I32,
    torch.int16: DType.I16,
    torch.int8: DType.I8,
    torch.uint64: DType.U64,
    torch.uint32: DType.U32,
    torch.uint16: DType.U16,
    torch.uint8: DType.U8,
    torch.bool: DType.BOOL,
    torch.complex64: DType.C64,
}


def test_every_dtype_that_torch_saves_is_read_as_torch_reads_it(tmp_path):
    torch.manual_seed(0)
    state = {str(d): (torch.randn(5, 7) * 3).abs().to(d) for d in DTYPES}
    state |= {"empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5), "axes": torch.randn(1, 3, 1)}
    catalogue = open_checkpoint(save(tmp_path / "m.bin", state))
    loaded = torch.load(tmp_path / "m.bin")
    assert sorted(catalogue.tensors) == sorted(state)
    assert catalogue.notes == ()
    for name, tensor in loaded.items():
        assert catalogue.tensors[name].shape == tuple(tensor.shape)
        assert catalogue.tensors[name].strides is None
        assert read(catalogue, name) == torch_bytes(tensor), name
    assert {name: catalogue.tensors[str(d)].dtype for d, name in DTYPES.items()} == {
        d: d for d in DTYPES.values()
    }


def test_strided_tensors_are_read_as_torch_reads_them(tmp_path):
    torch.manual_seed(1)
    base = torch.randn(12, 10, 6)
    views = {
        "transposed": base.transpose(0, 2).clone(memory_format=torch.preserve_format),
        "expanded": torch.randn(4, 1).expand(4, 50),
        "sliced": torch.randn(20, 20)[3:17:2, 5:],
        "stepped": torch.arange(100)[7::9],
        "channels_last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "permuted": torch.randn(3, 4, 5).bfloat16().permute(2, 0, 1),
    }
    catalogue = open_checkpoint(save(tmp_path / "m.pt", views))
    loaded = torch.load(tmp_path / "m.pt")
    for name, tensor in loaded.items():
        assert tensor.stride() == views[name].stride()
        assert (catalogue.tensors[name].strides is None) == tensor.is_contiguous()
        assert read(catalogue, name) == torch_bytes(tensor), name


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_random_views_of_one_storage_are_read_as_torch_reads_them(tmp_path_factory, data):
    storage = torch.arange(600, dtype=torch.int16)
    shape = data.draw(st.lists(st.integers(0, 5), max_size=4))
    strides = [data.draw(st.integers(0, 30)) for _ in shape]
    view = storage.as_strided(shape, strides, data.draw(st.integers(0, 50)))
    path = save(tmp_path_factory.getbasetemp() / "views.bin", {"view": view, "whole": storage})
    catalogue = open_checkpoint(path)
    assert read(catalogue, "view") == torch_bytes(torch.load(path)["view"])


def test_a_modules_state_dict_with_parameters_tags_and_metadata_is_read(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).bfloat16()
    model[0].weight.tag = "kept by torch"
    plain = open_checkpoint(save(tmp_path / "state.bin", model.state_dict()))
    tagged = open_checkpoint(save(tmp_path / "tagged.bin", dict(model.named_parameters())))
    assert list(plain.tensors) == sorted(model.state_dict())
    assert read(plain, "0.weight") == read(tagged, "0.weight") == torch_bytes(model[0].weight)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol_is_read(tmp_path, protocol):
    state = OrderedDict(w=torch.arange(6.0), b=torch.ones(2))
    catalogue = open_checkpoint(save(tmp_path / "m.pt", state, pickle_protocol=protocol))
    assert read(catalogue, "w") == torch_bytes(state["w"])


def test_tied_names_are_aliases_of_the_name_that_comes_first_in_the_file(tmp_path):
    embedding = torch.randn(8, 4)
    state = {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": torch.ones(4),
        "lm_head.weight": embedding,
    }
    catalogue = open_checkpoint(save(tmp_path / "m.bin", state))
    assert catalogue.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    assert list(catalogue.tensors) == ["model.embed_tokens.weight", "model.norm.weight"]
    assert catalogue.num_entries == 36
    assert catalogue.notes == ()


def test_views_that_share_part_of_a_storage_stay_separate_with_a_note(tmp_path):
    fused = torch.randn(6, 4)
    catalogue = open_checkpoint(save(tmp_path / "m.bin", {"qkv": fused, "q": fused[:2], "k": fused[2:4]}))
    assert sorted(catalogue.tensors) == ["k", "q", "qkv"]
    assert catalogue.aliases == {}
    assert read(catalogue, "k") == torch_bytes(fused[2:4])
    assert len(catalogue.notes) == 1
    assert "share part of a storage" in catalogue.notes[0]


def test_equal_views_of_different_shape_are_not_aliases(tmp_path):
    weight = torch.randn(4, 6)
    catalogue = open_checkpoint(
        save(tmp_path / "m.bin", {"a": weight, "b": weight.reshape(24), "c": weight.t()})
    )
    assert catalogue.aliases == {}
    assert len(catalogue.tensors) == 3


def test_a_big_endian_file_gives_little_endian_codes(tmp_path):
    state = {"w": torch.randn(3, 5), "h": torch.randn(7).bfloat16().view(7), "t": torch.randn(4, 3).t()}
    path = save(tmp_path / "m.bin", state)
    with zipfile.ZipFile(path) as archive:
        swapped = {
            f"data/{i}": np.frombuffer(archive.read(f"m/data/{i}"), f"<u{size}").astype(f">u{size}").tobytes()
            for i, size in enumerate((4, 2, 4))
        }
    rewrite(path, byteorder=b"big", **swapped)
    loaded = torch.load(path)
    catalogue = open_checkpoint(path)
    for name, tensor in state.items():
        assert catalogue.tensors[name].big_endian
        assert read(catalogue, name) == torch_bytes(tensor) == torch_bytes(loaded[name])


def test_an_unknown_byte_order_is_refused(tmp_path):
    path = rewrite(save(tmp_path / "m.bin", {"w": torch.ones(2)}), byteorder=b"middle")
    with pytest.raises(CorruptCheckpointError, match=r"m\.bin.*byteorder is b'middle'"):
        open_checkpoint(path)


@pytest.mark.parametrize("key", ["state_dict", "model", "module", "model_state_dict", "weights"])
def test_a_state_dict_under_a_key_is_found(tmp_path, key):
    state = {"w": torch.arange(4.0)}
    path = save(tmp_path / "m.pt", {"epoch": 3, key: state, "lr": 0.1, "dtype": torch.bfloat16})
    catalogue = open_checkpoint(path)
    assert read(catalogue, "w") == torch_bytes(state["w"])
    assert any(repr(key) in note for note in catalogue.notes)


def test_an_optimizer_beside_the_model_is_left_out_without_ambiguity(tmp_path):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    path = save(
        tmp_path / "m.pt", {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 1}
    )
    assert list(open_checkpoint(path).tensors) == ["bias", "weight"]
    with pytest.raises(UnsupportedFormatError, match="state of an optimizer"):
        open_checkpoint(save(tmp_path / "optimizer.pt", optimizer.state_dict()))


def test_tensors_in_lists_and_nested_dicts_beside_the_state_dict_are_named(tmp_path):
    one = torch.ones(1)
    catalogue = open_checkpoint(save(tmp_path / "m.pt", {"w": one, "extra": {"deep": [one]}, "list": [one]}))
    assert list(catalogue.tensors) == ["w"]
    assert "tensors nested under 'extra', 'list' are not compared" in catalogue.notes[0]


def test_a_pickle_that_shares_one_dict_under_many_keys_is_searched_once(tmp_path):
    count = 20_000
    big = b"}q\x01(" + b"".join(b"M" + struct.pack("<H", i) + b"N" for i in range(count)) + b"u"
    keys = b"".join(_text(b"%d" % i) + b"h\x01" for i in range(count))
    path = archive_of(tmp_path / "m.bin", b"\x80\x02" + big + b"0}(" + keys + b"u.")
    began = time.perf_counter()
    with pytest.raises(UnsupportedFormatError, match="holds no tensors in its 20000 keys"):
        open_checkpoint(path)
    assert time.perf_counter() - began < 20


def test_a_dict_that_contains_itself_is_searched_once(tmp_path):
    path = archive_of(tmp_path / "m.bin", b"\x80\x02}q\x01X\x05\x00\x00\x00modelh\x01s.")
    with pytest.raises(UnsupportedFormatError, match="holds no tensors"):
        open_checkpoint(path)


def test_two_state_dicts_are_an_error_that_lists_both(tmp_path):
    state = {"w": torch.ones(2)}
    path = save(tmp_path / "m.pt", {"actor": state, "critic": {"v": torch.ones(1)}})
    with pytest.raises(UnsupportedFormatError, match="2 dicts of tensors: 'actor', 'critic'"):
        open_checkpoint(path)
    both = save(tmp_path / "n.pt", {"model": state, "state_dict": state})
    with pytest.raises(UnsupportedFormatError, match="'model', 'state_dict'"):
        open_checkpoint(both)


def test_tensors_beside_the_state_dict_are_named_in_a_note(tmp_path):
    path = save(tmp_path / "m.pt", {"state_dict": {"w": torch.ones(2)}, "loss": torch.tensor(1.0)})
    catalogue = open_checkpoint(path)
    assert list(catalogue.tensors) == ["w"]
    assert any("ignored tensors beside 'state_dict', under 'loss'" in note for note in catalogue.notes)


def test_leaves_that_are_not_tensors_are_counted_in_a_note(tmp_path):
    extras = {
        "a": 1,
        "b": "text",
        "c": {1, 2},
        "d": b"bytes",
        "e": 1 + 2j,
        "f": torch.Size([1, 2]),
        "g": bytearray(b"x"),
        "h": 2**200,
        "i": torch.device("cpu"),
        "j": np.float64(1.5),
        "k": [None, True, (1, 2.5)],
        "l": frozenset({3}),
    }
    catalogue = open_checkpoint(save(tmp_path / "m.pt", {"w": torch.ones(2), **extras}, pickle_protocol=4))
    assert list(catalogue.tensors) == ["w"]
    assert catalogue.notes == (f"m.pt: ignored {len(extras)} entries of the state dict that are not tensors",)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(2), "holds a single tensor"),
        ([torch.ones(2)], "holds a list"),
        ({"a": 1}, "holds no tensors in its 1 keys"),
        ({}, "holds no tensors in its 0 keys"),
        ({3: torch.ones(1)}, "a tensor is named 3"),
        ({"a\n": torch.ones(1)}, "a tensor is named 'a\\\\n'"),
    ],
)
def test_what_is_not_a_state_dict_is_refused(tmp_path, value, message):
    with pytest.raises(SparsityAuditError, match=message):
        open_checkpoint(save(tmp_path / "m.pt", value))


def quantised() -> torch.Tensor:
    return torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (quantised, "quantised by torch"),
        (lambda: torch.eye(3).to_sparse(), "sparse"),
        (lambda: torch.eye(3).to_sparse_csr(), "sparse"),
        (lambda: torch.empty(3, device="meta"), "on the meta device"),
        (lambda: torch.ones(2, dtype=torch.complex64).conj(), "conjugated or negated"),
        (lambda: torch.ones(2, dtype=torch.complex128), "ComplexDoubleStorage"),
    ],
)
def test_tensors_that_cannot_be_read_are_refused_by_name(tmp_path, make, message):
    path = save(tmp_path / "m.pt", {"good": torch.ones(1), "layer.weight": make()})
    with pytest.raises(UnsupportedFormatError, match=rf"m\.pt: tensor 'layer.weight': .*{message}"):
        open_checkpoint(path)


def test_the_legacy_format_is_refused_with_two_lines_that_convert_it(tmp_path, monkeypatch):
    state = {"w": torch.arange(3.0)}
    path = save(tmp_path / "old.bin", state, _use_new_zipfile_serialization=False)
    with pytest.raises(UnsupportedFormatError, match=r"torch's format before 1\.6") as caught:
        open_checkpoint(path)
    lines = [line.strip() for line in str(caught.value).splitlines()[-2:]]
    monkeypatch.chdir(tmp_path)
    exec("\n".join(["import torch", *lines]), {})
    assert read(open_checkpoint(tmp_path / "zip-old.bin"), "w") == torch_bytes(state["w"])


def test_a_torchscript_archive_is_refused(tmp_path):
    path = archive_of(tmp_path / "m.pt", b"\x80\x02}.")
    rewrite(path, **{"constants.pkl": b"\x80\x02).", "code/__torch__.py": b"class M: pass"})
    with pytest.raises(UnsupportedFormatError, match="TorchScript"):
        open_checkpoint(path)


def test_a_compressed_archive_is_refused_and_stays_readable_after_the_remedy(tmp_path):
    path = save(tmp_path / "m.bin", {"w": torch.zeros(1000)})
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    with pytest.raises(UnsupportedFormatError, match=r"m\.bin: zip member .* is compressed \(method 8\)"):
        open_checkpoint(path)
    torch.save(torch.load(path), path)
    assert read(open_checkpoint(path), "w") == bytes(4000)


def test_another_zip_archive_is_refused(tmp_path):
    np.savez(tmp_path / "m.npz", w=np.ones(3))
    with pytest.raises(UnsupportedFormatError, match=r"m\.npz: zip archive with 0 data\.pkl"):
        open_checkpoint(tmp_path / "m.npz")


def test_zip64_sizes_and_offsets_are_read_where_32_bits_are_saturated(tmp_path):
    path = tmp_path / "m.bin"
    payload = np.arange(6, dtype="<f4").tobytes()
    source = io.BytesIO()
    torch.save({"w": torch.arange(6.0)}, source)
    with zipfile.ZipFile(source) as archive:
        data_pkl = archive.read("archive/data.pkl")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open("archive/data/0", "w", force_zip64=True) as member:
            member.write(payload)
        archive.writestr("archive/data.pkl", data_pkl)
    raw = bytearray(path.read_bytes())
    # Move the sizes of the first central entry into a zip64 field, as a writer of members > 4 GiB must.
    start = raw.index(b"PK\x01\x02")
    fields = list(struct.unpack_from("<4s6H3I5H2I", raw, start))
    name = raw[start + 46 : start + 46 + fields[10]]
    extra = struct.pack("<2H3Q", 1, 24, fields[9], fields[8], fields[16])
    fields[8] = fields[9] = fields[16] = 0xFFFFFFFF
    fields[11] = len(extra)
    rest = raw[start + 46 + len(name) :]
    raw[start:] = struct.pack("<4s6H3I5H2I", *fields) + name + extra + rest
    end = raw.rindex(b"PK\x05\x06")
    size = struct.unpack_from("<I", raw, end + 12)[0] + len(extra)
    struct.pack_into("<I", raw, end + 12, size)
    path.write_bytes(raw)
    assert read(open_checkpoint(path), "w") == payload


def test_a_hole_of_five_gib_before_the_data_needs_and_gets_zip64_offsets(tmp_path):
    path = tmp_path / "m.bin"
    with zipfile.ZipFile(save(tmp_path / "small.bin", {"w": torch.arange(6.0)})) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with path.open("wb") as file:
        file.seek(5 << 30)
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for name, data in members.items():
                archive.writestr(name, data)
    catalogue = open_checkpoint_with_offset(path)
    assert catalogue.tensors["w"].extent.start > 5 << 30
    assert read(catalogue, "w") == torch_bytes(torch.arange(6.0))


def open_checkpoint_with_offset(path: Path) -> Catalogue:
    # A file that starts with a hole has no zip magic, so the reader is called below the recognition.
    from sparsity_audit.checkpoint.store import FileEntry

    entry = FileEntry.from_path(path)
    contents = torch_zip.read_torch_zip(entry, file=0)
    return Catalogue(reference=str(path), resolved=str(path), files=(entry,), tensors=contents.tensors)


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_a_malicious_pickle_is_refused_and_runs_nothing(tmp_path):
    marker = tmp_path / "executed"
    path = save(tmp_path / "m.bin", {"w": torch.ones(2), "x": Malicious(marker)})
    with pytest.raises(
        UnsafePickleError, match=r"m\.bin: pickle asks for 'pathlib\.Path\.touch'|builtins.getattr"
    ):
        open_checkpoint(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("pickled", "name"),
    [
        (b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00ls\x85R.", "os.system"),
        (b"\x80\x02(X\x02\x00\x00\x00lsios\nsystem\n.", "os.system"),
        (pickle.dumps(eval, protocol=4), "builtins.eval"),
        (pickle.dumps(exec, protocol=2), "builtins.exec"),
        (b"\x80\x02ctorch\nload\n.", "torch.load"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2.__globals__\n.", "__globals__"),
        (b"\x80\x02ccollections\nOrderedDict.__init__\n.", "OrderedDict.__init__"),
        (b"\x80\x02\x82\x01.", "registered extension"),
    ],
)
def test_every_way_to_name_a_function_is_refused(tmp_path, pickled, name):
    with pytest.raises(UnsafePickleError, match=name) as caught:
        open_checkpoint(archive_of(tmp_path / "m.bin", pickled))
    assert "nothing was executed" in str(caught.value)
    assert "m.bin" in str(caught.value)


def test_a_piece_of_a_distributed_checkpoint_is_refused_with_the_way_out(tmp_path):
    path = archive_of(tmp_path / "rank_0.pt", b"\x80\x02ctorch.distributed.tensor\nDTensor\n)R.")
    with pytest.raises(UnsupportedFormatError, match="pieces of all ranks"):
        open_checkpoint(path)


# Multiples of the modulus of Python's integer hash: all share one hash, and a dict of them is quadratic.
COLLIDING = b"".join(b"\x8a\x10%bN" % (i * (2**61 - 1)).to_bytes(16, "little") for i in range(1, 200_000))

SHARED = b"".join(b"h%ch%c\x86q%c0" % (i, i, i + 1) for i in range(99))


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (b"", "ends without a result"),
        (b"\x80\x02", "ends without a result"),
        (b"\x80\x09}.", "unknown protocol"),
        (b"\x80\x02}", "ends without a result"),
        (b"\x80\x02.", "never made"),
        (b"\x80\x02h\x07.", "never made"),
        (b"\x80\x02Nt.", "never made"),
        (b"\x80\x02\x8b\xff\xff\xff\x7f1.", "truncated"),
        (b"\x80\x02\x8b\xff\xff\xff\xff1.", "truncated"),
        (b"\x80\x02X\xff\xff\xff\x7fa.", "truncated"),
        (b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\xffa.", "truncated"),
        (b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7fa.", "truncated"),
        (b"\x80\x02X\x02\x00\x00\x00\xff\xfe.", "cannot be decoded"),
        (b"\x80\x02}]Ns.", "a list as a key"),
        (b"\x80\x02})q\x000" + SHARED + b"hcNs.", "nested tuple as a key"),
        (b"\x80\x02}(" + COLLIDING + b"u.", "a large number as a key"),
        (b"\x80\x02}G" + bytes(8) + b"Ns.", "a float as a key"),
        (b"\x80\x02}\x8a\x08" + bytes(7) + b"\x01\x85Ns.", "tuple as a key"),
        (b"\x80\x02)Na.", "appends to something"),
        (b"\x80\x02]NNs.", "sets items of something"),
        (b"\x80\x02NNb.", "sets attributes"),
        (b"\x80\x02N)R.", "calls something"),
        (b"\x80\x02ctorch\nFloatStorage\n)R.", "calls torch.FloatStorage"),
        (b"\x80\x02NQ.", "outside that is not a storage"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.", "without storage"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v3\n)R.", "without a dtype"),
        (b"\x80\x02ctorch._utils\n_rebuild_parameter\n)R.", "without a tensor"),
        (b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n)R.", "without function"),
        (b"\x80\x02(" + b"}" * (MAX_OPERATIONS + 1) + b"t.", "operations"),
        (b"\x80\x02" + b"N" * MAX_PICKLE_BYTES, "expected: at most"),
        (b"I1\n.", "opcode b'I'"),
    ],
)
def test_a_malformed_pickle_is_corrupt_and_cheap(tmp_path, pickled, message):
    path = archive_of(tmp_path / "m.bin", pickled)
    began = time.perf_counter()
    with pytest.raises(CorruptCheckpointError, match=message) as caught:
        open_checkpoint(path)
    assert "m.bin" in str(caught.value)
    assert time.perf_counter() - began < 30


def test_a_huge_memo_index_and_deep_nesting_cost_nothing():
    assert load_state(b"\x80\x02Nr\xff\xff\xff\xff.", subject="f") is None
    load_state(b"\x80\x02)" + b"\x85" * 300_000 + b".", subject="f")


def tensor_pickle(
    *, start=b"K\x00", shape=b"K\x02\x85", strides=b"K\x01\x85", entries=b"K\x02", key=b"0"
) -> bytes:
    storage = (
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n" + _text(key) + _text(b"cpu") + entries + b"tQ"
    )
    hooks = b"ccollections\nOrderedDict\n)R"
    rebuilt = (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + start + shape + strides + b"\x89" + hooks + b"tR"
    )
    return b"\x80\x02}" + _text(b"w") + rebuilt + b"s."


def _text(raw: bytes) -> bytes:
    return b"X" + struct.pack("<I", len(raw)) + raw


def test_the_hand_made_pickle_is_valid(tmp_path):
    path = archive_of(tmp_path / "m.bin", tensor_pickle(), _0=struct.pack("<2f", 1, 2))
    assert read(open_checkpoint(path), "w") == struct.pack("<2f", 1, 2)


BIG = b"\x8a\x08" + struct.pack("<q", 2**62)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"shape": b"K\x03\x85"}, "reaches entry 3 of a storage of 2"),
        ({"start": b"K\x01"}, "reaches entry 3 of a storage of 2"),
        ({"start": b"J\xff\xff\xff\xff"}, "not a size"),
        ({"shape": b"J\xff\xff\xff\xff\x85"}, "not a size"),
        ({"strides": b"J\xff\xff\xff\xff\x85"}, "not a size"),
        ({"shape": b"\x88\x85"}, "not a size"),
        ({"shape": b"G?\xf0\x00\x00\x00\x00\x00\x00\x85"}, "not a size"),
        ({"shape": b"N"}, "not a size"),
        ({"shape": b"K\x01K\x02\x86"}, "2 sizes and 1 strides"),
        ({"shape": BIG + BIG + b"\x86", "strides": b"K\x00K\x00\x86"}, r"more than 2\^63"),
        ({"shape": BIG + b"\x85", "strides": b"K\x00\x85"}, "expands 1 entries"),
        ({"shape": BIG + b"\x85"}, "reaches entry"),
        ({"shape": b"(" + b"K\x01" * 70 + b"t", "strides": b"(" + b"K\x01" * 70 + b"t"}, "70 sizes"),
        ({"shape": b"K\x00" + BIG + b"\x86", "strides": b"K\x00K\x00\x86"}, "no entries, yet large"),
        ({"entries": b"K\x03"}, "storage of 8 bytes"),
        ({"key": b"../0"}, r"storage '../0', which is not in the archive"),
        ({"key": b"1"}, "storage '1', which is not in the archive"),
    ],
)
def test_a_tensor_that_does_not_fit_is_corrupt_and_named(tmp_path, parts, message):
    path = archive_of(tmp_path / "m.bin", tensor_pickle(**parts), _0=struct.pack("<2f", 1, 2))
    with pytest.raises(CorruptCheckpointError, match=message) as caught:
        open_checkpoint(path)
    assert "'w'" in str(caught.value)
    assert "m.bin" in str(caught.value)


@pytest.mark.parametrize("cut", [1, 10, 22, 100, 700])
def test_a_truncated_archive_is_corrupt(tmp_path, cut):
    path = save(tmp_path / "m.bin", {"w": torch.ones(100)})
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(CorruptCheckpointError, match=r"m\.bin"):
        open_checkpoint(path)


def test_bytes_before_or_after_the_archive_are_corrupt(tmp_path):
    raw = save(tmp_path / "m.bin", {"w": torch.ones(100)}).read_bytes()
    (tmp_path / "m.bin").write_bytes(raw + b"\0")
    with pytest.raises(CorruptCheckpointError, match="without an end record"):
        open_checkpoint(tmp_path / "m.bin")
    (tmp_path / "m.bin").write_bytes(b"PK\x03\x04" + raw)
    with pytest.raises(CorruptCheckpointError, match=r"m\.bin"):
        open_checkpoint(tmp_path / "m.bin")


def patched_directory(path: Path, member: int, field: int, value: int) -> None:
    """Overwrite one field of one central directory entry."""
    raw = bytearray(path.read_bytes())
    position = raw.index(b"PK\x01\x02")
    for _ in range(member):
        fields = struct.unpack_from("<4s6H3I5H2I", raw, position)
        position += 46 + sum(fields[10:13])
    fields = list(struct.unpack_from("<4s6H3I5H2I", raw, position))
    fields[field] = value
    struct.pack_into("<4s6H3I5H2I", raw, position, *fields)
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("member", "field", "value", "error", "message"),
    [
        (1, 16, 0, CorruptCheckpointError, "overlap"),
        (1, 16, 5, CorruptCheckpointError, "no local header of that name|overlap"),
        (1, 16, 10**6, CorruptCheckpointError, "past the end"),
        (1, 8, 10**6, CorruptCheckpointError, "past the end"),
        (1, 9, 7, CorruptCheckpointError, "two sizes"),
        (1, 9, 0xFFFFFFFF, CorruptCheckpointError, "zip64 sizes"),
        (1, 4, 8, CorruptCheckpointError, "two compression methods"),
        (1, 3, 1, UnsupportedFormatError, "encrypted"),
        (1, 10, 60000, CorruptCheckpointError, "damaged"),
    ],
)
def test_a_directory_that_contradicts_the_file_is_refused(tmp_path, member, field, value, error, message):
    path = archive_of(tmp_path / "m.bin", tensor_pickle(), _0=struct.pack("<2f", 1, 2))
    patched_directory(path, member, field, value)
    with pytest.raises(error, match=message) as caught:
        open_checkpoint(path)
    assert "m.bin" in str(caught.value)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_member_listed_twice_is_refused(tmp_path):
    path = archive_of(tmp_path / "m.bin", tensor_pickle(), _0=bytes(8))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data/0", bytes(8))
    with pytest.raises(CorruptCheckpointError, match="twice"):
        open_checkpoint(path)


def test_a_directory_that_claims_to_be_huge_is_refused_before_it_is_read(tmp_path):
    path = archive_of(tmp_path / "m.bin", tensor_pickle(), _0=bytes(8))
    raw = bytearray(path.read_bytes())
    struct.pack_into("<I", raw, len(raw) - 22 + 12, 2**31)
    path.write_bytes(raw)
    with pytest.raises(CorruptCheckpointError, match="directory claims 2147483648 bytes"):
        open_checkpoint(path)
