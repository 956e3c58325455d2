"""Factors of runs: contrasts by hand, permutations against brute force, calibration, a planted factor."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import binom

from sparsity_audit.stats.factors import MIN_ARRANGEMENTS, factor_effects, num_arrangements

FOUR = {"algorithm": ["A", "A", "B", "B"], "seed": ["0", "1", "0", "1"]}
FIGURES = [[0, 0.8, 0.5, 0.1], [0, 0, 0.2, 0.3], [0, 0, 0, 0.6], [0, 0, 0, 0]]


def effects(levels, figures, *, draws=99, seed=0):
    return factor_effects(levels, figures, draws=draws, seed=seed)


def test_means_of_a_crossed_design_by_hand():
    found = effects(FOUR, FIGURES)["algorithm"]
    # Alike: 01 (.8) and 23 (.6). Unlike: 02 (.5), 03 (.1), 12 (.2), 13 (.3).
    assert (found.marginal.same_pairs, found.marginal.differ_pairs) == (2, 4)
    assert found.marginal.same == pytest.approx(0.7, rel=1e-12)
    assert found.marginal.differ == pytest.approx(0.275, rel=1e-12)
    assert found.marginal.difference == pytest.approx(0.425, rel=1e-12)
    # In algorithm alone: 02 and 13. Matched by seed: pairs of other seeds, alike 01 and 23, unlike 03 and 12.
    assert (found.only_pairs, found.only) == (2, pytest.approx(0.4, rel=1e-12))
    assert (found.controlled.same_pairs, found.controlled.differ_pairs) == (2, 2)
    assert found.controlled.same == pytest.approx(0.7, rel=1e-12)
    assert found.controlled.differ == pytest.approx(0.15, rel=1e-12)


def test_groups_of_matched_pairs_are_weighted_by_both_of_their_sizes():
    levels = {"f": ["x", "x", "x", "y"], "g": ["0", "0", "1", "0"]}
    figures = [[0, 0.9, 0.5, 0.3], [0, 0, 0.7, 0.1], [0, 0, 0, 0.2], [0, 0, 0, 0]]
    found = effects(levels, figures)["f"]
    # Alike in g: 01 (.9) against 03, 13 (.2), weight 2/3.
    # Unlike in g: 02, 12 (.6) against 23 (.2), weight 2/3.
    assert found.controlled.same == pytest.approx((0.9 + 0.6) / 2, rel=1e-12)
    assert found.controlled.differ == pytest.approx(0.2, rel=1e-12)
    assert found.only == pytest.approx(0.2, rel=1e-12)
    both = {name: [*row, row[0]] for name, row in levels.items()}
    wider = [[*row, 0.9] for row in figures] + [[0.0] * 5]
    found = effects(both, wider)["f"]
    # Alike in g now: 01, 04, 14 (.9) against 03, 13, 34; unlike: 02, 12, 24 against 23.
    same, differ = (0.9, (0.5 + 0.7 + 0.9) / 3), ((0.3 + 0.1 + 0.9) / 3, 0.2)
    weights = (9 / 6, 3 / 4)
    expected = sum(w * (s - d) for w, s, d in zip(weights, same, differ, strict=True)) / sum(weights)
    assert found.controlled.difference == pytest.approx(expected, rel=1e-12)


def test_the_controlled_difference_is_free_of_a_factor_that_the_marginal_one_confounds():
    """Overlap hangs on g alone; f mostly goes with g."""
    f, g = list("xxxxxyyyyy"), list("0000110011")
    figures = [[1.0 if a == b else 0.0 for b in g] for a in g]
    found = effects({"f": f, "g": g}, figures)
    assert found["f"].marginal.difference > 0
    assert found["f"].controlled.difference == 0
    assert found["g"].controlled.difference == 1
    assert found["g"].controlled.permutation.p < 0.05


def brute_force(own, blocks, figures, groups):
    """All distinct labellings, the difference in full each time: (p, distinct patterns of agreement)."""
    runs, pairs = len(own), list(itertools.combinations(range(len(own)), 2))
    places = [[r for r in range(runs) if blocks[r] == block] for block in dict.fromkeys(blocks)]
    labellings = set()
    for parts in itertools.product(
        *[set(itertools.permutations([own[r] for r in place])) for place in places]
    ):
        labels = [None] * runs
        for place, part in zip(places, parts, strict=True):
            for run, level in zip(place, part, strict=True):
                labels[run] = level
        labellings.add(tuple(labels))

    def difference(labels):
        total, weight = 0.0, 0.0
        for group in set(groups.values()):
            kinds = ([], [])
            for r, q in pairs:
                if groups[r, q] == group:
                    kinds[labels[r] != labels[q]].append(figures[r][q])
            if kinds[0] and kinds[1]:
                w = len(kinds[0]) * len(kinds[1]) / (len(kinds[0]) + len(kinds[1]))
                total += w * (np.mean(kinds[0]) - np.mean(kinds[1]))
                weight += w
        return total / weight

    found = [difference(labels) for labels in labellings]
    patterns = {tuple(labels[r] == labels[q] for r, q in pairs) for labels in labellings}
    hits = sum(value >= difference(own) - 1e-12 for value in found)
    return hits / len(found), len(patterns)


@pytest.mark.parametrize("own", ["AAABBBC", "AABBCCD", "AAAABBB", "AABBCDE"])
@pytest.mark.parametrize("seed", range(3))
def test_the_marginal_p_is_that_of_all_relabellings(own, seed):
    figures = np.random.default_rng(seed).random((7, 7)).tolist()
    pairs = dict.fromkeys(itertools.combinations(range(7), 2), 0)
    p, arrangements = brute_force(list(own), [0] * 7, figures, pairs)
    found = effects({"f": list(own)}, figures)["f"].marginal.permutation
    assert found.arrangements == arrangements == num_arrangements(list(own), [0] * 7)
    assert found.p == pytest.approx(p, rel=1e-12)
    assert found.draws is None


@pytest.mark.parametrize("own", ["ABABABCC", "AABBABCC", "ABCABCAB"])
def test_the_controlled_p_is_that_of_all_relabellings_among_runs_alike_in_everything_else(own):
    other = list("00011122")
    figures = np.random.default_rng(4).random((8, 8)).tolist()
    groups = {(r, q): other[r] != other[q] for r, q in itertools.combinations(range(8), 2)}
    p, arrangements = brute_force(list(own), other, figures, groups)
    found = effects({"f": list(own), "g": other}, figures)["f"].controlled.permutation
    assert found.arrangements == arrangements
    if arrangements >= MIN_ARRANGEMENTS:
        assert found.p == pytest.approx(p, rel=1e-12)
    else:
        assert found.p is None


def symmetric_noise(rng: np.random.Generator, runs: int) -> list[list[float]]:
    """Figures that know nothing of any factor, with pairs that share their runs' own effects."""
    own = rng.normal(size=runs)
    return (own[:, None] + own[None] + rng.normal(size=(runs, runs))).tolist()


