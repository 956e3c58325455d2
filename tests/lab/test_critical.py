"""Critical positions: what is forced, what is measured, and when a position is called critical."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lab_runs import base

from sparsity_audit.errors import UsageError
from sparsity_audit.lab.critical import _continued, _wrong_tokens, find_critical, right_probabilities
from sparsity_audit.lab.determinism import stream
from sparsity_audit.lab.estimators import interval
from sparsity_audit.lab.losses import shannon_certainty
from sparsity_audit.lab.rollout import as_rollouts, teacher_forced
from sparsity_audit.lab.tasks import named_task
from sparsity_audit.lab.vocabulary import PAD, TOKENS, encode

TASK = named_task("addition")
PROBLEMS = TASK.sample(24, lengths={2: 1.0}, generator=stream(0, "problems"))


@pytest.fixture(scope="module")
def found():
    return find_critical(
        base(),
        PROBLEMS,
        task=TASK,
        fmt="S",
        checkpoint="base",
        min_drop=0.1,
        generator=stream(0, "noise"),
        on_position=lambda _done, _all: None,
    )


def test_an_interval_is_the_mean_with_two_standard_errors_and_may_be_negative() -> None:
    row = interval([-1.0, 0.0, -2.0])
    half = 1.959964 * (1.0 / 3) ** 0.5
    assert (row.value, row.num_prompts) == (-1.0, 3)
    assert row.low == pytest.approx(-1 - half)
    assert row.high == pytest.approx(-1 + half)
    with pytest.raises(UsageError, match="at least 2"):
        interval([1.0])


@given(right=st.integers(0, 19), seed=st.integers(0, 1000))
def test_a_wrong_token_is_neither_the_right_one_nor_padding(right, seed) -> None:
    logits = torch.randn(8, len(TOKENS), generator=torch.Generator().manual_seed(seed))
    drawn = _wrong_tokens(logits, torch.full((8,), right), torch.Generator().manual_seed(seed + 1))
    assert right not in drawn
    assert PAD not in drawn


def test_wrong_tokens_follow_the_policys_own_distribution() -> None:
    logits = torch.full((20_000, len(TOKENS)), -40.0)
    logits[:, 3], logits[:, 4], logits[:, 5] = 2.0, 1.0, 0.0
    drawn = _wrong_tokens(logits, torch.full((20_000,), 3), torch.Generator().manual_seed(0))
    share = float((drawn == 4).double().mean())
    expected = 1 / (1 + torch.tensor(-1.0).exp().item())
    assert abs(share - expected) < 4 * (expected * (1 - expected) / 20_000) ** 0.5
    assert set(drawn.tolist()) == {4, 5}


def test_a_forced_end_is_the_end() -> None:
    prefixes = torch.tensor([encode("S<eos>")])
    texts = _continued(base(), PROBLEMS[:1], prefixes, limit=4, generator=stream(0, "x"))
    assert texts == ["S<eos>"]


def test_certainty_and_probability_are_those_of_one_teacher_forced_pass(found) -> None:
    written = as_rollouts(PROBLEMS, [TASK.write(p, "S") for p in PROBLEMS], task=TASK)
    with torch.no_grad():
        logits = teacher_forced(base(), written)
    certainty = shannon_certainty(logits)
    right = torch.softmax(logits, -1).gather(-1, written.completions.unsqueeze(-1)).squeeze(-1)
    for position in found.positions:
        assert position.certainty == pytest.approx(float(certainty[:, position.index].mean()), abs=1e-5)
        assert position.right_probability == pytest.approx(float(right[:, position.index].mean()), abs=1e-5)


def test_the_positions_are_those_that_every_solution_has(found) -> None:
    shortest = min(len(encode(TASK.write(problem, "S"))) for problem in PROBLEMS)
    assert [position.index for position in found.positions] == list(range(shortest))
    assert "".join(position.example for position in found.positions).startswith("S")
    assert found.positions[0].num_tokens == 1


def test_the_choice_of_format_is_critical_and_punctuation_is_not(found) -> None:
    assert 0 in found.critical
    separators = [position.index for position in found.positions if position.example == ";"]
    assert separators
    assert not set(separators) & set(found.critical)


def test_critical_means_uncertain_and_decisive(found) -> None:
    for position in found.positions:
        holds = position.delta_certainty.high < 0 and position.drop.low > found.min_drop
        assert position.critical == holds
        drop = position.accuracy_right.value - position.accuracy_wrong.value
        assert position.drop.value == pytest.approx(drop)


def test_the_same_seed_gives_the_same_record(found) -> None:
    again = find_critical(
        base(),
        PROBLEMS,
        task=TASK,
        fmt="S",
        checkpoint="base",
        min_drop=0.1,
        generator=stream(0, "noise"),
        on_position=lambda _done, _all: None,
    )
    assert again == found


def test_steps_are_compared_with_the_first_one(found) -> None:
    steps = right_probabilities(found, [(0, base()), (4, base())], PROBLEMS, task=TASK)
    assert steps[0].by_position == steps[1].by_position
    gain = steps[1].gain
    assert gain is not None
    assert (gain.value, gain.low, gain.high) == (0.0, 0.0, 0.0)
    assert steps[0].by_position[0] == pytest.approx(found.positions[0].right_probability)


def test_without_critical_positions_nothing_is_compared(found) -> None:
    none = replace(found, positions=tuple(replace(p, critical=False) for p in found.positions))
    (step,) = right_probabilities(none, [(0, base())], PROBLEMS, task=TASK)
    assert (step.critical, step.gain) == (None, None)
    assert step.others is not None
