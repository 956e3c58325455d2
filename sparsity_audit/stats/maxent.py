"""Row-column nulls: the independent entries of largest entropy with a mask's own margins.

Contract: pure. Entry (i, j) is changed with probability p_ij, logit p_ij = r_i + c_j (`row-column`) or
r_i + c_j + g(stratum of |w_base| at ij) (`row-column-magnitude`); the effects are those under which expected
row, column and stratum counts are the observed ones. Fitted by Newton's method until every margin is met
within `MARGIN_TOLERANCE` entries; the remainder is part of the result. Lines and strata whose entries are all
changed or all unchanged are fixed at p = 1 or 0, also where that follows only once others are fixed.

*Mean* of the intersection: Σ p q. *Variance* given the margins of both masks, which were fitted and so do not
vary: Σ p(1−p) q(1−q) + Σ p(1−p) q⊥² + Σ q(1−q) p⊥², q⊥ the residual of q after a p(1−p)-weighted regression
on row, column (and stratum) effects, p⊥ likewise; times N/(N − effects) over the N entries open in both, as
n/(n − 1) in the hypergeometric variance. Σ pq(1 − pq), which forgets the margins, is too large.

Vectors have no rows and columns: with one entry a line the null repeats the mask, mean |A∩B| and variance 0.
Callers treat them as `per-tensor` (`row-column`) or `magnitude` (`row-column-magnitude`).

Source of the question: stripes, 2511.08567. The model is that of Park and Newman, Phys. Rev. E 70, 066117
(2004), for bipartite graphs; Rasch's model in statistics. The product ρ_i κ_j/Σ exceeds 1 and misstates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from sparsity_audit.stats.additive import Effects, Grid, NormalEquations
from sparsity_audit.stats.chance import Expectation

__all__ = ["MARGIN_TOLERANCE", "MaxentFit", "fit_row_column", "fit_row_column_strata", "maxent_expectation"]

MARGIN_TOLERANCE = 1e-6
"""Largest difference between an expected and an observed margin, in entries."""

_MAX_STEPS = 200
_MAX_CHANGE = 4.0
_NEWTON_TOLERANCE = 1e-3
_MAX_HALVINGS = 30
_LIKELIHOOD_ROUNDING = 1e-12
_FIRST_FIXED, _FIXED_STEP, _LAST_FIXED = 2.0**60, 4.0, 2.0**12


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MaxentFit:
    """Fitted logits of one mask of one matrix.

    Args:
        effects: Row, column and stratum effects. Beyond ±2¹² a line is fixed; the larger decides.
        strata: Stratum number of each entry, from 0; None for `row-column`.
        steps: Newton steps taken.
        remainder: Largest |expected − observed| over all margins, in entries.
    """

    effects: Effects
    strata: np.ndarray | None
    steps: int
    remainder: float

    @property
    def is_converged(self) -> bool:
        """Whether every margin is met within `MARGIN_TOLERANCE`."""
        return self.remainder <= MARGIN_TOLERANCE

    def probabilities(self, block: slice = slice(None)) -> np.ndarray:
        """P of a block of rows, float64."""
        grid = _grid(self.effects, self.strata)
        return _probability(grid.cells(self.effects, block))


def fit_row_column(rows: np.ndarray, cols: np.ndarray) -> MaxentFit:
    """Fit p_ij = x_i y_j/(1 + x_i y_j) to the row and column counts of a mask.

    Rows with equal counts have equal effects, as have columns; so the work is that of the distinct counts.

    Args:
        rows: Changed entries of each row, int64[m].
        cols: Changed entries of each column, int64[n].
    """
    assert int(rows.sum()) == int(cols.sum()), (int(rows.sum()), int(cols.sum()))
    row_counts, row_of, row_weights = np.unique(rows, return_inverse=True, return_counts=True)
    col_counts, col_of, col_weights = np.unique(cols, return_inverse=True, return_counts=True)
    grid = Grid(row_weights=row_weights.astype(np.float64), col_weights=col_weights.astype(np.float64))
    margins = Effects(rows=row_counts * row_weights, cols=col_counts * col_weights, strata=np.zeros(0))
    found = _fit(grid, margins)
    effects = Effects(
        rows=found.effects.rows[row_of], cols=found.effects.cols[col_of], strata=found.effects.strata
    )
    return MaxentFit(effects=effects, strata=None, steps=found.steps, remainder=found.remainder)


def fit_row_column_strata(
    rows: np.ndarray, cols: np.ndarray, *, strata: np.ndarray, changed: np.ndarray
) -> MaxentFit:
    """Fit logit p_ij = r_i + c_j + g(stratum) to the row, column and stratum counts of a mask.

    Args:
        rows: Changed entries of each row, int64[m].
        cols: Changed entries of each column, int64[n].
        strata: Stratum number of each entry, unsigned[m, n], from 0 and below len(changed).
        changed: Changed entries of each stratum, int64[S].
    """
    assert strata.shape == (len(rows), len(cols)), (strata.shape, len(rows), len(cols))
    assert int(rows.sum()) == int(cols.sum()) == int(changed.sum()), "margins of different masks"
    grid = Grid(
        row_weights=np.ones(len(rows)),
        col_weights=np.ones(len(cols)),
        strata=strata,
        num_strata=len(changed),
    )
    return _fit(grid, Effects(rows=rows * 1.0, cols=cols * 1.0, strata=changed * 1.0))


def maxent_expectation(a: MaxentFit, b: MaxentFit) -> Expectation:
    """Mean and variance of the intersection of two masks of one matrix, both fitted with the same strata.

    Source of the variance: given its margins a mask is, to leading order, independent entries conditioned on
    linear sums; so a weighted sum of it varies by the residual of a weighted regression on these sums.
    """
    assert (a.strata is None) == (b.strata is None), "fits of different nulls"
    grid, first, second = _common_grid(a, b)
    p = partial(_probabilities, grid, first)
    q = partial(_probabilities, grid, second)
    mean = grid.total(lambda block: p(block) * q(block))
    both = grid.total(lambda block: _spread(p(block)) * _spread(q(block)))
    of_first = NormalEquations(grid, partial(_spread_of, grid, first)).left_over(q)
    of_second = NormalEquations(grid, partial(_spread_of, grid, second)).left_over(p)
    factor = _freedom_factor(grid, lambda block: _spread(p(block)) * _spread(q(block)) > 0)
    return Expectation(mean=mean, variance=factor * (both + of_first + of_second))


def _freedom_factor(grid: Grid, is_open: Callable[[slice], np.ndarray]) -> float:
    """Entries over entries less fitted effects: what n/(n − 1) is for one stratum and its one effect."""
    counts = grid.sums(lambda block: is_open(block).astype(np.float64))
    entries = float(counts.rows.sum())
    effects = (
        grid.row_weights[counts.rows > 0].sum()
        + grid.col_weights[counts.cols > 0].sum()
        + max(int((counts.strata > 0).sum()) - 1, 0)
        - 1
    )
    return entries / max(entries - float(effects), 1.0)


def _common_grid(a: MaxentFit, b: MaxentFit) -> tuple[Grid, Effects, Effects]:
    """Cells that are alike in both fits taken together; with strata, all cells."""
    if a.strata is not None:
        assert a.strata.shape == (len(b.effects.rows), len(b.effects.cols)), "fits of different matrices"
        return _grid(a.effects, a.strata), a.effects, b.effects
    rows, row_weights = np.unique(
        np.stack([a.effects.rows, b.effects.rows], axis=1), axis=0, return_counts=True
    )
    cols, col_weights = np.unique(
        np.stack([a.effects.cols, b.effects.cols], axis=1), axis=0, return_counts=True
    )
    grid = Grid(row_weights=row_weights.astype(np.float64), col_weights=col_weights.astype(np.float64))
    first, second = (Effects(rows=rows[:, k], cols=cols[:, k], strata=np.zeros(0)) for k in (0, 1))
    return grid, first, second


def _grid(effects: Effects, strata: np.ndarray | None) -> Grid:
    return Grid(
        row_weights=np.ones(len(effects.rows)),
        col_weights=np.ones(len(effects.cols)),
        strata=strata,
        num_strata=len(effects.strata),
    )


def _probability(logits: np.ndarray) -> np.ndarray:
    small = np.exp(-np.abs(logits))
    return np.where(logits >= 0, 1.0, small) / (1.0 + small)


def _probabilities(grid: Grid, effects: Effects, block: slice) -> np.ndarray:
    return _probability(grid.cells(effects, block))


def _spread_of(grid: Grid, effects: Effects, block: slice) -> np.ndarray:
    return _spread(_probabilities(grid, effects, block))


def _spread(p: np.ndarray) -> np.ndarray:
    return p * (1 - p)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Problem:
    """What is to be fitted, lines that are fixed taken apart.

    Args:
        grid: The cells.
        margins: Observed counts, times the lines' weights.
        fixed: Effects of fixed lines, 0 elsewhere; joined.
        is_free: Lines with entries that are not decided by a fixed line; joined.
        left: Margins less the changed entries that fixed lines decide; joined.
    """

    grid: Grid
    margins: Effects
    fixed: np.ndarray
    is_free: np.ndarray
    left: np.ndarray

    @classmethod
    def of(cls, grid: Grid, margins: Effects) -> _Problem:
        """Fix, round by round, each line all of whose undecided entries must be alike.

        Later rounds get smaller effects, so that an entry on two fixed lines follows the one fixed first.
        """
        fixed, size = np.zeros(len(margins.joined())), _FIRST_FIXED
        while True:
            cells = partial(grid.cells, margins.like(fixed))
            undecided = grid.sums(lambda block, c=cells: (c(block) == 0).astype(np.float64)).joined()
            decided = grid.sums(lambda block, c=cells: (c(block) > 0).astype(np.float64)).joined()
            left = margins.joined() - decided
            is_free = (fixed == 0) & (undecided > 0)
            empty, full = is_free & (left == 0), is_free & (left == undecided)
            if size < _LAST_FIXED or not (empty | full).any():
                return cls(grid=grid, margins=margins, fixed=fixed, is_free=is_free, left=left)
            fixed = np.where(empty, -size, np.where(full, size, fixed))
            size /= _FIXED_STEP

    def first_guess(self) -> Effects:
        """Logit of each line's own rate; of columns and strata relative to the overall rate."""
        grid = self.grid
        sizes = grid.sums(lambda block: np.ones((len(grid.row_weights[block]), len(grid.col_weights))))
        overall = (self.margins.rows.sum() + 0.5) / (sizes.rows.sum() + 1.0)
        rates = (self.margins.joined() + 0.5) / (sizes.joined() + 1.0)
        logits = np.log(rates) - np.log1p(-rates)
        logits[len(sizes.rows) :] -= np.log(overall) - np.log1p(-overall)
        return self.margins.like(np.where(self.is_free, logits, self.fixed))

    def evaluate(self, effects: Effects) -> tuple[np.ndarray, float]:
        """Observed − expected margins, and the log likelihood of the entries that are not decided."""
        grid, loss = self.grid, 0.0

        def probabilities(block: slice) -> np.ndarray:
            nonlocal loss
            logits = grid.cells(effects, block)
            small = np.exp(-np.abs(logits))
            soft = np.where(np.abs(logits) < _LAST_FIXED / 2, np.maximum(logits, 0.0) + np.log1p(small), 0.0)
            loss += float(grid.row_weights[block] @ (soft @ grid.col_weights))
            return np.where(logits >= 0, 1.0, small) / (1.0 + small)

        rest = self.margins.joined() - grid.sums(probabilities).joined()
        return rest, float((self.left * effects.joined())[self.is_free].sum()) - loss

    def newton_change(self, effects: Effects, rest: np.ndarray) -> np.ndarray:
        """The step to the zero of the linearised margins, shortened where it is long."""
        weights = partial(_spread_of, self.grid, effects)
        right = self.margins.like(np.where(self.is_free, rest, 0.0))
        found = NormalEquations(self.grid, weights).solve(right, tolerance=_NEWTON_TOLERANCE).joined()
        change = np.where(self.is_free, found, 0.0)
        largest = float(np.abs(change).max(initial=0.0))
        return change * min(1.0, _MAX_CHANGE / largest) if largest > 0 else change

    def remainder(self, rest: np.ndarray) -> float:
        """Largest difference of a margin, in entries of one line."""
        grid = self.grid
        weights = np.concatenate([grid.row_weights, grid.col_weights, np.ones(grid.num_strata)])
        return float(np.abs(rest / weights).max(initial=0.0))


def _fit(grid: Grid, margins: Effects) -> MaxentFit:
    """Newton's method on the concave likelihood; a step is halved while it would lower it."""
    problem = _Problem.of(grid, margins)
    effects, steps = problem.first_guess(), 0
    rest, likelihood = problem.evaluate(effects)
    while problem.remainder(rest) > MARGIN_TOLERANCE and steps < _MAX_STEPS:
        change = problem.newton_change(effects, rest)
        least = likelihood - _LIKELIHOOD_ROUNDING * abs(likelihood)
        rest, likelihood = problem.evaluate(margins.like(effects.joined() + change))
        halvings = 0
        while likelihood < least and halvings < _MAX_HALVINGS:
            change, halvings = change / 2, halvings + 1
            rest, likelihood = problem.evaluate(margins.like(effects.joined() + change))
        effects, steps = margins.like(effects.joined() + change), steps + 1
    return MaxentFit(effects=effects, strata=grid.strata, steps=steps, remainder=problem.remainder(rest))
