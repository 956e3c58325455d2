"""Noise that belongs to a row, and the choice it makes.

Contract: a row's noise is a function of its seed and its step alone: not of the batch it is in, nor of when
other rows end. Two models given the same noise are coupled: where their distributions agree they choose
alike. Nothing touches torch's global random state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["RowNoise", "choose", "row_seed"]


def row_seed(seed: int, *purpose: str | int) -> int:
    """The seed of one row: the same seed and purpose give the same number below 2⁶³.

    Args:
        seed: The run's seed.
        purpose: What it is for, and which row: ("base", prompt, sample).
    """
    digest = hashlib.sha256("/".join(map(str, (seed, *purpose))).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class RowNoise:
    """Exp(1) noise over the vocabulary, a stream a row.

    Args:
        seeds: One a row.
        vocab_size: Numbers of a step.
        device: Where they are drawn; another kind of device draws other numbers.
    """

    def __init__(self, seeds: Sequence[int], *, vocab_size: int, device: torch.device) -> None:
        self._streams = [torch.Generator(device=device).manual_seed(seed) for seed in seeds]
        self._vocab_size, self._device = vocab_size, device

    def draw(self, rows: Sequence[int]) -> Tensor:
        """float32[len(rows), vocab], > 0: the next step of these rows; the streams of others stand still."""
        noise = torch.empty(len(rows), self._vocab_size, device=self._device)
        for place, row in zip(noise, rows, strict=True):
            place.exponential_(generator=self._streams[row])
        return noise.clamp_(min=torch.finfo(noise.dtype).tiny)


def choose(logits: Tensor, noise: Tensor | None, *, temperature: float) -> Tensor:
    """One token a row: int64[batch] from logits [batch, vocab].

    Exponential race: with E_i ~ Exp(1), argmax p_i / E_i has the distribution p = softmax(logits /
    temperature), and so has argmax (logits_i / temperature − log E_i).

    Args:
        logits: A token of logit −inf is never chosen.
        noise: From `RowNoise.draw`; None takes the most probable token, the first of equals.
        temperature: > 0; without noise it changes nothing.
    """
    if noise is None:
        return logits.argmax(dim=-1)
    return (logits / temperature - noise.log()).argmax(dim=-1)
