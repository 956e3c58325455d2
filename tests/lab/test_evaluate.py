"""Evaluations: figures that follow from the samples, and from the reference where there is one."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from sparsity_audit.lab.determinism import stream
from sparsity_audit.lab.estimators import estimate
from sparsity_audit.lab.evaluate import accuracy_alone, evaluate
from sparsity_audit.lab.evaluation import Evaluation
from sparsity_audit.lab.folder import load_model, resolve_base
from sparsity_audit.lab.model import SIZES, Llama, initialise
from sparsity_audit.lab.rollout import logprobs_of, sample, teacher_forced
from sparsity_audit.lab.tasks import OTHER_FORMAT, Addition

TASK = Addition()


@pytest.fixture(scope="module")
def base() -> Llama:
    return load_model(resolve_base("mix"))


def judged(model: Llama, *, reference: Llama | None = None, seed: int = 0, length: int = 2) -> Evaluation:
    return evaluate(
        model,
        task=TASK,
        lengths={length: 1.0},
        num_prompts=48,
        num_samples=4,
        generator=stream(seed),
        reference=reference,
        betas=(0.1, 1.0),
    )


@pytest.fixture(scope="module")
def record(base: Llama) -> Evaluation:
    return judged(base)


def test_figures_are_those_of_the_samples(base: Llama, record: Evaluation) -> None:
    generator = stream(0)
    problems = TASK.sample(48, lengths={2: 1.0}, generator=generator)
    made = sample(
        base, problems, task=TASK, num_samples=4, max_new_tokens=20, temperature=1.0, generator=generator
    )
    shares = made.rewards.view(48, 4).mean(dim=1)
    assert record.accuracy == estimate(shares.tolist())
    assert record.tokens_per_completion == int(made.completion_mask.sum()) / 192
    labels = [text[:1] for text in made.texts()]
    for row in record.formats[:3]:
        own = [
            reward for reward, label in zip(made.rewards.tolist(), labels, strict=True) if label == row.format
        ]
        assert row.share == len(own) / 192
        assert row.accuracy == sum(own) / len(own)


def test_the_accuracy_alone_is_the_accuracy_of_the_record(base: Llama, record: Evaluation) -> None:
    found = accuracy_alone(
        base, task=TASK, lengths={2: 1.0}, num_prompts=48, num_samples=4, generator=stream(0)
    )
    assert found == record.accuracy


def test_shares_sum_to_one_and_the_accuracy_is_their_mean(record: Evaluation) -> None:
    assert [row.format for row in record.formats] == ["S", "R", "C", OTHER_FORMAT]
    assert abs(sum(row.share for row in record.formats) - 1) < 1e-12
    mean = sum(row.share * (row.accuracy or 0) for row in record.formats)
    assert abs(mean - record.accuracy.value) < 1e-9


def test_pass_at_k_rises_with_k_from_the_accuracy_and_votes_start_there_too(record: Evaluation) -> None:
    assert list(record.pass_at) == list(record.majority_at) == [1, 2, 4]
    assert abs(record.pass_at[1].value - record.accuracy.value) < 1e-12
    assert abs(record.majority_at[1].value - record.accuracy.value) < 1e-12
    values = [figure.value for figure in record.pass_at.values()]
    assert values == sorted(values)
    assert all(record.majority_at[k].value <= record.pass_at[k].value for k in record.pass_at)


def test_entropy_of_a_uniform_policy_is_the_log_of_the_vocabulary() -> None:
    model = initialise(SIZES["tiny"], generator=stream(0))
    found = judged(model)
    assert abs(found.entropy_per_token - math.log(20)) < 1e-6
    assert found.accuracy.value == 0
    assert 0 < found.truncated_frac < 1


def test_a_policy_is_at_no_distance_from_itself(base: Llama) -> None:
    drift = judged(base, reference=base).drift
    assert drift is not None
    assert drift.kl_per_token == drift.kl_per_completion == 0
    assert drift.optima[1].kl > 0, "the optimum is elsewhere"


def test_the_exact_kl_agrees_with_the_sampled_logratio(base: Llama, addition: Path) -> None:
    """The mean of log π − log π₀ over the same tokens estimates the same KL: within five standard errors."""
    tuned = load_model(addition / "grpo-fp32-seed0")
    reference = load_model(addition / "base-fp32")
    found = judged(tuned, reference=reference)
    assert found.drift is not None
    generator = stream(0)
    problems = TASK.sample(48, lengths={2: 1.0}, generator=generator)
    made = sample(
        tuned, problems, task=TASK, num_samples=4, max_new_tokens=20, temperature=1.0, generator=generator
    )
    with torch.no_grad():
        other = logprobs_of(teacher_forced(reference, made), made.completions, temperature=1.0)
    ratios = ((made.logprobs - other) * made.completion_mask).sum(dim=1)
    error = float(ratios.std()) / math.sqrt(192)
    assert abs(found.drift.kl_per_completion - float(ratios.mean())) < 5 * error
    visited = found.tokens_per_completion
    assert abs(found.drift.kl_per_completion - found.drift.kl_per_token * visited) < 1e-9


def test_the_same_seed_gives_the_same_record_and_it_is_plain_json(base: Llama, record: Evaluation) -> None:
    assert judged(base) == record
    assert judged(base, seed=1) != record
    text = json.dumps(judged(base, reference=base).to_json(), allow_nan=False)
    assert json.loads(text)["drift"]["optima"][0]["beta"] == 0.1


def test_the_reference_does_not_change_what_is_said_of_the_policy(base: Llama, record: Evaluation) -> None:
    beside = judged(base, reference=base)
    assert (beside.accuracy, beside.formats, beside.pass_at) == (
        record.accuracy,
        record.formats,
        record.pass_at,
    )
