"""Every counter of overlaps against the entry-by-entry reference, and compiled strata against numpy's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsity_audit.compare.accumulate import CODE_DTYPE
from sparsity_audit.compare.numba_overlap import WordCounter, new_counter
from sparsity_audit.compare.numba_strata import BucketCounter, TableCounter, fill_strata
from sparsity_audit.compare.numpy_kernel import strata_of
from sparsity_audit.compare.overlap_counts import NumpyCounter, empty_table, new_words
from sparsity_audit.masks.sampling import OUTSIDE
from sparsity_audit.stats.overlap import StratumTable
from sparsity_audit.types import DType

FIELDS = ("strata", "entries", "changed", "both", "core")
LENGTHS = [0, 1, 63, 64, 65, 2047, 2048, 2049, 16384, 16385, 40000]


def _same(found: StratumTable, expected: StratumTable) -> None:
    found.check()
    assert found.tensor == expected.tensor
    for field in FIELDS:
        assert np.array_equal(getattr(found, field), getattr(expected, field)), field


def _words(masks: np.ndarray, spare: int) -> np.ndarray:
    """Words for blocks up to `spare` entries longer; what is not promised to be zero is not."""
    runs, length = masks.shape
    words = new_words(runs, length + spare)
    promised = new_words(runs, length).shape[1] - new_words(runs, 0).shape[1]
    words[:, promised:] = np.uint64(0xFFFFFFFFFFFFFFFF)
    packed = np.packbits(masks, axis=-1, bitorder="little")
    words.view(np.uint8)[:, : packed.shape[1]] = packed
    return words


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    runs=st.integers(1, 12),
    lengths=st.lists(st.sampled_from(LENGTHS), min_size=1, max_size=3),
    num_strata=st.sampled_from([1, 2, 32, 512]),
)
def test_counters_equal_the_reference_over_any_blocks_and_start_again_after_each_table(
    seed, runs, lengths, num_strata
) -> None:
    rng = np.random.default_rng(seed)
    by_stratum = [NumpyCounter(runs), TableCounter(runs, num_strata), BucketCounter(runs, num_strata)]
    together = [NumpyCounter(runs), WordCounter(runs)]
    for _ in range(2):
        blocks = [rng.random((runs, length)) < rng.random((runs, 1)) for length in lengths]
        strata = [rng.integers(0, num_strata, length).astype(np.int16) for length in lengths]
        for of_block in strata:
            of_block[rng.random(of_block.size) < 0.1] = OUTSIDE
        for block, of_block in zip(blocks, strata, strict=True):
            counted = int(np.count_nonzero(of_block != OUTSIDE))
            for counter in by_stratum:
                counter.add(_words(block, 100), block.shape[1], strata=of_block, counted=counted)
            for counter in together:
                only = block & (of_block != OUTSIDE)
                counter.add(_words(only, 100), block.shape[1], strata=None, counted=counted)
        numbers, bits = np.concatenate(strata), np.concatenate(blocks, axis=1)
        inside = numbers != OUTSIDE
        expected = StratumTable.from_masks("w", numbers[inside], list(bits[:, inside]))
        for counter in by_stratum:
            _same(counter.take("w"), expected)
        expected = StratumTable.from_masks("w", np.zeros(inside.sum()), list(bits[:, inside]))
        for counter in together:
            _same(counter.take("w"), expected)


@pytest.mark.parametrize("runs", [13, 14, 15, 16, 31, 32, 63, 64, 65, 130])
def test_any_number_of_runs_is_counted_alike(runs) -> None:
    rng = np.random.default_rng(runs)
    bits = rng.random((runs, 3000)) < rng.random((runs, 1)) ** 2
    strata = rng.integers(0, 5, 3000).astype(np.int16)
    for counter, numbers in (
        (new_counter(runs, 5), strata),
        (BucketCounter(runs, 5), strata),
        (WordCounter(runs), np.zeros_like(strata)),
    ):
        given_strata = None if isinstance(counter, WordCounter) else strata
        counter.add(_words(bits, 0), 3000, strata=given_strata, counted=3000)
        _same(counter.take("w"), StratumTable.from_masks("w", numbers, list(bits)))


def test_full_and_empty_masks_fill_the_outer_counts() -> None:
    bits = np.ones((3, 500), dtype=np.bool_)
    bits[2] = False
    counter = WordCounter(3)
    counter.add(_words(bits, 0), 500, strata=None, counted=500)
    table = counter.take("w")
    assert table.core[:, 0].tolist() == [0, 0, 500, 0]
    assert table.both[:, :, 0].tolist() == [[500, 500, 0], [500, 500, 0], [0, 0, 0]]


def test_a_counter_that_saw_nothing_gives_the_empty_table() -> None:
    counters = [WordCounter(4), TableCounter(4, 8), BucketCounter(4, 8), NumpyCounter(4)]
    for counter in counters:
        _same(counter.take("w"), empty_table("w", 4))


def test_tables_are_taken_where_they_stay_small_and_buckets_beyond() -> None:
    assert isinstance(new_counter(2, None), WordCounter)
    assert isinstance(new_counter(12, 512), TableCounter)
    assert isinstance(new_counter(13, 512), BucketCounter)
    assert isinstance(new_counter(10, 4096), BucketCounter)


def test_a_table_keeps_nothing_but_its_counts() -> None:
    counter = TableCounter(10, 512)
    counter.add(new_words(10, 64), 64, strata=np.zeros(64, dtype=np.int16), counted=64)
    table = counter.take("w")
    for field in FIELDS:
        owner = getattr(table, field)
        while owner.base is not None:
            owner = owner.base
        assert owner.nbytes == getattr(table, field).nbytes, f"{field} keeps the patterns alive"


@pytest.mark.parametrize("dtype", [d for d in DType if d.kind == "float"], ids=str)
def test_compiled_strata_are_those_of_numpy(dtype) -> None:
    kind = CODE_DTYPE[dtype.itemsize]
    rng = np.random.default_rng(3)
    codes = np.arange(1 << 16) if dtype.itemsize <= 2 else rng.integers(0, 2**63, 1 << 16)
    codes = codes.astype(kind)
    if dtype.itemsize > 2:  # powers of two, zeros and infinities are rare among random codes
        codes[::3] &= kind.type(~((1 << dtype.layout.mantissa_bits) - 1) & (2 ** (8 * dtype.itemsize) - 1))
    found = np.empty(codes.size, dtype=np.int16)
    fill_strata(codes, dtype, found)
    assert np.array_equal(found, strata_of(codes, dtype))
