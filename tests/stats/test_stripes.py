"""Stripe scores: exact means by enumeration; calibration on independent and on planted changes."""

from fractions import Fraction
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsity_audit.stats.strata import NAN_PAYLOAD, OUT, ZERO_SIGN
from sparsity_audit.stats.stripes import (
    LineNull,
    MagnitudeNull,
    StratumRate,
    TensorStripes,
    describe_lines,
    line_score,
    stratum_rates,
    stripe_findings,
)
from sparsity_audit.stats.tally import AxisCounts, Tally, ViewTally
from sparsity_audit.types import View


def score(counts: list[int], across: int) -> Fraction:
    """The definition in exact arithmetic, written apart from the package."""
    lines, total = len(counts), sum(counts)
    entries, mean = lines * across, Fraction(total, len(counts))
    rate = Fraction(total, entries)
    sample = sum((count - mean) ** 2 for count in counts) / (lines - 1)
    return sample / (across * rate * (1 - rate) * Fraction(entries, entries - 1))


def null_of(strata: np.ndarray, changed: np.ndarray) -> LineNull:
    """The null of the rows of a matrix of stratum numbers."""
    lines, across = strata.shape
    numbers = np.unique(strata)
    rates = [
        StratumRate(stratum=int(s), entries=int((strata == s).sum()), changed=int(changed[strata == s].sum()))
        for s in numbers
    ]
    null = MagnitudeNull(rates, lines=lines, across=across)
    null.fold(np.stack([(strata == s).sum(axis=1) for s in numbers], axis=1))
    return null.result()


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 6), st.integers(2, 6), st.data())
def test_a_score_is_its_definition(lines, across, data):
    counts = data.draw(st.lists(st.integers(0, across), min_size=lines, max_size=lines))
    found = line_score(np.array(counts), across)
    if sum(counts) in (0, lines * across):
        assert found is None
    else:
        assert found == pytest.approx(float(score(counts, across)), rel=1e-15)


