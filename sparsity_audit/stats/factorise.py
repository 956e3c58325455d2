"""Singular value factorisations of one matrix, exact or sketched, and the angles between subspaces.

Contract: float64 in and out, numpy alone, no generator: the sketch and the shuffle use keyed splitmix64, so
that they do not depend on a library's stream. `ExactSvd` returns every singular value; `SketchedSvd` returns
the first k and promises no more than that they do not exceed the true ones by more than rounding.

Source: randomised subspace iteration is Halko, Martinsson and Tropp 2011 (0909.4061), algorithm 4.4; sines
and cosines for angles are Björck and Golub 1973, who show that cosines alone lose small angles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

__all__ = [
    "OVERSAMPLING",
    "POWER_ITERATIONS",
    "ExactSvd",
    "Factorisation",
    "Factors",
    "SketchedSvd",
    "principal_angles",
    "shuffled",
]

OVERSAMPLING = 10
"""Columns of the sketch beyond k; Halko et al. advise 5 to 10."""

POWER_ITERATIONS = 4
"""Each multiplies the ratio of neighbouring singular values once more by its square."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """Singular values, largest first, and the leading singular vectors.

    Args:
        left: float64[rows, k].
        values: float64[count], count ≥ k.
        right: float64[cols, k].
    """

    left: np.ndarray
    values: np.ndarray
    right: np.ndarray

    def low_rank(self) -> np.ndarray:
        """The best approximation of rank k."""
        k = self.left.shape[1]
        return (self.left * self.values[:k]) @ self.right.T


class Factorisation(Protocol):
    """A way to factorise."""

    def factors(self, matrix: np.ndarray, k: int) -> Factors:
        """Values and the first k singular vectors. Raises numpy.linalg.LinAlgError."""
        ...

    def values(self, matrix: np.ndarray, k: int) -> np.ndarray:
        """Values alone, at least the first k. Raises numpy.linalg.LinAlgError."""
        ...


class ExactSvd:
    """LAPACK's divide and conquer: all min(rows, cols) values, to rounding."""

    def factors(self, matrix: np.ndarray, k: int) -> Factors:
        """See `Factorisation`."""
        left, values, right = np.linalg.svd(matrix, full_matrices=False)
        return Factors(left=left[:, :k].copy(), values=values, right=right[:k].T.copy())

    def values(self, matrix: np.ndarray, k: int) -> np.ndarray:  # noqa: ARG002 - the interface of both
        """See `Factorisation`."""
        return np.linalg.svd(matrix, compute_uv=False)


class SketchedSvd:
    """Randomised subspace iteration with a fixed sketch, orthonormalised after every product.

    Every matrix of a shape meets the same sketch, so that the errors of two nearly equal matrices are nearly
    equal and cancel in the difference of their values.
    """

    def factors(self, matrix: np.ndarray, k: int) -> Factors:
        """See `Factorisation`."""
        rows, cols = matrix.shape
        width = min(k + OVERSAMPLING, rows, cols)
        basis = np.linalg.qr(matrix @ _signs(cols, width))[0]
        for _ in range(POWER_ITERATIONS):
            basis = np.linalg.qr(matrix.T @ basis)[0]
            basis = np.linalg.qr(matrix @ basis)[0]
        left, values, right = np.linalg.svd(basis.T @ matrix, full_matrices=False)
        return Factors(left=basis @ left[:, :k], values=values[:k], right=right[:k].T.copy())

    def values(self, matrix: np.ndarray, k: int) -> np.ndarray:
        """See `Factorisation`."""
        return self.factors(matrix, k).values


def principal_angles(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Angles in radians, ascending, between the spans of two orthonormal sets of k columns."""
    inner = first.T @ second
    cosines = np.linalg.svd(inner, compute_uv=False)
    sines = np.linalg.svd(second - first @ inner, compute_uv=False)[::-1]
    return np.arctan2(sines, np.clip(cosines, 0.0, None))


def shuffled(matrix: np.ndarray, seed: int) -> np.ndarray:
    """The entries of a matrix in a random order that `seed` fixes."""
    order = np.argsort(_words(seed, matrix.size), kind="stable")
    return matrix.reshape(-1)[order].reshape(matrix.shape)


def _signs(rows: int, cols: int) -> np.ndarray:
    return np.where(_words(0, rows * cols) >> np.uint64(63), 1.0, -1.0).reshape(rows, cols)


def _words(seed: int, count: int) -> np.ndarray:
    """splitmix64 of the positions, keyed by the seed."""
    x = (np.arange(count, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x += np.uint64(seed % 2**64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
