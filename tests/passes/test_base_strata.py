"""The base behind a magnitude-matched mask: fingerprints of slices, and groups by block."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from sparsity_audit.checkpoint.opening import open_checkpoint
from sparsity_audit.compare.numpy_kernel import NumpyKernel
from sparsity_audit.compare.reference import ReferenceKernel
from sparsity_audit.masks import bitmask
from sparsity_audit.masks.container import MaskWriter
from sparsity_audit.masks.metadata import MaskMetadata, MaskTensor
from sparsity_audit.masks.reader import MaskReader, open_mask
from sparsity_audit.masks.sampling import OUTSIDE
from sparsity_audit.passes import base_strata
from sparsity_audit.passes.base_strata import StrataGrouping, base_fingerprint
from sparsity_audit.passes.open_files import OpenFiles


@pytest.mark.parametrize("compared", [((0, 7),), ((0, 3), (3, 7)), ((1, 2), (4, 7)), ()])
def test_a_tensors_fingerprint_is_the_sum_over_its_compared_slices(tmp_path, monkeypatch, compared):
    monkeypatch.setattr(base_strata, "_CHUNK_ENTRIES", 8)
    weights = np.random.default_rng(0).standard_normal((7, 5)).astype(np.float16)
    save_file({"w": weights}, tmp_path / "model.safetensors")
    catalogue = open_checkpoint(tmp_path)
    expected = 0
    for start, stop in compared:
        data = weights[start:stop].tobytes()
        words = np.frombuffer(data.ljust(-(-len(data) // 8) * 8, b"\0"), dtype=np.uint64)
        expected += ReferenceKernel().fingerprint(words, 0)
    tensor = MaskTensor(name="w", shape=(7, 5), compared=compared)
    files = OpenFiles(catalogue)
    assert base_fingerprint(tensor, catalogue.tensors["w"], files, NumpyKernel()) == expected % 2**64
    files.close()


def test_groups_are_strata_of_the_base_and_outside_where_not_compared(tmp_path):
    weights = np.array([[1.0, 1.5, 0.0], [-2.0, 3.0, -0.0], [0.25, 0.3, np.inf]], dtype=np.float32)
    save_file({"w": weights, "n": np.arange(4)}, tmp_path / "model.safetensors")
    tensors = [MaskTensor(name="w", shape=(3, 3), compared=((0, 2),)), MaskTensor.whole("n", (4,))]
    with MaskWriter(tmp_path / "mask", tensors, MaskMetadata(criterion="value", view="native")) as writer:
        writer.finish()
    with MaskReader(open_mask(tmp_path / "mask")) as reader:
        grouping = StrataGrouping(reader, open_checkpoint(tmp_path / "model.safetensors"), force=True)
        found = [grouping.groups("w", block).tolist() for block in bitmask.blocks_of((3, 3), max_bytes=1)]
        assert found == [
            [2 * 127 + 1, 2 * 127, 1],
            [2 * 128 + 1, 2 * 128, 1],
            [OUTSIDE] * 3,
        ]
        (block,) = bitmask.blocks_of((4,))
        assert grouping.num_groups("n") == 1, "integers are one stratum"
        assert grouping.groups("n", block).tolist() == [0] * 4
        grouping.close()
