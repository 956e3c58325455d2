"""Stratum tables against entry-by-entry counts, known answers of frozen runs, the attribution ladder."""

import math
from dataclasses import fields, replace

import numpy as np
import pytest
from addition_runs import load, strata_of, values
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsity_audit.stats.chance import Expectation
from sparsity_audit.stats.ladder import attribution
from sparsity_audit.stats.overlap import StratumTable, overlap_by, pair_overlap


def equal(x: StratumTable, y: StratumTable) -> bool:
    return all(np.array_equal(getattr(x, f.name), getattr(y, f.name)) for f in fields(x))


@st.composite
def masked_tensors(draw):
    size, runs = draw(st.integers(0, 40)), draw(st.integers(1, 4))
    strata = np.array(draw(st.lists(st.integers(0, 5), min_size=size, max_size=size)), dtype=np.int64)
    held = np.array(draw(st.lists(st.integers(0, 2**runs - 1), min_size=size, max_size=size)), dtype=np.int64)
    return strata, [(held >> run & 1).astype(bool) for run in range(runs)]


@settings(deadline=None, max_examples=100)
@given(masked_tensors(), st.data())
def test_any_split_merges_to_the_counts_of_the_whole(tensor, data):
    strata, masks = tensor
    whole = StratumTable.from_masks("t", strata, masks)
    whole.check()
    part_of = np.array(data.draw(st.lists(st.integers(0, 3), min_size=len(strata), max_size=len(strata))))
    order = data.draw(st.permutations(range(4)))
    parts = [
        StratumTable.from_masks("t", strata[chosen], [mask[chosen] for mask in masks])
        for chosen in (part_of.reshape(-1) == number for number in order)
    ]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    assert equal(merged, whole)


@settings(deadline=None, max_examples=100)
@given(masked_tensors())
def test_counts_and_chance_are_those_of_sets(tensor):
    strata, masks = tensor
    table = StratumTable.from_masks("t", strata, masks)
    sets = [set(np.flatnonzero(mask).tolist()) for mask in masks]
    held = [sum(entry in found for found in sets) for entry in range(len(strata))]
    for column, stratum in enumerate(table.strata.tolist()):
        members = set(np.flatnonzero(strata == stratum).tolist())
        assert table.entries[column] == len(members)
        for k in range(len(masks) + 1):
            assert table.core[k, column] == sum(held[entry] == k for entry in members)
    a, b = sets[0], sets[-1]
    pair = pair_overlap([table], 0, len(masks) - 1)
    assert (pair.a, pair.b, pair.both) == (len(a), len(b), len(a & b))
    assert pair.jaccard == (len(a & b) / len(a | b) if a | b else None)
    expected = sum(
        len(a & members) * len(b & members) / len(members)
        for stratum in table.strata
        if (members := set(np.flatnonzero(strata == stratum).tolist()))
    )
    assert pair.nulls["magnitude"].expected == pytest.approx(expected, rel=1e-14)
    if a and b and len(a) < len(strata) and len(b) < len(strata):
        assert pair.phi == pytest.approx(np.corrcoef(masks[0], masks[-1])[0, 1], abs=1e-12)


