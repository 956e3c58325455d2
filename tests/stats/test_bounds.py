"""Bounds of uncounted tolerances against the reference kernel's own counts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsity_audit.compare.accumulate import CODE_DTYPE, Accumulator, KernelSpec
from sparsity_audit.compare.numpy_kernel import NumpyKernel
from sparsity_audit.compare.reference import ReferenceKernel, _judge, _stratum
from sparsity_audit.errors import UsageError
from sparsity_audit.stats.bounds import CountBounds, delta_range, tolerance_bounds
from sparsity_audit.stats.strata import CROSS, IN, NUM_BUCKETS, OUT, ZERO_SIGN
from sparsity_audit.stats.tally import ViewTally
from sparsity_audit.types import Criterion, DType

TOLERANCES = tuple(
    Criterion.parse(k)
    for k in (
        *("atol:0", "atol:1e-38", "atol:1e-5", "atol:0.01", "atol:2", "atol:70000"),
        *(
            "rel:0",
            "rel:1e-7",
            "rel:1e-3",
            "rel:0.00390625",
            "rel:0.1",
            "rel:0.5",
            "rel:1",
            "rel:1.5",
            "rel:2",
        ),
        *("ulp:0", "ulp:1", "ulp:8", "ulp:12", "ulp:100", "ulp:3000000000"),
    )
)
CRITERIA = (Criterion.parse("bitwise"), Criterion.parse("value"), *TOLERANCES)
DTYPES = [DType.BF16, DType.F16, DType.F32, DType.F64, DType.F8_E4M3, DType.F8_E5M2, DType.I8, DType.U16]
DTYPES += [DType.I64, DType.U64, DType.BOOL, DType.C64]


def tally(base, tuned, dtype, *, kernel=None, criteria=CRITERIA):
    acc = Accumulator(
        KernelSpec(dtype=dtype, criteria=criteria, mask=1, level="full"), rows=1, cols=base.size
    )
    kernel = kernel or ReferenceKernel()
    kernel.compare(base.reshape(1, -1), tuned.reshape(1, -1), acc, first_row=0, first_col=0, bits=None)
    return acc.view_tally()


def uncounted(view):
    kept = {k: n for k, n in view.changed.items() if k in ("bitwise", "value")}
    return ViewTally(entries=view.entries, changed=kept, strata=view.strata, cells=view.cells)


def random_pair(rng, dtype, size):
    code = CODE_DTYPE[dtype.itemsize]
    bits = 8 * dtype.itemsize
    base = rng.integers(0, 2**bits, size, dtype=code, endpoint=False)
    near = base ^ (rng.integers(0, 2**bits, size, dtype=code) >> rng.integers(0, bits, size).astype(code))
    step = rng.integers(0, 40, size).astype(code)
    kind = rng.integers(0, 4, size)
    with np.errstate(over="ignore"):
        return base, np.select([kind == 0, kind == 1, kind == 2], [base, near, base + step], base - step)


@given(st.integers(0, 2**32 - 1), st.sampled_from(DTYPES))
@settings(deadline=None, max_examples=60)
def test_the_count_of_every_tolerance_lies_between_its_bounds(seed, dtype):
    base, tuned = random_pair(np.random.default_rng(seed), dtype, 60)
    view = tally(base, tuned, dtype)
    for criterion in TOLERANCES:
        bounds = tolerance_bounds(uncounted(view), dtype, criterion)
        assert bounds.lower <= view.changed[criterion.key] <= bounds.upper, (criterion, bounds)
        assert bounds.is_exact == (bounds.lower == bounds.upper)


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([DType.BF16, DType.F16, DType.F32, DType.F64]),
    st.sampled_from(["atol", "rel"]),
    st.floats(min_value=1e-12, max_value=3.0),
)
@settings(deadline=None, max_examples=60)
def test_any_tolerance_is_bounded_on_weights_of_ordinary_size(seed, dtype, kind, parameter):
    rng = np.random.default_rng(seed)
    code = CODE_DTYPE[dtype.itemsize]
    w = rng.normal(0, 0.03, 300)
    d = rng.normal(0, 1, 300) * 10.0 ** rng.uniform(-9, -1, 300)
    if dtype is DType.BF16:
        base, tuned = ((x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16) for x in (w, w + d))
    else:
        native = {DType.F16: np.float16, DType.F32: np.float32, DType.F64: np.float64}[dtype]
        base, tuned = (x.astype(native).view(code) for x in (w, w + d))
    criterion = Criterion(kind=kind, parameter=parameter)
    view = tally(base, tuned, dtype, kernel=NumpyKernel(), criteria=(*CRITERIA[:2], criterion))
    bounds = tolerance_bounds(uncounted(view), dtype, criterion)
    assert bounds.lower <= view.changed[criterion.key] <= bounds.upper


@pytest.mark.parametrize("dtype", [DType.F8_E5M2, DType.F8_E4M3])
def test_the_range_of_delta_in_a_cell_is_attained_by_some_pair_of_codes(dtype):
    acc = {}
    for a in range(256):
        for b in range(256):
            entry = _judge(a, b, dtype)
            if entry.column < ZERO_SIGN and entry.value_differs:
                acc.setdefault((_stratum(a, dtype), entry.column), []).append(entry.delta)
    assert {cell[1] // NUM_BUCKETS * NUM_BUCKETS for cell in acc} == {OUT, IN, CROSS}
    for (stratum, column), found in acc.items():
        assert delta_range(stratum, column, dtype) == (min(found), max(found)), (stratum, column)


def test_one_ulp_changes_are_decided_exactly_by_every_absolute_tolerance():
    codes = np.arange(0x0001, 0x7F7F, dtype=np.uint16)
    view = tally(codes, codes + np.uint16(1), DType.BF16, kernel=NumpyKernel())
    for criterion in TOLERANCES:
        if criterion.kind == "atol":
            bounds = tolerance_bounds(uncounted(view), DType.BF16, criterion)
            assert bounds == CountBounds(
                lower=view.changed[criterion.key], upper=view.changed[criterion.key], is_exact=True
            )


def test_a_counted_criterion_is_returned_as_it_was_counted():
    view = ViewTally(entries=9, changed={"bitwise": 5, "value": 5, "atol:1e-5": 3})
    assert tolerance_bounds(view, DType.BF16, Criterion.parse("atol:1e-5")) == CountBounds(
        lower=3, upper=3, is_exact=True
    )


def test_top_and_tallies_without_cells_are_refused():
    view = ViewTally(entries=9, changed={"bitwise": 5, "value": 5})
    with pytest.raises(UsageError, match="cannot be bounded"):
        tolerance_bounds(view, DType.BF16, Criterion.parse("top:3"))
    with pytest.raises(UsageError, match="no cells"):
        tolerance_bounds(view, DType.BF16, Criterion.parse("atol:1e-4"))
