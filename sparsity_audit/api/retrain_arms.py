"""Who trains in a retraining: the lab, which repeats one of its runs.

Contract: an arm knows base, full run and settings; it trains one run inside one mask, goes on where a killed
one stopped, keeps a finished one, and proves that what is frozen has the base's bits. It scores checkpoints
on test prompts, and on validation prompts of which none is among them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sparsity_audit.api.retrain_folder import is_retraining
from sparsity_audit.checkpoint.opening import open_checkpoint
from sparsity_audit.checkpoint.store import Catalogue
from sparsity_audit.errors import SparsityAuditError, UsageError
from sparsity_audit.lab.held_out import HeldOut, count_correct, held_out_problems
from sparsity_audit.lab.pretrain import NotFiniteError
from sparsity_audit.lab.repeat import (
    config_record,
    finished_full_run,
    prove_outside,
    read_update_mask,
    repeat_run,
)
from sparsity_audit.lab.saved_run import SavedRun
from sparsity_audit.lab.tasks import named_task
from sparsity_audit.report.retrain import ProofRecord

__all__ = ["Arm", "CollapsedRunError", "LabArm", "Trained", "TrainingJob"]


class CollapsedRunError(SparsityAuditError, ArithmeticError):
    """A run ended in numbers that are not finite; another learning rate may not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingJob:
    """One run.

    Args:
        folder: Where it is written.
        mask: Where it may move, a packed mask directory; None trains every entry.
        seed: Its seed.
        lr: Its learning rate.
    """

    folder: Path
    mask: Path | None
    seed: int
    lr: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A finished run: its checkpoint, and the proof where it had a mask."""

    checkpoint: Path
    proof: ProofRecord | None


class Arm(Protocol):
    """What a retraining needs of a trainer."""

    @property
    def trainer(self) -> str:
        """`lab`, or the name of TRL's trainer."""
        ...

    @property
    def base(self) -> Catalogue:
        """What training starts from."""
        ...

    @property
    def start(self) -> Path | str:
        """The same as a reference, to be scored."""
        ...

    @property
    def full(self) -> Path | str | None:
        """The full run's checkpoint."""
        ...

    @property
    def full_seed(self) -> int | None:
        """The full run's seed, where it is known."""
        ...

    @property
    def lr(self) -> float:
        """The full run's learning rate."""
        ...

    @property
    def metric(self) -> str | None:
        """What scores measure; None where nobody says how to score."""
        ...

    @property
    def can_choose(self) -> bool:
        """Whether there is a validation set to choose a learning rate by."""
        ...

    @property
    def question(self) -> Mapping[str, Any]:
        """What identifies base, full run, settings and scores, as plain JSON."""
        ...

    def prepare(self) -> None:
        """Read what training reads, so that what is wrong with it is said before anything is written."""
        ...

    def train(self, job: TrainingJob, *, on_note: Callable[[str], None]) -> Trained:
        """Train one run, or go on with it. Raises CollapsedRunError."""
        ...

    def score(self, checkpoint: Path | str, *, validation: bool) -> Mapping[str, float]:
        """A score in the form that `recovery` reads."""
        ...


class LabArm:
    """Repeats a run of `lab train`.

    Args:
        run: Its folder.
        num_prompts: Test problems.
        num_validation: Validation problems.

    Raises:
        CheckpointNotFoundError: It is no such folder.
        UsageError: The run is not finished, was trained in a mask, or has too few problems.
    """

    def __init__(self, run: str | Path, *, num_prompts: int, num_validation: int) -> None:
        if is_retraining(Path(run)):
            raise UsageError(
                str(run),
                "is the output of a retraining",
                expected="the folder of a run that `lab train` wrote",
                remedy="give the full run that it repeated",
            )
        self._saved: SavedRun = finished_full_run(run)
        self._task = named_task(self._saved.task)
        self._problems: HeldOut = held_out_problems(
            self._task, self._saved.lengths, num_test=num_prompts, num_validation=num_validation
        )
        self.trainer = "lab"
        self.start: Path | str = self._saved.reference
        self.base = open_checkpoint(self._saved.reference)
        self.full: Path | str | None = self._saved.path / "final"
        self.full_seed: int | None = self._saved.config["seed"]
        self.lr: float = self._saved.config["lr"]
        self.can_choose = num_validation > 0

    @property
    def metric(self) -> str | None:
        """pass@1 on the test set."""
        return f"pass@1 at temperature 1 on {len(self._problems.test)} held-out problems"

    @property
    def question(self) -> Mapping[str, Any]:
        """The run's settings and final weights."""
        return {"trainer": self.trainer, "run": config_record(self._saved)}

    def prepare(self) -> None:
        """The lab makes its own data."""

    def train(self, job: TrainingJob, *, on_note: Callable[[str], None]) -> Trained:
        """Repeat the run; see `Arm`."""
        mask = None if job.mask is None else read_update_mask(job.mask, self._saved.reference)
        try:
            result = repeat_run(
                self._saved,
                job.folder,
                update_mask=mask,
                seed=job.seed,
                lr=job.lr,
                on_note=on_note,
            )
        except NotFiniteError as error:
            raise CollapsedRunError(error.subject, error.found) from error
        final = job.folder / "final"
        proof = prove_outside(self._saved, final, update_mask=mask)
        for warning in result.warnings:
            on_note(f"{job.folder.name}: {warning}")
        return Trained(
            checkpoint=final,
            proof=proof and ProofRecord(num_tensors=proof.num_tensors, num_frozen=proof.num_frozen),
        )

    def score(self, checkpoint: Path | str, *, validation: bool) -> Mapping[str, float]:
        """Problems solved, in one sample each."""
        problems = self._problems.validation if validation else self._problems.test
        return {"correct": count_correct(Path(checkpoint), problems, task=self._task), "n": len(problems)}
