"""Callbacks for Transformers' and TRL's trainers: train only a subnetwork, or audit a run as it goes.

Contract: `SubnetworkCallback` calls `freeze_outside` when training begins, after model and optimizer are
made, wrapped and (when resuming) loaded, and proves that everything outside the mask kept its bits at every
save and at the end; a failed proof ends the run. Needs the extra `[train]`.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from sparsity_audit.errors import MissingExtraError, UsageError
from sparsity_audit.training.freeze import FrozenOutside, freeze_outside
from sparsity_audit.training.live_audit import BaseCopy, LiveCounts
from sparsity_audit.training.update_masks import BaseCheck, Unmasked, UpdateMask
from sparsity_audit.types import Criterion

__all__ = ["LiveAudit", "SubnetworkCallback"]

FROZEN_NAME: Final = "sparsity_audit_frozen.json"
"""In each checkpoint directory: what `resumed_from` needs; one file a rank beyond the first."""


def _trainer_callback() -> Any:
    try:
        return importlib.import_module("transformers").TrainerCallback
    except ImportError as error:
        raise MissingExtraError(
            "trainer callbacks",
            "transformers is not installed",
            remedy="pip install 'sparsity-audit[train]', or call freeze_outside in your own loop",
        ) from error


TrainerCallback: Any = _trainer_callback()


class SubnetworkCallback(TrainerCallback):
    """Makes a `Trainer`, `SFTTrainer`, `DPOTrainer` or `GRPOTrainer` update only the subnetwork.

    Logs `sparsity_audit/density` (selected ÷ entries the mask speaks of) and `sparsity_audit/changed_ratio`
    (share of the selected entries that differ from their values when training began, or went on). Reporting
    integrations see them when the callback comes before theirs: use `attach`.

    Args:
        update_mask: A mask directory of this tool, or name → torch.bool.
        unmasked: `freeze` or `train` for trained parameters without a mask, which are refused otherwise.
        base: `verify` compares the mask's base fingerprints with the weights; `trust` takes your word.
    """

    def __init__(
        self, update_mask: UpdateMask, *, unmasked: Unmasked | None = None, base: BaseCheck = "verify"
    ) -> None:
        self._update_mask = update_mask
        self._unmasked: Unmasked | None = unmasked
        self._base: BaseCheck = base
        self.frozen: FrozenOutside | None = None

    def attach(self, trainer: Any) -> None:
        """Add the callback before all others of a trainer, so that loggers see what it logs."""
        trainer.callback_handler.callbacks.insert(0, self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Freeze; refuses what `freeze_outside` refuses, before the first step."""
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        resumed = None
        if state.global_step > 0:
            file = _frozen_file(args, state)
            if not file.is_file():
                raise UsageError(
                    str(file),
                    f"does not exist, and training goes on from step {state.global_step}",
                    expected="what SubnetworkCallback wrote at that save",
                    remedy="resume a run that was saved with this callback, in its output_dir",
                )
            resumed = json.loads(file.read_text(encoding="utf-8"))
        self.frozen = freeze_outside(
            model,
            optimizer,
            self._update_mask,
            unmasked=self._unmasked,
            base=self._base,
            resumed_from=resumed,
        )

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Prove, and record for a later resume what is frozen."""
        frozen = self._begun()
        frozen.verify_frozen()
        file = _frozen_file(args, state)
        if file.parent.is_dir():
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps(frozen.state_dict(), sort_keys=True), encoding="utf-8")
            partial.replace(file)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Add the two figures to what is logged, and to the state's history."""
        if self.frozen is None:
            return
        changed, selected = self.frozen.count_changed()
        figures = {
            "sparsity_audit/density": self.frozen.density,
            "sparsity_audit/changed_ratio": changed / selected if selected else 0.0,
        }
        kwargs.get("logs", {}).update(figures)
        if state.log_history:
            state.log_history[-1].update(figures)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Prove, and let go of the model."""
        frozen = self._begun()
        try:
            frozen.verify_frozen()
        finally:
            frozen.remove()
            self.frozen = None

    def _begun(self) -> FrozenOutside:
        if self.frozen is None:
            raise UsageError(
                "SubnetworkCallback",
                "training has begun without it, so nothing was frozen",
                remedy="give it to the trainer as callbacks=[…] before train()",
            )
        return self.frozen


def _frozen_file(args: Any, state: Any) -> Path:
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    name = FROZEN_NAME if rank == 0 else FROZEN_NAME.replace(".json", f"_{rank}.json")
    return Path(args.output_dir) / f"checkpoint-{state.global_step}" / name


class LiveAudit(TrainerCallback):
    """Reports the update sparsity against the base during any run, without saving.

    Logs `sparsity_audit/update_sparsity/CRITERION` at the logging steps that follow a count, and keeps all
    counts in `records`. It holds one more copy of the weights.

    Args:
        every: Steps between two counts.
        criteria: Keys of criteria, each reported by its name.
        base: What to compare with: name → tensor. The weights when training begins, unless it resumes.
    """

    def __init__(
        self,
        *,
        every: int = 10,
        criteria: Sequence[str] = ("value", "atol:1e-5"),
        base: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        if every < 1:
            raise UsageError("every", f"{every}", expected="a number of steps ≥ 1")
        self._every, self._given = every, base
        self._criteria = tuple(Criterion.parse(text) for text in criteria)
        self._copy: BaseCopy | None = None
        self.records: list[LiveCounts] = []

    def attach(self, trainer: Any) -> None:
        """Add the callback before all others of a trainer, so that loggers see what it logs."""
        trainer.callback_handler.callbacks.insert(0, self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Copy the base."""
        if state.global_step > 0 and self._given is None:
            raise UsageError(
                "LiveAudit",
                f"training goes on from step {state.global_step}, whose weights are not the base",
                remedy="give the base's state dict as base=…",
            )
        self._copy = BaseCopy(kwargs["model"], base=self._given)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Count, every so many steps."""
        if self._copy is not None and state.global_step % self._every == 0:
            self.records.append(self._copy.count(self._criteria, step=state.global_step))

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Add the latest counts to what is logged, and to the state's history."""
        if not self.records:
            return
        latest = self.records[-1]
        figures = {f"sparsity_audit/update_sparsity/{key}": latest.sparsity(key) for key in latest.changed}
        kwargs.get("logs", {}).update(figures)
        if state.log_history:
            state.log_history[-1].update(figures)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Let go of the copy."""
        self._copy = None
