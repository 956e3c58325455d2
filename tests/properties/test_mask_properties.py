"""Masks against plain bool arrays: packing, algebra, counts, writing in any order, encodings."""

import itertools
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsity_audit.api.masks import mask_convert, mask_info, mask_ops
from sparsity_audit.masks.bitmask import (
    at_least,
    blocks_of,
    combine,
    compared_bits,
    count_columns,
    count_rows,
    has_stray_tail,
    pack_bits,
    packed_bytes,
    packed_shape,
    popcount,
    rows_columns,
    unpack_bits,
)
from sparsity_audit.masks.container import MaskWriter
from sparsity_audit.masks.metadata import MaskMetadata, MaskTensor
from sparsity_audit.masks.reader import MaskReader, open_mask

_FEW = settings(deadline=None, max_examples=30)
_MANY = settings(deadline=None, max_examples=150)
_shapes = st.lists(st.integers(0, 20), max_size=3).map(tuple)
_matrices = st.tuples(st.integers(1, 9), st.integers(1, 70))
_seeds = st.integers(0, 2**32 - 1)


def _random(shape: tuple[int, ...], seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.asarray(rng.random(shape) < rng.random())


def _folder():
    return tempfile.TemporaryDirectory()


def _write(target: Path, masks: dict[str, np.ndarray], **options) -> Path:
    tensors = [MaskTensor.whole(name, mask.shape) for name, mask in masks.items()]
    metadata = MaskMetadata(criterion="value", view="native")
    with MaskWriter(target, tensors, metadata, **options) as writer:
        for name, mask in masks.items():
            writer.write_bits(name, 0, pack_bits(mask))
        writer.finish()
    return target


def _read(path: Path) -> dict[str, np.ndarray]:
    with MaskReader(open_mask(path)) as reader:
        return {
            name: unpack_bits(reader.read_packed(name), tensor.shape)
            for name, tensor in reader.tensors.items()
        }


@_MANY
@given(_shapes, _seeds)
def test_unpacking_what_was_packed_gives_the_same_bits(shape, seed):
    selected = _random(shape, seed)
    packed = pack_bits(selected)
    assert packed.shape == packed_shape(shape)
    assert packed.size == packed_bytes(shape)
    assert np.array_equal(unpack_bits(packed, shape), selected)
    assert popcount(packed) == np.count_nonzero(selected)


@_MANY
@given(_shapes, st.integers(1, 40))
def test_blocks_cover_every_entry_and_every_packed_byte_once_in_order(shape, max_bytes):
    entry = byte = 0
    for block in blocks_of(shape, max_bytes=max_bytes):
        assert (block.first_entry, block.offset) == (entry, byte)
        assert block.num_bytes <= max(max_bytes, 8)
        entry += block.num_entries
        byte += block.num_bytes
    assert (entry, byte) == (int(np.prod(shape)), packed_bytes(shape))


@_MANY
@given(_shapes.filter(all), st.integers(1, 40), _seeds)
def test_compared_bits_of_blocks_are_the_packed_ranges(shape, max_bytes, seed):
    length = shape[0] if shape else 1
    inside = np.zeros(shape, dtype=np.bool_)
    cuts = np.unique(np.random.default_rng(seed).integers(0, length + 1, 4)).tolist()
    ranges = tuple(itertools.pairwise(cuts))[::2]
    for start, stop in ranges:
        np.atleast_1d(inside)[start:stop] = True
    tensor = MaskTensor(name="t", shape=shape, compared=ranges)
    assert tensor.num_compared == np.count_nonzero(inside)
    packed = pack_bits(inside).reshape(-1)
    for block in blocks_of(shape, max_bytes=max_bytes):
        expected = packed[block.offset : block.offset + block.num_bytes].reshape(block.shape)
        assert np.array_equal(compared_bits(block, tensor.entry_ranges), expected)


@_MANY
@given(_matrices, st.lists(_seeds, min_size=2, max_size=7), st.data())
def test_algebra_on_packed_bits_equals_algebra_on_bools_and_keeps_tails_zero(shape, seeds, data):
    masks = [_random(shape, seed) for seed in seeds]
    packed = [pack_bits(mask) for mask in masks]
    k = data.draw(st.integers(1, len(masks)))
    expected = {
        "and": np.logical_and.reduce(masks),
        "or": np.logical_or.reduce(masks),
        "xor": np.logical_xor.reduce(masks),
        "minus": masks[0] & ~np.logical_or.reduce(masks[1:]),
    }
    (block,) = blocks_of(shape, max_bytes=1 << 12)
    for op, result in expected.items():
        bits = combine(op, packed)
        assert np.array_equal(unpack_bits(bits, shape), result), op
        assert not has_stray_tail(bits, block)
    counted = at_least(packed, k)
    assert np.array_equal(unpack_bits(counted, shape), np.sum(masks, axis=0) >= k)
    assert not has_stray_tail(counted, block)
    before = [pack_bits(mask) for mask in masks]
    assert all(np.array_equal(a, b) for a, b in zip(packed, before, strict=True)), "operands were changed"


@_MANY
@given(_matrices, _seeds)
def test_row_and_column_counts_equal_those_of_bools(shape, seed):
    mask = _random(shape, seed)
    packed = pack_bits(mask)
    assert np.array_equal(count_rows(packed), mask.sum(axis=1))
    assert np.array_equal(count_columns(packed, shape[1]), mask.sum(axis=0))


@_FEW
@given(st.lists(_shapes, max_size=4), _seeds, st.randoms(use_true_random=False), st.integers(1, 60))
def test_bytes_do_not_depend_on_the_order_or_size_of_writes(shapes, seed, shuffler, shard_bytes):
    masks = {f"t{i}": _random(shape, seed + i) for i, shape in enumerate(shapes)}
    with _folder() as folder:
        whole = _write(Path(folder) / "whole", masks, max_shard_bytes=shard_bytes)
        tensors = [MaskTensor.whole(name, mask.shape) for name, mask in masks.items()]
        pieces = [(name, block) for name, m in masks.items() for block in blocks_of(m.shape, max_bytes=8)]
        shuffler.shuffle(pieces)
        shuffler.shuffle(tensors)
        target = Path(folder) / "pieces"
        with MaskWriter(
            target, tensors, MaskMetadata(criterion="value", view="native"), max_shard_bytes=shard_bytes
        ) as writer:
            for name, block in pieces:
                packed = pack_bits(masks[name]).reshape(-1)
                writer.write_bits(name, block.offset, packed[block.offset : block.offset + block.num_bytes])
            writer.finish()
        assert _bytes(target) == _bytes(whole)
        assert all(np.array_equal(mask, masks[name]) for name, mask in _read(target).items())


@_FEW
@given(st.lists(st.integers(1, 30), min_size=1, max_size=5), _seeds, st.randoms(use_true_random=False))
def test_slices_of_a_vector_that_share_bytes_may_come_in_any_order(lengths, seed, shuffler):
    mask = _random((sum(lengths),), seed)
    starts = [0, *itertools.accumulate(lengths)][:-1]
    slices = list(zip(starts, lengths, strict=True))
    shuffler.shuffle(slices)
    with _folder() as folder:
        target = Path(folder) / "mask"
        tensors = [MaskTensor.whole("bias", mask.shape)]
        with MaskWriter(target, tensors, MaskMetadata(criterion="value", view="native")) as writer:
            for start, length in slices:
                writer.write_entries("bias", start, pack_bits(mask[start : start + length]), length)
            writer.finish()
        assert np.array_equal(_read(target)["bias"], mask)


@_FEW
@given(st.lists(_shapes, min_size=1, max_size=3), _seeds)
def test_converting_there_and_back_gives_the_first_bytes_again(shapes, seed):
    masks = {f"t{i}": _random(shape, seed + i) for i, shape in enumerate(shapes)}
    with _folder() as folder:
        root = Path(folder)
        first = _write(root / "first", masks)
        for encoding in ("bool", "indices"):
            mask_convert(first, root / encoding, encoding)
            mask_convert(root / encoding, root / f"{encoding}-back", "packed")
            assert _bytes(root / f"{encoding}-back") == _bytes(first)
            assert mask_info(root / encoding).tensors == mask_info(first).tensors


@_FEW
@given(st.lists(_shapes.filter(all), min_size=1, max_size=3), _seeds, st.integers(2, 4))
def test_operations_on_files_equal_operations_on_bools(shapes, seed, count):
    sets = [{f"t{i}": _random(s, seed + 10 * j + i) for i, s in enumerate(shapes)} for j in range(count)]
    with _folder() as folder:
        root = Path(folder)
        paths = [_write(root / f"in{j}", masks) for j, masks in enumerate(sets)]
        mask_ops("not", paths[:1], root / "not")
        mask_ops("minus", paths, root / "minus")
        mask_ops("k-of-n", paths, root / "some", k=2)
        complement, minus, some = (_read(root / name) for name in ("not", "minus", "some"))
        for name in sets[0]:
            stack = np.stack([masks[name] for masks in sets])
            assert np.array_equal(complement[name], ~stack[0])
            assert np.array_equal(minus[name], stack[0] & ~stack[1:].any(axis=0))
            assert np.array_equal(some[name], stack.sum(axis=0) >= 2)


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_rows_and_columns_of_scalars_and_vectors():
    assert rows_columns(()) == (1, 1)
    assert rows_columns((7,)) == (1, 7)
    assert rows_columns((2, 0, 5)) == (0, 5)
