"""Sampling from a policy, and reading the same tokens again.

Contract: a *rollout* is a completion with the log-probabilities it was drawn with and its reward. A
completion that reached the limit before `<eos>` is *truncated*: counted, and of reward 0. `teacher_forced`
recomputes all positions in one pass; the cache that `generate` uses, and padding, change them by rounding
only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor

from sparsity_audit.lab.generate import Completions, generate
from sparsity_audit.lab.model import Llama
from sparsity_audit.lab.tasks import Problem, Task
from sparsity_audit.lab.vocabulary import EOS, PAD, decode, encode, encode_prompt

__all__ = [
    "Rollouts",
    "as_rollouts",
    "greedy",
    "logprobs_of",
    "pad_prompts",
    "sample",
    "teacher_forced",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollouts:
    """A batch of completions with behaviour log-probabilities and rewards.

    Args:
        prompts: int64[batch, prompt_seq], left-padded, `<bos>` first.
        prompt_mask: bool[batch, prompt_seq], false on padding.
        completions: int64[batch, seq], `<pad>` behind `<eos>`.
        completion_mask: bool[batch, seq], true up to and including `<eos>`.
        logprobs: float32[batch, seq], of each completion token under the behaviour policy at `temperature`; 0
            where the mask is false.
        group: int64[batch], index of the prompt: rollouts of one prompt share it.
        rewards: float32[batch], 1 where the task's verifier agrees, else 0.
        truncated: bool[batch], no `<eos>` within the limit.
        temperature: The behaviour policy's.
    """

    prompts: Tensor
    prompt_mask: Tensor
    completions: Tensor
    completion_mask: Tensor
    logprobs: Tensor
    group: Tensor
    rewards: Tensor
    truncated: Tensor
    temperature: float

    def __len__(self) -> int:
        return len(self.group)

    @property
    def tokens(self) -> Tensor:
        """int64[batch, prompt_seq + seq]: prompts and completions."""
        return torch.cat((self.prompts, self.completions), dim=1)

    @property
    def attention_mask(self) -> Tensor:
        """bool[batch, prompt_seq + seq]: false on padding of either side."""
        return torch.cat((self.prompt_mask, self.completion_mask), dim=1)

    def texts(self) -> list[str]:
        """The completions as texts, `<eos>` included where there is one."""
        return [
            decode(tokens[mask].tolist())
            for tokens, mask in zip(self.completions, self.completion_mask, strict=True)
        ]

    def select(self, rows: Tensor) -> Rollouts:
        """The rollouts that an index (int64) or a mask (bool[batch]) picks; the padding stays."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: part[rows] for name, part in parts.items() if isinstance(part, Tensor)})


def pad_prompts(problems: Sequence[Problem]) -> tuple[Tensor, Tensor]:
    """Prompts of any lengths as int64[batch, seq], padded on the left, and their mask."""
    return _padded([encode_prompt(problem.prompt) for problem in problems], side="left")


def _padded(rows: Sequence[list[int]], *, side: Literal["left", "right"]) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    sign = 1 if side == "left" else -1
    tokens = [([PAD] * (longest - len(row)) + row[::sign])[::sign] for row in rows]
    mask = [([False] * (longest - len(row)) + [True] * len(row))[::sign] for row in rows]
    return torch.tensor(tokens), torch.tensor(mask)


def sample(
    model: Llama,
    problems: Sequence[Problem],
    *,
    task: Task,
    num_samples: int,
    max_new_tokens: int,
    temperature: float,
    generator: torch.Generator,
) -> Rollouts:
    """`num_samples` rollouts of each problem, those of a problem next to each other.

    Args:
        model: The behaviour policy.
        problems: What is asked.
        task: Whose verifier gives the rewards.
        num_samples: Rollouts of a group.
        max_new_tokens: Tokens of a completion at most.
        temperature: > 0.
        generator: Where the noise comes from.

    Raises:
        UsageError: As for `generate`.
    """
    return _rollouts(
        model,
        problems,
        task=task,
        num_samples=num_samples,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        generator=generator,
    )


def greedy(model: Llama, problems: Sequence[Problem], *, task: Task, max_new_tokens: int) -> Rollouts:
    """One rollout of each problem, the most probable token at each step; `logprobs` at temperature 1."""
    return _rollouts(
        model,
        problems,
        task=task,
        num_samples=1,
        max_new_tokens=max_new_tokens,
        temperature=1.0,
        generator=None,
    )


def _rollouts(
    model: Llama,
    problems: Sequence[Problem],
    *,
    task: Task,
    num_samples: int,
    max_new_tokens: int,
    temperature: float,
    generator: torch.Generator | None,
) -> Rollouts:
    prompts, prompt_mask = (part.repeat_interleave(num_samples, dim=0) for part in pad_prompts(problems))
    made = generate(
        model,
        prompts,
        prompt_mask,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        generator=generator,
    )
    return _judged(
        problems, made, prompts, prompt_mask, task=task, num_samples=num_samples, temperature=temperature
    )


def as_rollouts(problems: Sequence[Problem], completions: Sequence[str], *, task: Task) -> Rollouts:
    """Texts that no policy sampled (written solutions, chosen or refused answers) as rollouts.

    Their `logprobs` are NaN: there is no behaviour policy, and a loss that asks for one must not get a
    number.

    Args:
        problems: One for each text; each is a group of its own.
        completions: The texts, with `<eos>` where they end.
        task: Whose verifier gives the rewards.
    """
    tokens, mask = _padded([encode(text) for text in completions], side="right")
    made = Completions(tokens=tokens, mask=mask, logprobs=torch.full(tokens.shape, torch.nan))
    prompts, prompt_mask = pad_prompts(problems)
    return _judged(problems, made, prompts, prompt_mask, task=task, num_samples=1, temperature=1.0)


def _judged(
    problems: Sequence[Problem],
    made: Completions,
    prompts: Tensor,
    prompt_mask: Tensor,
    *,
    task: Task,
    num_samples: int,
    temperature: float,
) -> Rollouts:
    """Completions with the verifier's rewards."""
    rollouts = Rollouts(
        prompts=prompts,
        prompt_mask=prompt_mask,
        completions=made.tokens,
        completion_mask=made.mask,
        logprobs=made.logprobs,
        group=torch.arange(len(problems)).repeat_interleave(num_samples),
        rewards=torch.zeros(len(prompts)),
        truncated=~(made.tokens == EOS).any(dim=1),
        temperature=temperature,
    )
    verdicts = [
        task.verify(problems[group], text)
        for group, text in zip(rollouts.group.tolist(), rollouts.texts(), strict=True)
    ]
    # A text without <eos> fails every strict verifier; the product makes "truncated: 0" hold for any task.
    return replace(rollouts, rewards=torch.tensor(verdicts).float() * ~rollouts.truncated)


def teacher_forced(model: Llama, rollouts: Rollouts) -> Tensor:
    """Logits float32[batch, seq, vocab] that predict each completion token, from one pass over all of them.

    Differentiable; not divided by a temperature. Rows behind `<eos>` are finite and mean nothing.
    """
    start = rollouts.prompts.shape[1]
    hidden = model.hidden_states(rollouts.tokens[:, :-1], rollouts.attention_mask[:, :-1])
    return model.lm_head(hidden[:, start - 1 :])


def logprobs_of(logits: Tensor, tokens: Tensor, *, temperature: float) -> Tensor:
    """The tokens' log softmax(logits / temperature): float32[batch, seq] from [batch, seq, vocab]."""
    distribution = torch.log_softmax(logits / temperature, dim=-1)
    return distribution.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
