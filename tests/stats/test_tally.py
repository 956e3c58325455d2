from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsity_audit.stats.tally import AxisCounts, CellTable, DecayCounts, SpecialCounts, Tally, ViewTally

counts = st.integers(0, 2**40)
ROWS, COLS = 3, 4


def records(kind, *names):
    return st.builds(kind, **dict.fromkeys(names, counts))


@st.composite
def view_tallies(draw, *, decay: bool):
    return ViewTally(
        entries=draw(st.integers(1, 2**40)),
        changed={"bitwise": draw(counts), "value": draw(counts), "atol:1e-5": draw(counts)},
        strata=draw(st.dictionaries(st.integers(0, 511), st.integers(1, 2**40), max_size=4)),
        cells=draw(
            st.dictionaries(
                st.tuples(st.integers(0, 511), st.integers(0, 209)), st.integers(1, 2**40), max_size=4
            )
        ),
        base_specials=draw(records(SpecialCounts, "nan", "inf", "pos_zero", "neg_zero", "subnormal")),
        tuned_specials=draw(records(SpecialCounts, "nan", "inf", "pos_zero", "neg_zero", "subnormal")),
        sign_flips=draw(counts),
        nonfinite_deltas=draw(counts),
        abs_sum=draw(st.integers(0, 2**2200)),
        sq_sum=draw(st.integers(0, 2**2200)),
        base_sq_sum=draw(st.integers(0, 2**2200)),
        max_abs=draw(st.floats(min_value=0, allow_nan=False, allow_infinity=False)),
        decay=draw(records(DecayCounts, "within_one_ulp", "band", "mirror")) if decay else None,
    )


@st.composite
def tallies(draw):
    axes = {
        name: np.array(draw(st.lists(counts, min_size=n, max_size=n)), dtype=np.int64)
        for name, n in (("rows", ROWS), ("cols", COLS), ("band", ROWS), ("outside", ROWS))
    }
    return Tally(
        native=draw(view_tallies(decay=True)),
        served=draw(view_tallies(decay=False)),
        base_fingerprint=draw(st.integers(0, 2**64 - 1)),
        tuned_fingerprint=draw(st.integers(0, 2**64 - 1)),
        axes=AxisCounts(**axes),
    )


@settings(deadline=None, max_examples=50)
@given(tallies(), tallies(), tallies())
def test_merging_is_associative_and_commutative(a, b, c):
    assert a.merge(b) == b.merge(a)
    assert a.merge(b).merge(c) == a.merge(b.merge(c))


@settings(deadline=None, max_examples=50)
@given(tallies())
def test_the_empty_tally_is_neutral(a):
    assert Tally().merge(a) == a
    assert a.merge(Tally()) == a


@settings(deadline=None, max_examples=50)
@given(tallies())
def test_a_tally_survives_json(a):
    assert Tally.from_json(json.loads(json.dumps(a.to_json()))) == a


def test_a_tally_without_optional_parts_survives_json():
    plain = Tally(native=ViewTally(entries=3, changed={"bitwise": 1, "value": 0}, abs_sum=5))
    assert Tally.from_json(json.loads(json.dumps(plain.to_json()))) == plain


def test_fingerprints_add_modulo_two_to_the_64():
    one = Tally(native=ViewTally(entries=1), base_fingerprint=2**64 - 1, tuned_fingerprint=1)
    both = one.merge(one)
    assert (both.base_fingerprint, both.tuned_fingerprint) == (2**64 - 2, 2)


def test_tallies_of_different_criteria_do_not_merge():
    with pytest.raises(AssertionError):
        ViewTally(entries=1, changed={"value": 1}).merge(ViewTally(entries=1, changed={"bitwise": 1}))


def test_a_tally_with_decay_does_not_merge_with_one_without():
    with pytest.raises(AssertionError):
        ViewTally(entries=1, decay=DecayCounts()).merge(ViewTally(entries=1))


def test_rows_that_changed_by_decay_alone_are_counted():
    zeros = np.zeros(4, dtype=np.int64)
    axes = AxisCounts(rows=zeros, cols=zeros, band=np.array([0, 5, 5, 0]), outside=np.array([0, 0, 1, 2]))
    assert axes.decay_only_rows == 1


def test_axis_counts_differ_when_one_count_differs():
    a, b = np.zeros(2, dtype=np.int64), np.array([0, 1])
    same = AxisCounts(rows=a, cols=a, band=a, outside=a)
    assert same == AxisCounts(rows=a, cols=a, band=a, outside=a)
    assert same != AxisCounts(rows=a, cols=b, band=a, outside=a)
    assert same != "something else"


@given(
    st.dictionaries(st.tuples(st.integers(0, 4095), st.integers(0, 209)), st.integers(1, 2**40), max_size=40)
)
@settings(deadline=None, max_examples=60)
def test_a_cell_table_is_the_mapping_it_was_made_from(cells) -> None:
    table = CellTable(cells)
    assert table == cells
    assert cells == table
    assert dict(table) == cells
    assert len(table) == len(cells)
    assert sorted(table) == sorted(cells)
    for missing in [(5000, 0), (0, 300)]:
        assert missing not in table
    view = ViewTally(entries=1, cells=cells)
    assert view.compact() == view
    assert ViewTally.from_json(view.compact().to_json()) == view
    assert view.compact().merge(view).cells == {key: 2 * count for key, count in cells.items()}