@pytest.mark.parametrize(("lines", "across", "changed"), [(3, 3, 2), (2, 5, 4), (4, 2, 5), (5, 2, 1)])
def test_the_mean_score_over_all_placements_is_exactly_one(lines, across, changed):
    scores = []
    for places in combinations(range(lines * across), changed):
        counts = [0] * lines
        for place in places:
            counts[place // across] += 1
        scores.append(score(counts, across))
    assert sum(scores) / len(scores) == 1


@pytest.mark.parametrize("seed", range(4))
def test_the_expected_score_is_the_mean_over_all_placements_within_strata(seed):
    rng = np.random.default_rng(seed)
    strata = rng.integers(0, 3, (3, 4))
    changed = rng.random((3, 4)) < 0.4
    changed[0, 0] = True
    places = [np.flatnonzero(strata == s) for s in np.unique(strata)]
    numbers = [int(changed.reshape(-1)[place].sum()) for place in places]
    scores = []
    for choice in product(*(combinations(p, k) for p, k in zip(places, numbers, strict=True))):
        counts = [0] * 3
        for place in (p for chosen in choice for p in chosen):
            counts[place // 4] += 1
        scores.append(score(counts, 4))
    assert null_of(strata, changed).expected == pytest.approx(float(sum(scores) / len(scores)), rel=1e-12)


def test_one_stratum_expects_one():
    changed = np.random.default_rng(0).random((40, 30)) < 0.2
    found = null_of(np.zeros((40, 30), dtype=int), changed)
    assert found.expected == pytest.approx(1, rel=1e-12)
    assert found.sd == pytest.approx(np.sqrt(2 / 39), rel=0.02)


@pytest.mark.parametrize("scale", [0.01, 0.1, 1.0])
def test_the_nulls_standard_deviation_is_that_of_redrawn_changes(scale):
    """Strata spread unevenly over rows, from a change in every second row to dense ones."""
    rng = np.random.default_rng(1)
    strata = np.clip(rng.integers(0, 4, (60, 80)) + (np.arange(60) < 10)[:, None], 0, 4)
    rates = scale * np.array([0.05, 0.2, 0.5, 0.8, 0.95])
    changed = rng.random(strata.shape) < rates[strata]
    null = null_of(strata, changed)
    places = [np.flatnonzero(strata == s) for s in range(5)]
    scores = []
    for _ in range(3000):
        drawn = np.zeros(strata.size, dtype=bool)
        for place in places:
            drawn[rng.permutation(place)[: int(changed.reshape(-1)[place].sum())]] = True
        scores.append(line_score(drawn.reshape(strata.shape).sum(axis=1), 80))
    assert np.mean(scores) == pytest.approx(null.expected, abs=5 * null.sd / np.sqrt(3000))
    assert null.sd == pytest.approx(np.std(scores), rel=0.1)


@pytest.mark.parametrize("rate", [0.002, 0.1, 0.5, 0.98])
def test_independent_changes_score_one_on_both_axes(rate):
    """Within five standard deviations, √(2 ÷ (lines − 1)) where changes are many."""
    changed = np.random.default_rng(2).random((300, 500)) < rate
    for counts, across in ((changed.sum(axis=1), 500), (changed.sum(axis=0), 300)):
        found = line_score(counts, across)
        assert found == pytest.approx(1, abs=5 * np.sqrt(2 / (len(counts) - 1)))


def test_planted_rows_score_far_above_the_expectation_and_columns_do_not():
    rng = np.random.default_rng(3)
    strata = rng.integers(0, 4, (200, 300))
    changed = rng.random(strata.shape) < np.array([0.1, 0.2, 0.4, 0.6])[strata]
    changed[[3, 50, 51, 120]] = rng.random((4, 300)) < 0.9
    rows = describe_lines(changed.sum(axis=1), 300, null_of(strata, changed))
    cols = describe_lines(changed.sum(axis=0), 200, null_of(strata.T, changed.T))
    assert rows is not None
    assert cols is not None
    assert rows.expected == pytest.approx(1, abs=0.1)
    assert rows.observed > 5
    assert rows.is_striped
    assert rows.excess_sd == pytest.approx(np.sqrt(4 / 200) * (0.9 - 0.33), rel=0.15)
    assert abs(cols.z or 0) < 5
    assert not cols.is_striped


def test_counts_without_a_null_have_a_score_alone():
    found = describe_lines(np.array([1, 2, 3]), 4, None)
    assert found is not None
    assert (found.expected, found.z, found.excess_sd, found.is_striped) == (None, None, None, False)


@pytest.mark.parametrize(("counts", "across"), [([0, 0], 3), ([3, 3], 3), ([1], 3), ([1, 0, 1], 1)])
def test_there_is_no_score_without_two_lines_and_both_kinds_of_entries(counts, across):
    assert line_score(np.array(counts), across) is None


def test_a_null_that_cannot_vary_has_no_z():
    strata = np.array([[0, 0], [1, 1]])
    changed = np.array([[True, True], [False, False]])
    null = null_of(strata, changed)
    assert null.sd == 0
    found = describe_lines(changed.sum(axis=1), 2, null)
    assert found is not None
    assert found.observed == pytest.approx(found.expected)
    assert found.z is None


def _tally(rows: list[int], cells: dict[tuple[int, int], int]) -> Tally:
    empty = np.zeros(len(rows), dtype=np.int64)
    axes = AxisCounts(rows=np.array(rows), cols=np.array([sum(rows)]), band=empty, outside=empty)
    return Tally(native=ViewTally(entries=20, strata={5: 12, 1: 8}, cells=cells), axes=axes)


def test_changes_by_stratum_follow_the_criterion_of_the_row_counts():
    cells = {(5, OUT): 3, (5, OUT + 9): 1, (1, ZERO_SIGN): 2, (5, NAN_PAYLOAD): 1}
    value = (StratumRate(stratum=1, entries=8, changed=0), StratumRate(stratum=5, entries=12, changed=4))
    bitwise = (StratumRate(stratum=1, entries=8, changed=2), StratumRate(stratum=5, entries=12, changed=5))
    assert stratum_rates(_tally([3, 1], cells), View.NATIVE) == value
    assert stratum_rates(_tally([4, 3], cells), View.SERVED) == bitwise, "no served view: the native one"
    assert stratum_rates(_tally([1, 1], cells), View.NATIVE) is None, "a tolerance: not known by stratum"
    assert stratum_rates(Tally(native=ViewTally(entries=20)), View.NATIVE) is None


def _stripes(name, *, kind="matrix", observed=4.0, expected=1.0, sd=0.1, lines=64) -> TensorStripes:
    """Rows with the given score, columns as expected."""
    counts = np.zeros(lines, dtype=int)
    counts[::2] = 1
    line = describe_lines(counts, 50, LineNull(expected=expected, sd=sd))
    assert line is not None
    from dataclasses import replace

    rows = replace(line, observed=observed, z=(observed - expected) / sd)
    return TensorStripes(name=name, kind=kind, rows=rows, cols=replace(line, observed=1.0, z=0.0))


def test_findings_name_the_most_striped_matrices_and_keep_embeddings_apart():
    stripes = [
        _stripes("a", observed=2.0),
        _stripes("b", observed=5.5),
        _stripes("c", observed=1.2),
        _stripes("embed", kind="embedding", observed=38.0),
    ]
    assert stripe_findings(stripes) == (
        (
            "Changes gather in rows beyond what magnitudes give in 2 of 3 matrices of the layers (stripe "
            "score observed against expected): b (5.50 against 1.00, z = 45); a (2.00 against 1.00, z = 10)."
        ),
        (
            "Changes gather in rows beyond what magnitudes give in 1 of 1 embeddings and heads (stripe score "
            "observed against expected): embed (38.00 against 1.00, z = 370)."
        ),
    )


@pytest.mark.parametrize("weak", [{"observed": 1.2}, {"sd": 1.0}, {"lines": 15}, {"expected": 3.9}])
def test_nothing_is_said_unless_size_significance_and_lines_suffice(weak):
    assert stripe_findings([_stripes("a", **weak)]) == ()
