"""How the divergence from the base grows along a run's saved steps, on the same positions.

Contract: pure functions of the JS of each step at each position. A position is *divergent* at a step where
its JS is above `HIGH`; the last step's divergent set is what the others are compared with, beside the overlap
that sets of these sizes have by chance. Intervals are over prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sparsity_audit.stats.paired import resample
from sparsity_audit.tokens.intervals import RatioEstimate, ratio_estimates
from sparsity_audit.tokens.summary import HIGH, LOW, PERCENTILES

__all__ = ["TOP", "SetSeries", "StepDivergence", "summarise_series"]

TOP = 0.1
"""Share of the positions that `jaccard_top` compares."""

_DRAWS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDivergence:
    """One saved step against the base.

    Args:
        mean_js: Mean divergence, nats.
        above: Share of positions above `HIGH`.
        below: Share below `LOW`.
        js_percentiles: Percentile → JS.
        divergent: Positions above `HIGH`.
        shared: Those among them that are divergent at the last step too.
        jaccard: Of the divergent set with the last step's; None where both are empty.
        chance_jaccard: Of two sets of these sizes drawn from all positions: expected shared ÷ the rest.
        coverage: Share of the last step's set that is divergent here; None where that is empty.
        jaccard_top: Of the tenth of the positions with the largest JS here and at the last step: sets of one
            size, whatever the scale; None where fewer positions have moved at all.
        chance_jaccard_top: Of two such sets drawn from all positions.
    """

    mean_js: RatioEstimate
    above: RatioEstimate
    below: RatioEstimate
    js_percentiles: dict[int, float]
    divergent: int
    shared: int
    jaccard: float | None
    chance_jaccard: float | None
    coverage: float | None
    jaccard_top: float | None
    chance_jaccard_top: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SetSeries:
    """One set of completions along the steps.

    Args:
        positions: Positions.
        prompts: Prompts.
        steps: One record a saved step.
        mean_grows: Whether the mean JS never falls from one saved step to the next.
        monotone: Share of the last step's divergent positions whose JS never falls; None without any.
        falls: Mean over those positions of the largest fall of JS between saved steps, nats; None as above.
    """

    positions: int
    prompts: int
    steps: tuple[StepDivergence, ...]
    mean_grows: bool
    monotone: float | None
    falls: float | None


def summarise_series(js: np.ndarray, owner: Sequence[int] | np.ndarray, *, seed: int) -> SetSeries:
    """The series of one set of at least one position.

    Args:
        js: float64[steps, positions].
        owner: The prompt of each position.
        seed: Of the resamples.
    """
    _, prompts = np.unique(np.asarray(owner), return_inverse=True)
    num_prompts = int(prompts.max()) + 1
    times = resample(num_prompts, draws=_DRAWS, seed=seed)
    last = js[-1] > HIGH
    means = js.mean(axis=1)
    falls = np.maximum(-np.diff(js, axis=0), 0.0)[:, last]
    has_falls = bool(last.any()) and len(js) > 1
    return SetSeries(
        positions=js.shape[1],
        prompts=num_prompts,
        steps=tuple(_step(row, js[-1], prompts, times) for row in js),
        mean_grows=bool((np.diff(means) >= 0).all()),
        monotone=float((falls.max(axis=0) == 0).mean()) if has_falls else None,
        falls=float(falls.max(axis=0).mean()) if has_falls else None,
    )


def _step(js: np.ndarray, last_js: np.ndarray, prompts: np.ndarray, times: np.ndarray) -> StepDivergence:
    num = times.shape[1]
    counts = np.bincount(prompts, minlength=num)
    sums = [np.bincount(prompts, values, num) for values in (js, js > HIGH, js < LOW)]
    mean_js, above, below = ratio_estimates(
        np.stack(sums, axis=1), np.repeat(counts[:, None], 3, axis=1), times
    )
    here, last = js > HIGH, last_js > HIGH
    a, b, shared = int(here.sum()), int(last.sum()), int((here & last).sum())
    num_top = max(1, round(TOP * len(js)))
    return StepDivergence(
        mean_js=mean_js,
        above=above,
        below=below,
        js_percentiles={p: float(np.percentile(js, p)) for p in PERCENTILES},
        divergent=a,
        shared=shared,
        jaccard=shared / (a + b - shared) if a or b else None,
        chance_jaccard=_chance(a, b, len(js)) if a or b else None,
        coverage=shared / b if b else None,
        jaccard_top=_jaccard_top(js, last_js, num_top),
        chance_jaccard_top=_chance(num_top, num_top, len(js)),
    )


def _chance(a: int, b: int, num: int) -> float:
    """Jaccard index with the shared part that sets of a and b positions have on average."""
    shared = a * b / num
    return shared / (a + b - shared)


def _jaccard_top(js: np.ndarray, last: np.ndarray, num: int) -> float | None:
    """Of the `num` positions with the largest values of both; equals by their place."""
    tops = [np.argsort(-values, kind="stable")[:num] for values in (js, last)]
    if js[tops[0][-1]] <= 0 or last[tops[1][-1]] <= 0:
        return None
    shared = len(np.intersect1d(tops[0], tops[1]))
    return shared / (2 * num - shared)
