"""Sampling: with the cache as without it, log-probabilities that hold up, masks that mean what they say."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from sparsity_audit.errors import UsageError
from sparsity_audit.lab.folder import load_model, resolve_base
from sparsity_audit.lab.generate import generate
from sparsity_audit.lab.model import Llama
from sparsity_audit.lab.rollout import (
    Rollouts,
    as_rollouts,
    greedy,
    logprobs_of,
    pad_prompts,
    sample,
    teacher_forced,
)
from sparsity_audit.lab.tasks import Addition, Problem
from sparsity_audit.lab.vocabulary import EOS, PAD, decode, encode_prompt

TASK = Addition()
TOLERANCE = 1e-4
"""Of log-probabilities: cache and batch shape change the order of fp32 sums; measured: 3e-5."""


@pytest.fixture(scope="module")
def base() -> Llama:
    return load_model(resolve_base("mix"))


def problems(num: int, seed: int = 0) -> tuple[Problem, ...]:
    lengths = {1: 1, 2: 1, 3: 1, 4: 1}
    return TASK.sample(num, lengths=lengths, generator=torch.Generator().manual_seed(seed))


def rollouts(model: Llama, *, seed: int = 0, limit: int = 35, temperature: float = 1.0) -> Rollouts:
    return sample(
        model,
        problems(24),
        task=TASK,
        num_samples=2,
        max_new_tokens=limit,
        temperature=temperature,
        generator=torch.Generator().manual_seed(seed),
    )


@torch.no_grad()
def continued_without_a_cache(model: Llama, prompt: str, *, limit: int, noise: torch.Tensor | None) -> str:
    """The reference: one prompt, all of it again at every step; p / Exp(1), or the most probable token."""
    ids = encode_prompt(prompt)
    for step in range(limit):
        distribution = model(torch.tensor([ids]))[0, -1].softmax(-1)
        race = distribution if noise is None else distribution / noise[step]
        ids.append(int(race.argmax()))
        if ids[-1] == EOS:
            break
    return decode(ids[len(encode_prompt(prompt)) :])


def test_greedy_generation_with_the_cache_equals_generation_without_it(base: Llama) -> None:
    asked = problems(40)
    made = greedy(base, asked, task=TASK, max_new_tokens=35)
    assert made.texts() == [
        continued_without_a_cache(base, problem.prompt, limit=35, noise=None) for problem in asked
    ]


def test_sampling_with_the_cache_equals_sampling_without_it_on_the_same_noise(base: Llama) -> None:
    asked = problems(16)
    made = sample(
        base,
        asked,
        task=TASK,
        num_samples=1,
        max_new_tokens=35,
        temperature=1.0,
        generator=torch.Generator().manual_seed(3),
    )
    again = torch.Generator().manual_seed(3)
    noise = torch.stack([torch.empty(16, 20).exponential_(generator=again) for _ in range(35)])
    assert made.texts() == [
        continued_without_a_cache(base, problem.prompt, limit=35, noise=noise[:, row])
        for row, problem in enumerate(asked)
    ]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_of_rollouts_are_those_of_a_teacher_forced_pass(base: Llama, temperature: float) -> None:
    made = rollouts(base, temperature=temperature)
    logprobs = logprobs_of(teacher_forced(base, made), made.completions, temperature=temperature)
    assert (logprobs - made.logprobs)[made.completion_mask].abs().max() < TOLERANCE
    assert torch.equal(made.logprobs[~made.completion_mask], torch.zeros(int((~made.completion_mask).sum())))


def test_sampling_follows_the_distribution(base: Llama) -> None:
    """The first token of 4,000 samples of one prompt: each share within five standard errors."""
    num = 4000
    prompts, mask = pad_prompts([Problem(prompt="12+34=", answer="46", length=2)] * num)
    made = generate(
        base, prompts, mask, max_new_tokens=1, temperature=1.0, generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        expected = base(prompts[:1])[0, -1].softmax(-1)
    shares = torch.bincount(made.tokens[:, 0], minlength=20) / num
    assert ((shares - expected).abs() <= 5 * (expected * (1 - expected) / num).sqrt() + 1 / num).all()


def test_masks_reach_through_eos_and_padding_follows(base: Llama) -> None:
    made = rollouts(base)
    assert not made.truncated.any()
    for tokens, mask in zip(made.completions.tolist(), made.completion_mask.tolist(), strict=True):
        end = tokens.index(EOS)
        assert mask == [position <= end for position in range(len(tokens))]
        assert set(tokens[end + 1 :]) <= {PAD}
    assert made.completion_mask.any(dim=0).all(), "no column is padding alone"


def test_generation_stops_when_all_have_ended(base: Llama) -> None:
    made = greedy(base, [Problem(prompt="1+2=", answer="3", length=1)], task=TASK, max_new_tokens=35)
    assert made.completions[0, -1] == EOS


def test_a_completion_cut_by_the_limit_is_counted_and_has_no_reward(base: Llama) -> None:
    full, cut = rollouts(base), rollouts(base, limit=5)
    assert cut.completions.shape[1] <= 5
    assert torch.equal(cut.truncated, full.completion_mask.sum(dim=1) > 5)
    assert cut.truncated.any()
    assert not cut.rewards[cut.truncated].any()
    assert cut.completion_mask[cut.truncated].all()


def test_rewards_are_the_verifiers_verdicts_and_groups_the_prompts(base: Llama) -> None:
    made, asked = rollouts(base), problems(24)
    assert made.group.tolist() == [i for i in range(24) for _ in range(2)]
    verdicts = [
        TASK.verify(asked[group], text) for group, text in zip(made.group.tolist(), made.texts(), strict=True)
    ]
    assert made.rewards.tolist() == verdicts
    assert 0 < made.rewards.mean() < 1


def test_the_same_seed_gives_the_same_rollouts_and_another_others(base: Llama) -> None:
    first, again, other = rollouts(base), rollouts(base), rollouts(base, seed=1)
    assert torch.equal(first.completions, again.completions)
    assert torch.equal(first.logprobs, again.logprobs)
    assert first.texts() != other.texts()


def test_a_low_temperature_is_nearly_greedy(base: Llama) -> None:
    cold = rollouts(base, temperature=1e-4)
    warm = greedy(base, problems(24), task=TASK, max_new_tokens=35)
    assert cold.texts() == [text for text in warm.texts() for _ in range(2)]


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_that_is_not_positive_is_refused(base: Llama, temperature: float) -> None:
    with pytest.raises(UsageError, match="expected: more than 0"):
        rollouts(base, temperature=temperature)


def test_a_prompt_and_limit_beyond_the_models_positions_are_refused(base: Llama) -> None:
    prompts, mask = pad_prompts([Problem(prompt="1" * 150 + "+1=", answer="0", length=150)])
    with pytest.raises(UsageError, match="max_position_embeddings"):
        generate(base, prompts, mask, max_new_tokens=35, temperature=1.0, generator=None)


def test_written_solutions_have_rewards_but_no_behaviour_logprobs() -> None:
    asked = problems(8)
    texts = [TASK.write(problem, "R") for problem in asked]
    texts[3] = texts[3].removesuffix("<eos>")
    made = as_rollouts(asked, texts, task=TASK)
    assert made.texts() == texts
    assert made.rewards.tolist() == [1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    assert made.truncated.nonzero().flatten().tolist() == [3]
    assert made.logprobs.isnan().all()


def test_selecting_rollouts_keeps_the_rows_together(base: Llama) -> None:
    made = rollouts(base)
    some = made.select(made.rewards > 0)
    assert some.texts() == [text for text, reward in zip(made.texts(), made.rewards, strict=True) if reward]
    assert some.rewards.all()
    assert len(some) == int(made.rewards.sum())
    assert some.tokens.shape == (len(some), made.tokens.shape[1])
    assert replace(some, temperature=2.0).temperature == 2.0


def test_rows_behind_eos_are_finite_so_that_a_mask_can_silence_them(base: Llama) -> None:
    made = rollouts(base)
    logits = teacher_forced(base, made)
    assert logits.shape == (*made.completions.shape, 20)
    assert torch.isfinite(logits).all()
