"""What an update does to the spectrum of a weight matrix, beside the same update scattered at random.

Contract: two float64 matrices and the update mask in, one record out; nothing is read, and draws follow
from a given seed. Every measure stands beside its mean and sd over *scattered updates*: the entries of Δ,
zeros included, in random order, so that density and the distribution of Δ are the same and only the places
differ. A scattered 20 % mask has full rank too, so a rank alone says nothing.

Sources: rank of the update 2505.11711 (Table 2); principal and low-magnitude mask, spectral drift (NSS) and
angles 2511.08567; effective rank Roy and Vetterli 2007. Deviations: ranks name their tolerance; effective
rank is also given over energies σ²; overlaps have an exact chance level and what magnitudes alone give, since
large weights are principal more often and bf16 hides their updates; ties at a cut count in proportion.

Reported floats have 9 significant digits, ratios and angles at most 11 and 6 decimals: LAPACK's last digits
depend on the number of threads and the processor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from sparsity_audit.stats.base_masks import base_overlaps
from sparsity_audit.stats.factorise import (
    OVERSAMPLING,
    POWER_ITERATIONS,
    ExactSvd,
    Factorisation,
    Factors,
    SketchedSvd,
    principal_angles,
    shuffled,
)
from sparsity_audit.stats.spectral_records import (
    RankTolerances,
    SpectralMeasures,
    SpectralRecord,
    digits,
    ratio,
)
from sparsity_audit.types import DType, View

__all__ = [
    "MAX_RANK",
    "SpectralCost",
    "SpectralQuestion",
    "rounding_edge",
    "spectral_cost",
    "spectral_record",
    "subspace_rank",
]

MAX_RANK = 32
_ENERGY = 0.99
_LARGEST = 1e150


@dataclass(frozen=True, slots=True, kw_only=True)
class SpectralQuestion:
    """What is asked about one pair of matrices.

    Args:
        name: The pair.
        view: The view the matrices are given in.
        dtype: Dtype of the tuned side's values in that view: the grid they were rounded to; None where
            values are codes times scales.
        criterion: The criterion of the mask.
        max_dim: A side longer than this makes every measure an estimate.
        num_draws: Scattered updates to draw.
        seed: Fixes the draws.
    """

    name: str
    view: View
    dtype: DType | None
    criterion: str
    max_dim: int
    num_draws: int
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SpectralCost:
    """What measuring one matrix takes, roughly: floating point operations, and bytes at the peak."""

    flops: float
    num_bytes: int


def subspace_rank(rows: int, cols: int) -> int:
    """The k of a matrix: 32, or a quarter of its smaller side when that is less."""
    return max(1, min(MAX_RANK, min(rows, cols) // 4))


def spectral_cost(rows: int, cols: int, *, max_dim: int, num_draws: int) -> SpectralCost:
    """Operations by the counts of Golub and Van Loan (section 8.6) and Halko et al. (section 4.5)."""
    long, short = max(rows, cols), min(rows, cols)
    if long > max_dim:
        width = min(subspace_rank(rows, cols) + OVERSAMPLING, short)
        one = 2.0 * (2 * POWER_ITERATIONS + 2) * rows * cols * width
        return SpectralCost(flops=(3 + 2 * num_draws) * one, num_bytes=8 * 11 * rows * cols)
    vectors = 14.0 * long * short**2 + 8.0 * short**3
    values = 4.0 * long * short**2 - 4.0 / 3.0 * short**3
    flops = (2 + num_draws) * vectors + (1 + num_draws) * values
    return SpectralCost(flops=flops, num_bytes=8 * (11 * rows * cols + 4 * short**2))


def spectral_record(
    base: np.ndarray, tuned: np.ndarray, mask: np.ndarray, question: SpectralQuestion
) -> SpectralRecord:
    """Measure one update.

    Args:
        base: W₀, float64[rows, cols].
        tuned: W₊, the same shape.
        mask: bool, the same shape: entries that changed under the criterion.
        question: See there.
    """
    record = SpectralRecord(
        name=question.name, shape=base.shape, view=question.view, criterion=question.criterion
    )
    with np.errstate(invalid="ignore", over="ignore"):
        delta = tuned - base
    if delta.size == 0:
        return replace(record, refused="it has no entries")
    if not (np.isfinite(base).all() and np.isfinite(delta).all()):
        return replace(record, refused="W₀ or Δ holds NaN or Inf, which have no singular values")
    if max(np.abs(base).max(), np.abs(delta).max()) > _LARGEST:
        return replace(record, refused=f"values beyond {_LARGEST:g}, whose squares overflow float64")
    is_estimate = max(base.shape) > question.max_dim
    record = replace(
        record,
        is_estimate=is_estimate,
        estimate_reason=_reason(question.max_dim, base.shape) if is_estimate else "",
        entries=delta.size,
        changed=int(np.count_nonzero(mask)),
        full_rank=min(base.shape),
        k=subspace_rank(*base.shape),
    )
    try:
        return _measured(record, base, tuned, delta, mask, question)
    except np.linalg.LinAlgError as error:
        return replace(record, refused=f"LAPACK: {error}")


def rounding_edge(values: np.ndarray, dtype: DType) -> float:
    """Largest singular value to expect of the errors of rounding each value once to `dtype`.

    An error is uniform over one ULP, of variance ULP²/12, independent of the others. The expected spectral
    norm of such a matrix is at most (to a lower-order term) the largest norm of a row's standard deviations
    plus the largest of a column's, Bandeira and Van Handel 2016 (1408.6185) for normal entries; for equal
    variances that is the familiar s·(√rows + √cols).
    """
    layout = dtype.layout
    smallest = 1 - layout.bias  # of subnormals, and of zero, whose frexp is 0
    exponent = np.where(values == 0, smallest, np.maximum(np.frexp(values)[1] - 1, smallest))
    variance = np.ldexp(1.0, 2 * (exponent - layout.mantissa_bits)) / 12
    return math.sqrt(variance.sum(axis=1).max()) + math.sqrt(variance.sum(axis=0).max())


def _reason(max_dim: int, shape: tuple[int, ...]) -> str:
    return (
        f"a side of {max(shape)} exceeds --spectral-max-dim {max_dim}: randomised subspace iteration, "
        f"{OVERSAMPLING} extra columns, {POWER_ITERATIONS} power iterations; singular values are from below"
    )


def _measured(
    record: SpectralRecord,
    base: np.ndarray,
    tuned: np.ndarray,
    delta: np.ndarray,
    mask: np.ndarray,
    question: SpectralQuestion,
) -> SpectralRecord:
    method: Factorisation = SketchedSvd() if record.is_estimate else ExactSvd()
    k = record.k
    origin = method.factors(base, k)
    record = replace(
        record, gap=_gap(origin.values, k), overlaps=base_overlaps(base, origin.low_rank(), mask)
    )
    if not delta.any():
        zeros = None if record.is_estimate else 0.0
        ranks = SpectralMeasures(rank_float64=zeros, rank_float32=zeros, rank_rounding=zeros, rank_99=zeros)
        observed = _with_drift(ranks, origin, origin)
        return replace(record, spectral_norm=0.0, frobenius_norm=0.0, observed=observed)
    values, frobenius = method.values(delta, k), _frobenius(delta)
    edge = None
    if not record.is_estimate and question.dtype is not None:
        edge = rounding_edge(tuned, question.dtype)

    def measure(values: np.ndarray) -> SpectralMeasures:
        # A scattered update has the same entries, so the same ‖Δ‖_F.
        found = _energies(values, frobenius, k)
        if record.is_estimate:
            return found
        return _with_ranks(found, values, _tolerances(values[0], base.shape, edge))

    observed = _with_drift(measure(values), origin, method.factors(tuned, k))
    draws = []
    for number in range(question.num_draws):
        scattered = shuffled(delta, question.seed + number)
        ranks = measure(method.values(scattered, k))
        draws.append(_with_drift(ranks, origin, method.factors(base + scattered, k)))
    return replace(
        record,
        spectral_norm=digits(values[0]),
        frobenius_norm=digits(frobenius),
        tolerances=None if record.is_estimate else _tolerances(values[0], base.shape, edge),
        observed=observed,
        num_draws=len(draws),
        reference_mean=_over(draws, _mean) if draws else None,
        reference_sd=_over(draws, _deviation) if len(draws) > 1 else None,
    )


def _frobenius(matrix: np.ndarray) -> float:
    scale = float(np.abs(matrix).max())
    return scale * float(np.linalg.norm(matrix / scale))


def _gap(values: np.ndarray, k: int) -> float | None:
    return ratio((values[k - 1] - values[k]) / values[k - 1]) if len(values) > k and values[k - 1] else None


def _tolerances(largest: float, shape: tuple[int, ...], edge: float | None) -> RankTolerances:
    return RankTolerances(
        float64=digits(max(shape) * 2.0**-52 * largest),
        float32=digits(max(shape) * 2.0**-23 * largest),
        rounding=None if edge is None else digits(edge),
    )


def _energies(values: np.ndarray, frobenius: float, k: int) -> SpectralMeasures:
    energy = (frobenius / values[0]) ** 2
    top = float(np.sum((values[:k] / values[0]) ** 2)) / energy
    return SpectralMeasures(stable_rank=digits(energy), top_energy_frac=ratio(min(1.0, top)))


def _with_ranks(
    measures: SpectralMeasures, values: np.ndarray, tolerances: RankTolerances
) -> SpectralMeasures:
    unit, edge = values / values[0], tolerances.rounding
    cumulated = np.cumsum(unit**2)
    return replace(
        measures,
        rank_float64=_count_above(values, tolerances.float64),
        rank_float32=_count_above(values, tolerances.float32),
        rank_rounding=None if edge is None else _count_above(values, edge),
        effective_rank=_entropy_rank(unit),
        effective_rank_energy=_entropy_rank(unit**2),
        rank_99=float(np.searchsorted(cumulated, _ENERGY * cumulated[-1]) + 1),
    )


def _count_above(values: np.ndarray, tolerance: float) -> float:
    return float(np.count_nonzero(values > tolerance))


def _entropy_rank(weights: np.ndarray) -> float:
    shares = weights[weights > 0] / weights.sum()
    return digits(math.exp(-float(np.sum(shares * np.log(shares)))))


def _with_drift(measures: SpectralMeasures, origin: Factors, moved: Factors) -> SpectralMeasures:
    largest = origin.values[0]
    if largest == 0:
        return measures
    shift = (moved.values - origin.values) / largest
    measures = replace(
        measures, nss=ratio(float(np.linalg.norm(shift) / np.linalg.norm(origin.values / largest)))
    )
    found: dict[str, float] = {}
    sides = (("left", origin.left, moved.left), ("right", origin.right, moved.right))
    for side, first, second in sides:
        angles = np.zeros(1) if moved is origin else principal_angles(first, second)
        cosines = np.cos(angles)
        found[f"{side}_max_angle_deg"] = round(math.degrees(float(angles.max())), 6)
        found[f"{side}_mean_cosine"] = ratio(float(cosines.mean()))
        found[f"{side}_min_cosine"] = ratio(float(cosines.min()))
    return replace(measures, **found)


def _over(
    draws: Sequence[SpectralMeasures], statistic: Callable[[Sequence[float]], float]
) -> SpectralMeasures:
    found: dict[str, float | None] = {}
    for field in fields(SpectralMeasures):
        numbers = [getattr(draw, field.name) for draw in draws]
        found[field.name] = None if None in numbers else digits(statistic(numbers))
    return SpectralMeasures(**found)


def _mean(numbers: Sequence[float]) -> float:
    return math.fsum(numbers) / len(numbers)


def _deviation(numbers: Sequence[float]) -> float:
    mean = _mean(numbers)
    return math.sqrt(math.fsum((number - mean) ** 2 for number in numbers) / (len(numbers) - 1))
