"""Stripe scores: whether changes gather in rows or columns, beside what magnitudes alone make of them.

Contract: pure. A matrix is seen as *lines* (its rows, or its columns) of `across` entries each, n entries in
all, K of them changed, k_i in line i. Integers stay exact; a score is one correctly rounded division.

*Score*: the variance of the k_i over the variance that independent entries of equal rate would give,
[Σ_i (k_i − K/lines)² ÷ (lines − 1)] ÷ [across · (K/n)(1 − K/n) · n/(n − 1)]. Its mean over all ways to place
K changes among n entries is exactly 1, for any size of the matrix. None without changes, where everything
changed, and with fewer than two lines or entries across.

*Magnitude null*: within each stratum s of |w_base| (tensor × exponent × mantissa = 0, see `strata`) all ways
to place its a_s changes among its n_s entries are equally likely. `MagnitudeNull` gives the score's exact
mean under it, and its standard deviation approximately. With one stratum the mean is 1. Rows of small weights
change more often than others when rounding decides, so that a score above 1 alone shows no structure.

Source of the question: 2511.08567, which reports row and column stripes in RL updates; the score and its null
are ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sparsity_audit.align.roles import RoleKind
from sparsity_audit.stats.strata import NAN_PAYLOAD, NUM_COLUMNS, ZERO_SIGN
from sparsity_audit.stats.tally import Tally, ViewTally
from sparsity_audit.types import View

__all__ = [
    "MIN_EXCESS_RATIO",
    "MIN_LINES",
    "MIN_Z",
    "LineNull",
    "LineStripes",
    "MagnitudeNull",
    "MatrixNull",
    "StratumRate",
    "TensorStripes",
    "describe_lines",
    "line_score",
    "stratum_rates",
    "stripe_findings",
]

MIN_Z = 5.0
MIN_EXCESS_RATIO = 1.25
MIN_LINES = 16
"""A sentence needs z ≥ 5, a score of 1.25 × its expectation, and 16 lines for the normal terms to hold."""

_FOLD_LINES = 4096
_MAX_NAMES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class StratumRate:
    """A stratum of a tensor: its number, its entries and how many of them changed."""

    stratum: int
    entries: int
    changed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LineNull:
    """Mean and standard deviation of a stripe score when magnitudes alone decide what changes."""

    expected: float
    sd: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixNull:
    """The magnitude null of both axes of a matrix."""

    rows: LineNull
    cols: LineNull


@dataclass(frozen=True, slots=True, kw_only=True)
class LineStripes:
    """How unevenly changes lie over the lines of one axis.

    Args:
        lines: Number of rows (or columns).
        observed: Stripe score; 1 on average where entries are exchangeable.
        expected: Its mean when changes depend on |w_base| alone; None where that was not counted.
        z: (observed − expected) ÷ the null's standard deviation; None also where that is zero.
        excess_sd: Standard deviation of the lines' densities that magnitudes leave unexplained, in units of
            density; 0 where there is none. Unlike the scores it does not grow with the matrix.
    """

    lines: int
    observed: float
    expected: float | None
    z: float | None
    excess_sd: float | None

    @property
    def is_striped(self) -> bool:
        """Whether the score exceeds its expectation clearly; the rule is in `MIN_Z` and its neighbours."""
        return (
            self.lines >= MIN_LINES
            and self.expected is not None
            and self.z is not None
            and self.z >= MIN_Z
            and self.observed >= MIN_EXCESS_RATIO * self.expected
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorStripes:
    """Both axes of one matrix (leading axes × last axis).

    Args:
        name: The pair's name.
        kind: What it is, as in the roll-ups.
        rows: Its rows.
        cols: Its columns.
    """

    name: str
    kind: RoleKind
    rows: LineStripes
    cols: LineStripes


def line_score(counts: np.ndarray, across: int) -> float | None:
    """The stripe score of one axis.

    Args:
        counts: Changed entries per line, integers.
        across: Entries per line.
    """
    lines, changed = len(counts), int(counts.sum(dtype=np.int64))
    entries = lines * across
    if min(lines, across) < 2 or not 0 < changed < entries:
        return None
    wide = counts.astype(np.int64)
    spread = lines * int((wide * wide).sum(dtype=np.int64)) - changed * changed
    return (spread * entries * (entries - 1)) / (lines * (lines - 1) * across * changed * (entries - changed))


def describe_lines(counts: np.ndarray, across: int, null: LineNull | None) -> LineStripes | None:
    """One axis's score beside its expectation; None where it has no score."""
    observed = line_score(counts, across)
    if observed is None:
        return None
    lines, changed = len(counts), int(counts.sum(dtype=np.int64))
    z = excess_sd = None
    if null is not None:
        excess = max(observed - null.expected, 0.0) * _line_variance(lines, across, changed)
        excess_sd = math.sqrt(excess) / across
        z = (observed - null.expected) / null.sd if null.sd > 0 else None
    return LineStripes(
        lines=lines,
        observed=observed,
        expected=None if null is None else null.expected,
        z=z,
        excess_sd=excess_sd,
    )


def _line_variance(lines: int, across: int, changed: int) -> float:
    """What the score is measured in: the sample variance of k_i that exchangeable entries give."""
    entries = lines * across
    return changed * (entries - changed) / (lines * (entries - 1))


