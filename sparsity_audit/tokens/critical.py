"""Which tokens decide the outcome: certainty before them, and what follows when another one stands there.

Contract: a position of a completion is judged by *forced substitution*: the completion is kept up to it, once
with its own token and once with another one, drawn from the model's own distribution without it, and the
model goes on from there. *Certainty* J = 1 − H ÷ ln(vocabulary), in [0, 1]; ΔJ is J less its mean over the
completion. The noise of a continuation belongs to the position, the number of the continuation and the side.

Source: 2502.06533 §4, which looks at errors that happened; here the substitution is made, so that the
effect of a position is not confounded with how hard the prompt is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparsity_audit.models.noise import RowNoise, choose, row_seed
from sparsity_audit.models.protocol import LanguageModel
from sparsity_audit.models.sample import sample
from sparsity_audit.models.score import Resident, Scored, score
from sparsity_audit.tokens.divergence import entropy

__all__ = ["Forced", "Place", "Reading", "certainty", "continuations", "read_positions", "substitutes"]


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Place:
    """A position of a completion.

    Args:
        sequence: Which completion.
        position: Which of its tokens, from 0.
    """

    sequence: int
    position: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What the model says along its completions, by sequence and position.

    Args:
        certainty: J of each position of each sequence.
        kept_probability: Of the token that stands there.
        substitute: A token that may stand there instead; −1 where nothing else can.
    """

    certainty: tuple[np.ndarray, ...]
    kept_probability: tuple[np.ndarray, ...]
    substitute: tuple[np.ndarray, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Forced:
    """A token put at a place, and what the model wrote after it.

    Args:
        place: Where.
        is_kept: Whether it is the completion's own token.
        number: Which continuation.
        tokens: The whole completion: prefix, forced token, continuation.
    """

    place: Place
    is_kept: bool
    number: int
    tokens: tuple[int, ...]


def certainty(logprobs: Tensor) -> Tensor:
    """float64[n]: J = 1 − H ÷ ln(vocab) of log-probabilities [n, vocab]; 1 for a vocabulary of one."""
    if logprobs.shape[-1] == 1:
        return torch.ones_like(logprobs[..., 0])
    return 1 - entropy(logprobs) / math.log(logprobs.shape[-1])


def substitutes(logits: Tensor, kept: Tensor, *, never: Sequence[int], noise: Tensor) -> Tensor:
    """int64[rows]: one token each from softmax(logits) without the one that stands there.

    Args:
        logits: [rows, vocab].
        kept: int64[rows], the tokens that stand there.
        never: Ids that are no substitute either (padding).
        noise: Exp(1), [rows, vocab].

    Returns:
        −1 where nothing else can occur.
    """
    allowed = logits.clone()
    allowed[:, list(never)] = -math.inf
    allowed.scatter_(1, kept[:, None], -math.inf)
    chosen = choose(allowed, noise, temperature=1.0)
    return torch.where(allowed.isneginf().all(dim=1), -1, chosen)


def read_positions(
    model: LanguageModel,
    sequences: Sequence[Scored],
    *,
    seed: int,
    vocab_size: int,
    never: Sequence[int],
    batch_tokens: int,
    chunk_bytes: int,
) -> Reading:
    """Certainty, probability and a substitute at every position, in one pass.

    Args:
        model: The policy.
        sequences: Prompts with completions.
        seed: Of the substitutes, a stream a sequence.
        vocab_size: Ids from 0.
        never: Ids that are never a substitute.
        batch_tokens: As for `models.score`.
        chunk_bytes: As there.
    """
    side = Resident(model)
    found: list[tuple[np.ndarray, ...]] = []
    seeds = [row_seed(seed, "substitute", number) for number in range(len(sequences))]
    noise = RowNoise(seeds, vocab_size=vocab_size, device=model.device)
    for chunk in score(
        side,
        side,
        sequences,
        vocab_size=vocab_size,
        batch_tokens=batch_tokens,
        chunk_bytes=chunk_bytes,
    ):
        drawn = torch.cat([noise.draw([row]) for row in chunk.sequence.tolist()])
        token = chunk.token.to(chunk.base.device)
        kept = chunk.base.gather(1, token[:, None])[:, 0].exp()
        other = substitutes(chunk.base, token, never=never, noise=drawn)
        values = (chunk.sequence, chunk.position, certainty(chunk.base), kept, other)
        found.append(tuple(part.cpu().numpy() for part in values))
    sequence, position, *columns = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.lexsort((position, sequence))
    ends = np.cumsum([len(one.completion) for one in sequences])[:-1]
    js, kept, other = (tuple(np.split(column[order], ends)) for column in columns)
    return Reading(certainty=js, kept_probability=kept, substitute=other)


def continuations(
    model: LanguageModel,
    sequences: Sequence[Scored],
    places: Sequence[Place],
    reading: Reading,
    *,
    num: int,
    seed: int,
    eos_ids: Sequence[int],
    max_new_tokens: int,
    temperature: float,
    batch_tokens: int,
) -> list[Forced]:
    """`num` continuations after the kept token and as many after the substitute, of every place.

    Args:
        model: The policy.
        sequences: Prompts with completions.
        places: Where to force; a place without a substitute gives nothing.
        reading: Of the same sequences.
        num: Continuations of each side.
        seed: Of their noise.
        eos_ids: Ids that end a completion; a forced one ends at once.
        max_new_tokens: Limit of a whole completion.
        temperature: Of the continuations.
        batch_tokens: As for `models.sample`.
    """
    rows: list[tuple[Place, bool, int, tuple[int, ...]]] = []
    for place in places:
        one = sequences[place.sequence]
        prefix, kept = one.completion[: place.position], one.completion[place.position]
        other = int(reading.substitute[place.sequence][place.position])
        if other < 0:
            continue
        for is_kept, token in ((True, kept), (False, other)):
            rows += [(place, is_kept, number, (*prefix, token)) for number in range(num)]
    going = [
        row
        for row, (_, _, _, written) in enumerate(rows)
        if written[-1] not in eos_ids and len(written) < max_new_tokens
    ]
    made = sample(
        model,
        [(*sequences[rows[row][0].sequence].prompt, *rows[row][3]) for row in going],
        seeds=[
            row_seed(seed, "forced", place.sequence, place.position, int(is_kept), number)
            for place, is_kept, number, _ in (rows[row] for row in going)
        ],
        eos_ids=eos_ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        batch_tokens=batch_tokens,
    )
    after = dict(zip(going, (one.tokens for one in made), strict=True))
    return [
        # What lies beyond the limit was drawn for nothing: rows of a batch share its limit.
        Forced(place=place, is_kept=kept, number=n, tokens=(*written, *after.get(row, ()))[:max_new_tokens])
        for row, (place, kept, n, written) in enumerate(rows)
    ]
