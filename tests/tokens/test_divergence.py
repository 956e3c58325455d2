"""Divergences of two distributions against a slow reference and scipy, on ordinary and degenerate rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy as scipy_entropy

from sparsity_audit.models.score import log_probabilities
from sparsity_audit.tokens.divergence import (
    LN2,
    divergences,
    entropy,
    js_divergence,
    kl_divergence,
    nucleus,
    ranks,
    top,
)

EXACT = 1e-12
"""Absolute, of sums of some dozen float64 terms, taken in another order."""

INF = math.inf


def rows(*logits: list[float]) -> torch.Tensor:
    return log_probabilities(torch.tensor(logits, dtype=torch.float32))


def slow_js(p: list[float], q: list[float]) -> float:
    """By the definition, term by term with exact summation."""
    terms = []
    for a, b in zip(p, q, strict=True):
        middle = (a + b) / 2
        terms += [x * math.log(x / middle) / 2 for x in (a, b) if x > 0]
    return math.fsum(terms)


def slow_kl(p: list[float], q: list[float]) -> float:
    if any(a > 0 and b == 0 for a, b in zip(p, q, strict=True)):
        return INF
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


logit = st.one_of(st.floats(-30, 30, width=32), st.sampled_from([0.0, -INF, 5.0]))


@st.composite
def two_rows(draw) -> tuple[torch.Tensor, torch.Tensor]:
    size = draw(st.integers(1, 12))
    pair = []
    for _ in range(2):
        values = draw(st.lists(logit, min_size=size, max_size=size))
        values[draw(st.integers(0, size - 1))] = draw(st.floats(-3, 3, width=32))
        pair.append(rows(values))
    return pair[0], pair[1]


@settings(deadline=None, max_examples=200)
@given(two_rows())
def test_they_are_those_of_the_definition_and_of_scipy(pair) -> None:
    base, tuned = pair
    p, q = base[0].exp().tolist(), tuned[0].exp().tolist()
    js = float(js_divergence(base, tuned))
    assert js == pytest.approx(slow_js(p, q), abs=EXACT)
    # scipy subtracts logarithms of mixtures and takes a root: 1e-8 is what that leaves of a JS near 0.
    assert js == pytest.approx(float(np.nan_to_num(jensenshannon(p, q))) ** 2, abs=1e-8)
    assert float(kl_divergence(base, tuned)) == pytest.approx(slow_kl(p, q), abs=1e-10)
    assert float(entropy(base)) == pytest.approx(float(scipy_entropy(p)), abs=EXACT)


@settings(deadline=None, max_examples=200)
@given(two_rows())
def test_js_is_symmetric_bounded_and_zero_for_equals(pair) -> None:
    base, tuned = pair
    js = js_divergence(base, tuned)
    assert torch.equal(js, js_divergence(tuned, base))
    assert 0 <= float(js) <= LN2
    assert float(js_divergence(base, base)) == 0.0
    assert float(kl_divergence(base, base)) == 0.0
    jeffreys = float(kl_divergence(base, tuned)) + float(kl_divergence(tuned, base))
    assert float(js) <= jeffreys / 4 + EXACT


def test_degenerate_rows_have_the_values_of_the_table() -> None:
    one, other, uniform = rows([0.0, -INF, -INF]), rows([-INF, 0.0, -INF]), rows([2.0, 2.0, 2.0])
    assert float(js_divergence(one, other)) == LN2
    assert float(kl_divergence(one, other)) == INF
    assert float(entropy(one)) == 0.0
    assert float(entropy(uniform)) == pytest.approx(math.log(3), abs=EXACT)
    assert float(kl_divergence(one, uniform)) == pytest.approx(math.log(3), abs=EXACT)
    assert float(kl_divergence(uniform, one)) == INF
    by_hand = (math.log(1 / (2 / 3)) + (1 / 3) * math.log((1 / 3) / (2 / 3)) + (2 / 3) * LN2) / 2
    assert float(js_divergence(one, uniform)) == pytest.approx(by_hand, abs=EXACT)
    alone = rows([7.0])
    assert [float(f(alone, alone)) for f in (js_divergence, kl_divergence)] == [0.0, 0.0]
    assert float(entropy(alone)) == 0.0


def test_a_tiny_difference_keeps_its_digits() -> None:
    step = 1e-4
    base = torch.log_softmax(torch.zeros(1, 4, dtype=torch.float64), 1)
    tuned = torch.log_softmax(torch.tensor([[step, 0.0, 0.0, 0.0]], dtype=torch.float64), 1)
    # To second order JS = Σ p (Δ ln p)² / 8, here step² · (1/4)(3/4) / 8, and the next term is step³.
    assert float(js_divergence(base, tuned)) == pytest.approx(step**2 * 3 / 16 / 8, rel=1e-4)


def test_logits_that_half_precision_overflows_make_broken_rows_and_no_number() -> None:
    wild = torch.tensor([[70000.0, 1.0]]).half().float()
    found = divergences(log_probabilities(wild), rows([0.0, 0.0]), torch.tensor([0]), top_k=2, top_p=0.9)
    assert found.broken.tolist() == [True]
    assert found.js_nucleus is not None
    for part in (found.js, found.js_nucleus, found.kl_base_tuned, found.entropy_base, found.logprob_base):
        assert part.isnan().all()
    nothing = log_probabilities(torch.full((1, 2), -INF))
    assert divergences(nothing, rows([0.0, 0.0]), torch.tensor([0]), top_k=1).broken.all()


def test_an_underflowing_probability_beside_an_impossible_one_is_an_infinite_divergence() -> None:
    base = torch.tensor([[0.0, -800.0]], dtype=torch.float64)
    assert float(kl_divergence(base, rows([0.0, -INF]))) == INF
    assert float(js_divergence(base, rows([0.0, -INF]))) == pytest.approx(0.0, abs=EXACT)


def test_equals_share_a_rank_and_the_lower_id_comes_first() -> None:
    row = rows([1.0, 3.0, 3.0, 0.0, 1.0])
    assert [int(ranks(row, torch.tensor([n]))) for n in range(5)] == [3, 1, 1, 5, 3]
    assert top(row, k=3).ids.tolist() == [[1, 2, 0]]
    assert top(row, k=9).ids.tolist() == [[1, 2, 0, 4, 3]]
    assert top(rows([0.0] * 6), k=2).ids.tolist() == [[0, 1]]
    with_impossible = rows([-INF, 1.0, -INF])
    assert top(with_impossible, k=2).ids.tolist() == [[1, 0]]


@settings(deadline=None, max_examples=100)
@given(two_rows(), st.floats(0.05, 1.0))
def test_a_nucleus_is_the_smallest_set_that_reaches_its_mass(pair, top_p) -> None:
    row = pair[0]
    p = row[0].exp().tolist()
    kept, mass, near_a_tie = [], 0.0, False
    for n in sorted(range(len(p)), key=lambda n: (-p[n], n)):
        near_a_tie |= abs(mass - top_p) < EXACT
        if kept and top_p < 1 and mass >= top_p:
            break
        kept.append(n)
        mass += p[n]
    if near_a_tie:  # rounding decides on which side of top_p a sum lies that equals it
        return
    found = nucleus(row, top_p=top_p)[0].exp().tolist()
    for n, value in enumerate(found):
        assert value == pytest.approx(p[n] / mass if n in kept else 0.0, abs=EXACT)


def test_chunks_of_positions_change_no_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 37, 50, generator=generator) * 4
    base, tuned = (log_probabilities(part) for part in logits)
    tokens = torch.randint(50, (37,), generator=generator)
    whole = divergences(base, tuned, tokens, top_k=5, top_p=0.9)
    for size in (1, 5, 36):
        parts = [
            divergences(base[s : s + size], tuned[s : s + size], tokens[s : s + size], top_k=5, top_p=0.9)
            for s in range(0, 37, size)
        ]
        for name in ("js", "js_nucleus", "kl_base_tuned", "entropy_tuned", "rank_base", "top_k_overlap"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name)), name


def test_all_parts_of_a_position_are_about_the_right_side_and_token() -> None:
    base = rows([math.log(0.7), math.log(0.2), math.log(0.1)])
    tuned = rows([math.log(0.12), math.log(0.08), math.log(0.8)])
    found = divergences(base, tuned, torch.tensor([1]), top_k=2)
    assert float(found.logprob_base) == pytest.approx(math.log(0.2), abs=1e-6)  # float32 logits
    assert float(found.logprob_tuned) == pytest.approx(math.log(0.08), abs=1e-6)
    assert (int(found.rank_base), int(found.rank_tuned)) == (2, 3)
    assert found.top_base.ids.tolist() == [[0, 1]]
    assert found.top_tuned.ids.tolist() == [[2, 0]]
    assert int(found.tuned_top_rank_base) == 3
    assert float(found.tuned_top_logprob_base) == pytest.approx(math.log(0.1), abs=1e-6)
    assert float(found.top_k_overlap) == 0.5
    assert found.js_nucleus is None
    by_hand = sum(a * math.log(a / b) for a, b in ((0.7, 0.12), (0.2, 0.08), (0.1, 0.8)))
    assert float(found.kl_base_tuned) == pytest.approx(by_hand, abs=1e-6)
    assert float(found.kl_tuned_base) != float(found.kl_base_tuned)
