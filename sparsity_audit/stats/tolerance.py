"""The tolerance curve: how many entries moved by at least 2^k, for every k of a fixed range.

Contract: each point lies within what `tolerance_bounds` gives, from one look at each cell instead of forty;
it is narrower where the largest |Δ| of the view, which is known exactly, rules entries out. Counts never fall
along the curve. The difference of two neighbours is the number of entries with 2^k ≤ |Δ| < 2^(k+1), so the
curve is the distribution of |Δ| as well; both are bounds where not exact.

Why at least, and so a tolerance just below 2^k: a cell of a wide dtype spans ULP distances 2^j … 2^(j+1) − 1
at one exponent, so its |Δ| starts at a power of two. The tolerance 2^k itself could decide no such cell.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from sparsity_audit.stats.bounds import delta_range
from sparsity_audit.stats.strata import NAN_PAYLOAD, SPECIAL, ZERO_SIGN
from sparsity_audit.stats.tally import ViewTally
from sparsity_audit.types import Criterion, DType

__all__ = ["TOLERANCE_EXPONENTS", "TolerancePoint", "tolerance_curve"]

TOLERANCE_EXPONENTS = range(-1, -41, -1)
"""The exponents of the curve: from 0.5 down to 9e-13."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TolerancePoint:
    """Entries that moved by at least 2^`exponent`: between `lower` and `upper`.

    Args:
        criterion: The same as a criterion: `atol` of the largest float64 below 2^`exponent`.
        exponent: k of |Δ| ≥ 2^k.
        lower: Smallest count the tally allows.
        upper: Largest count.
        is_exact: Both are the same.
    """

    criterion: str
    exponent: int
    lower: int
    upper: int
    is_exact: bool


def tolerance_curve(view: ViewTally, dtype: DType) -> tuple[TolerancePoint, ...]:
    """The curve from 2^-1 down to 2^-40, without points whose counts equal both neighbours'.

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
    for exponent in TOLERANCE_EXPONENTS:
        criterion = Criterion(kind="atol", parameter=math.nextafter(2.0**exponent, 0))
        lower = special + _count_above(smallest_of, criterion.parameter)
        upper = special
        if ceiling > criterion.parameter:
            upper += _count_above(largest_of, criterion.parameter)
        points.append(
            TolerancePoint(
                criterion=criterion.key, exponent=exponent, lower=lower, upper=upper, is_exact=lower == upper
            )
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
