"""Counts of many masks in one pass, against a slow reference."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from support import WholeGroups

from sparsity_audit import diff
from sparsity_audit.checkpoint.opening import open_checkpoint
from sparsity_audit.checkpoint.store import LocalFile
from sparsity_audit.compare import numba_overlap
from sparsity_audit.errors import ChangedInputError, MaskError
from sparsity_audit.masks import reader as reader_module
from sparsity_audit.masks.bitmask import pack_bits
from sparsity_audit.masks.container import MaskWriter
from sparsity_audit.masks.metadata import MaskMetadata, MaskTensor
from sparsity_audit.masks.reader import MaskReader, open_mask
from sparsity_audit.masks.sampling import OUTSIDE
from sparsity_audit.passes.base_strata import StrataGrouping
from sparsity_audit.passes.many import count_overlaps
from sparsity_audit.stats.overlap import StratumTable

CODES = {
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "f32": torch.float32,
    "f64": torch.float64,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
    "int8": torch.int8,
}
LAYOUTS = {
    torch.bfloat16: (16, 7),
    torch.float16: (16, 10),
    torch.float32: (32, 23),
    torch.float64: (64, 52),
    torch.float8_e4m3fn: (8, 3),
    torch.float8_e5m2: (8, 2),
}
"""Bits of a number, bits of its mantissa."""
FIELDS = ("strata", "entries", "changed", "both", "core")


def _write(
    folder: Path, arrays: dict[str, np.ndarray], tensors: dict[str, MaskTensor], *, view: str = "native"
):
    with MaskWriter(folder, list(tensors.values()), MaskMetadata(criterion="value", view=view)) as writer:
        for name, bits in arrays.items():
            if bits.size:
                writer.write_bits(name, 0, pack_bits(bits))
        writer.finish()
    return open_mask(folder)


def _same(found: StratumTable, expected: StratumTable) -> None:
    found.check()
    assert (found.tensor, found.core_of) == (expected.tensor, expected.core_of)
    for field in FIELDS:
        assert np.array_equal(getattr(found, field), getattr(expected, field)), field


SHAPES = [(7, 13), (3, 200), (1, 500), (90,), (2, 3, 17), (33, 64), (), (0, 5), (4, 0), (0,)]


@settings(deadline=None, max_examples=80)
@given(
    seed=st.integers(0, 2**32 - 1),
    runs=st.integers(1, 12),
    shapes=st.lists(st.sampled_from(SHAPES), min_size=1, max_size=3),
    num_strata=st.integers(0, 9),
    kernel=st.sampled_from(["numpy", "numba", "buckets"]),
    block_bytes=st.sampled_from([1, 8, 16, 40, 1 << 15]),
    workers=st.sampled_from([1, 3]),
)
def test_counts_are_those_of_the_entry_by_entry_reference_for_any_split_and_kernel(
    seed, runs, shapes, num_strata, kernel, block_bytes, workers
) -> None:
    rng = np.random.default_rng(seed)
    names = [f"t{i}" for i in range(len(shapes))]
    tensors, inside = {}, {}
    for name, shape in zip(names, shapes, strict=True):
        tensors[name] = MaskTensor(name=name, shape=shape, compared=_some_rows(shape, rng))
        flags = np.zeros(tensors[name].num_entries, dtype=bool)
        for first, stop in tensors[name].entry_ranges:
            flags[first:stop] = True
        inside[name] = flags.reshape(shape)
    bits = [
        {n: (rng.random(s) < rng.random()) & inside[n] for n, s in zip(names, shapes, strict=True)}
        for _ in range(runs)
    ]
    groups = {n: rng.integers(0, max(num_strata, 1), s) for n, s in zip(names, shapes, strict=True)}
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        if kernel == "buckets":
            patch.setattr(numba_overlap, "MAX_TABLE_CELLS", 0)
        masks = [_write(Path(folder) / str(r), arrays, tensors) for r, arrays in enumerate(bits)]
        core_of = np.flatnonzero(rng.random(runs) < 0.7).tolist() if rng.random() < 0.5 else None
        found = count_overlaps(
            masks,
            tensors,
            grouping=WholeGroups(groups) if num_strata else None,
            core_of=core_of,
            kernel="numpy" if kernel == "numpy" else "numba",
            block_bytes=block_bytes,
            workers=workers,
        )
    for table, name in zip(found, names, strict=True):
        chosen = np.asarray(inside[name]).reshape(-1)
        expected = StratumTable.from_masks(
            name,
            np.asarray(groups[name]).reshape(-1)[chosen],
            [np.asarray(arrays[name]).reshape(-1)[chosen] for arrays in bits],
            core_of=core_of,
        )
        _same(table, expected)


def _some_rows(shape: tuple[int, ...], rng: np.random.Generator) -> tuple[tuple[int, int], ...]:
    """Compared ranges: everything, from some row on, two ranges with a gap, or nothing."""
    length = shape[0] if shape else 1
    cuts = sorted({int(cut) for cut in rng.integers(0, length + 1, 4)})
    some = [(0, length)], [(cuts[0], length)], list(zip(cuts[::2], cuts[1::2], strict=False)), []
    return tuple((start, stop) for start, stop in some[rng.integers(4)] if start < stop)


def test_a_tensor_without_entries_and_one_that_is_not_compared_have_no_strata(tmp_path) -> None:
    tensors = {
        "empty": MaskTensor.whole("empty", (0, 4)),
        "apart": MaskTensor(name="apart", shape=(3, 3), compared=()),
    }
    arrays = {"empty": np.zeros((0, 4), dtype=bool), "apart": np.zeros((3, 3), dtype=bool)}
    masks = [_write(tmp_path / str(r), arrays, tensors) for r in range(2)]
    for grouping in (None, WholeGroups({name: np.zeros(a.shape) for name, a in arrays.items()})):
        for table in count_overlaps(masks, tensors, grouping=grouping):
            assert table.entries.size == 0
            table.check()


def test_entries_without_a_group_are_not_counted(tmp_path) -> None:
    tensors = {"w": MaskTensor.whole("w", (2, 70))}
    groups = np.where(np.arange(140).reshape(2, 70) % 3 == 0, OUTSIDE, 5)
    masks = [_write(tmp_path / str(r), {"w": np.ones((2, 70), dtype=bool)}, tensors) for r in range(2)]
    (table,) = count_overlaps(masks, tensors, grouping=WholeGroups({"w": groups}))
    assert table.strata.tolist() == [5]
    assert table.entries.tolist() == table.both[0, 1].tolist() == [int((groups == 5).sum())]


def test_more_runs_than_bits_of_a_byte_are_counted_alike(tmp_path) -> None:
    rng = np.random.default_rng(5)
    tensors = {"w": MaskTensor.whole("w", (9, 61))}
    bits = [rng.random((9, 61)) < rng.random() for _ in range(19)]
    strata = rng.integers(0, 5, (9, 61))
    masks = [_write(tmp_path / str(r), {"w": mask}, tensors) for r, mask in enumerate(bits)]
    for grouping, numbers in ((WholeGroups({"w": strata}), strata), (None, np.zeros_like(strata))):
        (table,) = count_overlaps(masks, tensors, grouping=grouping, block_bytes=16)
        _same(table, StratumTable.from_masks("w", numbers, bits))


def test_entries_done_are_reported_to_the_last_one(tmp_path) -> None:
    tensors = {"w": MaskTensor.whole("w", (40, 70)), "v": MaskTensor.whole("v", (5,))}
    arrays = {"w": np.ones((40, 70), dtype=bool), "v": np.zeros(5, dtype=bool)}
    masks = [_write(tmp_path / str(r), arrays, tensors) for r in range(2)]
    done: list[int] = []
    count_overlaps(masks, tensors, block_bytes=9, on_entries=done.append)
    assert sum(done) == 2805
    assert len(done) > 1


@pytest.mark.parametrize("kernel", ["numpy", "numba"])
def test_a_damaged_mask_is_refused_in_every_worker(tmp_path, kernel) -> None:
    tensors = {"w": MaskTensor.whole("w", (8, 9))}
    masks = [_write(tmp_path / str(r), {"w": np.zeros((8, 9), dtype=bool)}, tensors) for r in range(2)]
    (shard,) = (tmp_path / "1").glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] = 0x80
    shard.write_bytes(bytes(data))
    with pytest.raises(MaskError, match="beyond the last column"):
        count_overlaps([masks[0], open_mask(tmp_path / "1")], tensors, workers=2, kernel=kernel)


def test_bits_outside_the_compared_rows_are_refused(tmp_path) -> None:
    tensors = {"w": MaskTensor(name="w", shape=(8, 16), compared=((2, 5),))}
    masks = [_write(tmp_path / str(r), {"w": np.zeros((8, 16), dtype=bool)}, tensors) for r in range(2)]
    (shard,) = (tmp_path / "1").glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] = 0x80
    shard.write_bytes(bytes(data))
    with pytest.raises(MaskError, match="outside the compared rows"):
        count_overlaps([masks[0], open_mask(tmp_path / "1")], tensors)


@pytest.mark.parametrize("last_byte", [0, 0x80])
def test_a_mask_that_changes_during_the_pass_is_refused_as_changed_not_as_damaged(
    tmp_path, last_byte
) -> None:
    tensors = {"w": MaskTensor.whole("w", (8, 9))}
    masks = [_write(tmp_path / str(r), {"w": np.zeros((8, 9), dtype=bool)}, tensors) for r in range(2)]
    (shard,) = (tmp_path / "1").glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] = last_byte
    shard.unlink()
    shard.write_bytes(bytes(data))
    with pytest.raises(ChangedInputError, match="changed during the run"):
        count_overlaps(masks, tensors)


def test_one_shard_a_run_is_open_at_a_time_and_none_afterwards(tmp_path, monkeypatch) -> None:
    shape = (64, 64)
    tensors = {name: MaskTensor.whole(name, shape) for name in ("a", "b", "c")}
    masks = []
    for r in range(2):
        metadata = MaskMetadata(criterion="value", view="native")
        with MaskWriter(tmp_path / str(r), list(tensors.values()), metadata, max_shard_bytes=512) as writer:
            writer.finish()
        masks.append(open_mask(tmp_path / str(r)))
    assert len(masks[0].files) == 3
    opened: list[int] = []
    most: list[int] = []

    class Counted(LocalFile):
        def __init__(self, entry) -> None:
            super().__init__(entry)
            opened.append(1)
            most.append(sum(opened))

        def close(self) -> None:
            super().close()
            opened.append(-1)

    monkeypatch.setattr(reader_module, "LocalFile", Counted)
    count_overlaps(masks, tensors)
    assert max(most) == 2
    assert sum(opened) == 0


@pytest.mark.parametrize("view", ["native", "served"])
@pytest.mark.parametrize("dtype", list(CODES))
def test_strata_of_any_base_dtype_are_the_same_for_every_kernel(tmp_path, dtype, view) -> None:
    rng = np.random.default_rng(11)
    shape = (41, 26)
    weights = torch.from_numpy(rng.standard_normal(shape) * 3).to(CODES[dtype])
    weights[0, :4], weights[3] = 0, 2
    save_file({"w": weights}, tmp_path / "model.safetensors")
    base = open_checkpoint(tmp_path / "model.safetensors")
    tensors = {"w": MaskTensor(name="w", shape=shape, compared=((1, 17), (20, 41)))}
    bits = [rng.random(shape) < 0.3 for _ in range(3)]
    for mask in bits:
        mask[0] = mask[17:20] = False
    masks = [_write(tmp_path / str(r), {"w": mask}, tensors, view=view) for r, mask in enumerate(bits)]
    expected = _strata_of_weights(weights, view)
    inside = np.zeros(shape, dtype=bool)
    inside[1:17] = inside[20:] = True
    reference = StratumTable.from_masks("w", expected[inside], [mask[inside] for mask in bits])
    with MaskReader(masks[0]) as like:
        for kernel, workers, block_bytes in (("numpy", 1, 1 << 16), ("numba", 1, 1 << 16), ("numba", 2, 16)):
            grouping = StrataGrouping(like, base, force=True, kernel=kernel)
            (table,) = count_overlaps(
                masks, tensors, grouping=grouping, kernel=kernel, workers=workers, block_bytes=block_bytes
            )
            grouping.close()
            _same(table, reference)


def _strata_of_weights(weights: torch.Tensor, view: str) -> np.ndarray:
    """Twice the exponent field and the bit "mantissa is 0", weight by weight, from torch's own numbers."""
    if not weights.is_floating_point():
        return np.zeros(weights.shape, dtype=np.int64)
    kept = (torch.float8_e4m3fn, torch.float8_e5m2)
    seen = weights.to(torch.bfloat16) if view == "served" and weights.dtype not in kept else weights
    bits, mantissa = LAYOUTS[seen.dtype]
    codes = seen.view(getattr(torch, f"int{bits}")).numpy().astype(np.int64) & (2 ** (bits - 1) - 1)
    return 2 * (codes >> mantissa) + (codes & (2**mantissa - 1) == 0)


