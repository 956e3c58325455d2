"""Encodings of our own masks, and masks that other tools wrote."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from sparsity_audit.errors import MaskError, OutputError
from sparsity_audit.masks.bitmask import pack_bits, unpack_bits
from sparsity_audit.masks.container import MaskWriter
from sparsity_audit.masks.encodings import indices_bytes, position_dtype, write_mask
from sparsity_audit.masks.metadata import MaskMetadata, MaskTensor, SourceReference
from sparsity_audit.masks.reader import MaskReader, open_mask
from sparsity_audit.masks.sources import open_source
from sparsity_audit.types import DType

_SHAPES = {"a": (7, 37), "bias": (11,), "empty": (0, 3), "none": (0,), "scalar": (), "cube": (2, 3, 5)}
_BITS = {
    name: np.asarray(np.random.default_rng(i).random(shape) < 0.3)
    for i, (name, shape) in enumerate(_SHAPES.items())
}
_BITS["a"][5:] = False
_BITS["scalar"] = np.asarray(True)
_METADATA = MaskMetadata(
    criterion="value",
    view="native",
    base=SourceReference(reference="base", resolved="hf://org/base@abc"),
    aliases={"tied": "a"},
    tool="test",
)


@pytest.fixture
def packed(tmp_path) -> Path:
    tensors = [
        MaskTensor.whole(name, shape, fingerprints=(3, 4)) for name, shape in _SHAPES.items() if name != "a"
    ]
    tensors.append(MaskTensor(name="a", shape=(7, 37), compared=((0, 2), (2, 5)), fingerprints=(5, 6)))
    with MaskWriter(tmp_path / "packed", tensors, _METADATA) as writer:
        for name, bits in _BITS.items():
            writer.write_bits(name, 0, pack_bits(bits))
        writer.finish()
    return tmp_path / "packed"


def _convert(source: Path, target: Path, encoding, **options) -> Path:
    opened = open_source(source, **options)
    try:
        write_mask(opened, target, encoding)
    finally:
        opened.close()
    return target


def _bits(path: Path) -> dict[str, np.ndarray]:
    with MaskReader(open_mask(path)) as reader:
        return {n: unpack_bits(reader.read_packed(n), t.shape) for n, t in reader.tensors.items()}


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("encoding", ["bool", "indices", "pt"])
def test_every_encoding_leads_back_to_the_same_bytes(tmp_path, packed, encoding):
    other = _convert(packed, tmp_path / encoding, encoding)
    assert open_source(other).encoding == encoding
    assert _bytes(_convert(other, tmp_path / "back", "packed")) == _bytes(packed)
    again = _convert(tmp_path / "back", tmp_path / "again", encoding)
    assert _bytes(again) == _bytes(other)


def test_bool_tensors_are_what_the_safetensors_library_calls_bool(tmp_path, packed):
    folder = _convert(packed, tmp_path / "bool", "bool")
    with safe_open(folder / "mask-00001-of-00001.safetensors", "numpy") as shard:
        for name, bits in _BITS.items():
            stored = shard.get_tensor(name)
            assert stored.dtype == np.bool_
            assert np.array_equal(stored, bits)


def test_indices_are_sorted_flat_positions(tmp_path, packed):
    folder = _convert(packed, tmp_path / "indices", "indices")
    with safe_open(folder / "mask-00001-of-00001.safetensors", "numpy") as shard:
        for name, bits in _BITS.items():
            stored = shard.get_tensor(name)
            assert stored.dtype == np.int32
            assert np.array_equal(stored, np.flatnonzero(bits))


def test_pt_masks_load_with_weights_only_and_one_storage_a_tensor(tmp_path, packed):
    folder = _convert(packed, tmp_path / "pt", "pt")
    state = torch.load(folder / "mask.pt", weights_only=True)
    assert state.keys() == _BITS.keys()
    for name, bits in _BITS.items():
        assert state[name].dtype == torch.bool
        assert np.array_equal(state[name].numpy(), bits)
        assert state[name].untyped_storage().nbytes() == bits.size
    assert sorted(path.name for path in folder.iterdir()) == ["mask.json", "mask.pt"]


def test_positions_become_64_bit_exactly_past_the_largest_int32():
    assert position_dtype(2**31) is DType.I32  # the last position is 2**31 − 1
    assert position_dtype(2**31 + 1) is DType.I64
    assert indices_bytes(2**31 + 1, 3) == 24


def test_an_encoding_that_fails_leaves_nothing(tmp_path, packed):
    class Broken:
        metadata, tensors = _METADATA, {"x": MaskTensor.whole("x", (3,))}

        def blocks(self, name, *, max_bytes=1):
            raise MaskError(name, "damaged")

        def close(self):
            pass

    for encoding in ("packed", "bool", "indices", "pt"):
        with pytest.raises(MaskError, match="damaged"):
            write_mask(Broken(), tmp_path / "out", encoding)
        assert not (tmp_path / "out").exists()
        with pytest.raises(OutputError, match="not empty"):
            _convert(packed, packed, encoding)


# ---- masks of other tools


_PLAIN = {name: bits for name, bits in _BITS.items() if bits.size}


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("form", ["pt", "bool", "uint8"])
def test_a_foreign_mask_is_imported_in_either_polarity(tmp_path, form, inverted):
    stored = {name: np.asarray(bits ^ inverted) for name, bits in _PLAIN.items()}
    if form == "pt":
        torch.save(
            {name: torch.from_numpy(bits.copy()) for name, bits in stored.items()}, tmp_path / "theirs.pt"
        )
        path = tmp_path / "theirs.pt"
    else:
        path = tmp_path / "theirs.safetensors"
        save_file(
            {n: np.asarray(b, dtype=np.bool_ if form == "bool" else np.uint8) for n, b in stored.items()},
            path,
        )
    imported = _convert(path, tmp_path / "ours", "packed", inverted=inverted)
    assert all(np.array_equal(bits, _PLAIN[name]) for name, bits in _bits(imported).items())
    metadata = open_mask(imported).metadata
    assert (metadata.criterion, metadata.view) == ("unspecified", "unspecified")
    assert metadata.origin["operation"] == "import"
    assert metadata.origin["inverted"] is inverted


def test_a_file_of_weights_is_no_mask(tmp_path):
    save_file({"w": np.zeros((2, 2), dtype=np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(MaskError, match=r"'w': F32 of shape \[2, 2\][^\0]*BOOL, or U8[^\0]*mask export"):
        open_source(tmp_path / "model.safetensors")


def test_a_value_that_is_neither_0_nor_1_is_refused(tmp_path):
    save_file({"w": np.array([[0, 1], [1, 7]], dtype=np.uint8)}, tmp_path / "theirs.safetensors")
    with pytest.raises(MaskError, match=r"'w': holds the value 7 at entry 3"):
        _convert(tmp_path / "theirs.safetensors", tmp_path / "out", "packed")
    assert not (tmp_path / "out").exists()


def test_inverting_a_mask_that_records_its_polarity_is_refused(tmp_path, packed):
    for encoding in ("packed", "bool", "pt"):
        path = packed if encoding == "packed" else _convert(packed, tmp_path / encoding, encoding)
        with pytest.raises(MaskError, match=r"records its polarity[^\0]*ops not"):
            open_source(path, inverted=True)


def test_a_missing_or_unreadable_file_is_a_mask_error(tmp_path):
    with pytest.raises(MaskError, match="no such file"):
        open_source(tmp_path / "nowhere.pt")
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    with pytest.raises(MaskError, match=r"junk\.safetensors: 4 bytes long"):
        open_source(tmp_path / "junk.safetensors")


# ---- damaged masks of ours


@pytest.mark.parametrize("positions", [[1, 1, 2], [3, 2, 4], [-1, 2, 3], [0, 1, 2**31 - 1]])
def test_positions_out_of_order_or_range_are_refused(tmp_path, packed, positions):
    folder = _convert(packed, tmp_path / "indices", "indices")
    path = folder / "mask-00001-of-00001.safetensors"
    raw = bytearray(path.read_bytes())
    start = len(raw) - 4 * sum(np.count_nonzero(bits) for bits in _BITS.values())
    raw[start : start + 12] = np.array(positions, dtype="<i4").tobytes()
    path.write_bytes(raw)
    with pytest.raises(MaskError, match=r"'a': positions 0 … \d+ are out of order or out of range"):
        _convert(folder, tmp_path / "out", "packed")


@pytest.mark.parametrize("encoding", ["bool", "indices"])
def test_entries_selected_outside_the_compared_rows_are_refused(tmp_path, packed, encoding):
    folder = _convert(packed, tmp_path / encoding, encoding)
    path = folder / "mask-00001-of-00001.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw.replace(rb"\"a\":[[0,2],[2,5]]", rb"\"a\":[[0,2],[4,5]]"))
    with pytest.raises(MaskError, match=r"'a'.*outside the compared rows"):
        _convert(folder, tmp_path / "out", "packed")


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not JSON"), ('{"a": 1}', "not a map of strings"), ("{}", "not a mask of this tool")],
)
def test_a_damaged_description_of_a_pt_mask_is_refused(tmp_path, packed, text, message):
    folder = _convert(packed, tmp_path / "pt", "pt")
    (folder / "mask.json").write_text(text)
    with pytest.raises(MaskError, match=message):
        open_source(folder)


def test_a_pt_mask_whose_tensors_are_not_the_described_ones_is_refused(tmp_path, packed):
    folder = _convert(packed, tmp_path / "pt", "pt")
    state = torch.load(folder / "mask.pt", weights_only=True)
    torch.save({**state, "a": torch.zeros(2, 2, dtype=torch.bool)}, folder / "mask.pt")
    with pytest.raises(
        MaskError, match=r"'a': BOOL of shape \[2, 2\][^\0]*expected: BOOL of shape \[7, 37\]"
    ):
        open_source(folder)
    state.pop("a")
    torch.save(state, folder / "mask.pt")
    with pytest.raises(MaskError, match=r"tensor 'a': not in both"):
        open_source(folder)


def test_the_description_of_a_pt_mask_is_the_metadata_of_the_format(tmp_path, packed):
    folder = _convert(packed, tmp_path / "pt", "pt")
    strings = json.loads((folder / "mask.json").read_text())
    assert strings["polarity"] == "1=updated"
    assert json.loads(strings["compared_rows"])["a"] == [[0, 2], [2, 5]]