def test_exact_p_values_are_uniform_where_the_factor_does_nothing():
    levels = {"f": list("AAAABBBB")}  # 35 arrangements
    rng = np.random.default_rng(11)
    found = [effects(levels, symmetric_noise(rng, 8))["f"].marginal.permutation.p for _ in range(1500)]
    for steps in (1, 3, 7, 14, 21, 28):
        below = sum(p <= (steps + 0.5) / 35 for p in found)
        # Limits at p < 1e-4 of 1,500 draws.
        assert binom.ppf(0.5e-4, 1500, steps / 35) <= below <= binom.isf(0.5e-4, 1500, steps / 35)
    assert max(found) == 1.0


def test_sampled_p_values_are_uniform_where_the_factor_does_nothing():
    levels = {"f": list("AB" * 10)}  # 92,378 arrangements
    rng = np.random.default_rng(12)
    found = []
    for seed in range(500):
        permutation = effects(levels, symmetric_noise(rng, 20), draws=39, seed=seed)["f"].marginal.permutation
        assert permutation.draws == 39
        found.append(permutation.p)
    for share in (0.025, 0.1, 0.25, 0.5, 0.75):
        below = sum(p <= share + 1e-9 for p in found)
        assert binom.ppf(0.5e-4, 500, share) <= below <= binom.isf(0.5e-4, 500, share)


