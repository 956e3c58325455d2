"""How a diff depends on the precision of the weights: change rates, ULP distances, hidden changes.

Contract: reads the strata and cells of a `ViewTally` with the dtype of that view; counts are exact
integers, shares are in [0, 1] and None where the denominator is zero. "Changed" is `value` unless said
otherwise. Tallies of level `counts` have no strata: the results are empty. ULPs are those of the view's
dtype, so tallies are only added within one dtype (`merge_views`).
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from sparsity_audit.stats.grid import Stratum, StratumKind, describe, ulp_of_exponent
from sparsity_audit.stats.strata import (
    CROSS,
    IN,
    NAN_PAYLOAD,
    NUM_BUCKETS,
    OUT,
    SPECIAL,
    ZERO_SIGN,
    bucket_bounds,
)
from sparsity_audit.stats.tally import SpecialCounts, ViewTally
from sparsity_audit.types import Criterion, DType

__all__ = [
    "ExponentRate",
    "HiddenByTolerance",
    "HiddenUlps",
    "UlpBin",
    "UlpHistogram",
    "change_rates",
    "hidden_by_tolerance",
    "hidden_ulps",
    "merge_views",
    "rel_equals_value",
    "share",
    "ulp_histogram",
]


_SPECIAL_NAMES = tuple(field.name for field in dataclasses.fields(SpecialCounts))


def share(part: int, whole: int) -> float | None:
    """part/whole, or None when there is nothing to divide by."""
    return part / whole if whole else None


def merge_views(views: Iterable[ViewTally]) -> ViewTally:
    """The tally of tensors with one dtype and one set of criteria, taken together.

    Equals repeated `ViewTally.merge`, but linear in the number of tensors, and without `decay`, which
    means something only for the shrink it was tested with.
    """
    entries, flips, nonfinite, sums, largest = 0, 0, 0, [0, 0, 0], 0.0
    changed: Counter[str] = Counter()
    strata: Counter[int] = Counter()
    cells: Counter[tuple[int, int]] = Counter()
    specials: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
    for view in views:
        entries += view.entries
        flips += view.sign_flips
        nonfinite += view.nonfinite_deltas
        changed.update(view.changed)
        strata.update(view.strata)
        cells.update(view.cells)
        for total, counts in zip(specials, (view.base_specials, view.tuned_specials), strict=True):
            total.update({name: getattr(counts, name) for name in _SPECIAL_NAMES})
        sums = [sums[0] + view.abs_sum, sums[1] + view.sq_sum, sums[2] + view.base_sq_sum]
        largest = max(largest, view.max_abs)
    return ViewTally(
        entries=entries,
        changed=dict(changed),
        strata=dict(strata),
        cells=dict(cells),
        base_specials=SpecialCounts(**specials[0]),
        tuned_specials=SpecialCounts(**specials[1]),
        sign_flips=flips,
        nonfinite_deltas=nonfinite,
        abs_sum=sums[0],
        sq_sum=sums[1],
        base_sq_sum=sums[2],
        max_abs=largest,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ExponentRate:
    """Change rate of the entries whose base value has one exponent.

    Args:
        kind: Class of the base values; only `normal` rows have an exponent.
        exponent: e with 2^e ≤ |w_base| < 2^(e+1).
        entries: Entries with such a base value.
        changed: Those changed under `value`.
        one_ulp: Those that moved by exactly one code of the view's dtype.
        rate: changed ÷ entries.
        one_ulp_share: one_ulp ÷ changed.
    """

    kind: StratumKind
    exponent: int | None
    entries: int
    changed: int
    one_ulp: int
    rate: float | None
    one_ulp_share: float | None


_KIND_ORDER: tuple[StratumKind, ...] = (
    "zero",
    "subnormal",
    "normal",
    "normal_or_nan",
    "infinity",
    "nan",
    "not_float",
)


def change_rates(view: ViewTally, dtype: DType) -> tuple[ExponentRate, ...]:
    """Change rate per exponent of |w_base|: zero, subnormals, exponents upwards, infinity, NaN.

    Source: bf16 absorbs an update below about half a ULP of the weight, so the rate falls as |w_base|
    grows (2602.03839; 2511.08567 Cor. 3.6).
    """
    entries: Counter[tuple[int, int | None]] = Counter()
    changed: Counter[tuple[int, int | None]] = Counter()
    one_ulp: Counter[tuple[int, int | None]] = Counter()
    for stratum, count in view.strata.items():
        entries[_row_key(describe(stratum, dtype))] += count
    for (stratum, column), count in view.cells.items():
        key = _row_key(describe(stratum, dtype))
        if column not in (ZERO_SIGN, NAN_PAYLOAD):
            changed[key] += count
        if column in (OUT, IN):
            one_ulp[key] += count
    return tuple(
        ExponentRate(
            kind=_KIND_ORDER[key[0]],
            exponent=key[1],
            entries=entries[key],
            changed=changed[key],
            one_ulp=one_ulp[key],
            rate=share(changed[key], entries[key]),
            one_ulp_share=share(one_ulp[key], changed[key]),
        )
        for key in sorted(entries, key=lambda k: (k[0], k[1] or 0))
    )


def _row_key(stratum: Stratum) -> tuple[int, int | None]:
    return _KIND_ORDER.index(stratum.kind), stratum.exponent


@dataclass(frozen=True, slots=True, kw_only=True)
class UlpBin:
    """Entries whose codes lie `low` to `high` apart (ordered codes of the view's dtype).

    Args:
        low: Smallest distance of the bin; equals `high` up to 8.
        high: Largest distance of the bin.
        outward: Entries that grew in magnitude (integers: grew).
        inward: Entries that shrank (integers: shrank).
        crossing: Entries whose sign changed.
    """

    low: int
    high: int
    outward: int
    inward: int
    crossing: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UlpHistogram:
    """How far entries moved, in ordered codes; the parts add up to the `bitwise` count.

    Args:
        bins: Non-empty bins by rising distance.
        zero_sign: +0 against −0: changed only under `bitwise`.
        nan_payload: Equal values in other codes (NaN payloads, bool bytes): changed only under `bitwise`.
        special: NaN or infinity against something else, and every change of opaque storage.
    """

    bins: tuple[UlpBin, ...]
    zero_sign: int
    nan_payload: int
    special: int


def ulp_histogram(view: ViewTally) -> UlpHistogram:
    """The ULP distances of a view: exact to 8, then in bins that double."""
    columns: Counter[int] = Counter()
    for (_, column), count in view.cells.items():
        columns[column] += count
    bins = []
    for bucket in range(NUM_BUCKETS):
        low, high = bucket_bounds(bucket)
        outward, inward, crossing = (columns[side + bucket] for side in (OUT, IN, CROSS))
        if outward or inward or crossing:
            bins.append(UlpBin(low=low, high=high, outward=outward, inward=inward, crossing=crossing))
    return UlpHistogram(
        bins=tuple(bins),
        zero_sign=columns[ZERO_SIGN],
        nan_payload=columns[NAN_PAYLOAD],
        special=columns[SPECIAL],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class HiddenUlps:
    """Below |w| < 2^`below_exponent`, changes of up to `ulps` ULP stay within a tolerance."""

    below_exponent: int
    ulps: int


def hidden_ulps(tolerance: float, dtype: DType, *, num: int = 5) -> tuple[HiddenUlps, ...]:
    """The first `num` exponents, from large weights to small, where `atol:tolerance` hides changes.

    For bf16 and 1e-5: below 2⁻⁹ one ULP, below 2⁻¹⁰ two, below 2⁻¹¹ five, … Empty when the tolerance
    hides nothing that is not already zero.
    """
    layout = dtype.layout
    top = layout.num_exponents - 1 - layout.bias
    rows: list[HiddenUlps] = []
    for exponent in range(top, -layout.bias, -1):
        ulps = int(min(tolerance / ulp_of_exponent(exponent, layout), 2.0**63))
        if ulps >= 1:
            rows.append(HiddenUlps(below_exponent=exponent + 1, ulps=ulps))
        if len(rows) == num:
            break
    return tuple(rows)


def rel_equals_value(criterion: Criterion, dtype: DType) -> bool:
    """Whether a `rel:η` criterion is `value` for this dtype, whatever the weights.

    The smallest relative step between neighbours of a float format with m mantissa bits is 2^−(m+1)
    (from the largest mantissa to the next power of two), so a smaller η hides nothing: 2⁻⁸ for bf16.
    Checked over all bf16 and fp16 codes in the tests.
    """
    return (
        criterion.kind == "rel"
        and dtype.kind == "float"
        and criterion.parameter < 2.0 ** -(dtype.layout.mantissa_bits + 1)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class HiddenByTolerance:
    """What a tolerance calls unchanged although the number differs.

    Args:
        criterion: Key of the tolerance.
        value_changed: Entries changed under `value`.
        hidden: Those of them that the tolerance calls unchanged.
        share: hidden ÷ value_changed.
    """

    criterion: str
    value_changed: int
    hidden: int
    share: float | None


def hidden_by_tolerance(view: ViewTally, criterion: Criterion) -> HiddenByTolerance:
    """How many `value` changes a counted tolerance hides; exact."""
    value = view.changed["value"]
    hidden = value - view.changed[criterion.key]
    return HiddenByTolerance(
        criterion=criterion.key, value_changed=value, hidden=hidden, share=share(hidden, value)
    )
