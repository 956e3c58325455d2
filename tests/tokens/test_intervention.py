"""Cross-sampling: whose token is taken, with which noise, after which prefix."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from token_models import random_model
from token_policies import WrittenModel

from sparsity_audit.errors import UsageError
from sparsity_audit.models.noise import RowNoise, choose, row_seed
from sparsity_audit.models.sample import sample
from sparsity_audit.tokens.divergence import LN2
from sparsity_audit.tokens.intervention import CrossSamples, cross_sample, read_signals
from sparsity_audit.tokens.rules import Above, At, First

NEVER, ALWAYS = Above(signal="js", threshold=math.inf), Above(signal="js", threshold=0.0)
A, B = random_model(1, spread=3.2), random_model(2, spread=3.2)
PROMPTS = [[1, 5, 6, 13], [1, 4], [1, 9, 9, 9, 9, 9, 13], [1, 3, 3], [1, 12]]
END = 2


def run(primary=A, intervening=B, prompts=PROMPTS, *, rule, seed=0, rows=None, **options) -> CrossSamples:
    numbers = range(len(prompts)) if rows is None else rows
    defaults = {
        "eos_ids": (END,),
        "max_new_tokens": 12,
        "temperature": 1.0,
        "batch_tokens": 10_000,
        "seeds": [row_seed(seed, "row", number) for number in numbers],
    }
    return cross_sample(primary, intervening, prompts, rule=rule, **{**defaults, **options})


def own(model, prompts=PROMPTS, *, seed=0, temperature=1.0):
    made = sample(
        model,
        prompts,
        seeds=[row_seed(seed, "row", number) for number in range(len(prompts))],
        eos_ids=(END,),
        max_new_tokens=12,
        temperature=temperature,
        batch_tokens=10_000,
    )
    return [list(one.tokens) for one in made], [one.truncated for one in made]


def completions(found: CrossSamples) -> list[list[int]]:
    return [found.completion(row) for row in range(len(found.lengths))]


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10_000), temperature=st.sampled_from([0.0, 0.7, 1.0]))
def test_a_rule_that_never_fires_is_the_primary_models_own_sample(seed, temperature) -> None:
    found = run(rule=NEVER, seed=seed, temperature=temperature)
    tokens, truncated = own(A, seed=seed, temperature=temperature)
    assert completions(found) == tokens
    assert found.truncated.tolist() == truncated
    assert not found.switched.any()


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10_000), temperature=st.sampled_from([0.0, 0.7, 1.0]))
def test_threshold_zero_is_the_intervening_models_own_sample(seed, temperature) -> None:
    found = run(rule=ALWAYS, seed=seed, temperature=temperature)
    tokens, truncated = own(B, seed=seed, temperature=temperature)
    assert completions(found) == tokens
    assert found.truncated.tolist() == truncated
    assert torch.equal(found.switched, found.written)
    assert found.changed.any()


def test_threshold_zero_holds_where_the_divergence_is_below_rounding() -> None:
    near = random_model(1, spread=3.2)
    with torch.no_grad():
        near.llama.lm_head.weight.add_(1e-6 * torch.randn(20, 16, generator=torch.Generator().manual_seed(0)))
    found = run(A, near, rule=ALWAYS)
    assert completions(found) == own(near)[0]
    assert bool((found.js[found.written] > 0).all())


@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_identical_models_never_switch_on_divergence_and_never_change(seed) -> None:
    twin = random_model(1, spread=3.2)
    found = run(A, twin, rule=ALWAYS, seed=seed)
    assert not found.switched.any()
    assert bool((found.js == 0).all())
    assert not run(A, twin, rule=First(num=4), seed=seed).changed.any()


@pytest.mark.parametrize("rule", [Above(signal="js", threshold=0.05), Above(signal="entropy", threshold=2.0)])
def test_a_row_does_not_depend_on_the_rows_beside_it(rule) -> None:
    together = run(rule=rule)
    for row, prompt in enumerate(PROMPTS):
        alone = run(prompts=[prompt], rule=rule, rows=[row])
        assert alone.completion(0) == together.completion(row)
        length = int(alone.lengths[0])
        assert torch.equal(alone.switched[0, :length], together.switched[row, :length])
    split = run(rule=rule, batch_tokens=20)
    assert completions(split) == completions(together)


def test_both_models_have_seen_the_mixed_prefix_as_if_it_were_computed_anew() -> None:
    rule = Above(signal="js", threshold=0.08)
    found = run(rule=rule)
    assert 0 < int(found.changed.sum()) < int(found.lengths.sum())
    for row, prompt in enumerate(PROMPTS):
        noise = RowNoise([row_seed(0, "row", row)], vocab_size=20, device=torch.device("cpu"))
        prefix = list(prompt)
        for step, token in enumerate(found.completion(row)):
            tokens = torch.tensor([prefix])
            mask = torch.ones_like(tokens, dtype=torch.bool)
            left, right = (m.logits(m.hidden_states(tokens, mask)[:, -1]) for m in (A, B))
            signals = read_signals(left, right, temperature=1.0)
            drawn = noise.draw([0])
            mine, other = (int(choose(logits, drawn, temperature=1.0)) for logits in (left, right))
            fired = bool(signals.js > rule.threshold)
            assert token == (other if fired else mine)
            assert bool(found.switched[row, step]) == fired
            assert bool(found.changed[row, step]) == (fired and mine != other)
            # 1e-5: logits through the cache differ in rounding, the divergence by its derivative times that.
            assert float(found.js[row, step]) == pytest.approx(float(signals.js), abs=1e-5)
            assert float(found.entropy[row, step]) == pytest.approx(float(signals.entropy), abs=1e-5)
            prefix.append(token)


def test_swapping_the_models_and_a_rule_by_divergence_swaps_who_writes() -> None:
    assert completions(run(A, B, rule=NEVER)) == completions(run(B, A, rule=ALWAYS))


PRIMARY = WrittenModel(
    lambda seen: [[0, 0, 0, 1], [0, 0, 0, 0.5, 0.5], [0, 0, 0, 0.9, 0.1], [0, 0, 1]][seen - 1]
)
OTHER = WrittenModel(
    lambda seen: [[0, 0, 0, 1], [0, 0, 0, 0, 0, 1], [0, 0, 0, 0.8, 0.2], [0, 0, 1]][seen - 1]
)
# Divergences by hand: 0; ln 2 (disjoint); small; 0. Entropies: 0; ln 2; 0.325; 0.


def written(rule, **options) -> CrossSamples:
    return run(PRIMARY, OTHER, [[1]], rule=rule, **{"max_new_tokens": 6, **options})


def test_signals_are_those_of_distributions_worked_out_by_hand() -> None:
    found = written(NEVER)
    p, q = (0.9, 0.1), (0.8, 0.2)
    m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    js = sum(a * math.log(a / c) + b * math.log(b / c) for a, b, c in zip(p, q, m, strict=True)) / 2
    assert found.js[0].tolist() == pytest.approx([0, LN2, js, 0], abs=1e-6)
    entropy = -sum(a * math.log(a) for a in p)
    assert found.entropy[0].tolist() == pytest.approx([0, LN2, entropy, 0], abs=1e-6)
    assert found.lengths.tolist() == [4]
    assert not found.truncated.any()


@pytest.mark.parametrize(
    ("rule", "places"),
    [
        (Above(signal="js", threshold=0.5), [1]),
        (Above(signal="js", threshold=0.001), [1, 2]),
        (Above(signal="js", threshold=0.001, budget=1), [1]),
        (Above(signal="js", threshold=LN2 + 1e-6), []),
        (Above(signal="entropy", threshold=0.3), [1, 2]),
        (Above(signal="entropy", threshold=0.3, budget=1), [1]),
        (First(num=1), [0]),
        (First(num=3), [0, 1, 2]),
        (At(positions=torch.tensor([[False, False, True, True, True, True]])), [2, 3]),
        (At(positions=torch.tensor([[False, True]])), [1]),
    ],
)
def test_each_rule_fires_where_it_should(rule, places) -> None:
    found = written(rule)
    assert found.switched[0].nonzero().flatten().tolist() == places
    assert bool(found.changed[0, 1]) == (1 in places)  # disjoint there: another token for certain
    assert (found.completion(0)[1] == 5) == (1 in places)


def test_a_budget_takes_the_first_positions_above_not_the_largest() -> None:
    rising = WrittenModel(lambda seen: [0.5 + 0.1 * seen, 0.5 - 0.1 * seen])
    flat = WrittenModel(lambda _seen: [0.5, 0.5])
    options = {"max_new_tokens": 4}
    found = run(flat, rising, [[1]], rule=Above(signal="js", threshold=0.003, budget=2), **options)
    assert found.js[0, 0] < found.js[0, 1] < found.js[0, 3]
    assert found.switched[0].tolist() == [True, True, False, False]


def test_the_limit_truncates_and_the_context_does_too() -> None:
    endless = WrittenModel(lambda _seen: [0, 0, 0, 1])
    found = run(endless, endless, [[1]], rule=NEVER, max_new_tokens=5)
    assert found.truncated.tolist() == [True]
    assert found.lengths.tolist() == [5]
    endless.context_tokens = 4
    assert run(endless, endless, [[1]], rule=NEVER, max_new_tokens=5).lengths.tolist() == [3]


@pytest.mark.parametrize("broken_side", [0, 1])
def test_logits_that_are_no_numbers_end_the_row_and_only_it(broken_side) -> None:
    fine = WrittenModel(lambda seen: [0, 0, 0, 1] if seen < 6 else [0, 0, 1])
    broken = WrittenModel(
        lambda seen: [math.nan] * 4 if seen == 3 else ([0, 0, 0, 1] if seen < 6 else [0, 0, 1])
    )
    pair = [fine, fine]
    pair[broken_side] = broken
    found = run(*pair, [[1], [1, 3, 3, 3]], rule=NEVER)
    assert found.failed.tolist() == [True, False]
    assert found.lengths.tolist() == [2, 3]


def test_bad_settings_are_refused() -> None:
    wide = WrittenModel(lambda _seen: [1.0], vocab_size=7)
    with pytest.raises(UsageError, match="heads of 6 and 7 rows"):
        run(PRIMARY, wide, [[1]], rule=NEVER)
    assert run(PRIMARY, wide, [[1]], rule=NEVER, vocab_size=6).lengths.tolist() == [4]
    with pytest.raises(UsageError, match="vocab_size"):
        run(PRIMARY, wide, [[1]], rule=NEVER, vocab_size=7)
    with pytest.raises(UsageError, match="temperature"):
        run(rule=NEVER, temperature=-1.0)
    with pytest.raises(UsageError, match="max_new_tokens"):
        run(rule=NEVER, max_new_tokens=0)
    for threshold in (-0.1, math.nan):
        with pytest.raises(UsageError, match="threshold"):
            Above(signal="js", threshold=threshold)
    with pytest.raises(UsageError, match="budget"):
        Above(signal="js", threshold=0.1, budget=0)
    with pytest.raises(UsageError, match="first positions"):
        First(num=0)


def test_completions_survive_being_written_as_arrays() -> None:
    found = run(rule=Above(signal="js", threshold=0.05))
    again = CrossSamples.from_arrays(found.to_arrays())
    for field in fields(found):
        assert torch.equal(getattr(found, field.name), getattr(again, field.name)), field.name
