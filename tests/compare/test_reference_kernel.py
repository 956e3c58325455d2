"""The reference is the definition, so it is held to independent decoders and to the table, case by case."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sparsity_audit.compare.accumulate import CODE_DTYPE, Accumulator, KernelSpec
from sparsity_audit.compare.reference import ReferenceKernel, decode, encode_bf16, mix
from sparsity_audit.stats.exact_sum import to_float
from sparsity_audit.stats.strata import CROSS, IN, NAN_PAYLOAD, OUT, SPECIAL, ZERO_SIGN
from sparsity_audit.types import Criterion, DType

KERNEL = ReferenceKernel()
CRITERIA = tuple(Criterion.parse(t) for t in ("bitwise", "value", "atol:1e-5", "rel:0.5", "ulp:1"))
TORCH = {
    DType.BF16: (torch.int16, torch.bfloat16),
    DType.F16: (torch.int16, torch.float16),
    DType.F8_E4M3: (torch.uint8, torch.float8_e4m3fn),
    DType.F8_E5M2: (torch.uint8, torch.float8_e5m2),
}
ZERO, MINUS_ZERO, ONE, MINUS_ONE = 0x0000, 0x8000, 0x3F80, 0xBF80
INF, MINUS_INF, NAN, OTHER_NAN, SMALLEST = 0x7F80, 0xFF80, 0x7FC0, 0xFFC1, 0x0001


def one_pair(a: int, b: int, dtype: DType = DType.BF16, criteria=CRITERIA):
    acc = Accumulator(KernelSpec(dtype=dtype, criteria=criteria, mask=1, level="full"), rows=1, cols=1)
    codes = [np.array([[c]], dtype=CODE_DTYPE[dtype.itemsize]) for c in (a, b)]
    KERNEL.compare(*codes, acc, first_row=0, first_col=0, bits=None)
    return acc.view_tally()


@pytest.mark.parametrize("dtype", list(TORCH), ids=lambda d: d.label)
def test_every_small_float_code_decodes_as_torch_decodes_it(dtype):
    integer, floating = TORCH[dtype]
    codes = np.arange(2 ** (8 * dtype.itemsize), dtype=CODE_DTYPE[dtype.itemsize])
    signed = torch.from_numpy(codes.view(np.int16 if dtype.itemsize == 2 else np.uint8))
    expected = signed.to(integer).view(floating).to(torch.float64).numpy()
    found = np.array([decode(int(c), dtype) for c in codes])
    assert np.array_equal(found, expected, equal_nan=True)
    assert np.array_equal(np.signbit(found[expected == 0]), np.signbit(expected[expected == 0]))


@pytest.mark.parametrize("value", [1.0, -2.5, 5e-324, 1e308, 0.1, math.inf, -0.0])
def test_float64_codes_decode_to_themselves(value):
    assert decode(int(np.float64(value).view(np.uint64)), DType.F64) == value


def test_rounding_to_bf16_matches_torch_on_float32():
    rng = np.random.default_rng(3)
    codes = rng.integers(0, 2**32, 3000, dtype=np.uint64).astype(np.uint32)
    expected = (
        torch.from_numpy(codes.view(np.float32)).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    )
    found = np.array([encode_bf16(float(v)) for v in codes.view(np.float32)], dtype=np.uint16)
    numbers = ~np.isnan(codes.view(np.float32))
    assert np.array_equal(found[numbers], expected[numbers])
    assert set(found[~numbers].tolist()) <= {0x7FC0}


def test_rounding_a_float64_rounds_once():
    just_above_middle = 1.0 + 2.0**-8 + 2.0**-40
    assert encode_bf16(float(np.float32(just_above_middle))) == 0x3F80
    assert encode_bf16(just_above_middle) == 0x3F81


@pytest.mark.parametrize(
    ("base", "tuned", "changed", "column"),
    [
        (ONE, ONE, (0, 0, 0, 0, 0), None),
        (NAN, OTHER_NAN, (1, 0, 0, 0, 0), NAN_PAYLOAD),
        (NAN, ONE, (1, 1, 1, 1, 1), SPECIAL),
        (ONE, NAN, (1, 1, 1, 1, 1), SPECIAL),
        (INF, INF, (0, 0, 0, 0, 0), None),
        (INF, ONE, (1, 1, 1, 1, 1), SPECIAL),
        (INF, MINUS_INF, (1, 1, 1, 1, 1), SPECIAL),
        (INF, NAN, (1, 1, 1, 1, 1), SPECIAL),
        (ZERO, MINUS_ZERO, (1, 0, 0, 0, 0), ZERO_SIGN),
        (ZERO, SMALLEST, (1, 1, 0, 1, 0), OUT),
        (MINUS_ZERO, SMALLEST, (1, 1, 0, 1, 0), OUT),
        (SMALLEST, MINUS_ZERO, (1, 1, 0, 1, 0), IN),
        (SMALLEST, SMALLEST | 0x8000, (1, 1, 0, 1, 1), CROSS + 1),
        (ONE, ONE + 1, (1, 1, 1, 0, 0), OUT),
        (ONE, ONE - 3, (1, 1, 1, 0, 1), IN + 2),
        (ONE, MINUS_ONE, (1, 1, 1, 1, 1), CROSS + 5 + 14),
    ],
)
def test_the_table_of_special_values(base, tuned, changed, column):
    tally = one_pair(base, tuned)
    assert tuple(tally.changed.values()) == changed
    assert [c for _, c in tally.cells] == ([] if column is None else [column])


def test_left_out_deltas_are_counted():
    assert one_pair(INF, ONE).nonfinite_deltas == 1
    assert one_pair(NAN, OTHER_NAN).nonfinite_deltas == 0
    assert one_pair(INF, ONE).abs_sum == 0
    huge = [int(np.float64(v).view(np.uint64)) for v in (1e308, -1e308)]
    tally = one_pair(*huge, dtype=DType.F64)
    assert (tally.nonfinite_deltas, tally.changed["atol:1e-5"], tally.sign_flips) == (1, 1, 1)


def test_sums_of_one_entry_are_its_delta():
    tally = one_pair(ONE, ONE + 2)
    step = 2 * 2.0**-7
    assert (to_float(tally.abs_sum), to_float(tally.sq_sum), tally.max_abs) == (step, step * step, step)
    assert to_float(tally.base_sq_sum) == 1.0


def test_integers_compare_exactly_where_float64_could_not():
    criteria = (*CRITERIA[:2], Criterion.parse("ulp:0"), Criterion.parse("atol:0.9"))
    tally = one_pair(2**63, 2**63 + 1, dtype=DType.U64, criteria=criteria)
    assert set(tally.changed.values()) == {1}


def test_bools_count_any_nonzero_byte_as_one():
    tally = one_pair(1, 2, dtype=DType.BOOL)
    assert (tally.changed["bitwise"], tally.changed["value"]) == (1, 0)


def test_opaque_storage_is_compared_by_code_under_every_criterion():
    assert set(one_pair(1, 2, dtype=DType.F8_E8M0).changed.values()) == {1}
    assert set(one_pair(2, 2, dtype=DType.F8_E8M0).changed.values()) == {0}


def test_the_fingerprint_notices_a_swap():
    assert mix(1, 0) + mix(2, 1) != mix(2, 0) + mix(1, 1)
    assert mix(0, 0) != mix(0, 1)
