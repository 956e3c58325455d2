"""The tolerance curve: how many entries are changed under `atol:2^-k`, for every k of a fixed range.

Contract: each point lies within what `tolerance_bounds` gives, from one look at each cell instead of forty;
it is narrower where the largest |Δ| of the view, which is known exactly, rules entries out. Counts never fall
along the curve. The difference of two neighbours is the number of entries with 2^-(k+1) < |Δ| ≤ 2^-k, so the
curve is the distribution of |Δ| as well; both are bounds where not exact.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from sparsity_audit.stats.bounds import delta_range, tolerance_bounds
from sparsity_audit.stats.strata import NAN_PAYLOAD, SPECIAL, ZERO_SIGN
from sparsity_audit.stats.tally import ViewTally
from sparsity_audit.types import Criterion, DType

__all__ = ["TOLERANCE_POWERS", "TolerancePoint", "tolerance_curve"]

TOLERANCE_POWERS = range(1, 41)
"""The powers k of the curve: from 0.5 down to 9e-13, below every bf16 step that RL has been seen to make."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TolerancePoint:
    """Entries changed under one absolute tolerance: between `lower` and `upper`.

    Args:
        criterion: `atol:2^-k`, spelled as criteria are.
        lower: Smallest count the tally allows.
        upper: Largest count.
        is_exact: Both are the same.
    """

    criterion: str
    lower: int
    upper: int
    is_exact: bool

    @property
    def tolerance(self) -> float:
        """The tolerance as a number."""
        return Criterion.parse(self.criterion).parameter


def tolerance_curve(view: ViewTally, dtype: DType) -> tuple[TolerancePoint, ...]:
    """The curve from 0.5 down to 2^-40, without points whose counts equal both neighbours'.

    Args:
        view: A tally of level `full`, of a float dtype.
        dtype: The dtype of that view's codes.
    """
    largest_of: Counter[float] = Counter()
    smallest_of: Counter[float] = Counter()
    special = 0
    for (stratum, column), count in view.cells.items():
        if column == SPECIAL:
            special += count
        elif column not in (ZERO_SIGN, NAN_PAYLOAD):
            smallest, largest = delta_range(stratum, column, dtype)
            smallest_of[smallest] += count
            largest_of[largest] += count
    # Differences of finite numbers can overflow (float64 alone), and are not in `max_abs` then.
    ceiling = view.max_abs if view.nonfinite_deltas <= special else math.inf
    points = []
    for power in TOLERANCE_POWERS:
        criterion = Criterion(kind="atol", parameter=2.0**-power)
        if criterion.key in view.changed:
            bounds = tolerance_bounds(view, dtype, criterion)
            lower, upper = bounds.lower, bounds.upper
        else:
            lower = special + _count_above(smallest_of, criterion.parameter)
            upper = special
            if ceiling > criterion.parameter:
                upper += _count_above(largest_of, criterion.parameter)
        points.append(
            TolerancePoint(criterion=criterion.key, lower=lower, upper=upper, is_exact=lower == upper)
        )
    return tuple(
        point
        for number, point in enumerate(points)
        if not 0 < number < len(points) - 1
        or not _same(points[number - 1], point)
        or not _same(point, points[number + 1])
    )


def _count_above(counts: Counter[float], limit: float) -> int:
    return sum(count for value, count in counts.items() if value > limit)


def _same(a: TolerancePoint, b: TolerancePoint) -> bool:
    return (a.lower, a.upper) == (b.lower, b.upper)
