"""Masks of whole tensors select compared entries alone, and survive a round trip."""

from __future__ import annotations

from contextlib import closing

import numpy as np

from sparsity_audit.masks.encodings import write_mask
from sparsity_audit.masks.metadata import MaskMetadata, MaskTensor
from sparsity_audit.masks.sources import open_source
from sparsity_audit.masks.whole import WholeTensorsSource


def test_rows_that_are_not_compared_are_not_selected(tmp_path) -> None:
    tensors = {
        "a": MaskTensor(name="a", shape=(5, 11), compared=((0, 2), (3, 5)), fingerprints=(7, 8)),
        "b": MaskTensor.whole("b", (3, 9), fingerprints=(9, 10)),
        "empty": MaskTensor.whole("empty", (0,)),
        "scalar": MaskTensor.whole("scalar", ()),
    }
    source = WholeTensorsSource(
        tensors, MaskMetadata(criterion="layer:0", view="native"), {"a", "empty", "scalar"}
    )
    write_mask(source, tmp_path / "mask", "packed")
    with closing(open_source(tmp_path / "mask")) as stored:
        found = {}
        for name, tensor in stored.tensors.items():
            bits = [
                np.unpackbits(packed, axis=-1, count=block.num_cols, bitorder="little").reshape(-1)
                for block, packed in stored.blocks(name, max_bytes=2)
            ]
            found[name] = np.concatenate(bits).reshape(tensor.shape) if bits else np.empty(tensor.shape)
        assert {name: t.fingerprints for name, t in stored.tensors.items()}["a"] == (7, 0)
    assert found["a"].sum(axis=1).tolist() == [11, 11, 0, 11, 11]
    assert found["b"].sum() == 0
    assert found["scalar"] == 1
