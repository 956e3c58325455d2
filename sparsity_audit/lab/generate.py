"""Continuing prompts one token at a time, with a cache.

Contract: all prompts of a batch at once, left-padded, until each has ended or reached the limit. What a row
draws depends on its place and the generator alone, not on when other rows end; cache and padding change
logits by rounding only. Log-probabilities are natural, of the distribution that is sampled from:
softmax(logits / temperature).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsity_audit.errors import UsageError
from sparsity_audit.lab.model import KVCache, Llama
from sparsity_audit.lab.vocabulary import EOS, PAD

__all__ = ["Completions", "generate"]

_WORTH_KEEPING = 0.75
"""Share of rows still going below which the others leave the cache: copying it costs about a step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completions:
    """What `generate` made: tokens without a judgement.

    Args:
        tokens: int64[batch, seq], `<pad>` behind `<eos>`.
        mask: bool[batch, seq], true up to and including `<eos>`.
        logprobs: float32[batch, seq] of the tokens when they were drawn; 0 where the mask is false.
    """

    tokens: Tensor
    mask: Tensor
    logprobs: Tensor


@torch.no_grad()
def generate(
    model: Llama,
    prompts: Tensor,
    prompt_mask: Tensor,
    *,
    max_new_tokens: int,
    temperature: float,
    generator: torch.Generator | None,
) -> Completions:
    """Continue each prompt until `<eos>` or the limit.

    Args:
        model: The policy.
        prompts: int64[batch, prompt_seq], left-padded.
        prompt_mask: bool[batch, prompt_seq].
        max_new_tokens: Tokens at most; `<eos>` counts.
        temperature: Of the distribution that is sampled from, and of `logprobs`; > 0.
        generator: Where the noise comes from; None takes the most probable token each time.

    Raises:
        UsageError: The temperature is not positive, or the sequence would outgrow the model's positions.
    """
    if not temperature > 0:
        raise UsageError(
            "temperature", str(temperature), expected="more than 0; greedy decoding has its own call"
        )
    batch, prompt_seq = prompts.shape
    attention_mask = torch.cat((prompt_mask, torch.zeros(batch, max_new_tokens, dtype=torch.bool)), dim=1)
    tokens = torch.full((batch, max_new_tokens), PAD)
    logprobs = torch.zeros(batch, max_new_tokens)
    cache = KVCache(model.config, batch=batch, capacity=prompt_seq + max_new_tokens)
    going = torch.ones(batch, dtype=torch.bool)
    rows = torch.arange(batch)  # those the cache holds: all that are going, and some that have ended
    new = prompts
    for step in range(max_new_tokens):
        end = prompt_seq + step
        logits = model(new, attention_mask[rows, :end], cache=cache)[:, -1]
        distribution = torch.log_softmax(logits / temperature, dim=-1)
        chosen = _choose(distribution, _noise(batch, distribution, generator), rows)
        tokens[rows, step] = torch.where(going[rows], chosen, PAD)
        logprobs[rows, step] = torch.where(going[rows], distribution.gather(1, chosen[:, None])[:, 0], 0.0)
        attention_mask[:, end] = going
        going[rows] &= chosen != EOS
        if not going.any():
            break
        if int(going.sum()) < _WORTH_KEEPING * len(rows):
            cache.keep(going[rows])
            rows = rows[going[rows]]
        new = tokens[rows, step : step + 1]
    mask = attention_mask[:, prompt_seq:]
    used = int(mask.any(dim=0).sum())
    return Completions(tokens=tokens[:, :used], mask=mask[:, :used], logprobs=logprobs[:, :used])


def _noise(batch: int, distribution: Tensor, generator: torch.Generator | None) -> Tensor | None:
    """Exp(1) for every row of the batch, ended or not: a row's noise does not depend on when others end."""
    if generator is None:
        return None
    noise = distribution.new_empty(batch, distribution.shape[1]).exponential_(generator=generator)
    return noise.clamp_(min=torch.finfo(noise.dtype).tiny)  # 0 / 0 would win the race as NaN


def _choose(distribution: Tensor, noise: Tensor | None, rows: Tensor) -> Tensor:
    """One token a row from log-probabilities [rows, vocab].

    Exponential race: with E_i ~ Exp(1), argmax p_i / E_i has the distribution p (the Gumbel-max trick).
    """
    if noise is None:
        return distribution.argmax(dim=-1)
    return (distribution.exp() / noise[rows]).argmax(dim=-1)
