"""Chance levels of an overlap: expected intersection, its variance, and what follows from them.

Contract: pure. Counts are exact integers; an expectation is `math.fsum` over strata, which rounds once, so
that neither order nor grouping of strata matters. A figure that is not defined is None, never NaN:

| case | what is None |
|---|---|
| both masks empty | Jaccard, observed and under every null |
| one mask empty | its one-sided overlap; excess share, z |
| a full mask | excess share, z: the intersection is fixed |
| J₀ = 0 or J₀ > ½ | lift (its ceiling is 1/J₀) |
| variance 0 or not known | z |
| no discordant stratum | odds ratio |

Given the margins of a stratum, n entries of which a and b changed, the intersection of independent masks is
hypergeometric: mean ab/n, variance ab(n − a)(n − b)/(n²(n − 1)), 0 where n ≤ 1. Strata are independent.

Source: uniform chance, 2505.11711 App. E. Odds ratio over strata: Mantel and Haenszel, J. Natl. Cancer
Inst. 22 (1959) 719. The excess share is ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

__all__ = [
    "MAX_LIFT_CHANCE",
    "Expectation",
    "NullOverlap",
    "hypergeometric",
    "jaccard_of",
    "mantel_haenszel",
    "null_overlap",
    "share_of",
]

MAX_LIFT_CHANCE = 0.5
"""Above this chance level no lift is given: its ceiling, 1/J₀, is below 2."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectation:
    """Mean and variance of the intersection under a null; they add over independent parts.

    Args:
        mean: Expected number of entries in both masks.
        variance: Its variance; None where the null gives none.
    """

    mean: float
    variance: float | None

    @classmethod
    def total(cls, parts: list[Expectation]) -> Expectation:
        """The sum over independent parts; without a variance as soon as one part has none."""
        variances = [part.variance for part in parts]
        return cls(
            mean=math.fsum(part.mean for part in parts),
            variance=None if None in variances else math.fsum(v for v in variances if v is not None),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class NullOverlap:
    """A pair of masks against one null.

    Args:
        null: The null's name.
        expected: Expected intersection I₀.
        variance: Variance of the intersection; None where the null gives none.
        jaccard: J₀ = I₀/(|A| + |B| − I₀).
        o1: I₀/|A|.
        o2: I₀/|B|.
        excess_share: (I − I₀)/(min(|A|, |B|) − I₀): 0 at chance, 1 when one mask holds the other.
        lift: J/J₀; None where J₀ > .5.
        z: (I − I₀)/√variance.
        odds_ratio: Mantel–Haenszel odds ratio over the null's strata; None for nulls without strata.
    """

    null: str
    expected: float
    variance: float | None
    jaccard: float | None
    o1: float | None
    o2: float | None
    excess_share: float | None
    lift: float | None
    z: float | None
    odds_ratio: float | None


def hypergeometric(entries: np.ndarray, a: np.ndarray, b: np.ndarray) -> Expectation:
    """The intersection of two masks that are independent within each stratum.

    Args:
        entries: Entries per stratum, int64[S]; 0 is allowed.
        a: Changed in the first mask, int64[S].
        b: Changed in the second, int64[S].
    """
    n = np.maximum(entries, 1).astype(np.float64)
    low, high = np.minimum(a, b).astype(np.float64), np.maximum(a, b).astype(np.float64)
    # The larger one is divided first: a full stratum then gives the smaller count exactly.
    mean = low * (high / n)
    variance = mean * ((n - low) / n) * ((n - high) / np.maximum(n - 1, 1))
    return Expectation(mean=math.fsum(mean.tolist()), variance=math.fsum(variance.tolist()))


def mantel_haenszel(entries: np.ndarray, a: np.ndarray, b: np.ndarray, both: np.ndarray) -> float | None:
    """Σ both·neither/n ÷ Σ (only a)(only b)/n; one stratum gives the plain odds ratio.

    None where no stratum has an entry in the first mask alone and one in the second alone: the ratio is
    infinite there, or 0/0.
    """
    n = np.maximum(entries, 1).astype(np.float64)
    neither = (entries - a - b + both).astype(np.float64)
    agree = math.fsum((both.astype(np.float64) * (neither / n)).tolist())
    apart = math.fsum(((a - both).astype(np.float64) * ((b - both).astype(np.float64) / n)).tolist())
    return agree / apart if apart > 0 else None


def share_of(part: float, whole: float) -> float | None:
    """Quotient part ÷ whole; None where the whole is 0."""
    return part / whole if whole > 0 else None


def jaccard_of(intersection: float, a: int, b: int) -> float | None:
    """I/(|A| + |B| − I); None for two empty masks."""
    return share_of(intersection, a + b - intersection)


def null_overlap(
    null: str, *, a: int, b: int, both: int, expectation: Expectation, odds_ratio: float | None = None
) -> NullOverlap:
    """A pair of masks against one null.

    Args:
        null: The null's name.
        a: |A|.
        b: |B|.
        both: |A∩B|.
        expectation: Of the intersection under the null.
        odds_ratio: Over the null's strata, if it has them.
    """
    expected, variance = expectation.mean, expectation.variance
    chance, observed = jaccard_of(expected, a, b), jaccard_of(both, a, b)
    lift = None
    if chance is not None and observed is not None and 0 < chance <= MAX_LIFT_CHANCE:
        lift = observed / chance
    return NullOverlap(
        null=null,
        expected=expected,
        variance=variance,
        jaccard=chance,
        o1=share_of(expected, a),
        o2=share_of(expected, b),
        excess_share=share_of(both - expected, min(a, b) - expected),
        lift=lift,
        z=(both - expected) / math.sqrt(variance) if variance else None,
        odds_ratio=odds_ratio,
    )