@settings(deadline=None, max_examples=50)
@given(masked_tensors())
def test_coarser_strata_count_as_if_they_had_been_asked_for(tensor):
    strata, masks = tensor
    fine = StratumTable.from_masks("t", strata, masks)
    assert equal(fine.coarsen(lambda s: s // 2), StratumTable.from_masks("t", strata // 2, masks))
    flat = pair_overlap([fine.coarsen(np.zeros_like)], 0, 0).nulls
    assert flat["magnitude"].expected == flat["per-tensor"].expected == flat["uniform"].expected


def test_check_refuses_counts_that_no_masks_have():
    good = StratumTable.from_masks("t", np.array([0, 0, 1]), [np.array([1, 1, 0]), np.array([0, 1, 1])])
    good.check()
    for name in ("entries", "changed", "both", "core"):
        bad = replace(good, **{name: getattr(good, name).copy()})
        getattr(bad, name)[..., 0] += 1
        with pytest.raises(AssertionError):
            bad.check()
    for chosen in ((0,), (1, 0), (0, 2)):
        with pytest.raises(AssertionError):
            replace(good, core_of=chosen).check()


def all_numbers(record):
    for field in fields(record):
        value = getattr(record, field.name)
        if field.name == "nulls":
            for null in value.values():
                yield from all_numbers(null)
        elif isinstance(value, float):
            yield value


@pytest.mark.parametrize("first", ["empty", "full", "some"])
@pytest.mark.parametrize("second", ["empty", "full", "some"])
def test_empty_full_and_zero_entry_cases_are_defined(first, second):
    rng = np.random.default_rng(0)
    kinds = {"empty": np.zeros(60, bool), "full": np.ones(60, bool), "some": rng.random(60) < 0.3}
    strata = np.arange(60) % 5
    tables = [
        StratumTable.from_masks("a", strata, [kinds[first], kinds[second]]),
        StratumTable.from_masks("none", strata[:0], [strata[:0], strata[:0]]),
        StratumTable.from_masks("one", strata[:1], [kinds[first][:1], kinds[second][:1]]),
    ]
    pair = pair_overlap(tables, 0, 1)
    assert all(math.isfinite(number) for number in all_numbers(pair))
    assert (pair.jaccard is None) == (first == second == "empty")
    assert (pair.o1_ceiling is None) == (first == "empty")
    if "some" not in (first, second):
        assert all(null.z is None and null.excess_share is None for null in pair.nulls.values())
        assert all(null.expected == pair.both for null in pair.nulls.values())
        assert pair.phi is None
    ladder = attribution(pair, None)
    assert ladder.sentence
    if "empty" in (first, second) or "full" in (first, second):
        assert ladder.warnings
    by_tensor = overlap_by(tables, lambda name: name)
    assert by_tensor["none"].jaccard is None
    assert by_tensor["none"].nulls["magnitude"].expected == 0


def test_no_tables_are_an_empty_overlap():
    pair = pair_overlap([], 0, 1)
    assert (pair.entries, pair.both, pair.jaccard) == (0, 0, None)


def test_one_entry_per_stratum_repeats_the_observation_and_has_no_z():
    masks = [np.array([1, 1, 0, 0, 1]), np.array([1, 0, 0, 1, 1])]
    null = pair_overlap([StratumTable.from_masks("t", np.arange(5), masks)], 0, 1).nulls["magnitude"]
    assert (null.expected, null.variance, null.z) == (2.0, 0.0, None)


def test_a_group_is_the_overlap_of_its_tensors_alone():
    rng = np.random.default_rng(3)
    tables = [
        StratumTable.from_masks(name, rng.integers(0, 4, 50), list(rng.random((2, 50)) < 0.4))
        for name in ("l.0.q", "l.0.k", "l.1.q", "norm")
    ]
    groups = overlap_by(tables, lambda name: name[:3] if name.startswith("l.") else None)
    assert list(groups) == ["l.0", "l.1"]
    assert groups["l.0"] == pair_overlap(tables[:2], 0, 1)


RUNS = {
    "lr1e-4": ("grpo-bf16-lr1e-4-seed0", "grpo-bf16-lr1e-4-seed1"),
    "seeds": ("grpo-bf16-seed0", "grpo-bf16-seed1"),
    "shuffled": ("grpo-bf16-seed0", "shuffled-reward-bf16"),
}


@pytest.fixture(scope="module")
def tables():
    base = load("base-bf16")
    masks = {
        name: {t: values(codes) != values(base[t]) for t, codes in load(name).items()}
        for name in {run for pair in RUNS.values() for run in pair}
    }
    return {
        key: [
            StratumTable.from_masks(t, strata_of(codes), [masks[x][t], masks[y][t]])
            for t, codes in base.items()
        ]
        for key, (x, y) in RUNS.items()
    }


# Known answers of tests/data/addition/README.md, printed there to four (shares: three) places.
@pytest.mark.parametrize(
    ("key", "jaccard", "magnitude", "share", "z"),
    [
        ("lr1e-4", 0.9224, 0.9160, 0.089, 10.6),
        ("seeds", 0.9451, 0.9438, 0.025, 5.9),
        ("shuffled", 0.9453, 0.9444, 0.018, 3.9),
    ],
)
def test_known_answers_of_real_runs(tables, key, jaccard, magnitude, share, z):
    pair = pair_overlap(tables[key], 0, 1)
    null = pair.nulls["magnitude"]
    assert round(pair.jaccard, 4) == jaccard
    assert round(null.jaccard, 4) == magnitude
    assert round(null.excess_share, 3) == share
    assert round(null.z, 1) == z
    assert null.lift is None


def test_known_chance_levels_of_coarser_nulls(tables):
    pair = pair_overlap(tables["lr1e-4"], 0, 1)
    assert round(pair.nulls["uniform"].jaccard, 4) == 0.1022
    assert round(pair.nulls["per-tensor"].jaccard, 4) == 0.1177
    exponents = [table.coarsen(lambda s: s // 2) for table in tables["lr1e-4"]]
    assert round(pair_overlap(exponents, 0, 1).nulls["magnitude"].jaccard, 4) == 0.9127


def test_the_ladder_is_the_sentence_of_the_method(tables):
    pair = pair_overlap(tables["lr1e-4"], 0, 1)
    reference = pair_overlap(tables["shuffled"], 0, 1)
    ladder = attribution(pair, reference)
    assert ladder.sentence == (
        "Jaccard .922: uniform chance .102, tensor densities .118, weight magnitude .916; beyond that an "
        "excess share of .09; a run with shuffled rewards has .02 of its own"
    )
    assert ladder.residual_null == "magnitude"
    assert [step.null for step in ladder.steps] == ["uniform", "per-tensor", "magnitude"]
    assert any("no lift" in warning for warning in ladder.warnings)


def test_row_and_column_nulls_take_their_places_on_the_ladder(tables):
    others = {
        "row-column": Expectation(mean=26000.0, variance=100.0),
        "row-column-magnitude": Expectation(mean=26500.0, variance=None),
        "phantom": Expectation(mean=20000.0, variance=None),
    }
    pair = pair_overlap(tables["lr1e-4"], 0, 1, others=others)
    ladder = attribution(pair, None)
    assert ladder.residual_null == "row-column-magnitude"
    assert ladder.residual == pair.nulls["row-column-magnitude"].excess_share
    assert [step.is_rung for step in ladder.steps] == [True, True, True, False, True, False]
    assert ladder.residual_z is None
    assert "given its rows and columns as well .922" in ladder.sentence
    alone = pair_overlap(tables["lr1e-4"], 0, 1, others={"row-column": others["row-column"]})
    assert "(beside these: rows and columns .889)" in attribution(alone, None).sentence


def test_a_small_excess_keeps_its_first_digit_and_its_sign():
    rng = np.random.default_rng(0)
    masks = list(rng.random((2, 10_000)) < 0.3)
    table = StratumTable.from_masks("t", np.zeros(10_000), masks)
    both = int((masks[0] & masks[1]).sum())
    for shift, text in ((-0.004, "share of −.004"), (0.004, "share of .004"), (0.3, "share of .30")):
        smaller = min(int(mask.sum()) for mask in masks)
        mean = (both - shift * smaller) / (1 - shift)
        others = {"row-column-magnitude": Expectation(mean=mean, variance=1.0)}
        assert text in attribution(pair_overlap([table], 0, 1, others=others), None).sentence


def test_a_dense_pair_is_warned_about():
    rng = np.random.default_rng(0)
    masks = list(rng.random((2, 10_000)) < 0.97)
    ladder = attribution(pair_overlap([StratumTable.from_masks("t", np.zeros(10_000), masks)], 0, 1), None)
    assert sum("holds 97" in warning for warning in ladder.warnings) == 2


def test_a_row_column_chance_above_magnitude_is_said():
    masks = list(np.random.default_rng(0).random((2, 10_000)) < 0.1)
    table = StratumTable.from_masks("t", np.zeros(10_000), masks)
    others = {"row-column": Expectation(mean=300.0, variance=10.0)}
    warnings = attribution(pair_overlap([table], 0, 1, others=others), None).warnings
    assert any("row-column chance, .1" in warning for warning in warnings)
