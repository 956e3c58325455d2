"""What rounding alone predicts: the half-ULP law, and a displacement fitted to the change rates.

Contract: both read the strata of the base (and cells) of one view and its dtype; neither looks at
weights. Infinity and NaN are left out of denominators. Standard library only, deterministic.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sparsity_audit.stats.grid import Stratum, describe
from sparsity_audit.stats.strata import NAN_PAYLOAD, SPECIAL, ZERO_SIGN
from sparsity_audit.stats.tally import ViewTally
from sparsity_audit.types import DType

__all__ = ["DisplacementFit", "HalfUlpPrediction", "fit_displacement", "half_ulp_interval"]

_LOWEST_LOG_SIGMA = -1060
"""Below it σ√2 would underflow (fp64 subnormals only)."""

_MIN_ROW_ENTRIES = 100
"""Strata below this many entries do not count towards the largest residual: their rates are noise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HalfUlpPrediction:
    """Share of entries that a step of size lr cannot move, P(½ ULP(w) > lr), as an interval.

    Args:
        lr: The learning rate asked about.
        lower: Share frozen at 2·lr, with the half gap *below* for powers of two.
        at_lr: Share frozen at lr, with the half gap above: the law as published.
        upper: Share frozen at lr/2, with the half gap above.
        entries: Entries with a finite base value.
        reason: Why there is no prediction; None when there is one.
    """

    lr: float
    lower: float | None
    at_lr: float | None
    upper: float | None
    entries: int
    reason: str | None


def half_ulp_interval(view: ViewTally, dtype: DType, *, lr: float, weights_dtype: DType) -> HalfUlpPrediction:
    """The half-ULP law for weights stored in bf16 and rounded after every Adam step.

    The law is a step function of lr, constant over each octave, and an Adam step is lr only up to a
    factor; so the interval reaches one octave to each side.

    Args:
        view: A view of level `full`; only its strata are read.
        dtype: The view's dtype.
        lr: Learning rate, > 0.
        weights_dtype: What the trainer stored the weights in *during* training.

    Source: 2602.03839; 2511.08567 Cor. 3.6. Deviation: powers of two have half the gap below, which the
    lower end takes into account. The law does not hold for wide master weights that are cast at the end.
    """
    counts = [
        (place, count)
        for stratum, count in sorted(view.strata.items())
        if (place := describe(stratum, dtype)).last >= place.first
    ]
    total = sum(count for _, count in counts)
    reason = _no_law_reason(dtype=dtype, weights_dtype=weights_dtype, total=total)
    if reason is not None:
        return HalfUlpPrediction(lr=lr, lower=None, at_lr=None, upper=None, entries=total, reason=reason)

    def frozen(step: float, *, inward: bool) -> float:
        gaps = ((p.gap_in if inward else p.gap_out, count) for p, count in counts)
        return sum(count for gap, count in gaps if gap > 2 * step) / total

    return HalfUlpPrediction(
        lr=lr,
        lower=frozen(2 * lr, inward=True),
        at_lr=frozen(lr, inward=False),
        upper=frozen(lr / 2, inward=False),
        entries=total,
        reason=None,
    )


def _no_law_reason(*, dtype: DType, weights_dtype: DType, total: int) -> str | None:
    if weights_dtype is not DType.BF16:
        return (
            f"the half-ULP law holds for weights stored in bf16 and rounded after every step, "
            f"not for {weights_dtype.label} weights that are cast at the end"
        )
    if dtype is not DType.BF16:
        return f"the base is stored in {dtype.label}, so it was not trained in bf16"
    return None if total else "there are no finite base values"


@dataclass(frozen=True, slots=True, kw_only=True)
class DisplacementFit:
    """A latent displacement N(0, σ²), rounded once onto the grid, fitted to the change rates.

    Args:
        sigma: Maximum-likelihood σ, in units of the weights; None where undefined.
        entries: Entries used: non-zero finite bases.
        changed: Those changed under `value`, special changes left out.
        deviance: Binomial deviance of the fit over strata; lower is better.
        pseudo_r2: 1 − deviance ÷ deviance of one rate for all strata; None when one rate is exact,
            below 0 when exponents explain less than nothing.
        max_residual: Largest |observed − fitted| rate over strata of at least 100 entries.
        reason: Why σ is undefined; None when it is defined.
    """

    sigma: float | None
    entries: int
    changed: int
    deviance: float | None
    pseudo_r2: float | None
    max_residual: float | None
    reason: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    place: Stratum
    entries: int
    changed: int


