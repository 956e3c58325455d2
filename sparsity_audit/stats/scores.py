"""Accuracies with their uncertainty, and which share of a gain a run recovers.

Contract: pure. An accuracy is a share of independent trials; its interval is Wilson's. The recovered share is
(run − base) ÷ (full − base), with Fieller's confidence set: the ρ that the test of run − (1 − ρ)·base −
ρ·full = 0 does not reject. Variances are those of accuracies with 2/3 of a success and 2/3 of a failure
added, so that none is 0 at an accuracy of 0 or 1. Runs are taken as independent: where all of them answered
the same prompts, intervals of differences and shares are rather too wide. What is not defined, or has no
bounded interval, is None with a reason.

Source: Wilson, JASA 22 (1927) 209. Newcombe, Stat. Med. 17 (1998) 873, method 10. Fieller, JRSS B 16 (1954)
175. Price and Bonett, Comput. Stat. Data Anal. 45 (2004) 449, for linear functions of proportions: 2/m added
to both counts, m = 3 here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sparsity_audit.errors import UsageError

__all__ = [
    "Accuracy",
    "Interval",
    "RecoveredShare",
    "difference_interval",
    "recovered_share",
    "wilson_interval",
]

_Z = 1.959963984540054
_ADDED = 2 / 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A 95 % interval."""

    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """Share of right answers.

    Args:
        value: In [0, 1].
        trials: Independent trials behind it, > 0; where a standard error was given, as many as it stands for.
    """

    value: float
    trials: float

    @classmethod
    def from_standard_error(cls, value: float, standard_error: float, *, trials: float) -> Accuracy:
        """An accuracy whose trials are not independent: several samples of one prompt, for instance.

        Args:
            value: In [0, 1].
            standard_error: Of `value`, clustered by prompt, say; ≥ 0.
            trials: What to take where the accuracy is 0 or 1, and its standard error says nothing.
        """
        if not 0 < value < 1 or standard_error == 0:
            return cls(value=value, trials=trials)
        return cls(value=value, trials=value * (1 - value) / standard_error**2)

    def __post_init__(self) -> None:
        if not (0 <= self.value <= 1 and 0 < self.trials < math.inf):
            raise UsageError(
                "accuracy",
                f"{self.value} of {self.trials} trials",
                expected="a share in [0, 1] of a positive number of trials",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveredShare:
    """Which share of the full run's gain a run has.

    Args:
        value: (run − base) ÷ (full − base); None where full and base are equal.
        interval: Fieller's; None where it is not bounded.
        reason: Why there is no value or no interval; None when there are both.
    """

    value: float | None
    interval: Interval | None
    reason: str | None


def wilson_interval(accuracy: Accuracy) -> Interval:
    """Wilson's score interval of an accuracy."""
    p, n = accuracy.value, accuracy.trials
    scale = 1 + _Z**2 / n
    centre = (p + _Z**2 / (2 * n)) / scale
    reach = _Z * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2)) / scale
    return Interval(low=max(0.0, centre - reach), high=min(1.0, centre + reach))


def difference_interval(a: Accuracy, b: Accuracy) -> Interval:
    """Interval of a − b, from the two Wilson intervals (Newcombe's method 10)."""
    of_a, of_b = wilson_interval(a), wilson_interval(b)
    gap = a.value - b.value
    low = math.hypot(a.value - of_a.low, of_b.high - b.value)
    high = math.hypot(of_a.high - a.value, b.value - of_b.low)
    return Interval(low=max(gap - low, -1.0), high=min(gap + high, 1.0))


def recovered_share(base: Accuracy, full: Accuracy, run: Accuracy) -> RecoveredShare:
    """The share of the gain from base to full that `run` has, with Fieller's 95 % set."""
    gain = full.value - base.value
    value = (run.value - base.value) / gain if gain else None
    (b, var_b), (f, var_f), (s, var_s) = (_adjusted(a) for a in (base, full, run))
    # (s − b − ρ(f − b))² ≤ z²(var_s + (1 − ρ)² var_b + ρ² var_f), as aρ² − 2hρ + c ≤ 0.
    a = (f - b) ** 2 - _Z**2 * (var_b + var_f)
    h = (f - b) * (s - b) - _Z**2 * var_b
    c = (s - b) ** 2 - _Z**2 * (var_s + var_b)
    if value is None or a <= 0:
        reason = "the full run's gain cannot be told from 0 with so few trials"
        return RecoveredShare(value=value, interval=None, reason=reason)
    root = math.sqrt(max(h * h - a * c, 0.0))
    return RecoveredShare(
        value=value, interval=Interval(low=(h - root) / a, high=(h + root) / a), reason=None
    )


def _adjusted(accuracy: Accuracy) -> tuple[float, float]:
    """Mean and variance after `_ADDED` successes and as many failures."""
    trials = accuracy.trials + 2 * _ADDED
    p = (accuracy.value * accuracy.trials + _ADDED) / trials
    return p, p * (1 - p) / trials
