"""Weight decay in wide pairs: the shrink that most entries share, and what is left without it.

Contract: multiplicative decay leaves a fingerprint, w_tuned = (1 − c)·w_base with one c per tensor,
while updates towards and away from zero are about as frequent. So every count in the decay band is
judged against its *mirror*: entries that grew by as much. Nothing here claims decay below the stated
significance, effect and purity. Source of the mechanism: decoupled weight decay (1711.05101) multiplies
every weight by 1 − lr·λ per step, trained or not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sparsity_audit.stats.tally import Tally

__all__ = ["DecayVerdict", "decay_verdict", "estimate_shrink"]

_BINS_PER_OCTAVE = 8
_LOWEST, _HIGHEST = 1e-8, 1e-1
_MIN_Z = 6.0
"""Signs in the band are fair coins without decay; with about 200 overlapping windows p stays below 1e-6."""

_MIN_SHARE = 0.005
"""Smallest excess, as a share of all entries, that is worth a sentence."""

_MIN_PURITY = 0.5
"""Smallest (band − mirror)/(band + mirror). Training drifts inwards a little: on a fine-tuned sentence
encoder the most one-sided octave of weight matrices has purity .03, tensors under pure decay 1.0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecayVerdict:
    """A tensor's entries split into unchanged, decay band and moved, with the control beside it.

    Args:
        shrink: The c that was tested.
        entries: Entries compared.
        unchanged: Entries equal under `value`.
        band: Changed entries that shrank by between c/2 and 2c, relative.
        moved: Changed entries outside the band.
        mirror: Entries that *grew* by between c/2 and 2c: false positives to expect in the band.
        within_one_ulp: Changed entries at most 1 ULP from (1 − c)·w_base.
        unchanged_share: unchanged ÷ entries; None where there are none, as for the next two.
        band_share: band ÷ entries.
        moved_share: moved ÷ entries.
        net_decay_share: (band − mirror) ÷ entries, not below 0.
        decay_only_rows: Rows in which something changed and all of it lies in the band; None when rows
            were not counted.
        verdict: `decay` when (band − mirror)/√(band + mirror) > 6, the net share is at least 0.5 % and
            (band − mirror)/(band + mirror) at least one half; else `no decay`.
    """

    shrink: float
    entries: int
    unchanged: int
    band: int
    moved: int
    mirror: int
    within_one_ulp: int
    unchanged_share: float | None
    band_share: float | None
    moved_share: float | None
    net_decay_share: float | None
    decay_only_rows: int | None
    verdict: Literal["decay", "no decay"]


def decay_verdict(tally: Tally, *, shrink: float) -> DecayVerdict | None:
    """What the decay counts of a tensor say, or None where no shrink was tested.

    Args:
        tally: The tensor's tally; its native view holds the decay counts.
        shrink: The c the counts were made with.
    """
    view, decay = tally.native, tally.native.decay
    if decay is None:
        return None
    changed, entries = view.changed["value"], view.entries
    verdict = _is_clear(decay.band, decay.mirror, entries)
    return DecayVerdict(
        shrink=shrink,
        entries=entries,
        unchanged=entries - changed,
        band=decay.band,
        moved=changed - decay.band,
        mirror=decay.mirror,
        within_one_ulp=decay.within_one_ulp,
        unchanged_share=(entries - changed) / entries if entries else None,
        band_share=decay.band / entries if entries else None,
        moved_share=(changed - decay.band) / entries if entries else None,
        net_decay_share=max(0, decay.band - decay.mirror) / entries if entries else None,
        decay_only_rows=None if tally.axes is None else tally.axes.decay_only_rows,
        verdict="decay" if verdict else "no decay",
    )


def estimate_shrink(base_values: np.ndarray, tuned_values: np.ndarray) -> float | None:
    """The shrink c that clearly more entries share than chance explains, from a sample; else None.

    r = 1 − tuned/base of the entries that changed and kept their sign is binned to eighths of an octave
    from 1e-8 to 1e-1, growth beside shrinkage. The octave with the largest excess of shrinkage wins, and
    c is the median r in it: an octave, because repeated rounding to fp32 spreads the shrink of equal
    weights by up to a factor 2 (a step of x ULP becomes round(x) ULP, and round(x)/x is in [2/3, 2]).

    Args:
        base_values: float64[n], base values of a sample of entries, unchanged ones included.
        tuned_values: float64[n], the same entries of the tuned side.
    """
    assert base_values.shape == tuned_values.shape, (base_values.shape, tuned_values.shape)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        judged = (
            (base_values != tuned_values)
            & (np.signbit(base_values) == np.signbit(tuned_values))
            & (base_values != 0)
            & np.isfinite(base_values)
            & np.isfinite(tuned_values)
        )
        base, tuned = base_values[judged], tuned_values[judged]
        # (base − tuned)/base keeps digits that 1 − tuned/base cancels.
        ratio = (base - tuned) / base
    edges = _edges()
    shrunk = _octave_sums(np.histogram(ratio, edges)[0])
    grown = _octave_sums(np.histogram(-ratio, edges)[0])
    best = int(np.argmax(shrunk - grown))
    if not _is_clear(int(shrunk[best]), int(grown[best]), base_values.size):
        return None
    inside = ratio[(ratio >= edges[best]) & (ratio < edges[best + _BINS_PER_OCTAVE])]
    return float(np.median(inside))


def _edges() -> np.ndarray:
    first = math.floor(math.log2(_LOWEST) * _BINS_PER_OCTAVE)
    last = math.ceil(math.log2(_HIGHEST) * _BINS_PER_OCTAVE)
    return np.exp2(np.arange(first, last + 1) / _BINS_PER_OCTAVE)


def _octave_sums(histogram: np.ndarray) -> np.ndarray:
    return np.convolve(histogram, np.ones(_BINS_PER_OCTAVE, dtype=np.int64), mode="valid")


def _is_clear(band: int, mirror: int, entries: int) -> bool:
    excess, total = band - mirror, band + mirror
    return (
        excess > _MIN_Z * math.sqrt(total)
        and excess >= _MIN_SHARE * entries
        and excess >= _MIN_PURITY * total
    )
