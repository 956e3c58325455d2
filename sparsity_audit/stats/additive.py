"""Weighted least squares on row, column and stratum effects of a matrix that is never held whole in fp64.

Contract: pure. A *grid* is a matrix of cells; rows and columns that are alike may share one line of cells,
whose weight says how many they are. Cells are visited in row blocks in a fixed order, so that sums
depend on nothing but the grid. Held per cell: 4 bytes of weight, and the stratum numbers if there are any.

Effects are defined up to constants that move between rows, columns and strata; sums of the three are not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

__all__ = ["Effects", "Grid", "NormalEquations"]

_BLOCK_CELLS = 1 << 19
_MAX_ITERATIONS = 500


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Effects:
    """One number a row, a column and a stratum, float64; `strata` is empty without strata."""

    rows: np.ndarray
    cols: np.ndarray
    strata: np.ndarray

    def joined(self) -> np.ndarray:
        """The three one after another."""
        return np.concatenate([self.rows, self.cols, self.strata])

    def like(self, values: np.ndarray) -> Effects:
        """A joined array taken apart again."""
        first, second = len(self.rows), len(self.rows) + len(self.cols)
        return Effects(rows=values[:first], cols=values[first:second], strata=values[second:])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Grid:
    """A matrix of cells.

    Args:
        row_weights: How many rows each line of cells stands for, float64[m].
        col_weights: The same of columns, float64[n].
        strata: Stratum number of each cell, integers[m, n] from 0; None without strata. With strata all
            weights are 1.
        num_strata: Number of strata.
    """

    row_weights: np.ndarray
    col_weights: np.ndarray
    strata: np.ndarray | None = None
    num_strata: int = 0

    def blocks(self) -> Iterator[slice]:
        """Row blocks in order."""
        step = max(1, _BLOCK_CELLS // max(1, len(self.col_weights)))
        for start in range(0, len(self.row_weights), step):
            yield slice(start, min(start + step, len(self.row_weights)))

    def cells(self, effects: Effects, block: slice) -> np.ndarray:
        """Row + column + stratum effect of each cell of a block, float64."""
        cells = effects.rows[block, np.newaxis] + effects.cols
        if self.strata is not None:
            cells += effects.strata[self.strata[block]]
        return cells

    def sums(self, values: Callable[[slice], np.ndarray]) -> Effects:
        """Sums of weight · value over rows, columns and strata.

        Args:
            values: Gives the values of a block of cells, float64.
        """
        rows = np.zeros(len(self.row_weights))
        cols, strata = np.zeros(len(self.col_weights)), np.zeros(self.num_strata)
        for block in self.blocks():
            part = values(block)
            rows[block] = part @ self.col_weights
            cols += self.row_weights[block] @ part
            if self.strata is not None:
                strata += np.bincount(self.strata[block].ravel(), part.ravel(), minlength=self.num_strata)
        return Effects(rows=rows * self.row_weights, cols=cols * self.col_weights, strata=strata)

    def total(self, values: Callable[[slice], np.ndarray]) -> float:
        """Sum of weight · value over all cells."""
        return float(
            sum(self.row_weights[block] @ (values(block) @ self.col_weights) for block in self.blocks())
        )


class NormalEquations:
    """Normal equations of the three effects under given cell weights; solved by conjugate gradients.

    The weights are rounded to fp32, and everything is then computed from the rounded ones in fp64: the
    equations stay consistent, and a relative 6e-8 in weights moves no result that is printed.

    Args:
        grid: The cells.
        weights: Gives the weight of each entry of a block of cells, float64 ≥ 0.
    """

    def __init__(self, grid: Grid, weights: Callable[[slice], np.ndarray]) -> None:
        num_rows, num_cols = len(grid.row_weights), len(grid.col_weights)
        self._grid = grid
        self._weights = np.empty((num_rows, num_cols), dtype=np.float32)
        self._rows_by_strata = np.zeros((num_rows, grid.num_strata))
        self._cols_by_strata = np.zeros((grid.num_strata, num_cols))
        for block in grid.blocks():
            part = weights(block) * grid.row_weights[block, np.newaxis]
            self._weights[block] = part * grid.col_weights
            if grid.strata is not None:
                self._count_strata(block, grid.strata[block])
        cols = np.zeros(num_cols)
        rows = np.zeros(num_rows)
        for block in grid.blocks():
            wide = self._weights[block].astype(np.float64)
            rows[block] = wide.sum(axis=1)
            cols += wide.sum(axis=0)
        self._diagonal = Effects(rows=rows, cols=cols, strata=self._rows_by_strata.sum(axis=0))

    def _count_strata(self, block: slice, strata: np.ndarray) -> None:
        size, (height, width) = self._grid.num_strata, strata.shape
        wide = self._weights[block].astype(np.float64).ravel()
        by_row = (strata + np.arange(height)[:, np.newaxis] * size).ravel()
        by_col = (strata * np.int64(width) + np.arange(width)).ravel()
        self._rows_by_strata[block] = np.bincount(by_row, wide, minlength=height * size).reshape(height, size)
        self._cols_by_strata += np.bincount(by_col, wide, minlength=width * size).reshape(size, width)

    def _apply(self, effects: Effects) -> np.ndarray:
        rows = self._diagonal.rows * effects.rows + self._rows_by_strata @ effects.strata
        cols = self._diagonal.cols * effects.cols + effects.strata @ self._cols_by_strata
        strata = self._diagonal.strata * effects.strata
        strata += effects.rows @ self._rows_by_strata + self._cols_by_strata @ effects.cols
        for block in self._grid.blocks():
            wide = self._weights[block].astype(np.float64)
            rows[block] += wide @ effects.cols
            cols += effects.rows[block] @ wide
        return np.concatenate([rows, cols, strata])

    def solve(self, right: Effects, *, tolerance: float) -> Effects:
        """Effects that satisfy the equations.

        Args:
            right: Right-hand side, in the span of the equations; lines without weight are left at 0.
            tolerance: Relative size of the remainder, in the norm of the diagonal's inverse.
        """
        diagonal = self._diagonal.joined()
        inverse = np.divide(1.0, diagonal, out=np.zeros_like(diagonal), where=diagonal > 0)
        rest = np.where(diagonal > 0, right.joined(), 0.0)
        found, direction = np.zeros_like(rest), inverse * rest
        size = first = float(rest @ direction)
        for _ in range(_MAX_ITERATIONS):
            if size <= tolerance**2 * first:
                break
            image = self._apply(right.like(direction))
            curvature = float(direction @ image)
            if curvature <= 0:
                break  # rounding is all that is left
            step = size / curvature
            found += step * direction
            rest -= step * image
            scaled = inverse * rest
            before, size = size, float(rest @ scaled)
            direction = scaled + (size / before) * direction
        return right.like(found)

    def left_over(self, values: Callable[[slice], np.ndarray]) -> float:
        """Σ weight · (value − best row, column and stratum effects)², over all entries."""
        grid = self._grid

        def weighted(block: slice) -> np.ndarray:
            return self._weights[block] * values(block)

        unit = Grid(
            row_weights=np.ones(len(grid.row_weights)),
            col_weights=np.ones(len(grid.col_weights)),
            strata=grid.strata,
            num_strata=grid.num_strata,
        )
        fitted = self.solve(unit.sums(weighted), tolerance=1e-9)

        def squares(block: slice) -> np.ndarray:
            return self._weights[block] * (values(block) - grid.cells(fitted, block)) ** 2

        return unit.total(squares)
