"""The differ on real RL checkpoints against independent code (tests/data/addition/README.md)."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsity_audit import diff, lab_evaluate, overlap
from sparsity_audit.types import View

_EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "addition"

BF16 = {
    "grpo-bf16-seed0": 0.3802,
    "grpo-bf16-seed1": 0.3793,
    "expert-iteration-bf16": 0.3840,
    "ppo-bf16": 0.3813,
    "simpo-bf16": 0.3788,
    "dpo-bf16": 0.3789,
    "sft-bf16": 0.3782,
    "shuffled-reward-bf16": 0.3791,
    "grpo-bf16-lr1e-4-seed0": 0.8155,
    "grpo-bf16-lr1e-4-seed1": 0.8136,
}
FP32_AS_SERVED = {
    "grpo-fp32-seed0": 0.1237,
    "grpo-fp32-seed1": 0.1359,
    "shuffled-reward-fp32": 0.1264,
    "sft-fp32": 0.1028,
}


@pytest.mark.parametrize("run", BF16)
def test_a_bf16_run_has_the_known_sparsity(addition, run: str) -> None:
    report = diff(addition / "base-bf16", addition / run)
    assert round(report.headline("value", View.NATIVE).sparsity, 4) == BF16[run]
    assert report.accounts.base.compared == report.accounts.base.total == 148_928


EXAMPLES = {"grpo-seed0": 0.684, "grpo-seed1": 0.680, "shuffled-seed2": 0.687}
"""As the README and `examples/README.md` print them."""


@pytest.mark.parametrize("run", EXAMPLES)
def test_an_example_has_the_sparsity_that_the_readme_states(run: str) -> None:
    report = diff(_EXAMPLES / "base", _EXAMPLES / run)
    assert round(report.headline("value", View.NATIVE).sparsity, 3) == EXAMPLES[run]


def test_the_examples_overlap_as_the_readme_states() -> None:
    runs = [_EXAMPLES / run for run in EXAMPLES]
    found = overlap(runs, base=_EXAMPLES / "base").pairs
    assert [round(pair.overall.jaccard, 3) for pair in found] == [0.892, 0.891, 0.887]
    assert round(found[0].overall.nulls["magnitude"].jaccard, 3) == 0.874
    assert [round(pair.overall.nulls["magnitude"].excess_share, 2) for pair in found] == [0.17, 0.05, 0.06]


def test_the_examples_learned_and_their_control_did_not() -> None:
    scores = {
        run: lab_evaluate(_EXAMPLES / run, num_prompts=256, num_samples=2) for run in ("base", *EXAMPLES)
    }
    learned = min(scores["grpo-seed0"].accuracy.value, scores["grpo-seed1"].accuracy.value)
    assert learned > scores["base"].accuracy.high + 0.2  # .72 and .76 against .40, standard errors of .02
    assert scores["shuffled-seed2"].accuracy.value < scores["base"].accuracy.value


@pytest.mark.parametrize("run", FP32_AS_SERVED)
def test_an_fp32_run_is_dense_natively_and_has_the_known_sparsity_as_served(addition, run: str) -> None:
    report = diff(addition / "base-fp32", addition / run)
    assert round(report.headline("value", View.NATIVE).sparsity, 3) == 0.0
    assert round(report.headline("value", View.SERVED).sparsity, 4) == FP32_AS_SERVED[run]


@pytest.mark.parametrize(
    ("run", "lr", "predicted"), [("grpo-bf16-lr1e-4-seed0", 1e-4, 0.807), ("grpo-bf16-seed0", 3e-4, 0.363)]
)
def test_the_half_ulp_law_predicts_the_known_share_for_bf16_weights(addition, run, lr, predicted) -> None:
    report = diff(addition / "base-bf16", addition / run, lr=lr, weights_dtype="bf16")
    law = report.precision[0].half_ulp
    assert round(law.at_lr, 3) == predicted
    assert law.lower <= report.sparsity <= law.upper


def test_the_half_ulp_law_is_refused_for_fp32_weights(addition) -> None:
    report = diff(addition / "base-fp32", addition / "grpo-fp32-seed0", lr=3e-4, weights_dtype="fp32")
    assert all(record.half_ulp.at_lr is None and record.half_ulp.reason for record in report.precision)


def test_a_bf16_pair_has_no_served_view_of_its_own(addition) -> None:
    report = diff(addition / "base-bf16", addition / "sft-bf16", view="served")
    assert {row.view for row in report.headlines} == {View.NATIVE}
    assert report.sparsity == report.headline("value", View.NATIVE).sparsity


def test_top_one_percent_selects_what_was_asked_and_reports_it(addition) -> None:
    report = diff(addition / "base-fp32", addition / "grpo-fp32-seed0", criteria=["top:1%"])
    (selection,) = report.top
    assert (selection.asked, selection.selected) == (1489, 1489)
    assert report.headline("top:1%", View.NATIVE).changed == 1489


def test_the_same_reward_shuffled_gives_the_same_sparsity_so_sparsity_is_no_evidence_of_learning(
    addition,
) -> None:
    learned = diff(addition / "base-bf16", addition / "grpo-bf16-seed0").sparsity
    shuffled = diff(addition / "base-bf16", addition / "shuffled-reward-bf16").sparsity
    assert abs(learned - shuffled) < 0.002
