"""What a policy does: accuracy, formats, entropy, and how far it went from a reference.

Contract: samples are drawn at temperature 1 from the generator given, the same number for each prompt;
entropy and KL are exact sums over the vocabulary at each position of those samples, so that only which
positions are visited is random. A truncated completion counts as wrong, and its share is reported. Nothing is
trained.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsity_audit.lab.estimators import Estimate, estimate, majority_at_k, pass_at_k
from sparsity_audit.lab.evaluation import Drift, Evaluation, FormatRecord, Optimum
from sparsity_audit.lab.model import Llama
from sparsity_audit.lab.optimum import kl_to_optimum, optimal_shares
from sparsity_audit.lab.rollout import Rollouts, greedy, sample, teacher_forced
from sparsity_audit.lab.tasks import OTHER_FORMAT, Problem, Task

__all__ = ["accuracy_alone", "evaluate", "sampled_rewards"]

_ROWS = 1024
"""Sequences in a batch; part of the result's last digits, so not an option."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sampled:
    """Rollouts of a policy on some problems, in batches; `rewards` is float32[prompts, samples]."""

    problems: tuple[Problem, ...]
    batches: tuple[Rollouts, ...]
    rewards: Tensor
    texts: tuple[str, ...]

    def mean_by_prompt(self, by_rollout: Tensor) -> Tensor:
        """The mean over each prompt's samples: [prompts] from [prompts · samples]."""
        return by_rollout.view(self.rewards.shape).mean(dim=1)


def evaluate(
    model: Llama,
    *,
    task: Task,
    lengths: Mapping[int, float],
    num_prompts: int,
    num_samples: int,
    generator: torch.Generator,
    reference: Llama | None,
    betas: Sequence[float],
) -> Evaluation:
    """Judge a policy on fresh problems.

    Args:
        model: The policy.
        task: What is asked, and the verifier.
        lengths: Mixture of problem lengths.
        num_prompts: Problems.
        num_samples: Samples of each; pass@k and maj@k are given for 1, 2, 4, … up to it.
        generator: Gives the problems, then the policy's noise, then the reference's.
        reference: Policy to measure the drift from.
        betas: KL coefficients to give the distance to the optimum for.

    Raises:
        UsageError: A mixture that cannot be drawn from, or problems too long for the model.
    """
    problems = task.sample(num_prompts, lengths=lengths, generator=generator)
    sampled = _sample(model, problems, task=task, num_samples=num_samples, generator=generator)
    formats = _format_records(sampled, task)
    drift = None
    if reference is not None:
        own = _sample(reference, problems, task=task, num_samples=num_samples, generator=generator)
        drift = _drift(model, reference, sampled, own, task=task, betas=betas)
    visited = sum(int(rollouts.completion_mask.sum()) for rollouts in sampled.batches)
    entropy = torch.cat([_by_rollout(_entropies(model, rollouts), rollouts) for rollouts in sampled.batches])
    return Evaluation(
        task=task.name,
        lengths=dict(lengths),
        num_prompts=num_prompts,
        num_samples=num_samples,
        accuracy=estimate(sampled.rewards.mean(dim=1).tolist()),
        greedy_accuracy=_greedy_accuracy(model, problems, task),
        **_best_of_k(sampled),
        formats=formats,
        entropy_per_token=float(entropy.sum()) / visited,
        tokens_per_completion=visited / len(sampled.texts),
        truncated_frac=sum(int(part.truncated.sum()) for part in sampled.batches) / len(sampled.texts),
        drift=drift,
    )


def accuracy_alone(
    model: Llama,
    *,
    task: Task,
    lengths: Mapping[int, float],
    num_prompts: int,
    num_samples: int,
    generator: torch.Generator,
) -> Estimate:
    """`evaluate(…).accuracy`, bit for bit, at half the cost: no greedy decoding, no entropies."""
    problems = task.sample(num_prompts, lengths=lengths, generator=generator)
    sampled = _sample(model, problems, task=task, num_samples=num_samples, generator=generator)
    return estimate(sampled.rewards.mean(dim=1).tolist())


def sampled_rewards(
    model: Llama, problems: Sequence[Problem], *, task: Task, generator: torch.Generator
) -> list[float]:
    """The reward of one sample of each problem at temperature 1, without all the rest."""
    sampled = _sample(model, tuple(problems), task=task, num_samples=1, generator=generator)
    return sampled.rewards[:, 0].tolist()


def _sample(
    model: Llama, problems: tuple[Problem, ...], *, task: Task, num_samples: int, generator: torch.Generator
) -> _Sampled:
    batches = tuple(
        sample(
            model,
            part,
            task=task,
            num_samples=num_samples,
            max_new_tokens=_limit(task, problems),
            temperature=1.0,
            generator=generator,
        )
        for part in _parts(problems, num_samples)
    )
    return _Sampled(
        problems=problems,
        batches=batches,
        rewards=torch.cat([rollouts.rewards for rollouts in batches]).view(-1, num_samples),
        texts=tuple(text for rollouts in batches for text in rollouts.texts()),
    )


