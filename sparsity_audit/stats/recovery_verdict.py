"""What a recovery says in words, and what it does not: the traps, each where it applies.

Contract: pure; a function of figures. No sentence is made of a figure that is undefined. Recovery of a score
alone proves little, and neither does agreement of parameters that never moved: controls and references are
named.

Source of the traps: random 1 % masks match full runs (2602.01599), a random 74 % mask lands within 1–2 points
of dense training (2511.08567), one layer alone recovers the gain (2607.01232).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sparsity_audit.stats.scores import Interval, RecoveredShare

__all__ = ["ControlFigures", "RecoveryFigures", "recovery_sentence", "recovery_warnings"]

_MANY = 0.5
"""A tolerance under which the base agrees on more than this tells little; a mask denser than this as well."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlFigures:
    """A control.

    Args:
        label: Its name.
        share: Of the gain; None without a score.
        lead: Interval of the accuracy of the retrained run less the control's; None without scores.
    """

    label: str
    share: RecoveredShare | None
    lead: Interval | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryFigures:
    """What the words are made of.

    Args:
        share: The retrained run's share of the gain; None without scores.
        controls: The controls.
        density: Entries inside the mask ÷ compared; None when nothing is compared.
        run_inside: Share of entries inside the mask that equal full's, by criterion.
        base_inside: The same of the base.
        run_overall: The same of the run, over all entries.
        frozen_moved: Entries that moved outside of a run's own mask, by label, where there is one.
        same_seed: Whether full and run had one seed; None where not known.
        is_bf16: Whether weights were rounded to bf16 between steps; None where not known.
    """

    share: RecoveredShare | None
    controls: Sequence[ControlFigures]
    density: float | None
    run_inside: Mapping[str, float | None]
    base_inside: Mapping[str, float | None]
    run_overall: Mapping[str, float | None]
    frozen_moved: Mapping[str, int]
    same_seed: bool | None
    is_bf16: bool | None


def recovery_sentence(figures: RecoveryFigures) -> str:
    """The verdict: shares of the gain, then agreement inside the mask beside that of the untrained base."""
    parts = []
    if figures.share is not None:
        parts.append(f"the mask recovers {_share(figures.share)}")
        parts += [f"{c.label} {_share(c.share)}" for c in figures.controls if c.share is not None]
    run, base = figures.run_inside.get("bitwise"), figures.base_inside.get("bitwise")
    agreement = "the mask is empty"
    if run is not None and base is not None:
        agreement = (
            f"inside it {_percent(run)} of the entries are the full run's bit for bit (the base has "
            f"{_percent(base)})"
        )
    return "; ".join([*parts, agreement])


def recovery_warnings(figures: RecoveryFigures) -> tuple[str, ...]:
    """What a reader must not conclude, most severe first."""
    found = [
        f"{label} is not frozen: {moved:,} entries outside of its mask differ from the base"
        for label, moved in figures.frozen_moved.items()
        if moved
    ]
    if figures.same_seed and figures.is_bf16:
        found.append(
            "same seed and weights rounded to bf16: what the mask leaves out did not move in the full run "
            "either, so that both runs are nearly one run by construction; a sanity check, no evidence"
        )
    elif figures.same_seed:
        found.append("full and retrained run have one seed: a new seed is the evidence")
    elif figures.same_seed is None:
        found.append(
            "the seeds are not known: with one seed and weights in bf16 recovery holds by construction"
        )
    if figures.share is None:
        found.append("no task metrics: agreement of parameters says nothing about performance")
    if not figures.controls:
        found.append(
            "no control: random masks of this density, the complement or another run's mask often do as well"
        )
    found += _as_good(figures.controls)
    if figures.density is not None and figures.density > _MANY:
        found.append(
            f"the mask holds {_percent(figures.density)} of the entries: random masks this dense recover "
            "most of a gain as well"
        )
    overall = figures.run_overall.get("bitwise")
    if overall is not None and figures.density is not None and figures.density < 1:
        found.append(
            f"of the overall agreement ({_percent(overall)} bit for bit), entries outside the mask "
            f"({_percent(1 - figures.density)} of all) agree by construction as far as the full run left them"
        )
    loose = {c: s for c, s in figures.base_inside.items() if s is not None and s > _MANY}
    found += [
        f"under {criterion} the untrained base agrees with the full run on {_percent(share)} of the entries "
        "inside the mask: this tolerance exceeds most of the update"
        for criterion, share in loose.items()
    ]
    return tuple(found)


def _as_good(controls: Sequence[ControlFigures]) -> list[str]:
    """Controls that the retrained run is not shown to beat."""
    even = [control.label for control in controls if control.lead is not None and control.lead.low <= 0]
    if not even:
        return []
    verb = "is" if len(even) == 1 else "are"
    return [
        (
            f"{', '.join(even)} {verb} not shown to be worse than the mask: where other entries do as well, "
            "it is not these entries that do it"
        )
    ]


def _share(share: RecoveredShare | None) -> str:
    if share is None or share.value is None:
        return "an undefined share of the gain"
    text = f"{_whole(share.value)} % of the gain"
    if share.interval is None:
        return f"{text} [no interval: {share.reason}]"
    return f"{text} [95 %: {_whole(share.interval.low)} to {_whole(share.interval.high)} %]"


def _percent(share: float) -> str:
    """One decimal, never 0 or 100 for what is neither."""
    text = f"{100 * share:.1f}"
    if share > 0 and text == "0.0":
        text = "<0.1"
    elif share < 1 and text == "100.0":
        text = ">99.9"
    return f"{text} %"


def _whole(share: float) -> str:
    """In percent, without decimals; −0 is 0."""
    return f"{round(100 * share)}".replace("-", "−")