@pytest.mark.parametrize("kernel", ["numpy", "numba"])
@pytest.mark.parametrize(("view", "base"), [("native", "base-bf16"), ("served", "base-fp32")])
def test_strata_of_real_runs_are_those_of_the_base_in_the_masks_view(
    addition, tmp_path, view, base, kernel
) -> None:
    kind = base.removeprefix("base-")
    for seed in (0, 1):
        run = addition / f"grpo-{kind}-seed{seed}"
        diff(addition / base, run, stats="counts", view=view, mask=tmp_path / f"m{seed}")
    masks = [open_mask(tmp_path / f"m{seed}") for seed in (0, 1)]
    with MaskReader(masks[0]) as like:
        grouping = StrataGrouping(like, open_checkpoint(addition / base), kernel=kernel)
        found = count_overlaps(masks, masks[0].tensors, grouping=grouping, workers=2, kernel=kernel)
        grouping.close()
    codes = _codes_as_bf16(addition / base)
    with MaskReader(masks[0]) as first, MaskReader(masks[1]) as second:
        for table in found:
            bits = [_bool(reader, table.tensor) for reader in (first, second)]
            strata = 2 * ((codes[table.tensor] >> 7) & 255).astype(np.int64) + (
                (codes[table.tensor] & 127) == 0
            )
            _same(table, StratumTable.from_masks(table.tensor, strata, bits))


def _codes_as_bf16(folder: Path) -> dict[str, np.ndarray]:
    import torch
    from safetensors.torch import load_file

    (path,) = folder.glob("*.safetensors")
    return {
        name: tensor.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
        for name, tensor in load_file(path).items()
    }


def _bool(reader: MaskReader, name: str) -> np.ndarray:
    from sparsity_audit.masks.bitmask import unpack_bits

    return unpack_bits(reader.read_packed(name), reader.tensors[name].shape)
