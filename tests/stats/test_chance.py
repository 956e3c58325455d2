"""Closed forms of chance against scipy and enumeration; the edges where nothing is defined."""

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import hypergeom
from scipy.stats.contingency import odds_ratio

from sparsity_audit.stats.chance import (
    Expectation,
    hypergeometric,
    jaccard_of,
    mantel_haenszel,
    null_overlap,
)


def counts(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50), st.integers(0, 50)), max_size=6))
def test_mean_and_variance_are_sums_of_hypergeometric_moments(strata):
    strata = [(max(triple), *sorted(triple)[:2]) for triple in strata]
    n, a, b = (counts(*column) for column in (zip(*strata, strict=True) if strata else ((), (), ())))
    found = hypergeometric(n, a, b)
    real = [(x, y, z) for x, y, z in strata if x > 0]
    assert found.mean == pytest.approx(sum(hypergeom.mean(x, y, z) for x, y, z in real), rel=1e-12)
    assert found.variance == pytest.approx(
        sum(hypergeom.var(x, y, z) for x, y, z in real if x > 1), rel=1e-10, abs=1e-12
    )


def test_moments_are_those_of_all_placements():
    first = {0, 2, 3}
    sizes = [len(first & set(second)) for second in combinations(range(7), 4)]
    found = hypergeometric(counts(7), counts(3), counts(4))
    assert found.mean == pytest.approx(np.mean(sizes), rel=1e-14)
    assert found.variance == pytest.approx(np.var(sizes), rel=1e-14)


@pytest.mark.parametrize(
    ("n", "a", "b", "mean"),
    [
        (0, 0, 0, 0),
        (1, 1, 1, 1),
        (1, 1, 0, 0),
        (9, 0, 5, 0),
        (9, 9, 5, 5),
        (2**53 - 1, 2**53 - 1, 3**33, 3**33),
    ],
)
def test_degenerate_strata_are_exact_and_do_not_vary(n, a, b, mean):
    assert hypergeometric(counts(n), counts(a), counts(b)) == Expectation(mean=float(mean), variance=0.0)


def test_the_sum_does_not_depend_on_the_order_of_strata():
    rng = np.random.default_rng(1)
    n = rng.integers(1, 10**9, 1000)
    a, b = (rng.integers(0, n + 1) for _ in range(2))
    order = rng.permutation(1000)
    assert hypergeometric(n, a, b) == hypergeometric(n[order], a[order], b[order])


def test_large_counts_do_not_overflow():
    found = hypergeometric(counts(2**60), counts(2**58), counts(2**59))
    assert found.mean == 2.0**57
    assert found.variance == pytest.approx(2.0**57 * 0.75 * 0.5, rel=1e-14)
    assert mantel_haenszel(counts(2**60), counts(2**58), counts(2**59), counts(2**57)) == 1.0


def test_one_stratum_has_the_plain_odds_ratio():
    found = mantel_haenszel(counts(100), counts(30), counts(40), counts(20))
    sample = odds_ratio([[20, 10], [20, 50]], kind="sample").statistic
    assert found == pytest.approx(sample, rel=1e-14)


def test_mantel_haenszel_removes_what_strata_share():
    # Independent within each stratum (odds ratio 1), though both are dense in the first one.
    n, a, b, both = counts(100, 100), counts(50, 10), counts(60, 10), counts(30, 1)
    assert mantel_haenszel(n, a, b, both) == pytest.approx(1.0, rel=1e-14)
    assert mantel_haenszel(*(x.sum(keepdims=True) for x in (n, a, b, both))) > 2


def test_no_discordant_stratum_has_no_odds_ratio():
    assert mantel_haenszel(counts(10), counts(3), counts(3), counts(3)) is None
    assert mantel_haenszel(counts(), counts(), counts(), counts()) is None


def test_an_excess_share_is_zero_at_chance_and_one_at_containment():
    expectation = hypergeometric(counts(1000), counts(100), counts(50))
    at_chance = null_overlap("uniform", a=100, b=50, both=5, expectation=expectation)
    contained = null_overlap("uniform", a=100, b=50, both=50, expectation=expectation)
    assert (at_chance.excess_share, at_chance.z, at_chance.lift) == (0.0, 0.0, 1.0)
    assert contained.excess_share == 1.0
    assert contained.o1 == 0.05
    assert contained.o2 == 0.1


def test_no_lift_above_a_chance_of_one_half():
    below = null_overlap("n", a=60, b=60, both=60, expectation=Expectation(mean=39.9, variance=1.0))
    above = null_overlap("n", a=60, b=60, both=60, expectation=Expectation(mean=40.1, variance=1.0))
    assert below.lift == pytest.approx(1 / below.jaccard, rel=1e-15)
    assert above.jaccard > 0.5
    assert above.lift is None


@pytest.mark.parametrize(("a", "b"), [(0, 0), (0, 7), (20, 7), (20, 20), (20, 0)])
def test_empty_and_full_masks_have_defined_results(a, b):
    expectation = hypergeometric(counts(20), counts(a), counts(b))
    found = null_overlap("uniform", a=a, b=b, both=min(a, b), expectation=expectation)
    assert found.expected == min(a, b)
    assert found.excess_share is None
    assert found.z is None
    numbers = [getattr(found, name) for name in ("jaccard", "o1", "o2", "lift")]
    assert all(number is None or math.isfinite(number) for number in numbers)
    assert (found.jaccard is None) == (a == b == 0)
    assert (found.o1 is None) == (a == 0)


def test_expectations_add_and_lose_their_variance_with_the_first_unknown():
    known, unknown = Expectation(mean=1.5, variance=2.0), Expectation(mean=1.0, variance=None)
    assert Expectation.total([known, known]) == Expectation(mean=3.0, variance=4.0)
    assert Expectation.total([known, unknown]) == Expectation(mean=2.5, variance=None)
    assert Expectation.total([]) == Expectation(mean=0.0, variance=0.0)


# 2505.11711 Table 4: one-sided overlaps and the published chance levels, in percent.
PUBLISHED = [(60.5, 60.6, 36.7, 36.7), (26.7, 67.1, 14.6, 36.7), (59.1, 33.2, 23.0, 12.9)]


@pytest.mark.parametrize(("o1", "o2", "chance1", "chance2"), PUBLISHED)
def test_published_overlaps_and_densities_give_the_published_chance(o1, o2, chance1, chance2):
    # The chance of o1 is the density of the second mask, and |A∩B| = o1·|A| = o2·|B|.
    n = 10**6
    a, b = round(chance2 / 100 * n), round(chance1 / 100 * n)
    both = round(o1 / 100 * a)
    found = null_overlap(
        "uniform", a=a, b=b, both=both, expectation=hypergeometric(counts(n), counts(a), counts(b))
    )
    assert 100 * found.o1 == pytest.approx(chance1, abs=0.05)
    assert 100 * found.o2 == pytest.approx(chance2, abs=0.05)
    # Both sides were printed to .1, which carries to o2 as a relative error of their densities and o1.
    assert 100 * both / b == pytest.approx(o2, abs=o2 * (0.05 / o1 + 0.05 / chance1 + 0.05 / chance2) + 0.05)
    assert jaccard_of(both, a, b) > found.jaccard
