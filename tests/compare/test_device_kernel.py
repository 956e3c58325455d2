"""The device kernel on torch's CPU device, against the reference: any codes, any question, any cut.

`tests/gpu` holds the checks on fixed data, which also run on CUDA.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsity_audit.compare.accumulate import CODE_DTYPE, Accumulator, KernelSpec
from sparsity_audit.compare.device_codes import bf16_of_f64, block_codes, codes_of, float_of_unsigned
from sparsity_audit.compare.device_kernel import DeviceKernel
from sparsity_audit.compare.reference import ReferenceKernel, decode, encode_bf16
from sparsity_audit.types import Criterion, DType

KERNEL = DeviceKernel("cpu")
BITWISE, VALUE = Criterion.parse("bitwise"), Criterion.parse("value")

amounts = st.one_of(
    st.just(0.0), st.floats(min_value=0, allow_nan=False, allow_infinity=False), st.floats(1e-9, 10.0)
)
criteria = st.one_of(
    amounts.map(lambda x: Criterion(kind="atol", parameter=x)),
    amounts.map(lambda x: Criterion(kind="rel", parameter=x)),
    st.one_of(st.integers(0, 12), st.integers(0, 2**70)).map(lambda k: Criterion(kind="ulp", parameter=k)),
)


def codes(dtype: DType) -> st.SearchStrategy[int]:
    """Any code, special ones often."""
    top = 2 ** (8 * dtype.itemsize) - 1
    near_zero = st.integers(0, 3)
    marks = [near_zero, near_zero.map(lambda k: top - k), near_zero.map(lambda k: top // 2 + 1 - k)]
    if dtype.kind == "float":
        around_infinity = st.integers(-2, 2).map(lambda k: min(dtype.layout.first_nan + k, top // 2))
        marks += [around_infinity, around_infinity.map(lambda size: size | dtype.layout.sign_mask)]
    return st.one_of(st.integers(0, top), *marks)


@st.composite
def questions(draw):
    """A dtype, a pair of blocks and a kernel spec."""
    dtype = draw(st.sampled_from(list(DType)))
    rows, cols = draw(st.integers(0, 4)), draw(st.integers(0, 11))
    pair = st.lists(codes(dtype), min_size=rows * cols, max_size=rows * cols)
    base = draw(pair)
    moved = draw(st.lists(st.integers(-9, 9), min_size=rows * cols, max_size=rows * cols))
    tuned = draw(
        st.one_of(
            pair, st.just([(a + k) % 2 ** (8 * dtype.itemsize) for a, k in zip(base, moved, strict=True)])
        )
    )
    asked = (BITWISE, VALUE, *draw(st.lists(criteria, max_size=3)))
    level = draw(st.sampled_from(["counts", "full"]))
    shrinks = level == "full" and dtype in (DType.F32, DType.F64)
    spec = KernelSpec(
        dtype=dtype,
        criteria=asked,
        mask=draw(st.integers(0, len(asked) - 1)),
        level=level,
        shrink=draw(st.one_of(st.none(), st.floats(1e-7, 0.5))) if shrinks else None,
    )
    blocks = [
        np.array(side, dtype=np.uint64).astype(CODE_DTYPE[dtype.itemsize]).reshape(rows, cols)
        for side in (base, tuned)
    ]
    return spec, blocks[0], blocks[1]


def run(kernel, spec: KernelSpec, base: np.ndarray, tuned: np.ndarray, *, cut: int = 0) -> tuple:
    """Tally, axis counts and bits; rows before and after `cut` are separate blocks, the later one first."""
    acc = Accumulator(spec, rows=base.shape[0], cols=base.shape[1])
    bits = np.full((base.shape[0], (base.shape[1] + 7) // 8), 0xFF, dtype=np.uint8)
    for rows in (slice(cut, None), slice(0, cut)):
        part = bits[rows]
        kernel.compare(base[rows], tuned[rows], acc, first_row=rows.start, first_col=0, bits=part)
    kernel.finish(acc)
    return acc.view_tally(), acc.axis_counts(), bits.tobytes()


@given(questions(), st.integers(0, 4))
@settings(deadline=None, max_examples=300)
def test_any_question_about_any_codes_equals_the_reference(question, cut):
    spec, base, tuned = question
    assert run(KERNEL, spec, base, tuned, cut=min(cut, len(base))) == run(
        ReferenceKernel(), spec, base, tuned
    )


@given(st.lists(codes(DType.F64), min_size=1, max_size=20))
@settings(deadline=None, max_examples=150)
def test_float64_is_rounded_to_bf16_once(values):
    got = (
        bf16_of_f64(torch.from_numpy(np.array(values, dtype=np.uint64).view(np.int64)))
        .numpy()
        .view(np.uint16)
    )
    assert got.tolist() == [encode_bf16(decode(code, DType.F64)) for code in values]


@given(st.lists(codes(DType.F32), min_size=1, max_size=20))
@settings(deadline=None, max_examples=150)
def test_float32_is_rounded_to_bf16_like_the_reference(values):
    block = np.array(values, dtype=np.uint32)
    got, expected = np.empty(block.shape, np.uint16), np.empty(block.shape, np.uint16)
    KERNEL.to_bf16(block, DType.F32, got)
    ReferenceKernel().to_bf16(block, DType.F32, expected)
    assert got.tolist() == expected.tolist()


@given(
    st.lists(st.one_of(codes(DType.U64), st.integers(0, 1 << 12).map(lambda k: 2**63 + 1024 + k)), min_size=1)
)
@settings(deadline=None, max_examples=150)
def test_unsigned_64_bit_numbers_are_rounded_once(values):
    got = float_of_unsigned(torch.from_numpy(np.array(values, dtype=np.uint64).view(np.int64)))
    assert got.tolist() == [float(value) for value in values]


@given(st.binary(max_size=400), st.integers(0, 2**61))
@settings(deadline=None, max_examples=60)
def test_fingerprints_of_any_words_equal_the_reference(data, first):
    words = np.frombuffer(data[: len(data) // 8 * 8], dtype=np.uint64)
    assert KERNEL.fingerprint(words, first) == ReferenceKernel().fingerprint(words, first)


def test_codes_share_the_storage_of_what_they_show():
    weights = torch.nn.Parameter(torch.ones(2, 3, dtype=torch.bfloat16))
    assert codes_of(weights).tolist() == [[0x3F80] * 3] * 2
    assert codes_of(weights).data_ptr() == weights.data_ptr()
    raw = torch.arange(12, dtype=torch.uint8)
    assert block_codes(raw, DType.BF16, (2, 3)).tolist() == [
        [0x0100, 0x0302, 0x0504],
        [0x0706, 0x0908, 0x0B0A],
    ]


def test_a_tensor_of_another_width_or_layout_is_refused():
    acc = Accumulator(
        KernelSpec(dtype=DType.BF16, criteria=(BITWISE, VALUE), mask=1, level="counts"), rows=2, cols=2
    )
    half, single = torch.zeros(2, 2, dtype=torch.bfloat16), torch.zeros(2, 2)
    where = {"first_row": 0, "first_col": 0, "want_bits": False}
    for base, tuned in ((single, single), (half, single), (half, half[:, :1]), (half, half.T)):
        with pytest.raises(AssertionError):
            KERNEL.compare_tensors(base, tuned, acc, **where)
    assert acc.entries == 0
