"""Part f of a full study: divergence-weighted advantages against the baseline and their own controls.

Contract: weights whose mean is not 1 act like another learning rate, and any spread of weights adds noise; so
the same weights are also normalised to mean 1 and dealt out to other tokens at random, and a gain is the
claim's own only where it survives the first and exceeds the second.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsity_audit.report.lab_critical import error_bars
from sparsity_audit.report.study_full import FullClaim, FullVerdict, Table
from sparsity_audit.report.study_full_facts import FullFacts
from sparsity_audit.report.study_full_judging import (
    RULE,
    arm_differences,
    decided,
    not_measured,
    shown_estimate,
    shown_interval,
)
from sparsity_audit.report.style import COLOURS, INK, MARKERS, WIDTHS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["divergence_claims", "draw_divergence"]

_SWEEP = "divergence"
_LABELS = {
    "baseline": "baseline",
    "weak": "s .3, α 1",
    "strong": "s 2, α 30",
    "strong-negative": "s 2, α −30",
    "strong-normalised": "s 2, α 30, mean 1",
    "strong-shuffled": "s 2, α 30, shuffled",
}
_TITLE = "Weighting the advantage of tokens by how far they diverged improves learning"
_COMPARED = (
    ("weak", "baseline"),
    ("strong", "baseline"),
    ("strong-negative", "baseline"),
    ("strong-normalised", "baseline"),
    ("strong-shuffled", "baseline"),
    ("strong", "strong-shuffled"),
)


def divergence_claims(facts: FullFacts) -> tuple[FullClaim, ...]:
    """One claim; `not measured` without the runs."""
    if not facts.of(_SWEEP):
        return (not_measured("divergence", part="f", title=_TITLE, source="2603.22446"),)
    differences = {pair: arm_differences(facts, _SWEEP, *pair) for pair in _COMPARED}
    verdict, explained_by = _verdict(facts)
    means = {arm: [run.weight_mean or 1.0 for run in facts.of(_SWEEP, arm)] for arm in ("weak", "strong")}
    return (
        FullClaim(
            key="divergence",
            part="f",
            title=_TITLE,
            source="2603.22446 (α and s are not published; these are ours)",
            goal=f"of accuracy with s 2 and α 30, less the baseline's: {RULE}. A gain is explained by the "
            "learning rate where it is gone at mean 1, by any spread of weights where shuffled ones have it",
            verdict=verdict,
            explained_by=explained_by,
            reading="Less the baseline's, accuracy is "
            + "; ".join(
                f"{_LABELS[a]}: {', '.join(shown_interval(part) for part in differences[a, b])}"
                for a, b in _COMPARED[:3]
            )
            + f". The mean weight is {_mean(means['weak']):.4f} with s .3 and "
            f"{_mean(means['strong']):.4f} with s 2: most tokens have hardly diverged within a step. "
            f"Weights that are 1 but for {abs(_mean(means['weak']) - 1):.0e} move accuracy by up to "
            f"{max(abs(part.value) for part in differences['weak', 'baseline']):.3f}: so much does a run "
            "differ once anything is changed, and no interval over problems contains it.",
            tables=(_runs(facts), _differences(facts)),
            caption="Accuracy of each arm, one mark a seed, with 95 % intervals over problems. Line: the "
            "base; dashed: the baseline's mean over seeds.",
        ),
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _verdict(facts: FullFacts) -> tuple[FullVerdict, str]:
    plain = decided(arm_differences(facts, _SWEEP, "strong", "baseline"))
    if plain != "reproduces":
        return plain, ""
    if decided(arm_differences(facts, _SWEEP, "strong-normalised", "baseline")) != "reproduces":
        return "is explained", "the learning rate"
    if decided(arm_differences(facts, _SWEEP, "strong", "strong-shuffled")) != "reproduces":
        return "is explained", "any spread of weights"
    return "reproduces", ""


def _runs(facts: FullFacts) -> Table:
    rows = []
    for arm, label in _LABELS.items():
        runs = facts.of(_SWEEP, arm)
        weights = [f"{run.weight_mean:.4f}" for run in runs if run.weight_mean is not None]
        rows.append(
            (
                label,
                " / ".join(weights) or "–",
                " / ".join(shown_estimate(run.tests[0].accuracy) for run in runs),
                " / ".join(f"{run.tests[0].kl or 0:.2f}" for run in runs),
            )
        )
    return Table(
        title="Arms; one figure a seed",
        head=("arm", "mean weight", "accuracy", "KL(policy‖base)"),
        rows=tuple(rows),
    )


def _differences(facts: FullFacts) -> Table:
    return Table(
        title="Differences of accuracy, seed by seed",
        head=("arm", "less", "difference"),
        rows=tuple(
            (
                _LABELS[a],
                _LABELS[b],
                " / ".join(shown_interval(part) for part in arm_differences(facts, _SWEEP, a, b)),
            )
            for a, b in _COMPARED
        ),
    )


def draw_divergence(facts: FullFacts) -> Figure:
    """Accuracy by arm and seed; draw in `house_style`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTHS[2], 0.34 * len(_LABELS) + 0.9))
    axes = figure.subplots()
    seeds = facts.seeds(_SWEEP)
    for number, seed in enumerate(seeds):
        runs = [run for run in facts.of(_SWEEP) if run.seed == seed]
        accuracies = [run.tests[0].accuracy for run in runs]
        axes.errorbar(
            [figure.value for figure in accuracies],
            [list(_LABELS).index(run.arm) + 0.22 * (number - (len(seeds) - 1) / 2) for run in runs],
            xerr=error_bars(accuracies),
            color=COLOURS[number],
            marker=MARKERS[number],
            linestyle="none",
            label=f"seed {seed}",
        )
    baseline = facts.of(_SWEEP, "baseline")
    base = facts.start_of(baseline[0]).accuracy.value
    axes.axvline(base, color=INK, linewidth=0.7, linestyle=":", label="base")
    mean = _mean([run.tests[0].accuracy.value for run in baseline])
    axes.axvline(mean, color=INK, linewidth=0.7, linestyle="--", label="baseline, mean")
    axes.set_yticks(range(len(_LABELS)), list(_LABELS.values()))
    axes.invert_yaxis()
    axes.set_xlabel("accuracy, pass@1")
    axes.grid(axis="x")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure
