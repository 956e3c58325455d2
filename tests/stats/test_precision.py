"""Change rates, ULP histogram, tolerance notes and visible share against brute force and known answers."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from view_tallies import CRITERIA, load, pair, tally

from sparsity_audit.compare.accumulate import CODE_DTYPE
from sparsity_audit.compare.numpy_kernel import to_float64
from sparsity_audit.stats.grid import describe
from sparsity_audit.stats.precision import (
    HiddenUlps,
    change_rates,
    hidden_by_tolerance,
    hidden_ulps,
    merge_views,
    rel_equals_value,
    ulp_histogram,
)
from sparsity_audit.stats.tally import DecayCounts, ViewTally
from sparsity_audit.types import Criterion, DType


@pytest.fixture(scope="module")
def bf16_pair():
    return pair("base-bf16", "grpo-bf16-lr1e-4-seed0")


def test_known_sparsity_comes_out_of_the_rates(bf16_pair):
    dtype, view, _ = bf16_pair
    rates = change_rates(view, dtype)
    assert sum(r.entries for r in rates) == 148_928
    assert 1 - sum(r.changed for r in rates) / 148_928 == pytest.approx(0.8155, abs=5e-5)
    assert sum(r.changed for r in rates) == view.changed["value"]


def test_rates_per_exponent_equal_a_direct_count(bf16_pair):
    dtype, view, _ = bf16_pair
    a, b = load("base-bf16"), load("grpo-bf16-lr1e-4-seed0")
    x, y = (to_float64(np.concatenate([side[n][1] for n in a]), dtype) for side in (a, b))
    for row in change_rates(view, dtype):
        inside = (np.abs(x) >= 2.0**row.exponent) & (np.abs(x) < 2.0 ** (row.exponent + 1))
        assert (row.entries, row.changed) == (inside.sum(), (inside & (x != y)).sum())
        assert row.rate == row.changed / row.entries


def test_zero_subnormal_infinity_and_nan_have_rows_of_their_own():
    base = np.array([0x0000, 0x8000, 0x0001, 0x3F80, 0x3F81, 0x7F80, 0x7FC0, 0x0080], dtype=np.uint16)
    tuned = np.array([0x8000, 0x0001, 0x0002, 0x3F81, 0x3F84, 0x7F80, 0x7FC1, 0x7FC0], dtype=np.uint16)
    rows = change_rates(tally(base, tuned, DType.BF16), DType.BF16)
    found = [(r.kind, r.exponent, r.entries, r.changed, r.one_ulp) for r in rows]
    assert found == [
        ("zero", None, 2, 1, 1),
        ("subnormal", None, 1, 1, 1),
        ("normal", -126, 1, 1, 0),
        ("normal", 0, 2, 2, 1),
        ("infinity", None, 1, 0, 0),
        ("nan", None, 1, 0, 0),
    ]
    assert rows[3].one_ulp_share == 0.5
    assert rows[-1].one_ulp_share is None


def test_the_top_exponent_of_fp8_e4m3_says_that_it_may_hold_nans():
    rows = change_rates(
        tally(np.array([0x7F, 0x7E], np.uint8), np.array([0x7F, 0x7D], np.uint8), DType.F8_E4M3),
        DType.F8_E4M3,
    )
    assert [(r.kind, r.entries, r.changed) for r in rows] == [("normal_or_nan", 2, 1)]


def test_integers_have_one_row():
    rows = change_rates(tally(np.array([1, 2], np.uint32), np.array([1, 9], np.uint32), DType.I32), DType.I32)
    assert [(r.kind, r.exponent, r.entries, r.changed) for r in rows] == [("not_float", None, 2, 1)]


def test_a_tally_without_strata_has_no_rows():
    assert change_rates(ViewTally(entries=4, changed={"bitwise": 1, "value": 1}), DType.BF16) == ()


def test_gaps_are_the_distances_to_the_neighbours_for_every_finite_code():
    for dtype in (DType.BF16, DType.F16, DType.F8_E4M3, DType.F8_E5M2):
        layout = dtype.layout
        codes = np.arange(layout.infinity or layout.first_nan, dtype=CODE_DTYPE[dtype.itemsize])
        value = to_float64(codes, dtype)
        for code in range(1, len(codes) - 1):
            mantissa = code & ((1 << layout.mantissa_bits) - 1)
            place = describe(2 * (code >> layout.mantissa_bits) + (mantissa == 0), dtype)
            assert place.first <= code <= place.last
            assert place.gap_out == value[code + 1] - value[code]
            assert place.gap_in == value[code] - value[code - 1]


def test_the_histogram_is_exact_to_eight_and_adds_up_to_bitwise():
    base = np.full(14, 0x4000, dtype=np.uint16)
    tuned = base.copy()
    tuned[:10] += np.array([1, 1, 2, 8, 9, 15, 16, 31, 32, 0], dtype=np.uint16)
    tuned[10] = 0x4000 - 3
    base[11], tuned[11] = 0x0000, 0x8000
    base[12], tuned[12] = 0x7FC0, 0x7FC1
    base[13], tuned[13] = 0x7F80, 0x0001
    view = tally(base, tuned, DType.BF16)
    histogram = ulp_histogram(view)
    assert [(b.low, b.high, b.outward, b.inward, b.crossing) for b in histogram.bins] == [
        (1, 1, 2, 0, 0),
        (2, 2, 1, 0, 0),
        (3, 3, 0, 1, 0),
        (8, 8, 1, 0, 0),
        (9, 15, 2, 0, 0),
        (16, 31, 2, 0, 0),
        (32, 63, 1, 0, 0),
    ]
    assert (histogram.zero_sign, histogram.nan_payload, histogram.special) == (1, 1, 1)
    assert sum(b.outward + b.inward + b.crossing for b in histogram.bins) + 3 == view.changed["bitwise"]


def test_the_ulps_that_1e_minus_5_hides_in_bf16_follow_from_the_layout():
    assert hidden_ulps(1e-5, DType.BF16) == tuple(
        HiddenUlps(below_exponent=e, ulps=u) for e, u in ((-9, 1), (-10, 2), (-11, 5), (-12, 10), (-13, 20))
    )
    assert hidden_ulps(0.0, DType.BF16) == ()


@given(
    st.floats(min_value=1e-7, max_value=1e-2),
    st.integers(min_value=0x2000, max_value=0x4000),
    st.integers(min_value=1, max_value=60),
)
@settings(deadline=None, max_examples=200)
def test_a_change_inside_one_binade_is_hidden_exactly_when_the_note_says_so(tolerance, code, ulps):
    if (code & 0x7F) + ulps > 0x7F:
        ulps = 0x7F - (code & 0x7F)
    x, y = to_float64(np.array([code, code + ulps], dtype=np.uint16), DType.BF16)
    below = math.frexp(x)[1]
    noted = [r.ulps for r in hidden_ulps(tolerance, DType.BF16, num=300) if r.below_exponent == below]
    if ulps:
        assert (abs(y - x) <= tolerance) == (ulps <= (noted[0] if noted else 0))


def test_hidden_changes_are_value_minus_tolerance(bf16_pair):
    _, view, _ = bf16_pair
    hidden = hidden_by_tolerance(view, Criterion.parse("atol:1e-5"))
    assert hidden.hidden == view.changed["value"] - view.changed["atol:1e-5"]
    assert hidden.share == hidden.hidden / view.changed["value"]
    assert (
        hidden_by_tolerance(
            tally(np.zeros(2, np.uint16), np.zeros(2, np.uint16), DType.BF16), CRITERIA[2]
        ).share
        is None
    )


@pytest.mark.parametrize("dtype", [DType.BF16, DType.F16])
def test_rel_equals_value_for_every_pair_of_neighbouring_codes_below_the_limit(dtype):
    layout = dtype.layout
    codes = np.arange(layout.infinity, dtype=np.uint16)
    limit = 2.0 ** -(layout.mantissa_bits + 1)
    below, at = (Criterion(kind="rel", parameter=e) for e in (np.nextafter(limit, 0), limit))
    view = tally(codes[:-1], codes[1:], dtype, criteria=(*CRITERIA[:2], below, at))
    assert view.changed[below.key] == view.changed["value"] == len(codes) - 1
    assert view.changed[at.key] < view.changed["value"]
    assert rel_equals_value(below, dtype)
    assert not rel_equals_value(at, dtype)
    assert not rel_equals_value(CRITERIA[2], dtype)
    assert not rel_equals_value(below, DType.I32)


def test_merged_views_equal_repeated_merge():
    rng = np.random.default_rng(1)
    views = []
    for _ in range(4):
        x = rng.integers(0, 2**16, 300, dtype=np.uint16)
        views.append(tally(x, x ^ rng.integers(0, 8, 300, dtype=np.uint16), DType.BF16))
    whole = ViewTally()
    for view in views:
        whole = whole.merge(view)
    assert merge_views(views) == whole
    assert merge_views([ViewTally(entries=1, decay=DecayCounts(band=1)), ViewTally(entries=1)]).decay is None
