"""The record of a retraining made of its runs, scores and recovery, and the result in words.

Contract: a function of what was found; nothing is read but the masks' counts. Where there is a recovery its
verdict and warnings are the retraining's, and what only the training can know is added: rates that were
chosen, rates that were not tried, runs that collapsed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsity_audit.api.masks import mask_info
from sparsity_audit.api.recovery_inputs import read_accuracy
from sparsity_audit.api.retrain_arms import Arm
from sparsity_audit.api.retrain_masks import SUBNETWORK
from sparsity_audit.api.retrain_runs import RunResult
from sparsity_audit.masks.metadata import tool_name
from sparsity_audit.report.recovery import RecoveryReport
from sparsity_audit.report.retrain import RetrainedRun, RetrainReport
from sparsity_audit.stats.scores import Accuracy, RecoveredShare, recovered_share

__all__ = ["build_report"]


def build_report(
    arm: Arm,
    results: Sequence[RunResult],
    *,
    mask: str,
    output: Path,
    scores: Mapping[str, Any] | None,
    recovered: RecoveryReport | None,
) -> RetrainReport:
    """The record.

    Args:
        arm: Who trained.
        results: The runs, the subnetwork's first.
        mask: The mask as it was given.
        output: The directory.
        scores: What `scores.json` holds; None without.
        recovered: The recovery; None without a full run.
    """
    known = {
        label: read_accuracy(entry, label) for label, entry in (scores or {}).items() if label != "metric"
    }
    runs = tuple(_run(result, known, output) for result in results)
    own = _verdict(runs, known) if recovered is None else recovered.verdict
    return RetrainReport(
        tool=tool_name(),
        trainer=arm.trainer,
        base=arm.base.resolved_label,
        full=None if arm.full is None else str(arm.full),
        mask=mask,
        criterion=mask_info(output / "masks" / SUBNETWORK).metadata.criterion,
        full_seed=arm.full_seed,
        full_lr=arm.lr,
        metric=arm.metric,
        base_score=known.get("base"),
        full_score=known.get("full"),
        runs=runs,
        verdict="; ".join([own, *_rate_sentences(runs)]),
        warnings=(*_own_warnings(runs), *(() if recovered is None else recovered.warnings)),
        notes=_notes(arm, runs),
    )


def _run(result: RunResult, known: Mapping[str, Accuracy], output: Path) -> RetrainedRun:
    plan, chosen = result.plan, result.chosen
    info = None if plan.mask is None else mask_info(plan.mask)
    return RetrainedRun(
        label=plan.label,
        kind="sub" if plan.control is None else plan.control.kind,
        meaning="the entries of the mask" if plan.control is None else plan.control.meaning,
        mask=None if plan.mask is None else plan.mask.relative_to(output).as_posix(),
        selected=None if info is None else info.selected,
        density=None if info is None else info.density,
        seed=plan.seed,
        lr=chosen and chosen.lr,
        folder=chosen and chosen.folder,
        rates=result.rates,
        proof=result.trained and result.trained.proof,
        score=known.get(plan.label),
        share=_share(known, plan.label),
    )


def _share(known: Mapping[str, Accuracy], label: str) -> RecoveredShare | None:
    if not {"base", "full", label} <= known.keys():
        return None
    return recovered_share(known["base"], known["full"], known[label])


def _verdict(runs: Sequence[RetrainedRun], known: Mapping[str, Accuracy]) -> str:
    """Where no full run was given: scores alone, and the proof."""
    parts = [f"{run.label} scores {run.score.value:.3f}" for run in runs if run.score is not None]
    if "base" in known:
        parts.append(f"the base {known['base'].value:.3f}")
    frozen = runs[0].proof
    assert frozen is not None, "the subnetwork has a mask"
    return "; ".join([*parts, f"{frozen.num_frozen:,} entries outside the mask kept their bits"])


def _rate_sentences(runs: Sequence[RetrainedRun]) -> list[str]:
    """How each rate was chosen, where there was a choice."""
    found = []
    for run in runs:
        if len(run.rates) == 1 or run.lr is None:
            continue
        tried = ", ".join(f"{rate.lr:.3g} {_outcome(rate.validation)}" for rate in run.rates)
        found.append(f"{run.label} at learning rate {run.lr:.3g}, best on validation prompts of {tried}")
    return found


def _outcome(validation: Accuracy | None) -> str:
    return "(collapsed)" if validation is None else f"({validation.value:.3f})"


def _own_warnings(runs: Sequence[RetrainedRun]) -> list[str]:
    found = [
        f"{run.label} has no result: {'; '.join(dict.fromkeys(r.failure for r in run.rates if r.failure))}"
        for run in runs
        if run.lr is None
    ]
    at_edge = [
        run.label
        for run in runs
        if run.lr is not None and len(run.rates) > 1 and run.lr == max(rate.lr for rate in run.rates)
    ]
    if at_edge:
        found.append(
            f"{', '.join(at_edge)}: the best rate is the largest that was tried; a larger one may be better"
        )
    untuned = [run.label for run in runs if run.kind in ("random", "magnitude") and len(run.rates) == 1]
    if untuned:
        found.append(
            f"{', '.join(untuned)}: trained at the full run's rate alone; random masks have matched full "
            "runs at larger ones: tune with --control-lrs"
        )
    return found


def _notes(arm: Arm, runs: Sequence[RetrainedRun]) -> tuple[str, ...]:
    proven = [run for run in runs if run.proof is not None]
    entries = sum(run.proof.num_frozen for run in proven if run.proof is not None)
    notes = [
        (
            f"every entry outside its mask has the bits of the base in all {len(proven)} masked runs "
            f"({entries:,} entries compared)"
        )
    ]
    denser = [run for run in runs if run.kind in ("layer", "complement", "other")]
    notes += [
        f"{run.label} holds {run.density:.1%} of the entries"
        for run in denser
        if run.density is not None and run.density != runs[0].density
    ]
    if arm.full is None:
        notes.append("no full run was given, so there is nothing to hold the retrained run against")
    return tuple(notes)
