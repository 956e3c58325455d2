"""Summaries of positions against counting by hand, and their intervals against resampling by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sparsity_audit.stats.paired import resample
from sparsity_audit.tokens.intervals import concentration_interval, ratio_estimates
from sparsity_audit.tokens.shifted import by_prompt, shifted_positions, shifted_tokens
from sparsity_audit.tokens.summary import CURVE_FRACS, JS_EDGES, summarise

EXACT = 1e-12
"""Sums of some hundred float64 in another order."""


def columns(num: int = 300, sequences: int = 20, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    sequence = np.sort(rng.integers(0, sequences, num))
    position = np.concatenate([np.arange(c) for c in np.bincount(sequence, minlength=sequences)])
    js = rng.beta(0.2, 3, num) * math.log(2)
    return {
        "sequence": sequence,
        "position": position,
        "token": rng.integers(0, 7, num),
        "js": js,
        "js_nucleus": np.sqrt(js) / 2,
        "kl_base_tuned": np.where(rng.random(num) < 0.05, np.inf, js * 3),
        "kl_tuned_base": js * 2,
        "entropy_base": rng.random(num) * 3,
        "entropy_tuned": rng.random(num) * 2,
        "logprob_base": -rng.random(num),
        "logprob_tuned": np.where(rng.random(num) < 0.02, -np.inf, -rng.random(num)),
        "rank_base": rng.integers(1, 9, num),
        "rank_tuned": rng.integers(1, 9, num),
        "top_base": rng.integers(0, 3, num),
        "top_tuned": rng.integers(0, 3, num),
        "tuned_top_rank_base": rng.integers(1, 14, num),
        "tuned_top_logprob_base": np.log(rng.random(num) * 0.05 + 1e-9),
        "top_k_overlap": rng.integers(0, 6, num) / 5,
    }


def test_every_figure_is_what_counting_gives() -> None:
    found = columns()
    prompts = [n // 2 for n in range(20)]
    summary = summarise(found, prompts, seed=0)
    js = found["js"].tolist()
    high = [n for n, x in enumerate(js) if x > 0.1]
    assert (summary.positions, summary.sequences, summary.prompts) == (300, 20, 10)
    assert summary.mean_js.value == pytest.approx(math.fsum(js) / 300, abs=EXACT)
    assert summary.above.value == pytest.approx(len(high) / 300, abs=EXACT)
    assert summary.below.value == pytest.approx(sum(x < 0.01 for x in js) / 300, abs=EXACT)
    assert summary.above_nucleus is not None
    assert summary.above_nucleus.value == pytest.approx((found["js_nucleus"] > 0.1).mean(), abs=EXACT)
    finite = [x for x in found["kl_base_tuned"].tolist() if math.isfinite(x)]
    assert summary.infinite_kl == 300 - len(finite) > 0
    assert summary.kl_base_tuned.value == pytest.approx(math.fsum(finite) / len(finite), abs=EXACT)
    moved = [b - a for a, b in zip(found["logprob_base"], found["logprob_tuned"], strict=True) if b > -np.inf]
    assert summary.delta_logprob.value == pytest.approx(math.fsum(moved) / len(moved), abs=EXACT)
    rank = found["tuned_top_rank_base"].tolist()
    assert summary.choices_above.positions == len(high)
    assert summary.choices_above.in_top_3.value == pytest.approx(
        sum(rank[n] <= 3 for n in high) / len(high), abs=EXACT
    )
    new = np.exp(found["tuned_top_logprob_base"]) < 0.01
    assert summary.choices.new.value == pytest.approx(new.mean(), abs=EXACT)
    assert summary.choices_above.new.value == pytest.approx(new[high].mean(), abs=EXACT)
    ordered = sorted(js, reverse=True)
    assert summary.concentration.value == pytest.approx(math.fsum(ordered[:30]) / math.fsum(js), abs=EXACT)
    assert summary.curve is not None
    assert summary.curve[CURVE_FRACS.index(0.1)] == pytest.approx(summary.concentration.value, abs=EXACT)
    assert summary.curve[-1] == 1.0
    assert sum(map(sum, summary.histogram)) == 300
    for row, low, end in zip(summary.histogram, JS_EDGES[:-1], JS_EDGES[1:], strict=True):
        assert sum(row) == sum(low <= x < end for x in js)
    assert sum(point.positions for point in summary.by_position) == 300
    first = found["position"] == 0
    assert summary.by_position[0].mean_js == pytest.approx(found["js"][first].mean(), abs=EXACT)
    assert sum(point.positions for point in summary.by_share) == 300


def test_intervals_hold_the_value_and_are_absent_for_one_prompt() -> None:
    found = columns()
    summary = summarise(found, [n // 2 for n in range(20)], seed=0)
    for name in ("mean_js", "above", "concentration", "argmax_agreement", "entropy_base"):
        estimate = getattr(summary, name)
        assert estimate.low < estimate.value < estimate.high, name
    alone = summarise(found, [0] * 20, seed=0)
    assert alone.above.value == summary.above.value
    assert (alone.above.low, alone.above.high, alone.concentration.low) == (None, None, None)


def test_without_any_divergence_nothing_is_concentrated() -> None:
    found = columns()
    found["js"] = np.zeros(300)
    summary = summarise(found, list(range(20)), seed=0)
    assert summary.curve is None
    assert summary.concentration.value is None
    assert summary.choices_above.positions == 0
    assert summary.choices_above.new.value is None
    assert summary.below.value == 1.0


def test_a_resample_counts_a_prompt_with_all_its_positions() -> None:
    rng = np.random.default_rng(1)
    values, owners = rng.random(40), np.sort(rng.integers(0, 6, 40))
    times = resample(6, draws=50, seed=3)
    assert (times.sum(axis=1) == 6).all()
    by_hand, shares = [], []
    for row in times:
        drawn = np.concatenate([np.repeat(values[owners == p], row[p]) for p in range(6)])
        by_hand.append(drawn.mean())
        room = 0.25 * len(drawn)
        ordered = -np.sort(-drawn)
        whole = int(room)
        held = ordered[:whole].sum() + (room - whole) * ordered[whole]
        shares.append(held / drawn.sum())
    sums = np.bincount(owners, values, 6)[:, None]
    found = ratio_estimates(sums, np.bincount(owners, minlength=6)[:, None].astype(float), times)[0]
    assert [found.low, found.high] == pytest.approx(np.quantile(by_hand, [0.025, 0.975]), abs=EXACT)
    held = concentration_interval(values, owners, times, top_frac=0.25)
    assert [held.low, held.high] == pytest.approx(np.quantile(shares, [0.025, 0.975]), abs=EXACT)


def test_shifted_tokens_and_prompts_add_up_to_the_whole() -> None:
    found = columns()
    places = [(n // 2, n % 2) for n in range(20)]
    tokens = shifted_tokens(found, num=99, decode=lambda ids: f"t{ids[0]}")
    assert sum(t.positions for t in tokens) == 300
    assert sum(t.js_share for t in tokens) == pytest.approx(1.0, abs=EXACT)
    assert [t.js_share for t in tokens] == sorted((t.js_share for t in tokens), reverse=True)
    rows = by_prompt(found, places, [float(n % 3 == 0) for n in range(20)])
    assert [row.prompt for row in rows] == list(range(10))
    assert sum(row.positions for row in rows) == 300
    weighted = math.fsum(row.positions * row.mean_js for row in rows) / 300
    assert weighted == pytest.approx(found["js"].mean(), abs=EXACT)
    assert rows[0].score == 0.5  # completion 0 is right, 1 is not


def test_the_most_divergent_position_of_each_completion_is_shown_in_its_context() -> None:
    found = columns()
    prompts = [[100 + n, 200] for n in range(20)]
    places = [(n // 2, n % 2) for n in range(20)]
    shown = shifted_positions(found, places, prompts, num=5, decode=lambda ids: " ".join(map(str, ids)))
    assert len({(s.prompt, s.sample) for s in shown}) == 5
    first = shown[0]
    row = int(np.argmax(found["js"]))
    sequence, position = int(found["sequence"][row]), int(found["position"][row])
    assert first.js == found["js"].max()
    assert (first.prompt, first.sample, first.position) == (*places[sequence], position)
    tokens = found["token"][found["sequence"] == sequence].tolist()
    text = f"{first.before} {first.token} {first.after}".strip()
    assert text == " ".join(map(str, [*prompts[sequence], *tokens]))
