"""How much of an update mask lies in masks made from the base: principal and low-magnitude entries.

Contract: counts in proportion where entries tie at the cut; expectations are exact, of a mask drawn uniformly
and of one drawn within exponents of |W₀|. The second is there because large weights are principal more often
and bf16 hides small steps of large weights.

Source: the two masks are those of 2511.08567; the null within magnitudes is ours.
"""

from __future__ import annotations

import math

import numpy as np

from sparsity_audit.stats.spectral_records import MaskOverlap, Target, ratio

__all__ = ["ALPHAS", "base_overlaps"]

ALPHAS = (0.05, 0.1, 0.2, 0.5)
_LEAST_EXPONENT = -1073
"""Of the smallest float64, as frexp gives it."""


def base_overlaps(base: np.ndarray, low_rank: np.ndarray, mask: np.ndarray) -> tuple[MaskOverlap, ...]:
    """Overlap of an update mask with both targets for each α; none for an empty mask or a base of zeros.

    Args:
        base: W₀, float64[rows, cols].
        low_rank: Its approximation of rank k.
        mask: bool, the same shape.
    """
    if not mask.any() or not base.any():
        return ()
    groups, updated = _magnitude_groups(base), mask.reshape(-1)
    found = []
    targets: tuple[Target, ...] = ("principal", "low-magnitude")
    for target in targets:
        scores = np.abs(low_rank if target == "principal" else base)
        if target == "low-magnitude":
            np.negative(scores, out=scores)
        ordered = np.sort(scores, axis=None)
        for alpha in (*ALPHAS, np.count_nonzero(mask) / mask.size):
            wanted = round(alpha * mask.size)
            weights, ties = _selected(scores.reshape(-1), ordered, wanted)
            share, by_magnitude = _share(weights, updated, None), _share(weights, updated, groups)
            found.append(
                MaskOverlap(
                    target=target,
                    alpha=ratio(alpha),
                    entries=wanted,
                    ties_at_cut=ties,
                    share=ratio(float(weights[updated].sum()) / np.count_nonzero(updated)),
                    chance=share[0],
                    chance_sd=share[1],
                    magnitude_share=by_magnitude[0],
                    magnitude_sd=by_magnitude[1],
                )
            )
    return tuple(found)


def _magnitude_groups(base: np.ndarray) -> np.ndarray:
    """Number of each entry's group: exponent of |W₀|, powers of two and zero apart, as in `stats.strata`."""
    fraction, exponent = np.frexp(base.reshape(-1))
    number = 2 * (exponent - _LEAST_EXPONENT) + (np.abs(fraction) == 0.5) + 1
    number[fraction == 0] = 0
    return number


def _selected(scores: np.ndarray, ordered: np.ndarray, wanted: int) -> tuple[np.ndarray, int]:
    """Weight of each entry among the `wanted` of largest score: 1, 0, or a share at the cut; and the ties."""
    if wanted == 0:
        return np.zeros(len(scores)), 0
    cut = ordered[len(ordered) - wanted]
    first, last = np.searchsorted(ordered, cut, side="left"), np.searchsorted(ordered, cut, side="right")
    ties, above = int(last - first), len(ordered) - int(last)
    return np.where(scores > cut, 1.0, np.where(scores == cut, (wanted - above) / ties, 0.0)), ties


def _share(weights: np.ndarray, updated: np.ndarray, groups: np.ndarray | None) -> tuple[float, float]:
    """Expected share of the update inside, and its sd, when it is drawn at random within each group."""
    if groups is None:
        groups = np.zeros(len(weights), dtype=np.int64)
    size = np.bincount(groups).astype(np.float64)
    is_met = size > 0
    changed, selected = (np.bincount(groups, weights=w)[is_met] for w in (updated, weights))
    size = size[is_met]
    variance = changed * selected * (size - changed) * (size - selected) / (size**2 * np.maximum(size - 1, 1))
    total = changed.sum()
    # Weights at the cut are shares whose sum may miss a whole group by rounding.
    deviation = math.sqrt(max(float(variance.sum()), 0.0))
    return ratio(float((changed * selected / size).sum() / total)), ratio(deviation / total)
