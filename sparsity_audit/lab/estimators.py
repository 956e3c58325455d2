"""Accuracy from n samples a prompt: pass@k and maj@k without bias, and how far a figure can be trusted.

Contract: pure functions of counts. pass@k and maj@k are the exact expectations over all subsets of k of the n
samples, so they have no bias and no noise of their own. An interval treats prompts as the units that vary:
samples of one prompt are not independent.

Source: pass@k from Chen et al. 2021 (2107.03374, eq. 1). maj@k is the same idea for the majority vote, by
counting instead of by drawing subsets. Wilson 1927 for the interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import comb

from sparsity_audit.errors import UsageError

__all__ = ["Estimate", "Interval", "estimate", "interval", "majority_at_k", "pass_at_k"]

_Z = 1.959964
"""97.5 % quantile of the normal distribution."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean over prompts with its uncertainty.

    Args:
        value: The mean, in [0, 1].
        standard_error: Of the mean, over prompts; None for a single prompt.
        low: Lower end of the 95 % Wilson interval.
        high: Upper end.
        num_prompts: Prompts it is taken over.
    """

    value: float
    standard_error: float | None
    low: float
    high: float
    num_prompts: int


def estimate(per_prompt: Sequence[float]) -> Estimate:
    """The mean of one figure a prompt, each in [0, 1].

    The Wilson interval is taken at the effective number of trials p(1 − p) / s.e.², which is the number of
    prompts for one sample each and more for several; where all prompts agree it is the number of prompts.

    Args:
        per_prompt: The share of right samples of each prompt, or its pass@k; at least one.
    """
    num = len(per_prompt)
    value = math.fsum(per_prompt) / num
    error = None
    trials = float(num)
    if num > 1:
        error = math.sqrt(math.fsum((x - value) ** 2 for x in per_prompt) / (num - 1) / num)
        if error > 0:
            trials = max(trials, value * (1 - value) / error**2)
    low, high = _wilson(value, trials)
    return Estimate(value=value, standard_error=error, low=low, high=high, num_prompts=num)


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean over prompts of a figure that may be negative, with its 95 % interval.

    Args:
        value: The mean.
        low: Lower end.
        high: Upper end.
        num_prompts: Prompts it is taken over.
    """

    value: float
    low: float
    high: float
    num_prompts: int


def interval(per_prompt: Sequence[float]) -> Interval:
    """The mean ± 1.96 standard errors over prompts: for differences, which no Wilson interval fits.

    Args:
        per_prompt: One figure a prompt; at least two, for one says nothing of its spread.

    Raises:
        UsageError: Fewer than two prompts.
    """
    num = len(per_prompt)
    if num < 2:
        raise UsageError("prompts", str(num), expected="at least 2: an interval is taken over prompts")
    value = math.fsum(per_prompt) / num
    half = _Z * math.sqrt(math.fsum((x - value) ** 2 for x in per_prompt) / (num - 1) / num)
    return Interval(value=value, low=value - half, high=value + half, num_prompts=num)


def _wilson(share: float, trials: float) -> tuple[float, float]:
    shrink = 1 + _Z**2 / trials
    centre = (share + _Z**2 / (2 * trials)) / shrink
    half = _Z / shrink * math.sqrt(share * (1 - share) / trials + _Z**2 / (4 * trials**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def pass_at_k(num_right: int, *, num_samples: int, k: int) -> float:
    """The chance that k of the samples, drawn without replacement, hold a right one: 1 − C(n−c, k) / C(n, k).

    Raises:
        UsageError: k is not between 1 and the number of samples.
    """
    _check_k(k, num_samples)
    return 1 - comb(num_samples - num_right, k) / comb(num_samples, k)


def majority_at_k(num_right: int, others: Sequence[int], *, num_abstained: int, k: int) -> float:
    """The chance that the right answer wins the vote of k of the samples, drawn without replacement.

    Each sample with an answer votes for it; a sample without one abstains. Ties are broken uniformly among
    the leading answers; where all k abstain nothing wins.

    Args:
        num_right: Samples with the right answer.
        others: How many samples gave each wrong answer.
        num_abstained: Samples without an answer.
        k: Size of the vote.

    Raises:
        UsageError: k is not between 1 and the number of samples.
    """
    _check_k(k, num_right + sum(others) + num_abstained)
    return _majority(num_right, tuple(sorted(others)), num_abstained, k)


@lru_cache(maxsize=4096)
def _majority(num_right: int, others: tuple[int, ...], num_abstained: int, k: int) -> float:
    total = comb(num_right + sum(others) + num_abstained, k)
    won = 0.0
    for votes in range(1, min(num_right, k) + 1):
        # ways[t][d]: how the wrong answers can hold d of the drawn samples, t of them with exactly `votes`
        # and none with more.
        ways = [[1] + [0] * (k - votes)]
        for count in others:
            ways = _with_answer(ways, count, votes)
        for ties, drawn in enumerate(ways):
            subsets = sum(n * comb(num_abstained, k - votes - d) for d, n in enumerate(drawn))
            won += comb(num_right, votes) * subsets / total / (ties + 1)
    return won


def _with_answer(ways: list[list[int]], count: int, votes: int) -> list[list[int]]:
    """The table once another wrong answer, given by `count` samples, takes part."""
    room = len(ways[0])
    table = [[0] * room for _ in range(len(ways) + 1)]
    for ties, drawn in enumerate(ways):
        for before, number in enumerate(drawn):
            if not number:
                continue
            for more in range(min(count, votes, room - 1 - before) + 1):
                table[ties + (more == votes)][before + more] += number * comb(count, more)
    return table if any(table[-1]) else table[:-1]


def _check_k(k: int, num_samples: int) -> None:
    if not 1 <= k <= num_samples:
        raise UsageError("k", str(k), expected=f"1 to {num_samples}, the samples of a prompt")
