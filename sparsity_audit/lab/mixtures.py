"""Mixtures by weight: how often each length, format or task is drawn.

Contract: a mixture is a mapping from a key to a positive weight; weights need not sum to one. An empty
mixture, a weight that is not a positive number and a key nobody knows are errors, never skipped.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import TypeVar

import torch

from sparsity_audit.errors import UsageError

__all__ = ["check_mixture", "draw"]

_Key = TypeVar("_Key", int, str)


def check_mixture(name: str, mixture: Mapping[_Key, float], *, known: Collection[_Key] | None = None) -> None:
    """Refuse a mixture that cannot be drawn from.

    Args:
        name: What is mixed, for the message.
        mixture: Weight by key.
        known: Keys that exist; None where any will do.

    Raises:
        UsageError: It is empty, has a weight that is not positive and finite, or a key that is not known.
    """
    if not mixture:
        raise UsageError(name, "the mixture is empty", expected="at least one part with a positive weight")
    for key, weight in mixture.items():
        if known is not None and key not in known:
            raise UsageError(name, f"{key!r} is not known", expected=f"one of {', '.join(map(str, known))}")
        if not (math.isfinite(weight) and weight > 0):
            raise UsageError(
                name, f"{key!r} has weight {weight}", expected="a positive number", remedy="leave it out"
            )


def draw(mixture: Mapping[_Key, float], num: int, *, generator: torch.Generator) -> list[_Key]:
    """`num` keys, each drawn independently with probability proportional to its weight."""
    keys = list(mixture)
    weights = torch.tensor([mixture[key] for key in keys], dtype=torch.float64)
    return [keys[i] for i in torch.multinomial(weights, num, replacement=True, generator=generator).tolist()]
