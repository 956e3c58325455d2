"""The bf16-visible share: exact overall, bounded per exponent, predicted from binned steps."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from view_tallies import load, pair, tally, to_bf16

from sparsity_audit.compare.accumulate import CODE_DTYPE
from sparsity_audit.compare.numpy_kernel import to_float64
from sparsity_audit.stats.visible import visible_share
from sparsity_audit.types import DType


@pytest.fixture(scope="module")
def fp32_pair():
    return pair("base-fp32", "grpo-fp32-seed0")


def test_the_visible_share_of_the_fp32_pair_is_the_known_answer(fp32_pair):
    dtype, native, served = fp32_pair
    visible = visible_share(native, served, dtype)
    assert 1 - visible.served_changed / 148_928 == pytest.approx(0.1237, abs=5e-5)
    assert visible.share == served.changed["value"] / native.changed["value"]
    # Predicted from |Δ| alone for a base off the grid; the bins give a factor, the truth lies inside.
    assert visible.predicted_off_grid.lower <= visible.served_changed <= visible.predicted_off_grid.upper


def test_visible_bounds_per_exponent_hold_against_a_direct_count(fp32_pair):
    dtype, native, served = fp32_pair
    a, b = load("base-fp32"), load("grpo-fp32-seed0")
    x, y = (np.concatenate([side[n][1] for n in a]) for side in (a, b))
    seen = to_float64(to_bf16(x, dtype), DType.BF16) != to_float64(to_bf16(y, dtype), DType.BF16)
    exponent = np.frexp(to_float64(x, dtype))[1] - 1
    rows = visible_share(native, served, dtype).by_exponent
    assert sum(r.native_changed for r in rows) == native.changed["value"]
    for row in rows:
        assert row.lower <= np.count_nonzero(seen & (exponent == row.exponent)) <= row.upper
        # Only bases that round to a power of two, 1 in 128, are in doubt; visible changes make it more.
        assert row.upper - row.lower <= 0.05 * row.native_changed + 2


@given(st.integers(0, 2**32 - 1), st.sampled_from([DType.F32, DType.F16]))
@settings(deadline=None, max_examples=40)
def test_visible_bounds_hold_on_random_codes_with_special_values(seed, dtype):
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 2 ** (8 * dtype.itemsize), 400, dtype=CODE_DTYPE[dtype.itemsize])
    y = np.where(rng.random(400) < 0.7, x ^ rng.integers(0, 4000, 400, dtype=x.dtype), x)
    native, served = tally(x, y, dtype), tally(to_bf16(x, dtype), to_bf16(y, dtype), DType.BF16)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        values_x, values_y = (to_float64(to_bf16(c, dtype), DType.BF16) for c in (x, y))
        base = to_float64(x, dtype)
    seen = (values_x != values_y) & ~(np.isnan(values_x) & np.isnan(values_y))
    exponent = np.where(np.isfinite(base) & (base != 0), np.frexp(base)[1] - 1, 10_000)
    visible = visible_share(native, served, dtype)
    assert visible.served_changed == np.count_nonzero(seen)
    assert visible.share is None or 0 <= visible.share <= 1
    for row in visible.by_exponent:
        assert row.lower <= np.count_nonzero(seen & (exponent == row.exponent)) <= row.upper


def test_the_on_grid_prediction_bounds_what_a_bf16_base_in_fp32_shows():
    rng = np.random.default_rng(0)
    x = (
        to_bf16(rng.normal(0, 0.05, 20_000).astype(np.float32).view(np.uint32), DType.F32).astype(np.uint32)
        << 16
    )
    y = (x.view(np.float32) + rng.normal(0, 1e-4, 20_000).astype(np.float32)).view(np.uint32)
    native, served = tally(x, y, DType.F32), tally(to_bf16(x, DType.F32), to_bf16(y, DType.F32), DType.BF16)
    visible = visible_share(native, served, DType.F32)
    assert visible.predicted_on_grid.lower <= visible.served_changed <= visible.predicted_on_grid.upper
    assert visible.predicted_on_grid.upper < 0.9 * native.changed["value"]
