"""Intervals over prompts of ratios of sums over positions.

Contract: pure, deterministic given the seed. Positions of a prompt are not independent, so prompts are what
is resampled, with all their positions; an interval is the middle 95 % of the resampled ratios. One prompt
says nothing of how prompts differ: no interval.

Source: cluster bootstrap, percentile intervals; Efron and Tibshirani 1993, ch. 8 and 13.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["RatioEstimate", "concentration_interval", "ratio_estimates"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RatioEstimate:
    """A ratio of sums with its 95 % interval over prompts.

    Args:
        value: Over all positions; None where the denominator is 0.
        low: Lower end; None below two prompts.
        high: Upper end.
    """

    value: float | None
    low: float | None
    high: float | None


def ratio_estimates(
    numerators: np.ndarray, denominators: np.ndarray, times: np.ndarray
) -> list[RatioEstimate]:
    """One estimate a figure.

    Args:
        numerators: float64[prompts, figures]: sums over each prompt's positions.
        denominators: float64[prompts, figures].
        times: From `stats.paired.resample`.
    """
    found = []
    for above, below in zip(numerators.T, denominators.T, strict=True):
        value = float(above.sum() / below.sum()) if below.sum() > 0 else None
        drawn = times @ np.stack([above, below], axis=1)
        ratios = drawn[drawn[:, 1] > 0]
        low = high = None
        if value is not None and len(above) > 1 and len(ratios):
            low, high = np.quantile(ratios[:, 0] / ratios[:, 1], [0.025, 0.975]).tolist()
        found.append(RatioEstimate(value=value, low=low, high=high))
    return found


def concentration_interval(
    values: np.ndarray, prompts: np.ndarray, times: np.ndarray, *, top_frac: float
) -> RatioEstimate:
    """Share of a sum that its largest terms hold, with its interval.

    Args:
        values: float64[positions], ≥ 0.
        prompts: int64[positions]: the prompt of each.
        times: From `resample`.
        top_frac: Share of positions that count as the largest, in (0, 1].
    """
    order = np.argsort(-values, kind="stable")
    ordered, owners = values[order], prompts[order]
    value = _held(ordered, np.ones(len(ordered)), top_frac)
    if times.shape[1] < 2 or value is None:
        return RatioEstimate(value=value, low=None, high=None)
    drawn = [_held(ordered, row[owners].astype(np.float64), top_frac) for row in times]
    defined = [share for share in drawn if share is not None]
    low, high = np.quantile(defined, [0.025, 0.975]).tolist()
    return RatioEstimate(value=value, low=low, high=high)


def _held(ordered: np.ndarray, weights: np.ndarray, top_frac: float) -> float | None:
    """Share of Σ weight · value in the first `top_frac` of the weights; the cut divides a term."""
    total = float((ordered * weights).sum())
    if total <= 0:
        return None
    room = np.clip(top_frac * weights.sum() - (np.cumsum(weights) - weights), 0.0, weights)
    return float((ordered * room).sum()) / total