def stratum_rates(tally: Tally, view: View) -> tuple[StratumRate, ...] | None:
    """Entries and changes by stratum, for the criterion that the row and column counts follow.

    Cells decide `value` and `bitwise`. Any other criterion changes a part of what `value` does, so that equal
    totals mean equal sets; otherwise the strata are not known: None, as at level `counts`.
    """
    if tally.axes is None:
        return None
    found = tally.served if view is View.SERVED and tally.served is not None else tally.native
    total = int(tally.axes.rows.sum(dtype=np.int64))
    for left_out in (frozenset((ZERO_SIGN, NAN_PAYLOAD)), frozenset[int]()):
        changed = _changed_by_stratum(found, left_out)
        if sum(changed.values()) == total:
            return tuple(
                StratumRate(stratum=stratum, entries=entries, changed=changed.get(stratum, 0))
                for stratum, entries in sorted(found.strata.items())
            )
    return None


def _changed_by_stratum(tally: ViewTally, left_out: frozenset[int]) -> Mapping[int, int]:
    changed: dict[int, int] = {}
    for (stratum, column), count in tally.cells.items():
        assert 0 <= column < NUM_COLUMNS
        if column not in left_out:
            changed[stratum] = changed.get(stratum, 0) + count
    return changed


class MagnitudeNull:
    """Accumulates the null of one axis, line by line.

    With p = a_s/n_s, q = 1 − p and w_s = pq/(n_s − 1), k_i has mean E_i = Σ n_is p, variance
    V_i = Σ n_is w_s (n_s − n_is), and covariances −Σ w_s n_is n_js (hypergeometric). So the mean of
    Σ(k_i − K/lines)² is Σ [V_i + d_i²], d_i = E_i − K/lines: exact. Its variance is that of independent
    Bernoulli entries given each stratum's number of changes, to leading order in the number of lines:
    2 Σ_i [V_i² − Σ_s n_is (pq)²] + 4 d'Cov d. Third and fourth cumulants cancel with that condition.

    Args:
        rates: The strata of the matrix.
        lines: Number of lines.
        across: Entries per line.
    """

    def __init__(self, rates: Sequence[StratumRate], *, lines: int, across: int) -> None:
        sizes = np.array([rate.entries for rate in rates], dtype=np.float64)
        p = np.array([rate.changed / rate.entries for rate in rates])
        self._lines, self._across = lines, across
        self._changed = sum(rate.changed for rate in rates)
        self._sizes, self._p = sizes, p
        self._w = np.where(sizes > 1, p * (1 - p) / np.maximum(sizes - 1, 1), 0.0)
        self._squared = (p * (1 - p)) ** 2
        self._mean = self._variance = 0.0
        self._along = np.zeros(len(rates))

    def fold(self, counts: np.ndarray) -> None:
        """Add lines; `counts[i, s]` is how many of line i's entries lie in the s-th stratum."""
        share = 1 - 1 / self._lines
        for start in range(0, len(counts), _FOLD_LINES):
            part = counts[start : start + _FOLD_LINES].astype(np.float64)
            offset = (part * self._p).sum(axis=1) - self._changed / self._lines
            variance = (part * (self._w * (self._sizes - part))).sum(axis=1)
            diagonal = (part * (self._w * self._sizes)).sum(axis=1)
            alone = (part * self._squared).sum(axis=1)
            self._mean += float((variance + offset * offset).sum())
            self._variance += float(
                (2 * (variance * variance / share - alone * share) + 4 * offset * offset * diagonal).sum()
            )
            self._along += (part * offset[:, np.newaxis]).sum(axis=0)

    def result(self) -> LineNull:
        """The null of the score; call after the last line."""
        variance = self._variance - 4 * float((self._w * self._along * self._along).sum())
        unit = (self._lines - 1) * _line_variance(self._lines, self._across, self._changed)
        # A positive definite form less rounding: where nothing can vary the difference may be −1e-17.
        return LineNull(expected=self._mean / unit, sd=math.sqrt(max(variance, 0.0)) / unit)


def stripe_findings(stripes: Sequence[TensorStripes]) -> tuple[str, ...]:
    """Sentences on matrices whose changes gather in lines clearly beyond what magnitudes give.

    Embeddings and heads stand apart: rows of tokens that training never saw are stripes of their own.
    """
    vocabulary = [tensor for tensor in stripes if tensor.kind in ("embedding", "head")]
    others = [tensor for tensor in stripes if tensor.kind not in ("embedding", "head")]
    found = [
        _sentence(axis, noun, [(tensor.name, line(tensor)) for tensor in tensors])
        for noun, tensors in (("matrices of the layers", others), ("embeddings and heads", vocabulary))
        for axis, line in (("rows", lambda tensor: tensor.rows), ("columns", lambda tensor: tensor.cols))
    ]
    return tuple(sentence for sentence in found if sentence is not None)


def _sentence(axis: str, noun: str, lines: Sequence[tuple[str, LineStripes]]) -> str | None:
    judged = [(name, line, line.expected) for name, line in lines if line.expected is not None]
    striped = [entry for entry in judged if entry[1].is_striped]
    if not striped:
        return None
    striped.sort(key=lambda entry: (-(entry[1].observed - entry[2]), entry[0]))
    listed = "; ".join(
        f"{name} ({line.observed:.2f} against {expected:.2f}, z = {line.z:.0f})"
        for name, line, expected in striped[:_MAX_NAMES]
    )
    more = len(striped) - _MAX_NAMES
    return (
        f"Changes gather in {axis} beyond what magnitudes give in {len(striped):,} of {len(judged):,} {noun} "
        f"(stripe score observed against expected): {listed}" + (f" and {more:,} more." if more > 0 else ".")
    )
