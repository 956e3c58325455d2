"""What a set of positions says together: shares, concentration, profile, histogram, new tokens.

Contract: pure functions of the columns that `measure` made; integers are exact counts, shares are in [0, 1],
None is undefined, never 0. Intervals are over prompts. An infinite KL is counted, and left out of its mean.

Source: shares below .01 and above .1, concentration, profile, re-ranking: 2603.22446, which leaves its
thresholds unstated; they are constants here. Δ log p: 2603.22117.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sparsity_audit.stats.paired import resample
from sparsity_audit.tokens.intervals import RatioEstimate, concentration_interval, ratio_estimates

__all__ = [
    "CURVE_FRACS",
    "ENTROPY_EDGES",
    "HIGH",
    "JS_EDGES",
    "LOW",
    "NEW_TOKEN",
    "PERCENTILES",
    "Choices",
    "ProfilePoint",
    "SetSummary",
    "summarise",
]

LOW, HIGH = 0.01, 0.1
"""JS in nats below which two distributions are called alike, above which different."""

NEW_TOKEN = 0.01
"""The tuned model's first choice is *new* where the base gives it less than this."""

PERCENTILES = (50, 75, 90, 95, 99, 100)
CURVE_FRACS = (0.001, 0.002, 0.005, *(n / 100 for n in range(1, 21)), *(n / 20 for n in range(5, 21)))
JS_EDGES = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, math.log(2))
ENTROPY_EDGES = (0.0, 1e-3, 1e-2, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 15.0)
"""Nats; the last bins take in their upper edge, and what lies beyond."""

_EXACT_PROFILE = 64
_RELATIVE_BINS = 20
_DRAWS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """Whether the tuned model's first choice is one the base considered, over some positions.

    Args:
        positions: Positions.
        same: The base's first choice as well.
        in_top_3: Among the base's three most probable.
        in_top_10: Among its ten.
        new: Given less than `NEW_TOKEN` by the base.
    """

    positions: int
    same: RatioEstimate
    in_top_3: RatioEstimate
    in_top_10: RatioEstimate
    new: RatioEstimate


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfilePoint:
    """Positions at about one place of their completions.

    Args:
        start: First position, or share of the completion, that counts.
        end: The first that does not.
        positions: How many.
        mean_js: None where there are none.
        above: Share above `HIGH`; None where there are none.
    """

    start: float
    end: float
    positions: int
    mean_js: float | None
    above: float | None

    def is_common(self, completions: int) -> bool:
        """Whether at least one in 50 completions is as long as that: a mean over fewer is noise."""
        return self.positions >= completions * (self.end - self.start) / 50


@dataclass(frozen=True, slots=True, kw_only=True)
class SetSummary:
    """The positions of one set of completions.

    Args:
        prompts: Prompts with at least one position.
        sequences: Completions.
        positions: Positions.
        mean_js: Mean Jensen–Shannon divergence, nats.
        below: Share of positions below `LOW`.
        above: Share above `HIGH`.
        above_nucleus: Share above `HIGH` after top-p truncation; None where none was asked for.
        js_percentiles: Percentile → JS.
        kl_base_tuned: Mean KL(base‖tuned) where it is finite.
        kl_tuned_base: Mean KL(tuned‖base) where it is finite.
        infinite_kl: Positions where either is infinite.
        entropy_base: Mean entropy of the base.
        entropy_tuned: Mean entropy of the tuned model.
        delta_logprob: Mean of log p(tuned) − log p(base) of the tokens that stand there, where finite.
        argmax_agreement: Share of positions with the same first choice.
        top_k_overlap: Mean share of the k most probable tokens in common.
        concentration: Share of all JS in the 10 % most divergent positions.
        curve: Share of all JS in the most divergent x of positions, x by `CURVE_FRACS`; None without JS.
        by_position: Profile over the position from the start.
        by_share: Profile over the share of the completion.
        histogram: Counts by JS (rows, `JS_EDGES`) and base entropy (columns, `ENTROPY_EDGES`).
        choices: Over all positions.
        choices_above: Over those above `HIGH`.
    """

    prompts: int
    sequences: int
    positions: int
    mean_js: RatioEstimate
    below: RatioEstimate
    above: RatioEstimate
    above_nucleus: RatioEstimate | None
    js_percentiles: dict[int, float]
    kl_base_tuned: RatioEstimate
    kl_tuned_base: RatioEstimate
    infinite_kl: int
    entropy_base: RatioEstimate
    entropy_tuned: RatioEstimate
    delta_logprob: RatioEstimate
    argmax_agreement: RatioEstimate
    top_k_overlap: RatioEstimate
    concentration: RatioEstimate
    curve: tuple[float, ...] | None
    by_position: tuple[ProfilePoint, ...]
    by_share: tuple[ProfilePoint, ...]
    histogram: tuple[tuple[int, ...], ...]
    choices: Choices
    choices_above: Choices


