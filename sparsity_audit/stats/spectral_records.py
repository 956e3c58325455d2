"""The record of one update's spectrum; `stats.spectral` makes it.

Contract: plain values, no NaN and no infinity; a measure that is not defined is None. Floats are rounded as
`stats.spectral` says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sparsity_audit.types import View

__all__ = ["MaskOverlap", "RankTolerances", "SpectralMeasures", "SpectralRecord", "Target", "digits", "ratio"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankTolerances:
    """Singular values of Δ above a tolerance count towards the rank of that name.

    Args:
        float64: max(rows, cols)·2⁻⁵²·σ₁, numpy's default for the float64 matrix that Δ is.
        float32: max(rows, cols)·2⁻²³·σ₁, numpy's and torch's default had Δ been a float32 matrix.
        rounding: What rounding the tuned weights once to their dtype could add, see `rounding_edge`; None for
            block-scaled weights, whose steps are not those of a dtype.
    """

    float64: float
    float32: float
    rounding: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SpectralMeasures:
    """Measures of one update; of several, their means or standard deviations.

    None: not defined (an update or base of zeros), or out of reach of an estimate.

    Args:
        rank_float64: Numerical rank of Δ, see `RankTolerances`.
        rank_float32: The same.
        rank_rounding: The same.
        effective_rank: exp of the entropy of σ/Σσ (Roy and Vetterli).
        effective_rank_energy: exp of the entropy of σ²/Σσ².
        stable_rank: ‖Δ‖_F²/‖Δ‖₂².
        rank_99: Fewest singular values that hold 99 % of ‖Δ‖_F².
        top_energy_frac: Share of ‖Δ‖_F² in the first k singular values.
        nss: ‖σ(W₊) − σ(W₀)‖₂/‖σ(W₀)‖₂; of the first k values in an estimate.
        left_max_angle_deg: Largest principal angle between the first k left singular vectors of W₀ and of W₊.
        left_mean_cosine: Mean of the k cosines.
        left_min_cosine: Smallest of them.
        right_max_angle_deg: The same for right singular vectors.
        right_mean_cosine: The same.
        right_min_cosine: The same.
    """

    rank_float64: float | None = None
    rank_float32: float | None = None
    rank_rounding: float | None = None
    effective_rank: float | None = None
    effective_rank_energy: float | None = None
    stable_rank: float | None = None
    rank_99: float | None = None
    top_energy_frac: float | None = None
    nss: float | None = None
    left_max_angle_deg: float | None = None
    left_mean_cosine: float | None = None
    left_min_cosine: float | None = None
    right_max_angle_deg: float | None = None
    right_mean_cosine: float | None = None
    right_min_cosine: float | None = None


Target = Literal["principal", "low-magnitude"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskOverlap:
    """How much of the update mask lies in a mask made from W₀.

    Args:
        target: `principal`: the α·n entries of largest |rank-k approximation of W₀|; `low-magnitude`: those
            of smallest |W₀|.
        alpha: α; the last one of a target is the update's own density.
        entries: round(α·n), the size of the target.
        ties_at_cut: Entries that share the value at the cut; they count in proportion.
        share: Share of the update mask inside.
        chance: The same of a random mask of the update's size, exactly: entries ÷ n.
        chance_sd: Standard deviation of that.
        magnitude_share: The same of a mask drawn at random within each exponent of |W₀| (powers of two
            apart), with as many entries of each as the update has.
        magnitude_sd: Standard deviation of that.
    """

    target: Target
    alpha: float
    entries: int
    ties_at_cut: int
    share: float
    chance: float
    chance_sd: float
    magnitude_share: float
    magnitude_sd: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SpectralRecord:
    """The spectrum of one update.

    Args:
        name: The pair.
        shape: Shape of the matrix.
        view: The view that was measured.
        criterion: The criterion of the update mask.
        refused: Why nothing was measured; "" otherwise.
        is_estimate: Whether the measures come from a sketch.
        estimate_reason: Why, and how it was made; "" otherwise.
        entries: rows·cols.
        changed: Entries of the update mask.
        full_rank: min(rows, cols).
        k: Dimension of the subspaces, and rank of the approximation behind the principal mask.
        gap: (σ_k − σ_{k+1})/σ_k of W₀; angles grow without bound as it closes. None where σ_{k+1} is unknown.
        spectral_norm: ‖Δ‖₂.
        frobenius_norm: ‖Δ‖_F.
        tolerances: Of the ranks; None in an estimate.
        observed: Measures of the update.
        num_draws: Scattered updates drawn; 0 when Δ is zero.
        reference_mean: Mean of each measure over them.
        reference_sd: Standard deviation (n − 1); None below two draws.
        overlaps: With the principal and the low-magnitude mask.
    """

    name: str
    shape: tuple[int, ...]
    view: View
    criterion: str
    refused: str = ""
    is_estimate: bool = False
    estimate_reason: str = ""
    entries: int = 0
    changed: int = 0
    full_rank: int = 0
    k: int = 0
    gap: float | None = None
    spectral_norm: float | None = None
    frobenius_norm: float | None = None
    tolerances: RankTolerances | None = None
    observed: SpectralMeasures | None = None
    num_draws: int = 0
    reference_mean: SpectralMeasures | None = None
    reference_sd: SpectralMeasures | None = None
    overlaps: tuple[MaskOverlap, ...] = ()


def digits(number: float) -> float:
    """To 9 significant digits."""
    return float(f"{number:.8e}")


def ratio(number: float) -> float:
    """To 9 significant digits and at most 11 decimals: what is noise beside 1 is 0."""
    return round(digits(number), 11)
