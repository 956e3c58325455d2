"""The attribution ladder: an observed overlap, then what each null accounts for, then what is left.

Contract: pure; every number of chance carries the name of its null. *Rungs* are nested nulls, each of which
keeps what the one below keeps and adds something: `uniform` → `per-tensor` → `magnitude` →
`row-column-magnitude`. `row-column` and `phantom` stand beside them: they do not keep the strata of |w_base|.
The residual is the excess share over the highest rung there is; the sentence gives it over `magnitude` as
well. Magnitude *accounts for* so much; that rounding is the cause is for a phantom or an fp32 control to
show.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsity_audit.stats.chance import MAX_LIFT_CHANCE
from sparsity_audit.stats.overlap import (
    MAGNITUDE,
    NULL_ORDER,
    PER_TENSOR,
    ROW_COLUMN,
    ROW_COLUMN_MAGNITUDE,
    UNIFORM,
    PairOverlap,
)

__all__ = ["DENSITY_LIMIT", "MIN_HEADROOM", "RUNGS", "Ladder", "LadderStep", "attribution"]

RUNGS = (UNIFORM, PER_TENSOR, MAGNITUDE, ROW_COLUMN_MAGNITUDE)

DENSITY_LIMIT = 0.95
"""A denser mask is warned about: hardly an entry is left in which two runs could differ."""

MIN_HEADROOM = 100
"""Below this many entries between chance and ceiling an excess share is noise, and warned about."""

_NAMES = {
    UNIFORM: "uniform chance",
    PER_TENSOR: "tensor densities",
    MAGNITUDE: "weight magnitude",
    ROW_COLUMN_MAGNITUDE: "rows, columns and magnitude",
    ROW_COLUMN: "rows and columns",
    "phantom": "random updates rounded once (phantom)",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LadderStep:
    """One null of a ladder.

    Args:
        null: Its name.
        label: What it keeps, in words.
        jaccard: J₀ under it.
        excess_share: The pair's excess share over it.
        is_rung: Whether it keeps all that the rungs below keep.
    """

    null: str
    label: str
    jaccard: float | None
    excess_share: float | None
    is_rung: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Ladder:
    """What accounts for the overlap of a pair.

    Args:
        observed: Jaccard of the pair; None for two empty masks.
        steps: The nulls, in their fixed order.
        residual_null: The highest rung; `residual` is the excess share over it.
        residual: None where chance leaves no room for an excess.
        residual_z: Its z; None where it has none.
        reference_residual: The same of a reference pair, such as a run that learned nothing.
        sentence: All of it in one sentence.
        warnings: Why the comparison says little, if it does.
    """

    observed: float | None
    steps: tuple[LadderStep, ...]
    residual_null: str
    residual: float | None
    residual_z: float | None
    reference_residual: float | None
    sentence: str
    warnings: tuple[str, ...]


def attribution(
    pair: PairOverlap,
    reference: PairOverlap | None,
    *,
    reference_label: str = "a run with shuffled rewards",
) -> Ladder:
    """The ladder of a pair beside a reference.

    Args:
        pair: The pair in question.
        reference: One of its runs against a run that learned nothing; None where there is none.
        reference_label: What that run is, in words.
    """
    steps = tuple(
        LadderStep(
            null=null,
            label=_NAMES[null],
            jaccard=pair.nulls[null].jaccard,
            excess_share=pair.nulls[null].excess_share,
            is_rung=null in RUNGS,
        )
        for null in NULL_ORDER
        if null in pair.nulls
    )
    top = next(null for null in reversed(RUNGS) if null in pair.nulls)
    of_reference = reference.nulls.get(top) if reference is not None else None
    return Ladder(
        observed=pair.jaccard,
        steps=steps,
        residual_null=top,
        residual=pair.nulls[top].excess_share,
        residual_z=pair.nulls[top].z,
        reference_residual=None if of_reference is None else of_reference.excess_share,
        sentence=_sentence(pair, steps, reference, reference_label),
        warnings=_warnings(pair, top),
    )


def _sentence(
    pair: PairOverlap, steps: tuple[LadderStep, ...], reference: PairOverlap | None, reference_label: str
) -> str:
    if pair.jaccard is None:
        return "Both masks are empty: there is no overlap to account for"
    by_counts = [step for step in steps if step.is_rung and step.null != ROW_COLUMN_MAGNITUDE]
    chances = ", ".join(f"{step.label} {_three(step.jaccard)}" for step in by_counts)
    has_nested = any(step.null == ROW_COLUMN_MAGNITUDE for step in steps)
    alone = [step for step in steps if step.null == ROW_COLUMN and not has_nested]
    beside = ", ".join(f"{step.label} {_three(step.jaccard)}" for step in alone)
    text = f"Jaccard {_three(pair.jaccard)}: {chances}" + (f" (beside these: {beside})" if beside else "")
    last = [by_counts[-1], *[step for step in steps if step.null == ROW_COLUMN_MAGNITUDE]]
    for number, step in enumerate(last):
        lead = f"given its rows and columns as well {_three(step.jaccard)}, " if number else ""
        if step.excess_share is None:
            return f"{text}; {lead}chance leaves no room for an excess"
        text += f"; {lead}beyond that an excess share of {_share(step.excess_share)}"
    if reference is not None:
        nulls = [reference.nulls.get(step.null) for step in last]
        shares = [_share(null.excess_share) for null in nulls if null and null.excess_share is not None]
        if shares:
            text += f"; {reference_label} has {' and '.join(shares)} of its own"
    return text


def _warnings(pair: PairOverlap, top: str) -> tuple[str, ...]:
    found = []
    for name, count in (("first", pair.a), ("second", pair.b)):
        if count == 0:
            found.append(f"the {name} mask is empty: nothing can be said about its overlap")
        elif count == pair.entries:
            found.append(f"the {name} mask is full: its overlap is fixed whatever the other one is")
        elif count > DENSITY_LIMIT * pair.entries:
            found.append(
                f"the {name} mask holds {count / pair.entries:.1%} of the entries: nearly all of any other "
                "mask lies in it; a stricter criterion (top:1%) can tell runs apart"
            )
    null = pair.nulls[top]
    headroom = min(pair.a, pair.b) - null.expected
    if 0 < headroom < MIN_HEADROOM and min(pair.a, pair.b) > 0:
        found.append(
            f"only {headroom:.3g} entries lie between {top} chance and full containment: the excess share is "
            "noise"
        )
    if null.jaccard is not None and null.jaccard > MAX_LIFT_CHANCE:
        found.append(
            f"{top} chance is {_three(null.jaccard)}: most of the overlap needs no common cause but that, "
            "and no lift is given above .5"
        )
    if null.variance == 0 and min(pair.a, pair.b) > 0 and max(pair.a, pair.b) < pair.entries:
        found.append(f"the strata of {top} leave nothing to chance: they repeat the observation")
    side = pair.nulls.get(ROW_COLUMN)
    if side is not None and side.expected > null.expected:
        found.append(
            f"row-column chance, {_three(side.jaccard)}, lies above {top} chance: which rows and columns are "
            "hit accounts for more of this overlap"
        )
    return tuple(found)


def _three(value: float | None) -> str:
    return _plain(value, 3)


def _share(value: float) -> str:
    """To two places; to three below .01, where two would say nothing."""
    return _plain(value, 2 if abs(value) >= 0.01 else 3)


def _plain(value: float | None, places: int) -> str:
    """Without the zero before the point, as the papers print shares; − before negative ones."""
    if value is None:
        return "undefined"
    text = f"{abs(value):.{places}f}".removeprefix("0")
    return ("−" if value < 0 and float(text) > 0 else "") + text
