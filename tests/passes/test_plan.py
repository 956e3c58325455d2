"""Work units cover every entry once and start where packed bits and fingerprint words start."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from sparsity_audit.align.records import Alignment, Pair, TensorSlice
from sparsity_audit.checkpoint.store import Catalogue
from sparsity_audit.compare.pair import PairSpec
from sparsity_audit.passes.plan import Plan, blocks_of, default_criteria, make_plan
from sparsity_audit.types import ByteRange, Criterion, DType, TensorSpec


def _plan(shape: tuple[int, ...], *, unit_bytes: int, dtype: DType = DType.BF16) -> Plan:
    size = dtype.itemsize
    for n in shape:
        size *= n
    spec = TensorSpec(name="w", dtype=dtype, shape=shape, file=0, extent=ByteRange(start=0, stop=size))
    pair = Pair(name="w", base=TensorSlice.whole(spec), tuned=TensorSlice.whole(spec), rule="exact")
    empty = Catalogue(reference="x", resolved="x", files=(), tensors={"w": spec})
    totals = {"base": spec.num_entries, "tuned": spec.num_entries}
    alignment = Alignment(pairs=(pair,), skipped=(), leftovers=(), findings=(), totals=totals)
    specs = (PairSpec(base=dtype, tuned=dtype, criteria=default_criteria()),)
    return make_plan(empty, empty, alignment, specs=specs, unit_bytes=unit_bytes)


@settings(deadline=None, max_examples=200)
@given(
    rows=st.integers(0, 40),
    cols=st.integers(0, 700),
    unit_bytes=st.integers(1, 4096),
    block_bytes=st.integers(1, 4096),
    dtype=st.sampled_from([DType.BF16, DType.F32, DType.F8_E4M3]),
)
def test_units_and_blocks_cover_every_entry_once(rows, cols, unit_bytes, block_bytes, dtype) -> None:
    plan = _plan((rows, cols), unit_bytes=unit_bytes, dtype=dtype)
    seen = []
    for unit in plan.units:
        assert unit.first_entry % 64 == 0
        position = unit.first_entry
        count = 0
        for block in blocks_of(unit, itemsize=dtype.itemsize, block_bytes=block_bytes):
            assert block.col % 64 == 0
            assert block.num_rows == 1 or block.num_cols == cols
            first = block.row * cols + block.col
            assert first == position, "blocks of a unit follow each other without a gap"
            position = first + block.num_rows * block.num_cols
            seen.extend(range(first, position))
            count += block.num_rows * block.num_cols
        assert count == unit.num_entries
    assert seen == list(range(rows * cols))


def test_a_huge_row_is_split_on_multiples_of_64_entries() -> None:
    plan = _plan((1000,), unit_bytes=256)
    assert [unit.cols for unit in plan.units][:2] == [(0, 128), (128, 256)]
    assert plan.units[-1].cols == (896, 1000)


def test_an_empty_tensor_is_one_unit_so_that_it_is_reported() -> None:
    assert [unit.num_entries for unit in _plan((0, 5), unit_bytes=64).units] == [0]


def test_the_plan_key_depends_on_questions_and_not_on_nothing() -> None:
    assert _plan((4, 4), unit_bytes=64).key == _plan((4, 4), unit_bytes=64).key
    assert _plan((4, 4), unit_bytes=64).key != _plan((4, 4), unit_bytes=128).key


def test_default_criteria_start_with_bitwise_and_value_and_hold_no_repeats() -> None:
    extra = (Criterion.parse("atol:1e-5"), Criterion.parse("ulp:1"), Criterion.parse("top:1%"))
    assert [c.key for c in default_criteria(extra)] == ["bitwise", "value", "atol:1e-5", "rel:1e-3", "ulp:1"]
