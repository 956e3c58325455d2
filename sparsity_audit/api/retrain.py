"""Masked retraining with its controls, end to end: train, prove, choose, score, judge.

Contract: `retrain` repeats a full run with updates inside a mask alone, trains the controls, proves of every
run that what is frozen kept its bits, scores all on the same prompts and calls `recovery`. A killed call goes
on when it is repeated, and ends in the same bytes; what is finished is kept. Learning rates of controls are
chosen on validation prompts that are no test prompts. Defaults live here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sparsity_audit.api.recovery import recovery
from sparsity_audit.api.retrain_arms import Arm, LabArm
from sparsity_audit.api.retrain_build import build_report
from sparsity_audit.api.retrain_config import RetrainConfig, read_retrain_config
from sparsity_audit.api.retrain_controls import Control, parse_controls, parse_rates
from sparsity_audit.api.retrain_folder import RetrainFolder
from sparsity_audit.api.retrain_masks import SUBNETWORK, RetrainMasks, layer_tensors
from sparsity_audit.api.retrain_runs import RunResult, plan_runs, train_run
from sparsity_audit.api.retrain_trl import TrlArm
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
    asked = _Asked(
        mask=mask, output=output, seed=seed, lr=lr, controls=controls, control_lrs=control_lrs, force=force
    )
    if (run is None) == (config is None):
        raise UsageError(
            "retrain", "needs either a lab run or a config, not both", expected="--run RUN, or --config FILE"
        )
    if config is not None:
        found = read_retrain_config(config)
        asked = asked.filled(found)
        asked.verify_complete()
        arm: Arm = TrlArm(found, force=force)
    else:
        assert run is not None
        asked.verify_complete()
        arm = LabArm(run, num_prompts=num_prompts, num_validation=num_validation if asked.has_choice else 0)
    asked.verify(arm)
    return asked.answer(arm, figures=figures, note=note)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """What is asked for, beside who trains; None where it is not said."""

    mask: str | Path | None
    output: str | Path | None
    seed: int | None
    lr: float | None
    controls: Sequence[str] | None
    control_lrs: Sequence[float] | None
    force: bool

    def filled(self, config: RetrainConfig) -> _Asked:
        """With what the file says where nothing was said."""
        return replace(
            self,
            mask=config.mask if self.mask is None else self.mask,
            output=config.output if self.output is None else self.output,
            seed=config.seed if self.seed is None else self.seed,
            lr=config.lr if self.lr is None else self.lr,
            controls=config.controls if self.controls is None else self.controls,
            control_lrs=(config.control_lrs or None) if self.control_lrs is None else self.control_lrs,
        )

    @property
    def parsed(self) -> tuple[Control, ...]:
        """The controls."""
        return parse_controls(self.controls or ())

    @property
    def rates(self) -> tuple[float, ...]:
        """Multiples of the learning rate."""
        return parse_rates((1.0,) if self.control_lrs is None else self.control_lrs)

    @property
    def has_choice(self) -> bool:
        """Whether a rate is to be chosen."""
        return len(self.rates) > 1 and any(control.is_masked for control in self.parsed)

    def verify_complete(self) -> None:
        """Refuse what is missing or not understood. Raises UsageError."""
        for flag, value in (("--mask", self.mask), ("--output", self.output)):
            if value is None:
                raise UsageError(flag, "is missing", expected="a directory")
        if self.lr is not None and not (math.isfinite(self.lr) and self.lr > 0):
            raise UsageError("--lr", str(self.lr), expected="more than 0")

    def verify(self, arm: Arm) -> None:
        """Refuse what cannot be trained, before anything is written."""
        assert self.mask is not None
        RetrainMasks.verify(self.mask, arm.base, force=self.force)
        for control in self.parsed:
            if control.mask is not None:
                RetrainMasks.verify(control.mask, arm.base, force=self.force)
            if control.layer is not None:
                layer_tensors(control, dict.fromkeys(arm.base.tensors), arm.base)
        if self.has_choice and not arm.can_choose:
            raise UsageError(
                "--control-lrs",
                "several rates, and no validation set to choose by",
                expected="prompts other than the test's: choosing on the test set flatters the controls",
                remedy="give validation prompts, or one rate",
            )
        arm.prepare()

    def answer(self, arm: Arm, *, figures: bool, note: Callable[[str], None]) -> Retraining:
        """Train and judge."""
        assert self.mask is not None
        assert self.output is not None
        # With the full run's own seed recovery proves little.
        seed = (0 if arm.full_seed is None else arm.full_seed + 1) if self.seed is None else self.seed
        lr = arm.lr if self.lr is None else self.lr
        with RetrainFolder(Path(self.output), {**arm.question, "seed": seed, "lr": lr}) as folder:
            masks = RetrainMasks(folder.path / "masks", arm.base, seed=seed, force=self.force)
            plans = plan_runs(arm, masks, self.parsed, mask=self.mask, seed=seed, lr=lr, rates=self.rates)
            results = [train_run(plan, arm, folder.path, on_note=note) for plan in plans]
            return _judge(arm, results, folder, mask=self.mask, force=self.force, figures=figures, note=note)


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
    scores = None
    if arm.metric is not None:
        note(f"scoring {len(checkpoints) + 1 + (arm.full is not None)} checkpoints")
        everything = {"base": arm.start, **({} if arm.full is None else {"full": arm.full}), **checkpoints}
        found = {label: dict(arm.score(at, validation=False)) for label, at in everything.items()}
        scores = {"metric": arm.metric, **found}
        folder.write("scores.json", scores)
    recovered = None
    if arm.full is not None:
        controls = {result.plan.label: result.plan.mask for result in results[1:] if result.trained}
        recovered = recovery(
            arm.base,
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
