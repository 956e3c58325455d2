"""Continuing prompts one token at a time, with a cache, until an end token or the limit.

Contract: what a row draws depends on its prompt, its seed and the model, not on the rows beside it: batching,
padding and the cache change logits by rounding only. A completion that reached the limit, or the end of the
context, without an end token is *truncated*; a row whose logits are not numbers is *failed* and ends there.
Both are marked, none is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsity_audit.errors import UsageError
from sparsity_audit.models.batches import pad, plan_batches
from sparsity_audit.models.noise import RowNoise, choose
from sparsity_audit.models.protocol import LanguageModel

__all__ = ["WORTH_KEEPING", "Sample", "new_tokens_limit", "sample", "sample_batch"]

WORTH_KEEPING = 0.75
"""Share of rows still going below which the others leave the cache: copying it costs about a step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One completion.

    Args:
        tokens: Its ids, the end token included where there is one.
        truncated: It was cut by the limit or by the context.
        failed: The model's logits were not numbers after the last token.
    """

    tokens: tuple[int, ...]
    truncated: bool
    failed: bool


def new_tokens_limit(model: LanguageModel, prompt: Sequence[int], *, max_new_tokens: int) -> int:
    """Tokens that may follow a prompt: the limit asked for, or what the context leaves; ≤ 0 for none."""
    room = model.context_tokens
    return max_new_tokens if room is None else min(max_new_tokens, room - len(prompt))


def sample(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    seeds: Sequence[int],
    eos_ids: Sequence[int],
    max_new_tokens: int,
    temperature: float,
    batch_tokens: int,
    on_rows: Callable[[int], None] = lambda _rows: None,
) -> list[Sample]:
    """A completion of each prompt, in the order of the prompts.

    Args:
        model: Whose distribution is drawn from.
        prompts: Ids, at least one each, shorter than the model's context.
        seeds: One a prompt: the row's noise.
        eos_ids: Ids that end a completion.
        max_new_tokens: Tokens of a completion at most, the end token included.
        temperature: Of the distribution that is drawn from; 0 takes the most probable token each time.
        batch_tokens: Padded tokens, new ones included, of a batch at most.
        on_rows: Called with the number of rows done after each batch.

    Raises:
        UsageError: A temperature below 0 or a limit below 1.
    """
    limits = [new_tokens_limit(model, prompt, max_new_tokens=max_new_tokens) for prompt in prompts]
    lengths = [len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)]
    found: list[Sample | None] = [None] * len(prompts)
    for rows in plan_batches(lengths, batch_tokens=batch_tokens):
        made = sample_batch(
            model,
            [prompts[row] for row in rows],
            seeds=[seeds[row] for row in rows],
            eos_ids=eos_ids,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
        )
        for row, one in zip(rows, made, strict=True):
            found[row] = one
        on_rows(len(rows))
    return [one for one in found if one is not None]


@torch.no_grad()
def sample_batch(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    seeds: Sequence[int],
    eos_ids: Sequence[int],
    max_new_tokens: int,
    temperature: float,
) -> list[Sample]:
    """`sample` for the rows of one batch."""
    _check(temperature, max_new_tokens)
    limits = [new_tokens_limit(model, prompt, max_new_tokens=max_new_tokens) for prompt in prompts]
    tokens, prompt_mask = pad(prompts, pad_id=model.tokenizer.pad_id, side="left", device=model.device)
    batch, prompt_seq = tokens.shape
    steps = max(limits)
    attention_mask = torch.cat((prompt_mask, prompt_mask.new_zeros(batch, steps)), dim=1)
    cache = model.new_cache(batch=batch, capacity=prompt_seq + steps)
    noise = None
    if temperature > 0:
        noise = RowNoise(seeds, vocab_size=model.vocab_size, device=model.device)
    written: list[list[int]] = [[] for _ in prompts]
    failed = [False] * batch
    held = list(range(batch))  # rows in the cache: all that are going, and some that have ended
    going = [limit > 0 for limit in limits]
    new = tokens
    for step in range(steps):
        end = prompt_seq + step
        hidden = model.hidden_states(new, attention_mask[held, :end], cache=cache)[:, -1]
        chosen, broken = _choose(model.logits(hidden), noise, held, going, temperature=temperature)
        for row, token, is_broken in zip(held, chosen, broken, strict=True):
            if not going[row]:
                continue
            failed[row] = is_broken
            if not is_broken:
                written[row].append(token)
            going[row] = not is_broken and token not in eos_ids and len(written[row]) < limits[row]
        if not any(going):
            break
        still = [going[row] for row in held]
        if sum(still) < WORTH_KEEPING * len(held):
            cache.keep(torch.tensor(still, device=model.device))
            held = [row for row in held if going[row]]
        attention_mask[:, end] = torch.tensor(going, device=model.device)
        new = torch.tensor(
            [[written[row][-1] if going[row] else model.tokenizer.pad_id] for row in held],
            device=model.device,
        )
    return [
        Sample(tokens=tuple(ids), truncated=not bad and (not ids or ids[-1] not in eos_ids), failed=bad)
        for ids, bad in zip(written, failed, strict=True)
    ]


def _choose(
    logits: Tensor,
    noise: RowNoise | None,
    held: Sequence[int],
    going: Sequence[bool],
    *,
    temperature: float,
) -> tuple[list[int], list[bool]]:
    """A token for each row held, and whether its logits were no numbers; rows that ended draw nothing."""
    broken = (
        logits.isnan().any(dim=-1) | logits.isneginf().all(dim=-1) | logits.isposinf().any(dim=-1)
    ).tolist()
    if noise is None:
        return choose(logits, None, temperature=temperature).tolist(), broken
    places = [place for place, row in enumerate(held) if going[row]]
    drawn = noise.draw([held[place] for place in places])
    chosen = [0] * len(held)
    picked = choose(logits[places], drawn, temperature=temperature).tolist()
    for place, token in zip(places, picked, strict=True):
        chosen[place] = token
    return chosen, broken


def _check(temperature: float, max_new_tokens: int) -> None:
    if not 0 <= temperature < float("inf"):
        raise UsageError("temperature", str(temperature), expected="0 (greedy) or more")
    if max_new_tokens < 1:
        raise UsageError("max_new_tokens", str(max_new_tokens), expected="at least 1")
