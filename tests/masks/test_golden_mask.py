"""Version 1 of the mask format, frozen: old files must load, and equal masks must give equal bytes."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from sparsity_audit.masks.bitmask import pack_bits, packed_shape
from sparsity_audit.masks.container import MaskWriter
from sparsity_audit.masks.metadata import MaskMetadata, MaskTensor, SourceReference
from sparsity_audit.masks.reader import MaskReader, open_mask

_GOLDEN = Path(__file__).parents[1] / "golden"
_EXPECTED = json.loads((_GOLDEN / "mask-v1.json").read_text(encoding="utf-8"))


def _metadata() -> MaskMetadata:
    known = dict(_EXPECTED["metadata"])
    return MaskMetadata(
        base=SourceReference(**known.pop("base")), tuned=SourceReference(**known.pop("tuned")), **known
    )


def _tensors() -> list[MaskTensor]:
    return [
        MaskTensor(
            name=record["name"],
            shape=tuple(record["shape"]),
            compared=tuple(tuple(pair) for pair in record["compared"]),
            fingerprints=(int(record["fingerprints"][0], 16), int(record["fingerprints"][1], 16)),
        )
        for record in _EXPECTED["tensors"]
    ]


def _bits_by_hand(record: dict) -> bytes:
    """Packed bytes from the definition, one entry at a time."""
    shape = record["shape"]
    cols = shape[-1] if shape else 1
    width = -(-cols // 8)
    data = bytearray(int(np.prod(packed_shape(tuple(shape)))))
    for entry in record["selected"]:
        row, col = divmod(entry, cols)
        data[row * width + col // 8] |= 1 << col % 8
    return bytes(data)


def _write(target: Path) -> None:
    with MaskWriter(target, _tensors(), _metadata(), max_shard_bytes=_EXPECTED["max_shard_bytes"]) as writer:
        for record in _EXPECTED["tensors"]:
            selected = np.zeros(int(np.prod(record["shape"])), dtype=np.bool_)
            selected[record["selected"]] = True
            writer.write_bits(record["name"], 0, pack_bits(selected.reshape(record["shape"])))
        writer.finish()


def test_a_version_1_mask_still_loads_with_the_bits_and_metadata_it_was_written_with():
    catalogue = open_mask(_GOLDEN / "mask-v1")
    assert catalogue.metadata == _metadata()
    assert list(catalogue.tensors.values()) == sorted(_tensors(), key=lambda tensor: tensor.name)
    with MaskReader(catalogue) as reader:
        for record in _EXPECTED["tensors"]:
            assert reader.read_packed(record["name"]).tobytes() == _bits_by_hand(record), record["name"]


def test_writing_the_same_mask_gives_the_golden_bytes(tmp_path):
    _write(tmp_path / "mask")
    golden = {path.name: path.read_bytes() for path in (_GOLDEN / "mask-v1").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "mask").iterdir()} == golden
    assert len(golden) > 2, "the golden mask has several shards"


def test_the_safetensors_library_reads_the_golden_shards():
    seen = set()
    records = {record["name"]: record for record in _EXPECTED["tensors"]}
    for path in sorted((_GOLDEN / "mask-v1").glob("*.safetensors")):
        with safe_open(path, "numpy") as shard:
            assert shard.metadata()["polarity"] == "1=updated"
            for name in shard.keys():  # noqa: SIM118 - the library's handle is no dict
                stored = shard.get_tensor(name)
                assert stored.dtype == np.uint8
                assert stored.shape == packed_shape(tuple(records[name]["shape"]))
                assert stored.tobytes() == _bits_by_hand(records[name])
                seen.add(name)
    assert seen == records.keys()


@pytest.mark.parametrize("record", _EXPECTED["tensors"], ids=lambda record: record["name"])
def test_packing_follows_the_written_definition(record):
    selected = np.zeros(int(np.prod(record["shape"])), dtype=np.bool_)
    selected[record["selected"]] = True
    assert pack_bits(selected.reshape(record["shape"])).tobytes() == _bits_by_hand(record)
