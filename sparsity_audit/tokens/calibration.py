"""Thresholds and positions that spend a given number of interventions, from completions seen before.

Contract: pure. What is looked at are signals of the models, never whether a completion is right, so a
threshold chosen here is not chosen by its success. Completions are rows; only written positions count. The
numbers met afterwards differ, because an intervention changes what follows: they are always reported beside
those asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sparsity_audit.errors import UsageError

__all__ = ["SPENT_FRAC", "budget_threshold", "random_positions", "share_threshold"]

SPENT_FRAC = 0.95
"""Share of the completions whose budget a calibrated threshold spends."""


def share_threshold(signal: Tensor, written: Tensor, *, share: float) -> float:
    """The threshold above which `share` of the written positions lie, at most.

    Args:
        signal: float[rows, seq] ≥ 0.
        written: bool[rows, seq].
        share: In [0, 1].

    Raises:
        UsageError: The share is none.
    """
    if not 0 <= share <= 1:
        raise UsageError("share", str(share), expected="0 to 1")
    values = signal[written].sort(descending=True).values
    num = int(share * len(values))
    return math.inf if num == 0 else 0.0 if num == len(values) else float(values[num])


def budget_threshold(
    signal: Tensor, written: Tensor, *, budget: int, spent_frac: float = SPENT_FRAC
) -> float:
    """The largest threshold that has `budget` positions above it in `spent_frac` of the completions.

    The online rule is then: take the first `budget` positions above the threshold. It is 0 where so many
    completions have no such positions.

    Args:
        signal: float[rows, seq] ≥ 0.
        written: bool[rows, seq].
        budget: ≥ 1.
        spent_frac: In (0, 1].
    """
    if budget < 1:
        raise UsageError("budget", str(budget), expected="at least 1 token")
    inside = torch.where(written, signal, 0.0)
    if budget > inside.shape[1]:
        return 0.0
    kth = inside.topk(budget, dim=1).values[:, -1].sort(descending=True).values
    least = kth[max(1, math.ceil(spent_frac * len(kth))) - 1]
    return float(torch.nextafter(least, torch.zeros_like(least))) if least > 0 else 0.0


def random_positions(counts: Tensor, lengths: Tensor, *, seeds: Sequence[int]) -> Tensor:
    """bool[rows, seq]: as many positions of each row as were asked for, without replacement.

    Args:
        counts: int64[rows], how many.
        lengths: int64[rows], positions to draw from; a row that has fewer than asked for gets all.
        seeds: One a row.
    """
    found = torch.zeros(len(counts), int(lengths.max()) if len(lengths) else 0, dtype=torch.bool)
    for row, (count, length, seed) in enumerate(zip(counts.tolist(), lengths.tolist(), seeds, strict=True)):
        order = torch.randperm(length, generator=torch.Generator().manual_seed(seed))
        found[row, order[:count]] = True
    return found
