"""A full study's verdicts follow from its numbers: change a number, and the verdict changes."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations, product

import jsonschema
import pytest
from full_facts import accurate, changed, full_facts, outcome
from hypothesis import given
from hypothesis import strategies as st

from sparsity_audit.api.study_full_sweeps import PARTS
from sparsity_audit.lab.estimators import Interval
from sparsity_audit.report import study_full_page
from sparsity_audit.report.across_runs import FactorRecord, FactorTable, OverlapMatrix
from sparsity_audit.report.study_full import FullReport, study_full_json_schema, study_full_to_json
from sparsity_audit.report.study_full_claims import DRAWERS, full_claims
from sparsity_audit.report.study_full_facts import FullFacts, GridFacts, PairKind
from sparsity_audit.report.study_full_frontier import frontier_gap
from sparsity_audit.report.study_full_judging import NEGLIGIBLE, decided, difference, signed
from sparsity_audit.report.study_full_page import render_full_study
from sparsity_audit.stats.factors import factor_effects

FACTS = full_facts()


def _verdict(facts: FullFacts, key: str) -> str:
    return next(claim.shown_verdict for claim in full_claims(facts) if claim.key == key)


# The rule


def _interval(value: float, half: float) -> Interval:
    return Interval(value=value, low=value - half, high=value + half, num_prompts=9)


def test_a_claim_holds_only_where_every_seed_says_so() -> None:
    up, down, wide = _interval(0.1, 0.05), _interval(-0.1, 0.05), _interval(0.1, 0.2)
    assert decided([up, up]) == "reproduces"
    assert decided([up, down]) == "undecided"
    assert decided([up, wide]) == "undecided"
    assert decided([down, down]) == "does not reproduce"
    assert decided([_interval(0.0, NEGLIGIBLE / 2)] * 2) == "does not reproduce"
    assert decided([]) == "not measured"


@given(st.floats(-0.5, 0.5), st.floats(0.001, 0.3))
def test_no_interval_can_be_both_a_success_and_a_failure(value, half) -> None:
    one = [_interval(value, half)]
    assert (decided(one) == "reproduces") == (one[0].low > 0)
    assert decided([*one, _interval(-value, half)]) != "reproduces"


def test_the_error_of_a_difference_is_that_of_two_independent_runs() -> None:
    found = difference(accurate(0.6), accurate(0.5))
    assert found.value == pytest.approx(0.1)
    assert found.high - found.value == pytest.approx(1.959964 * 0.01 * 2**0.5)


def test_what_rounds_to_nothing_has_no_sign() -> None:
    assert [signed(value) for value in (-0.0001, 0.0001, -0.02, 0.02)] == [
        "0.000",
        "0.000",
        "−0.020",
        "+0.020",
    ]


# (a)


def test_equal_sparsities_say_that_kl_and_clip_do_nothing_and_one_real_shift_says_the_opposite() -> None:
    assert _verdict(FACTS, "kl-clip") == "reproduces"
    shifted = changed(FACTS, "sparsity", "off-noclip-bf16", sparsity=0.9)
    shifted = changed(shifted, "sparsity", "off-kl-noclip-bf16", sparsity=0.9)
    assert _verdict(shifted, "kl-clip") == "does not reproduce"
    assert _verdict(changed(FACTS, "sparsity", "on-kl-bf16", 0, sparsity=0.9), "kl-clip") == "undecided"


def test_on_policy_sparsity_is_explained_by_updates_where_equal_updates_are_equally_sparse() -> None:
    assert _verdict(FACTS, "on-policy") == "does not reproduce"
    dense = changed(FACTS, "sparsity", "off-bf16", sparsity=0.2)
    dense = changed(dense, "sparsity", "off-kl-bf16", sparsity=0.2)
    assert _verdict(dense, "on-policy") == "is explained by the number of updates"
    assert _verdict(changed(dense, "sparsity", "off-quarter-bf16", sparsity=0.3), "on-policy") == "reproduces"


def test_sgd_must_be_sparser_and_no_worse() -> None:
    assert _verdict(FACTS, "optimizer") == "does not reproduce"
    sparse = changed(FACTS, "sparsity", "on-sgd-bf16", sparsity=0.8)
    assert _verdict(sparse, "optimizer") == "reproduces"
    worse = changed(sparse, "sparsity", "on-sgd-bf16", tests=(outcome(0.5),))
    assert _verdict(worse, "optimizer") == "undecided"


# (b)


def _grid(*, magnitude: float, same_data: float, other_data: float) -> GridFacts:
    """Twelve runs whose excess share depends on nothing but whether the data are the same."""
    cells = list(product(("grpo", "dpo"), ("addition", "sorting"), (0, 1, 2)))
    levels = {
        "seed": [str(seed) for *_, seed in cells],
        "data": [data for _, data, _ in cells],
        "algorithm": [algorithm for algorithm, *_ in cells],
    }
    excess = [[same_data if a[1] == b[1] else other_data for b in cells] for a in cells]
    effects = factor_effects(levels, excess, draws=99, seed=0)
    null = "row-column-magnitude"
    kinds = [
        PairKind(
            differs=differs,
            pairs=6,
            jaccard=0.9,
            chance={"uniform": 0.1, "magnitude": 0.8, null: 0.85},
            excess={
                "uniform": 0.9,
                "magnitude": magnitude,
                null: 0.0 if "shuffled" in differs else other_data if "data" in differs else same_data,
            },
            cosine=0.5,
        )
        for size in (1, 2, 3)
        for differs in combinations(("seed", "algorithm", "data"), size)
    ]
    shuffled = replace(kinds[0], differs=("shuffled",))
    names = tuple(" ".join(map(str, cell)) for cell in cells)
    return GridFacts(
        criterion="value",
        view="native",
        nulls=("uniform", "magnitude", null),
        kinds=(*kinds, shuffled),
        factors=FactorTable(
            null=null,
            statistic="",
            runs=names,
            factors=tuple(
                FactorRecord(factor=name, levels={}, excess_share=effect, jaccard=effect)
                for name, effect in effects.items()
            ),
            notes=(),
        ),
        matrix=OverlapMatrix(
            runs=(), null=null, jaccard=(), chance=(), excess_share=(), distance=None, merges=()
        ),
        notes=(),
    )


def _with_grid(**figures: float) -> FullFacts:
    value = _grid(**figures)
    runs = tuple(replace(run, sweep="grid") for run in FACTS.of("divergence"))
    bases = tuple(
        replace(base, sweep="grid")
        for base in FACTS.bases
        if (base.sweep, base.name) == ("divergence", "mix")
    )
    return replace(
        FACTS,
        runs=(*FACTS.runs, *runs),
        bases=(*FACTS.bases, *bases),
        grids=(value, replace(value, criterion="top:1%")),
    )


def test_an_overlap_that_magnitudes_account_for_is_explained_by_rounding() -> None:
    assert _verdict(_with_grid(magnitude=0.1, same_data=0.2, other_data=0.1), "grid-value") == (
        "is explained by rounding"
    )
    assert _verdict(_with_grid(magnitude=0.4, same_data=0.2, other_data=0.1), "grid-value") == "reproduces"


def test_data_decide_only_where_pairs_of_other_data_share_less_and_a_permutation_agrees() -> None:
    assert _verdict(_with_grid(magnitude=0.1, same_data=0.3, other_data=0.1), "grid-largest") == "reproduces"
    reverse = _with_grid(magnitude=0.1, same_data=0.1, other_data=0.3)
    assert _verdict(reverse, "grid-largest") == "does not reproduce"


# (c)


def test_a_transfer_that_only_the_choice_of_format_gives_is_explained_by_it() -> None:
    assert _verdict(FACTS, "transfer") == "reproduces"
    idle = changed(FACTS, "transfer", "single-n3", tests=(outcome(0.8, digits=3), outcome(0.4)))
    assert _verdict(idle, "transfer") == "undecided", "on mix the shares have not moved"
    chosen = changed(
        idle, "transfer", "mix-n3", tests=(outcome(0.8, digits=3), outcome(0.7, S=0.9, C=0.05, R=0.05))
    )
    assert _verdict(chosen, "transfer") == "is explained by the choice of format"


def test_a_collapse_needs_every_mixture_and_the_winner_is_compared_with_the_most_frequent_format() -> None:
    assert _verdict(FACTS, "collapse") == "does not reproduce"
    won = changed(FACTS, "mixtures", "*", tests=(outcome(0.7, S=0.95, C=0.05, R=0.0),))
    assert (_verdict(won, "collapse"), _verdict(won, "winner")) == ("reproduces", "reproduces")
    frequent = changed(FACTS, "mixtures", "*", tests=(outcome(0.7, S=0.0, C=0.95, R=0.05),))
    assert _verdict(frequent, "winner") == "does not reproduce"
    spread = next(claim for claim in full_claims(FACTS) if claim.key == "collapse")
    assert "even seed 0 (its base solves 0." in spread.reading, "runs that keep several formats are named"
    named = next(claim for claim in full_claims(frequent) if claim.key == "winner")
    assert "even seed 0: most frequent C" in named.reading
    assert "C wins" in named.reading
    mixed = changed(won, "mixtures", "even", 0, tests=(outcome(0.7, S=0.0, C=0.95, R=0.05),))
    assert (_verdict(mixed, "collapse"), _verdict(mixed, "winner")) == ("reproduces", "undecided")


def test_scale_matters_only_where_all_seeds_of_a_size_agree_on_another_format() -> None:
    assert _verdict(FACTS, "scale") == "does not reproduce"
    other = changed(FACTS, "scale", "small", tests=(outcome(0.7, S=0.9, C=0.1, R=0.0),))
    assert _verdict(other, "scale") == "reproduces"
    torn = changed(FACTS, "scale", "small", 0, tests=(outcome(0.7, S=0.9, C=0.1, R=0.0),))
    assert _verdict(torn, "scale") == "undecided"


# (d)


def test_degree_matters_where_accuracy_rises_with_every_one() -> None:
    assert _verdict(FACTS, "degree") == "undecided", "equal within intervals that reach beyond .02"
    rising = FACTS
    for degree, accuracy in ((250, 0.3), (400, 0.5), (700, 0.9)):
        for operands, task in (("identical", "addition"), ("varying", "addition-varying")):
            tests = (outcome(accuracy, task=task),)
            rising = changed(rising, "degree", f"{degree}-{operands}", tests=tests)
    assert _verdict(rising, "degree") == "reproduces"


def test_operands_matter_where_every_base_has_new_critical_positions() -> None:
    assert _verdict(FACTS, "operands") == "reproduces"
    same = tuple(
        replace(f, found=replace(f.found, positions=FACTS.criticals[0].found.positions))
        for f in FACTS.criticals
    )
    assert _verdict(replace(FACTS, criticals=same), "operands") == "does not reproduce"


def test_a_rise_elsewhere_is_no_rise_at_critical_tokens() -> None:
    assert _verdict(FACTS, "critical-rise") == "reproduces"
    down = Interval(value=-0.1, low=-0.2, high=0.0, num_prompts=128)
    first, *others = FACTS.criticals
    steps = tuple(replace(step, gain=down) for step in first.found.steps)
    torn = replace(FACTS, criticals=(replace(first, found=replace(first.found, steps=steps)), *others))
    assert _verdict(torn, "critical-rise") == "undecided"


# (e)


def _frontier(*, ahead: float) -> FullFacts:
    """Standard runs on accuracy = .5 + .1 · log10(KL); prioritised ones above it by `ahead`."""
    facts = changed(FACTS, "frontier", "no-penalty", tests=(outcome(0.6, kl=10.0),))
    for kind, shift in (("standard", 0.0), ("shannon", ahead), ("max-prob", ahead)):
        arms = sorted({run.arm for run in facts.of("frontier") if run.arm.startswith(kind)})
        for place, arm in enumerate(arms):
            exponent = -2.5 + 0.5 * place + 0.1 * (kind != "standard")
            tests = (outcome(0.5 + 0.1 * exponent + shift, kl=10.0**exponent),)
            facts = changed(facts, "frontier", arm, tests=tests)
    return facts


@pytest.mark.parametrize("ahead", [0.0, 0.05, -0.05])
def test_the_gap_of_two_frontiers_is_what_one_was_raised_by(ahead) -> None:
    """Accuracy is linear in log KL on both, so the interpolation is exact; the shared end bends the top."""
    gap = frontier_gap(_frontier(ahead=ahead), "shannon", 0)
    assert gap is not None
    assert gap.value == pytest.approx(ahead, abs=1e-9)
    assert gap.low < gap.value < gap.high


def test_more_accuracy_at_more_kl_on_the_same_frontier_is_no_gain() -> None:
    assert _verdict(_frontier(ahead=0.0), "frontier-shannon") in ("undecided", "does not reproduce")
    assert _verdict(_frontier(ahead=0.05), "frontier-shannon") == "reproduces"
    assert _verdict(_frontier(ahead=-0.05), "frontier-max-prob") == "does not reproduce"


def test_penalties_that_reach_no_common_kl_are_not_compared() -> None:
    facts = _frontier(ahead=0.0)
    for run in facts.of("frontier"):
        if run.arm.startswith("shannon"):
            facts = changed(facts, "frontier", run.arm, tests=(outcome(0.6, kl=run.tests[0].kl * 1e-4),))
    assert frontier_gap(facts, "shannon", 0) is None
    assert _verdict(facts, "frontier-shannon") == "not measured"


# (f)


def test_a_gain_of_weights_must_survive_mean_one_and_exceed_shuffled_weights() -> None:
    assert _verdict(FACTS, "divergence") == "undecided"
    better = (outcome(0.8),)
    plain = changed(FACTS, "divergence", "strong", tests=better)
    assert _verdict(plain, "divergence") == "is explained by the learning rate"
    normalised = changed(plain, "divergence", "strong-normalised", tests=better)
    assert _verdict(normalised, "divergence") == "reproduces"
    shuffled = changed(normalised, "divergence", "strong-shuffled", tests=better)
    assert _verdict(shuffled, "divergence") == "is explained by any spread of weights"
    assert (
        _verdict(changed(plain, "divergence", "strong", 1, tests=(outcome(0.6),)), "divergence")
        == "undecided"
    )


# The record and the page


def _report(facts: FullFacts) -> FullReport:
    return FullReport(tool="sparsity-audit 0", size="full", facts=facts, claims=full_claims(facts))


def test_a_part_that_was_not_run_is_said_to_be_not_measured() -> None:
    nothing = replace(FACTS, parts=(), sweeps=(), runs=(), bases=(), criticals=())
    claims = full_claims(nothing)
    assert {claim.verdict for claim in claims} == {"not measured"}
    assert [claim.key for claim in claims] == [claim.key for claim in full_claims(FACTS)]
    assert {claim.part for claim in claims} == set(PARTS)


def test_the_record_follows_its_schema() -> None:
    facts = _with_grid(magnitude=0.1, same_data=0.3, other_data=0.1)
    jsonschema.validate(json.loads(study_full_to_json(_report(facts))), study_full_json_schema())


def test_every_claim_with_a_caption_has_a_figure_and_the_page_needs_nothing(monkeypatch) -> None:
    monkeypatch.setattr(study_full_page, "FORMATS", ("svg",))
    facts = replace(_with_grid(magnitude=0.1, same_data=0.3, other_data=0.1), parts=tuple(PARTS))
    report = _report(facts)
    files = render_full_study(report, questions=PARTS)
    drawn = {claim.key for claim in report.claims if claim.caption}
    assert drawn == set(DRAWERS)
    page = files["index.html"].decode()
    assert page.count("<svg ") == len(drawn)
    assert "<script" not in page
    assert "default-src &#39;none&#39;" in page
    for claim in report.claims:
        assert f'id="{claim.key}"' in page
