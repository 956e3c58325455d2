"""What only the numpy kernel does; that it equals the reference is in tests/properties."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from sparsity_audit.compare.accumulate import CODE_DTYPE, Accumulator, KernelSpec
from sparsity_audit.compare.numpy_kernel import NumpyKernel, to_float64
from sparsity_audit.compare.reference import decode
from sparsity_audit.types import Criterion, DType

CRITERIA = tuple(Criterion.parse(t) for t in ("bitwise", "value"))


@pytest.mark.parametrize(
    "dtype", [DType.F8_E4M3, DType.F8_E5M2, DType.F16, DType.BF16], ids=lambda d: d.label
)
def test_small_floats_widen_to_what_their_bits_say(dtype):
    codes = np.arange(2 ** (8 * dtype.itemsize), dtype=CODE_DTYPE[dtype.itemsize])
    expected = np.array([decode(int(c), dtype) for c in codes])
    assert np.array_equal(to_float64(codes, dtype), expected, equal_nan=True)


def test_blocks_larger_than_a_chunk_add_up():
    base = np.zeros((3, 50_000), dtype=np.uint16)
    tuned = base.copy()
    tuned[:, ::7] = 0x3F80
    acc = Accumulator(
        KernelSpec(dtype=DType.BF16, criteria=CRITERIA, mask=1, level="full"), rows=3, cols=50_000
    )
    bits = np.zeros((3, 6250), dtype=np.uint8)
    NumpyKernel().compare(base, tuned, acc, first_row=0, first_col=0, bits=bits)
    per_row = len(range(0, 50_000, 7))
    assert acc.rows.tolist() == [per_row] * 3
    assert acc.changed.tolist() == [3 * per_row] * 2
    assert np.array_equal(np.unpackbits(bits, axis=1, bitorder="little"), base != tuned)


def test_the_fingerprint_does_not_depend_on_internal_chunks():
    words = np.random.default_rng(5).integers(0, 2**63, 100_000, dtype=np.uint64)
    kernel = NumpyKernel()
    parts = kernel.fingerprint(words[:70_001], 9) + kernel.fingerprint(words[70_001:], 70_010)
    assert kernel.fingerprint(words, 9) == parts % 2**64


def test_extreme_values_raise_no_warning():
    codes = np.array(
        [[0, 2**63, 0x7FEFFFFFFFFFFFFF, 0xFFEFFFFFFFFFFFFF, 0x7FF0000000000000, 1]], dtype=np.uint64
    )
    criteria = (*CRITERIA, Criterion.parse("rel:1e-3"), Criterion.parse("atol:1"))
    spec = KernelSpec(dtype=DType.F64, criteria=criteria, mask=1, level="full", shrink=1e-3)
    acc = Accumulator(spec, rows=1, cols=6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        NumpyKernel().compare(codes, codes[:, ::-1].copy(), acc, first_row=0, first_col=0, bits=None)
    assert acc.changed[1] > 0