def test_controlled_p_values_are_uniform_where_only_another_factor_acts():
    levels = {"f": list("AABBABBBAA"), "g": list("0000011111")}
    rng = np.random.default_rng(13)
    agree = np.array([[a == b for b in levels["g"]] for a in levels["g"]]) * 10.0
    found = []
    for _ in range(400):
        figures = (agree + np.array(symmetric_noise(rng, 10))).tolist()
        found.append(effects(levels, figures)["f"].controlled.permutation)
    for share in (0.05, 0.2, 0.5, 0.8):
        exact = math.floor(share * found[0].arrangements) / found[0].arrangements
        below = sum(p.p <= exact + 1e-9 for p in found)
        assert binom.ppf(0.5e-4, 400, exact) <= below <= binom.isf(0.5e-4, 400, exact)


def test_a_planted_factor_has_the_smallest_p_there_can_be():
    levels = {"f": list("AAAABBBB"), "noise": list("ABBAABBA")}
    rng = np.random.default_rng(14)
    figures = [[0.5 * (a == b) + 0.01 * rng.random() for b in levels["f"]] for a in levels["f"]]
    found = effects(levels, figures)
    assert found["f"].marginal.permutation.p == 1 / 35
    assert found["noise"].marginal.permutation.p > 0.2
    many = {"f": list("A" * 10 + "B" * 10)}
    figures = [[0.5 * (a == b) + 0.01 * rng.random() for b in many["f"]] for a in many["f"]]
    assert effects(many, figures, draws=999, seed=1)["f"].marginal.permutation.p == 1 / 1000


def test_the_same_seed_gives_the_same_p_and_names_of_levels_do_not_matter():
    figures = symmetric_noise(np.random.default_rng(15), 20)
    first = effects({"f": list("AB" * 10)}, figures, draws=199, seed=3)
    assert first == effects({"f": list("AB" * 10)}, figures, draws=199, seed=3)
    assert first == effects({"f": list("yx" * 10)}, figures, draws=199, seed=3)


def test_ties_count_as_as_large():
    figures = [[0.1 + 0.2] * 8 for _ in range(8)]
    assert effects({"f": list("AAAABBBB")}, figures)["f"].marginal.permutation.p == 1.0


def test_few_arrangements_have_no_p_but_a_reason():
    found = effects(FOUR, FIGURES)["algorithm"].marginal
    assert found.difference is not None
    assert (found.permutation.p, found.permutation.arrangements) == (None, 3)
    assert found.permutation.reason == "3 distinct arrangements of the labels: a p needs at least 20"


def test_a_factor_in_which_every_run_has_its_own_level_has_no_pairs_that_agree():
    found = effects({"seed": list("01234567")}, symmetric_noise(np.random.default_rng(0), 8))["seed"]
    assert (found.marginal.same_pairs, found.marginal.same, found.marginal.difference) == (0, None, None)
    assert found.marginal.differ_pairs == found.only_pairs == 28
    assert found.marginal.differ == found.only
    assert found.marginal.permutation.reason == "every run has a level of its own: no pairs agree"


def test_a_factor_with_one_level_and_one_without_matches_say_so():
    levels = {"f": list("AAAA"), "g": list("0011"), "h": list("0012")}
    found = effects(levels, FIGURES)
    assert found["f"].marginal.permutation.reason == "all runs have one level: no pairs differ"
    assert found["f"].marginal.same is not None
    assert found["h"].only_pairs == 1
    alike = effects({"g": list("0011"), "k": list("0011")}, FIGURES)["g"]
    assert alike.controlled.permutation.reason == "no pairs that agree match pairs that differ"
    assert (alike.controlled.same_pairs, alike.controlled.same, alike.only_pairs) == (0, None, 0)


def test_a_pair_without_a_figure_leaves_no_p():
    figures = [list(row) for row in FIGURES]
    figures[0][1] = None
    found = effects(FOUR, figures)["algorithm"]
    assert found.marginal.same is None
    assert found.marginal.differ is not None
    assert found.marginal.permutation.reason == "a pair has no such figure"


def test_no_runs_and_no_factors_have_no_effects():
    assert effects({}, FIGURES) == {}
    assert effects({"f": ["A"]}, [[0.0]])["f"].marginal.same_pairs == 0
