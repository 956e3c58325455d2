"""Scores of several policies on the same prompts: means, differences, and the share of a gap, with intervals.

Contract: pure. A score is one number a prompt; NaN where nothing judged it, and a comparison is over the
prompts that all its sides have. Means and differences have percentile bootstrap intervals over prompts, all
from the same resamples. The share of a gap (run − start) ÷ (goal − start) has Fieller's set for paired means:
the ρ that a test of mean(run − start) − ρ · mean(goal − start) = 0 does not reject; where it is not bounded
there is none, with a reason.

Source: Fieller, JRSS B 16 (1954) 175; Efron and Tibshirani 1993, ch. 13. `stats.scores` is the same for runs
that did not answer the same prompts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

__all__ = ["GapShare", "Mean", "gap_share", "mean_interval", "resample"]

_Z = 1.959963984540054
_DRAWS = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Mean:
    """A mean over prompts with its 95 % interval.

    Args:
        value: The mean; None without prompts.
        low: Lower end; None below two prompts.
        high: Upper end.
        num_prompts: Prompts with a score.
    """

    value: float | None
    low: float | None
    high: float | None
    num_prompts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GapShare:
    """(run − start) ÷ (goal − start).

    Args:
        value: None where goal and start are equal.
        low: Lower end of Fieller's 95 % set; None where it is not bounded.
        high: Upper end.
        reason: Why something is missing; None when nothing is.
    """

    value: float | None
    low: float | None
    high: float | None
    reason: str | None


def resample(num_prompts: int, *, draws: int, seed: int) -> np.ndarray:
    """int64[draws, prompts]: how often each prompt is in each resample."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(num_prompts, np.full(num_prompts, 1 / num_prompts), size=draws)


def mean_interval(scores: np.ndarray, *, seed: int, draws: int = _DRAWS) -> Mean:
    """The mean of one score a prompt (or of a difference), percentile bootstrap.

    Args:
        scores: float64[prompts], NaN where there is none.
        seed: Of the resamples; the same for every score of a comparison.
        draws: Resamples.
    """
    known = scores[~np.isnan(scores)]
    num = len(known)
    if num == 0:
        return Mean(value=None, low=None, high=None, num_prompts=0)
    value = math.fsum(known) / num
    if num == 1:
        return Mean(value=value, low=None, high=None, num_prompts=1)
    times = resample(num, draws=draws, seed=seed)
    low, high = np.quantile(times @ known / num, [0.025, 0.975]).tolist()
    return Mean(value=value, low=low, high=high, num_prompts=num)


def gap_share(start: np.ndarray, goal: np.ndarray, run: np.ndarray) -> GapShare:
    """The share of the gap from `start` to `goal` that `run` has; float64[prompts] each, NaN for none."""
    known = ~(np.isnan(start) | np.isnan(goal) | np.isnan(run))
    num = int(known.sum())
    if num < 2:
        reason = f"{num} prompts: an interval is taken over prompts"
        return GapShare(value=None, low=None, high=None, reason=reason)
    gain, gap = run[known] - start[known], goal[known] - start[known]
    x, y = math.fsum(gain) / num, math.fsum(gap) / num
    (var_x, cov), (_, var_y) = (np.cov(gain, gap) / num).tolist()
    value = x / y + 0.0 if y else None  # + 0.0: no −0
    # (x − ρy)² ≤ z²(var_x − 2ρ cov + ρ² var_y), as aρ² − 2hρ + c ≤ 0.
    a, h, c = y * y - _Z**2 * var_y, x * y - _Z**2 * cov, x * x - _Z**2 * var_x
    if value is None or a <= 0:
        reason = "the gap cannot be told from 0 with so few prompts"
        return GapShare(value=value, low=None, high=None, reason=reason)
    root = math.sqrt(max(h * h - a * c, 0.0))
    return GapShare(value=value, low=(h - root) / a + 0.0, high=(h + root) / a + 0.0, reason=None)