def summarise(columns: dict[str, np.ndarray], prompts: Sequence[int], *, seed: int) -> SetSummary:
    """The summary of at least one position.

    Args:
        columns: As `Measured.columns`.
        prompts: The prompt of each sequence, by the sequence's number.
        seed: Of the resamples.
    """
    js, sequence = columns["js"], columns["sequence"]
    _, owner = np.unique(np.asarray(prompts)[sequence], return_inverse=True)
    num_prompts = int(owner.max()) + 1
    times = resample(num_prompts, draws=_DRAWS, seed=seed)
    figures = _figures(columns)
    choices, choices_above = _choices(columns, owner, times)
    finite = np.isfinite(columns["kl_base_tuned"]) & np.isfinite(columns["kl_tuned_base"])
    found = _estimates(figures, owner, times)
    return SetSummary(
        prompts=num_prompts,
        sequences=len(np.unique(sequence)),
        positions=len(js),
        above_nucleus=found.pop("above_nucleus", None),
        **found,
        js_percentiles={p: float(np.percentile(js, p)) for p in PERCENTILES},
        infinite_kl=int((~finite).sum()),
        concentration=concentration_interval(js, owner, times, top_frac=0.1),
        curve=_curve(js),
        by_position=_profile(
            columns["position"].astype(np.float64), js, _position_edges(columns["position"])
        ),
        by_share=_profile(_shares(columns), js, np.linspace(0, 1, _RELATIVE_BINS + 1)),
        histogram=_histogram(js, columns["entropy_base"]),
        choices=choices,
        choices_above=choices_above,
    )


def _figures(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Name → values whose mean over positions is reported; NaN is left out."""
    js = columns["js"]
    with np.errstate(invalid="ignore"):
        delta = columns["logprob_tuned"] - columns["logprob_base"]
    figures = {
        "mean_js": js,
        "below": js < LOW,
        "above": js > HIGH,
        "kl_base_tuned": columns["kl_base_tuned"],
        "kl_tuned_base": columns["kl_tuned_base"],
        "entropy_base": columns["entropy_base"],
        "entropy_tuned": columns["entropy_tuned"],
        "delta_logprob": delta,
        "argmax_agreement": columns["top_base"] == columns["top_tuned"],
        "top_k_overlap": columns["top_k_overlap"],
    }
    if "js_nucleus" in columns:
        figures["above_nucleus"] = columns["js_nucleus"] > HIGH
    return {name: np.where(np.isfinite(values), values, np.nan) for name, values in figures.items()}


def _estimates(
    figures: dict[str, np.ndarray], owner: np.ndarray, times: np.ndarray
) -> dict[str, RatioEstimate]:
    num = times.shape[1]
    sums = [np.bincount(owner, np.nan_to_num(values), num) for values in figures.values()]
    counts = [np.bincount(owner, ~np.isnan(values), num) for values in figures.values()]
    found = ratio_estimates(np.stack(sums, axis=1), np.stack(counts, axis=1), times)
    return dict(zip(figures, found, strict=True))


def _choices(columns: dict[str, np.ndarray], owner: np.ndarray, times: np.ndarray) -> tuple[Choices, Choices]:
    rank = columns["tuned_top_rank_base"]
    of_first = {
        "same": columns["top_base"] == columns["top_tuned"],
        "in_top_3": rank <= 3,
        "in_top_10": rank <= 10,
        "new": columns["tuned_top_logprob_base"] < math.log(NEW_TOKEN),
    }
    found = []
    for counted in (np.ones(len(rank), dtype=bool), columns["js"] > HIGH):
        figures = {name: np.where(counted, value, np.nan) for name, value in of_first.items()}
        found.append(Choices(positions=int(counted.sum()), **_estimates(figures, owner, times)))
    return found[0], found[1]


def _curve(js: np.ndarray) -> tuple[float, ...] | None:
    """Share of the sum in the first x of the positions, the most divergent first; linear within one."""
    total = float(js.sum())
    if total <= 0:
        return None
    held = np.concatenate([[0.0], np.cumsum(-np.sort(-js))]) / total
    places = np.array(CURVE_FRACS) * len(js)
    return tuple(np.minimum(np.interp(places, np.arange(len(held)), held), 1.0).tolist())


def _position_edges(positions: np.ndarray) -> np.ndarray:
    """Every position for itself up to 64, then bins that grow by a quarter."""
    last = int(positions.max()) + 1
    edges = list(range(min(last, _EXACT_PROFILE) + 1))
    while edges[-1] < last:
        edges.append(min(last, edges[-1] * 5 // 4))
    return np.array(edges, dtype=np.float64)


def _shares(columns: dict[str, np.ndarray]) -> np.ndarray:
    """Where a position lies in its completion, in [0, 1)."""
    _, place, lengths = np.unique(columns["sequence"], return_inverse=True, return_counts=True)
    return columns["position"] / lengths[place]


def _profile(places: np.ndarray, js: np.ndarray, edges: np.ndarray) -> tuple[ProfilePoint, ...]:
    at = np.clip(np.searchsorted(edges, places, side="right") - 1, 0, len(edges) - 2)
    counts = np.bincount(at, minlength=len(edges) - 1)
    sums = np.bincount(at, js, len(edges) - 1)
    above = np.bincount(at, js > HIGH, len(edges) - 1)
    return tuple(
        ProfilePoint(
            start=float(edges[n]),
            end=float(edges[n + 1]),
            positions=int(counts[n]),
            mean_js=float(sums[n] / counts[n]) if counts[n] else None,
            above=float(above[n] / counts[n]) if counts[n] else None,
        )
        for n in range(len(counts))
    )


def _histogram(js: np.ndarray, entropy: np.ndarray) -> tuple[tuple[int, ...], ...]:
    rows, cols = (
        np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)
        for edges, values in ((JS_EDGES, js), (ENTROPY_EDGES, entropy))
    )
    counts = np.zeros((len(JS_EDGES) - 1, len(ENTROPY_EDGES) - 1), dtype=np.int64)
    np.add.at(counts, (rows, cols), 1)
    return tuple(tuple(row) for row in counts.tolist())