def fit_displacement(view: ViewTally, dtype: DType) -> DisplacementFit:
    """Fit σ so that an entry changes when |N(0, σ²)| passes half the gap to its neighbour.

    For bases on the grid of `dtype`, as in a native view; P = erfc(½ULP/(σ√2)), and for a power of two
    the mean of that and the same with half the gap. Zeros are left out: padding that was never trained
    would look like infinite stiffness. The likelihood is scanned by octaves over all gaps in the tally,
    then refined by golden section to 1e-5 relative.
    """
    rows = _rows(view, dtype)
    entries, changed = sum(r.entries for r in rows), sum(r.changed for r in rows)
    reason = None
    if not rows:
        reason = "there are no non-zero finite base values"
    elif changed == 0:
        reason = "no entry changed"
    elif changed == entries:
        reason = "every entry changed"
    if reason is not None:
        return DisplacementFit(
            sigma=None,
            entries=entries,
            changed=changed,
            deviance=None,
            pseudo_r2=None,
            max_residual=None,
            reason=reason,
        )

    table = _Table(rows)
    log_sigma = _minimise(
        lambda x: table.deviance(*table.log_rates(2.0**x)),
        low=max(math.log2(min(r.place.gap_in for r in rows)) - 5, _LOWEST_LOG_SIGMA),
        high=math.log2(max(r.place.gap_out for r in rows)) + 15,
    )
    log_changed, log_frozen = table.log_rates(2.0**log_sigma)
    deviance = table.deviance(log_changed, log_frozen)
    overall = changed / entries
    constant = table.deviance(np.full(len(rows), math.log(overall)), np.full(len(rows), math.log1p(-overall)))
    residuals = [
        abs(r.changed / r.entries - math.exp(rate))
        for r, rate in zip(rows, log_changed.tolist(), strict=True)
        if r.entries >= _MIN_ROW_ENTRIES
    ]
    return DisplacementFit(
        sigma=2.0**log_sigma,
        entries=entries,
        changed=changed,
        deviance=deviance,
        pseudo_r2=1 - deviance / constant if constant > 0 else None,
        max_residual=max(residuals, default=None),
        reason=None,
    )


def _rows(view: ViewTally, dtype: DType) -> list[_Row]:
    changed: dict[int, int] = {}
    special: dict[int, int] = {}
    for (stratum, column), count in view.cells.items():
        into = special if column == SPECIAL else changed
        if column not in (ZERO_SIGN, NAN_PAYLOAD):
            into[stratum] = into.get(stratum, 0) + count
    rows = []
    for stratum, count in sorted(view.strata.items()):
        place = describe(stratum, dtype)
        usable = count - special.get(stratum, 0)
        if place.kind in ("subnormal", "normal") and usable:
            rows.append(_Row(place=place, entries=usable, changed=changed.get(stratum, 0)))
    return rows


class _Table:
    """The strata as arrays: the fit asks for the rates at about a hundred σ a tensor."""

    def __init__(self, rows: list[_Row]) -> None:
        self._out = np.array([row.place.gap_out for row in rows])
        self._in = np.array([row.place.gap_in for row in rows])
        self._changed = np.array([row.changed for row in rows], dtype=np.float64)
        self._frozen = np.array([row.entries - row.changed for row in rows], dtype=np.float64)
        total = self._changed + self._frozen
        with np.errstate(divide="ignore"):
            log_changed, log_frozen = np.log(self._changed / total), np.log(self._frozen / total)
        self._saturated = _times(self._changed, log_changed) + _times(self._frozen, log_frozen)

    def log_rates(self, sigma: float) -> tuple[np.ndarray, np.ndarray]:
        """Logarithms of P(changed) and P(frozen) of each stratum."""
        scale = 2 * sigma * math.sqrt(2.0)
        with np.errstate(over="ignore"):
            out, inward = self._out / scale, self._in / scale
        changed = 0.5 * (_map(math.erfc, out) + _map(math.erfc, inward))
        frozen = 0.5 * (_map(math.erf, out) + _map(math.erf, inward))
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            # Where both tails underflow the nearer boundary dominates: log erfc(x) for large x to relative
            # 1/(2x²), Abramowitz and Stegun 7.1.23, first term.
            tail = -inward * inward - np.log(inward * math.sqrt(math.pi))
            return np.where(changed > 0, np.log(changed), tail), np.log(frozen)

    def deviance(self, log_changed: np.ndarray, log_frozen: np.ndarray) -> float:
        """2·(saturated − fitted) log-likelihood; infinity where a rate excludes what happened."""
        fitted = _times(self._changed, log_changed) + _times(self._frozen, log_frozen)
        return max(0.0, 2 * math.fsum((self._saturated - fitted).tolist()))


def _map(function: Callable[[float], float], values: np.ndarray) -> np.ndarray:
    return np.array([function(value) for value in values.tolist()])


def _times(counts: np.ndarray, logs: np.ndarray) -> np.ndarray:
    """Counts · logs, where no count makes any logarithm count for nothing."""
    return np.multiply(counts, logs, out=np.zeros(len(counts)), where=counts > 0)


def _minimise(function: Callable[[float], float], *, low: float, high: float) -> float:
    """The argument of the smallest value: a scan in whole steps, one in quarters near it, golden section."""
    coarse = min((low + i for i in range(math.ceil(high - low) + 1)), key=function)
    best = min((coarse + i / 4 for i in range(-6, 7)), key=function)
    a, b = best - 0.25, best + 0.25
    golden = (math.sqrt(5) - 1) / 2
    c, d = b - golden * (b - a), a + golden * (b - a)
    value_c, value_d = function(c), function(d)
    while b - a > 1e-5:
        if value_c <= value_d:
            b, d, value_d = d, c, value_c
            c = b - golden * (b - a)
            value_c = function(c)
        else:
            a, c, value_c = c, d, value_d
            d = a + golden * (b - a)
            value_d = function(d)
    return 0.5 * (a + b)
