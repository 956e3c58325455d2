"""The runs of a retraining: planned as data, trained one after the other, the best rate of each kept.

Contract: the subnetwork's run comes first and has one learning rate; a masked control has one a multiple. A
rate is chosen by the score on validation prompts; of equal ones it is the smaller. A control whose numbers
are not finite at a rate is recorded with the reason, and not chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparsity_audit.api.recovery_inputs import read_accuracy
from sparsity_audit.api.retrain_arms import Arm, CollapsedRunError, Trained, TrainingJob
from sparsity_audit.api.retrain_controls import Control
from sparsity_audit.api.retrain_masks import RetrainMasks
from sparsity_audit.report.retrain import TriedRate

__all__ = ["RunPlan", "RunResult", "plan_runs", "train_run"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """A run before it is trained: `sub`, or a control.

    Args:
        label: `sub`, or the control's.
        control: The control; None for `sub`.
        mask: Where it may move; None of a full run.
        seed: Its seed.
        rates: Multiples of the full run's learning rate, and the rates; `sub` has one.
    """

    label: str
    control: Control | None
    mask: Path | None
    seed: int
    rates: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """A run after training; `trained` is None where every rate failed."""

    plan: RunPlan
    rates: tuple[TriedRate, ...]
    chosen: TriedRate | None
    trained: Trained | None


def plan_runs(
    arm: Arm,
    masks: RetrainMasks,
    controls: Sequence[Control],
    *,
    mask: str | Path,
    seed: int,
    lr: float,
    rates: Sequence[float],
) -> list[RunPlan]:
    """The runs, the subnetwork first, with their masks made.

    Args:
        arm: Who trains.
        masks: Where masks are made.
        controls: What is asked for beside the subnetwork.
        mask: The subnetwork's, as it was given.
        seed: Of the retrained run and its masked controls.
        lr: Learning rate of the retrained run.
        rates: Multiples of the full run's learning rate, of masked controls.

    Raises:
        MaskError: A mask is none of the base.
        UsageError: There is no such layer.
    """
    sub = masks.subnetwork(mask)
    plans = [RunPlan(label="sub", control=None, mask=sub, seed=seed, rates=((lr / arm.lr, lr),))]
    for control in controls:
        other = seed if seed != arm.full_seed else seed + 1
        multiples = tuple((m, m * arm.lr) for m in (rates if control.is_masked else (1.0,)))
        plans.append(
            RunPlan(
                label=control.label,
                control=control,
                mask=masks.of_control(control) if control.is_masked else None,
                seed=seed if control.is_masked else (other if control.seed is None else control.seed),
                rates=multiples,
            )
        )
    return plans


def train_run(plan: RunPlan, arm: Arm, folder: Path, *, on_note: Callable[[str], None]) -> RunResult:
    """Train a run at each of its rates, and choose the one with the best validation score.

    Raises:
        CollapsedRunError: The subnetwork's run itself is not finite.
    """
    tried: list[tuple[TriedRate, Trained | None]] = []
    for multiple, lr in plan.rates:
        place = f"runs/{plan.label}" + ("" if plan.control is None or multiple == 1 else f"-x{multiple:g}")
        on_note(f"{place}: seed {plan.seed}, learning rate {lr:g}")
        job = TrainingJob(folder=folder / place, mask=plan.mask, seed=plan.seed, lr=lr)
        try:
            trained, failure = arm.train(job, on_note=on_note), None
        except CollapsedRunError as error:
            if plan.control is None:
                raise
            trained, failure = None, str(error)
        validation = None
        if trained is not None and len(plan.rates) > 1:
            validation = read_accuracy(arm.score(trained.checkpoint, validation=True), f"{place}: validation")
        rate = TriedRate(multiple=multiple, lr=lr, folder=place, validation=validation, failure=failure)
        tried.append((rate, trained))
    alive = [(rate, trained) for rate, trained in tried if trained is not None]
    # Of equal scores the smaller rate: max keeps the first.
    best = max(alive, key=lambda pair: pair[0].validation.value if pair[0].validation else 0, default=None)
    return RunResult(
        plan=plan,
        rates=tuple(rate for rate, _ in tried),
        chosen=best and best[0],
        trained=best and best[1],
    )