def _greedy_accuracy(model: Llama, problems: tuple[Problem, ...], task: Task) -> Estimate:
    limit = _limit(task, problems)
    batches = [greedy(model, part, task=task, max_new_tokens=limit) for part in _parts(problems, 1)]
    return estimate([reward for rollouts in batches for reward in rollouts.rewards.tolist()])


def _parts(problems: Sequence[Problem], num_samples: int) -> list[Sequence[Problem]]:
    """The problems in batches of at most `_ROWS` sequences, or of one problem."""
    size = max(1, _ROWS // num_samples)
    return [problems[i : i + size] for i in range(0, len(problems), size)]


def _limit(task: Task, problems: Sequence[Problem]) -> int:
    return task.max_new_tokens(max(problem.length for problem in problems))


def _best_of_k(sampled: _Sampled) -> dict[str, dict[int, Estimate]]:
    """pass@k and maj@k for k = 1, 2, 4, … up to the number of samples."""
    num_samples = sampled.rewards.shape[1]
    right = [int(count) for count in sampled.rewards.sum(dim=1)]
    votes = [_wrong_votes(sampled, prompt) for prompt in range(len(right))]
    ks = [2**i for i in range(num_samples.bit_length())]
    return {
        "pass_at": {k: estimate([pass_at_k(c, num_samples=num_samples, k=k) for c in right]) for k in ks},
        "majority_at": {
            k: estimate(
                [
                    majority_at_k(c, wrong, num_abstained=num_samples - c - sum(wrong), k=k)
                    for c, wrong in zip(right, votes, strict=True)
                ]
            )
            for k in ks
        },
    }


def _wrong_votes(sampled: _Sampled, prompt: int) -> list[int]:
    """How many samples of a prompt gave each wrong answer; a text without `#` gave none and abstains."""
    rewards = sampled.rewards[prompt].tolist()
    start = prompt * len(rewards)
    texts = sampled.texts[start : start + len(rewards)]
    answers = [text.rpartition("#") for text, reward in zip(texts, rewards, strict=True) if not reward]
    return list(Counter(answer for _, sign, answer in answers if sign).values())


def _format_records(sampled: _Sampled, task: Task) -> tuple[FormatRecord, ...]:
    labels = [task.format_of(text) for text in sampled.texts]
    rewards = sampled.rewards.flatten().tolist()
    records = []
    for name in (*task.formats, OTHER_FORMAT):
        own = [reward for reward, label in zip(rewards, labels, strict=True) if label == name]
        accuracy = sum(own) / len(own) if own else None
        records.append(FormatRecord(format=name, share=len(own) / len(labels), accuracy=accuracy))
    return tuple(records)


@torch.no_grad()
def _entropies(model: Llama, rollouts: Rollouts) -> Tensor:
    """float32[batch, seq]: entropy of the next token at each position."""
    distribution = torch.log_softmax(teacher_forced(model, rollouts), dim=-1)
    return -(distribution.exp() * distribution).sum(dim=-1)


@torch.no_grad()
def _divergences(model: Llama, reference: Llama, rollouts: Rollouts) -> Tensor:
    """float32[batch, seq]: KL(policy‖reference) of the next token at each position."""
    own = torch.log_softmax(teacher_forced(model, rollouts), dim=-1)
    other = torch.log_softmax(teacher_forced(reference, rollouts), dim=-1)
    return (own.exp() * (own - other)).sum(dim=-1)


def _by_rollout(by_position: Tensor, rollouts: Rollouts) -> Tensor:
    """float64[batch]: the sum over a completion's positions."""
    return torch.where(rollouts.completion_mask, by_position.double(), 0.0).sum(dim=1)


def _drift(
    model: Llama,
    reference: Llama,
    sampled: _Sampled,
    own: _Sampled,
    *,
    task: Task,
    betas: Sequence[float],
) -> Drift:
    """Distances to the reference, whose own samples are `own`, and to the optima around it."""
    kl = torch.cat([_by_rollout(_divergences(model, reference, part), part) for part in sampled.batches])
    visited = sum(int(rollouts.completion_mask.sum()) for rollouts in sampled.batches)
    shares, _ = _shares(_format_records(sampled, task))
    reference_shares, reference_accuracies = _shares(_format_records(own, task))
    optima = []
    for beta in betas:
        best = optimal_shares(reference_shares, reference_accuracies, beta=beta)
        distance = kl_to_optimum(
            sampled.mean_by_prompt(kl), sampled.rewards.mean(dim=1), own.rewards.mean(dim=1), beta=beta
        )
        optima.append(
            Optimum(
                beta=beta,
                kl=distance,
                shares=tuple(best.tolist()),
                share_distance=float((best - shares).abs().sum() / 2),
            )
        )
    return Drift(
        kl_per_token=float(kl.sum()) / visited,
        kl_per_completion=float(kl.mean()),
        reference_accuracy=estimate(own.rewards.mean(dim=1).tolist()),
        optima=tuple(optima),
    )


def _shares(records: Sequence[FormatRecord]) -> tuple[Tensor, Tensor]:
    shares = torch.tensor([record.share for record in records], dtype=torch.float64)
    accuracies = torch.tensor([record.accuracy or 0.0 for record in records], dtype=torch.float64)
    return shares, accuracies
