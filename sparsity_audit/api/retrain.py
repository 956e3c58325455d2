"""Masked retraining with its controls, end to end: train, prove, choose, score, judge.

Contract: `retrain` repeats a full run with updates inside a mask alone, trains the controls, proves of every
run that what is frozen kept its bits, scores all on the same prompts and calls `recovery`. A killed call goes
on when it is repeated, and ends in the same bytes; what is finished is kept. Learning rates of controls are
chosen on validation prompts that are no test prompts. Defaults live here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsity_audit.api.recovery import recovery
from sparsity_audit.api.retrain_arms import Arm, LabArm
from sparsity_audit.api.retrain_build import build_report
from sparsity_audit.api.retrain_controls import Control, parse_controls, parse_rates
from sparsity_audit.api.retrain_folder import RetrainFolder
from sparsity_audit.api.retrain_masks import SUBNETWORK, RetrainMasks, layer_tensors
from sparsity_audit.api.retrain_runs import RunResult, plan_runs, train_run
from sparsity_audit.errors import UsageError
from sparsity_audit.report.recovery import RecoveryReport
from sparsity_audit.report.retrain import RETRAIN_FILE, RetrainReport, retrain_to_json

__all__ = ["Retraining", "retrain"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Retraining:
    """What `retrain` found.

    Args:
        output: The directory.
        report: Runs, rates, scores, verdict: `retrain.json`.
        recovery: Agreement with the full run and shares of its gain: `recovery/recovery.json`; None where no
            full run was given.
    """

    output: Path
    report: RetrainReport
    recovery: RecoveryReport | None


def retrain(
    output: str | Path | None = None,
    *,
    run: str | Path | None = None,
    mask: str | Path | None = None,
    config: str | Path | Mapping[str, Any] | None = None,
    seed: int | None = None,
    lr: float | None = None,
    controls: Sequence[str] | None = None,
    control_lrs: Sequence[float] | None = None,
    num_prompts: int = 1024,
    num_validation: int = 512,
    force: bool = False,
    figures: bool = False,
    on_note: Callable[[str], None] | None = None,
) -> Retraining:
    """Train only the entries of a mask, and what that must be compared with.

    Args:
        output: Directory of all that is made; a killed call goes on there. May stand in `config`.
        run: A finished run of `lab train`: it is repeated from its own base with its own settings.
        mask: Mask directory of that base. May stand in `config`.
        config: Instead of `run`: a YAML file or its content, which says what TRL trains; see
            `docs/guide/masked-training.md`. Options given here win.
        seed: Of the retrained run and of random masks; default the full run's seed + 1, because with the
            same seed recovery proves little.
        lr: Learning rate of the retrained run; default the full run's.
        controls: `random`, `magnitude`, `complement`, `other:MASK`, `seed` (or `seed:N`), `layer:N`.
        control_lrs: Multiples of the full run's learning rate that masked controls are trained at; the best
            on the validation prompts is reported.
        num_prompts: Lab: test prompts, the same for all.
        num_validation: Lab: validation prompts, none of them a test prompt; read only to choose a rate.
        force: Take masks whose base cannot be shown to be this one.
        figures: Draw the figure of the recovery as well.
        on_note: Called with lines for the user.

    Raises:
        UsageError: A run that is none, not finished, or masked; a control that is not known; two settings
            that contradict each other.
        MaskError: A mask of another model, inverted, empty, or without a polarity.
        OutputError: The directory holds something else, or cannot be written.
        FrozenEntryChangedError: An entry that is frozen changed.
        MissingExtraError: `config`, and the extra `[train]` is not installed.
        SparsityAuditError: As `recovery`.
    """
    note = on_note or (lambda _text: None)
    if (run is None) == (config is None):
        raise UsageError(
            "retrain", "needs either a lab run or a config, not both", expected="--run RUN, or --config FILE"
        )
    if config is not None:
        from sparsity_audit.api.retrain_config import read_retrain_config

        given = read_retrain_config(config, mask=mask, output=output)
        arm: Arm = given.arm()
        mask, output = given.mask, given.output
        seed = given.seed if seed is None else seed
        controls = given.controls if controls is None else controls
        control_lrs = given.control_lrs if control_lrs is None else control_lrs
        lr = given.lr if lr is None else lr
    rates = parse_rates(control_lrs or (1.0,))
    parsed = parse_controls(controls or ())
    if output is None or mask is None:
        missing = "-o" if output is None else "--mask"
        raise UsageError(missing, "is missing", expected="a directory")
    if run is not None:
        wants_choice = len(rates) > 1 and any(control.is_masked for control in parsed)
        arm = LabArm(run, num_prompts=num_prompts, num_validation=num_validation if wants_choice else 0)
    seed = _new_seed(arm) if seed is None else seed
    _verify(arm, mask, parsed, rates, force=force)
    question = {**arm.question, "seed": seed, "lr": lr or arm.lr}
    with RetrainFolder(Path(output), question) as folder:
        masks = RetrainMasks(folder.path / "masks", arm.base, seed=seed, force=force)
        plans = plan_runs(arm, masks, parsed, mask=mask, seed=seed, lr=lr or arm.lr, rates=rates)
        results = [train_run(plan, arm, folder.path, on_note=note) for plan in plans]
        return _judge(arm, results, folder, mask=mask, force=force, figures=figures, note=note)


def _new_seed(arm: Arm) -> int:
    return 0 if arm.full_seed is None else arm.full_seed + 1


def _verify(
    arm: Arm, mask: str | Path, controls: Sequence[Control], rates: Sequence[float], *, force: bool
) -> None:
    """Refuse what cannot be trained, before anything is written."""
    RetrainMasks.verify(mask, arm.base, force=force)
    for control in controls:
        if control.mask is not None:
            RetrainMasks.verify(control.mask, arm.base, force=force)
        if control.layer is not None:
            layer_tensors(control, dict.fromkeys(arm.base.tensors), arm.base)
        if control.is_masked and len(rates) > 1 and not arm.can_choose:
            raise UsageError(
                "--control-lrs",
                "several rates, and no validation set to choose by",
                expected="prompts other than the test's: choosing on the test set flatters the controls",
                remedy="give validation prompts, or one rate",
            )


def _judge(
    arm: Arm,
    results: Sequence[RunResult],
    folder: RetrainFolder,
    *,
    mask: str | Path,
    force: bool,
    figures: bool,
    note: Callable[[str], None],
) -> Retraining:
    """Score every run on the test prompts, and hold it against the full run."""
    done = {result.plan.label: result.trained for result in results if result.trained is not None}
    checkpoints: dict[str, Path | str] = {label: trained.checkpoint for label, trained in done.items()}
    base = arm.base.files[0].path.parent
    scores = None
    if arm.metric is not None:
        note(f"scoring {len(checkpoints) + 1 + (arm.full is not None)} checkpoints")
        everything = {"base": base, **({} if arm.full is None else {"full": arm.full}), **checkpoints}
        found = {label: dict(arm.score(at, validation=False)) for label, at in everything.items()}
        scores = {"metric": arm.metric, **found}
        folder.write("scores.json", scores)
    recovered = None
    if arm.full is not None:
        controls = {result.plan.label: result.plan.mask for result in results[1:] if result.trained}
        recovered = recovery(
            base,
            arm.full,
            checkpoints["sub"],
            mask=folder.path / "masks" / SUBNETWORK,
            controls={label: checkpoints[label] for label in controls},
            control_masks={label: own for label, own in controls.items() if own is not None},
            metrics=scores,
            force=force,
            output=folder.path / "recovery",
            overwrite=True,
            figures=figures,
            workers=1,
            on_note=note,
        )
    report = build_report(
        arm, results, mask=str(mask), output=folder.path, scores=scores, recovered=recovered
    )
    folder.write(RETRAIN_FILE, retrain_to_json(report))
    return Retraining(output=folder.path, report=report, recovery=recovered)
