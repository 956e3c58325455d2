from __future__ import annotations

import pytest

from sparsity_audit.compare.accumulate import Accumulator, KernelSpec
from sparsity_audit.stats.tally import DecayCounts
from sparsity_audit.types import Criterion, DType

CRITERIA = tuple(Criterion.parse(t) for t in ("bitwise", "value"))


def spec(**changes) -> KernelSpec:
    fields = {"dtype": DType.F32, "criteria": CRITERIA, "mask": 1, "level": "full"}
    return KernelSpec(**fields | changes)


def test_criteria_start_with_bitwise_and_value():
    with pytest.raises(AssertionError):
        spec(criteria=CRITERIA[::-1])


def test_top_is_no_criterion_of_a_kernel():
    with pytest.raises(AssertionError):
        spec(criteria=(*CRITERIA, Criterion.parse("top:5")))


def test_the_mask_criterion_is_one_of_them():
    with pytest.raises(AssertionError):
        spec(mask=2)


@pytest.mark.parametrize(
    ("dtype", "strata"), [(DType.BF16, 512), (DType.F16, 64), (DType.F64, 4096), (DType.I32, 1)]
)
def test_strata_follow_from_the_exponent_field(dtype, strata):
    assert spec(dtype=dtype).num_strata == strata


def test_an_empty_accumulator_gives_an_empty_tally():
    tally = Accumulator(spec(), rows=2, cols=3).view_tally()
    assert (tally.entries, dict(tally.changed), dict(tally.strata), dict(tally.cells)) == (
        0,
        {"bitwise": 0, "value": 0},
        {},
        {},
    )
    assert tally.decay is None


def test_decay_is_reported_only_where_a_shrink_was_tested():
    assert Accumulator(spec(shrink=1e-4), rows=1, cols=1).view_tally().decay == DecayCounts()


def test_level_counts_has_no_row_and_column_counts():
    assert Accumulator(spec(level="counts"), rows=2, cols=3).axis_counts() is None
    axes = Accumulator(spec(), rows=2, cols=3).axis_counts()
    assert axes is not None
    assert (len(axes.rows), len(axes.cols)) == (2, 3)
