"""How a full study compares runs, decides, and prints numbers. Pure.

Contract: two runs are compared seed by seed. An interval is 95 %, over problems: the problems are the same
for all runs and the two errors are taken as independent, which makes it too wide. Seeds are not pooled:
two or three of them have no interval of their own, so a claim holds only where every seed says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from sparsity_audit.lab.estimators import Estimate, Interval
from sparsity_audit.report.study_full import FullClaim, FullVerdict, Table
from sparsity_audit.report.study_full_facts import FullFacts, FullRun

__all__ = [
    "NEGLIGIBLE",
    "RULE",
    "arm_differences",
    "by_seed",
    "decided",
    "difference",
    "not_measured",
    "percent",
    "shown_estimate",
    "shown_interval",
    "signed",
]

NEGLIGIBLE = 0.02
"""A difference of accuracies or of sparsities that counts as none."""

RULE = (
    "it reproduces where the interval of every seed lies above 0, it does not where every seed's lies below "
    f"{NEGLIGIBLE:g}; else seeds disagree or intervals are too wide, and it is undecided"
)
_Z = 1.959964


def difference(a: Estimate, b: Estimate) -> Interval:
    """A − b with its 95 % interval, errors taken as independent."""
    half = _Z * math.hypot(a.standard_error or 0.0, b.standard_error or 0.0)
    value = a.value - b.value
    return Interval(value=value, low=value - half, high=value + half, num_prompts=a.num_prompts)


def decided(differences: Sequence[Interval]) -> FullVerdict:
    """The verdict of `RULE`; without a difference nothing was measured."""
    if not differences:
        return "not measured"
    if all(part.low > 0 for part in differences):
        return "reproduces"
    return "does not reproduce" if all(part.high < NEGLIGIBLE for part in differences) else "undecided"


def arm_differences(facts: FullFacts, sweep: str, a: str, b: str) -> tuple[Interval, ...]:
    """Accuracy of one arm less that of another on their own task, seed by seed."""
    ones, others = by_seed(facts.of(sweep, a)), by_seed(facts.of(sweep, b))
    return tuple(
        difference(ones[seed].tests[0].accuracy, others[seed].tests[0].accuracy)
        for seed in ones
        if seed in others
    )


def by_seed(runs: Iterable[FullRun]) -> dict[int, FullRun]:
    """Runs of one arm."""
    return {run.seed: run for run in runs}


def not_measured(key: str, *, part: str, title: str, source: str) -> FullClaim:
    """The claim of a part that was not run."""
    return FullClaim(
        key=key,
        part=part,
        title=title,
        source=source,
        goal="–",
        verdict="not measured",
        reading=f"Part {part} was not run.",
        tables=tuple[Table, ...](),
        caption="",
    )


def signed(value: float, digits: int = 3) -> str:
    """With its sign, and a real minus; what rounds to 0 has none."""
    text = f"{value:+.{digits}f}"
    return text[1:] if not float(text) else text.replace("-", "−")


def shown_interval(part: Interval) -> str:
    """`+0.021 (−0.004 to +0.046)`."""
    return f"{signed(part.value)} ({signed(part.low)} to {signed(part.high)})"


def shown_estimate(part: Estimate) -> str:
    """`0.421 (0.395–0.447)`."""
    return f"{part.value:.3f} ({part.low:.3f}–{part.high:.3f})"


def percent(value: float) -> str:
    """`85 %`."""
    return f"{100 * value:.0f} %".replace("-", "−")
