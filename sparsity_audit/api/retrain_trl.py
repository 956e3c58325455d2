"""TRL as the trainer of a retraining: the user's model, data and rewards, and the user's own scores.

Contract: arguments and data are checked before anything is written. Scores come from the functions of the
configuration; a score of a finished run is kept beside it, and asked for again only of another function.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from sparsity_audit.api.recovery_inputs import read_accuracy
from sparsity_audit.api.retrain_arms import CollapsedRunError, Trained, TrainingJob
from sparsity_audit.api.retrain_config import RetrainConfig
from sparsity_audit.checkpoint.hub_reference import parse_reference
from sparsity_audit.checkpoint.opening import open_checkpoint
from sparsity_audit.errors import UsageError
from sparsity_audit.report.output import write_atomically
from sparsity_audit.report.retrain import ProofRecord

__all__ = ["TrlArm"]


class TrlArm:
    """Trains the model of a configuration.

    Args:
        config: The configuration.
        force: Take masks whose base cannot be shown to be this one.

    Raises:
        UsageError: An argument TRL does not have, or data of another form.
        MissingExtraError: TRL is not installed.
        CheckpointNotFoundError: The model is not there.
    """

    def __init__(self, config: RetrainConfig, *, force: bool) -> None:
        from sparsity_audit.training.trl_run import check_arguments

        self._config, self._force = config, force
        self._arguments = check_arguments(config.trainer, config.arguments)
        self.trainer = config.trainer
        self.start: Path | str = config.model
        self.base = open_checkpoint(config.model)
        self.full: Path | str | None = config.full
        self.full_seed = config.full_seed
        self.lr = float(self._arguments["learning_rate"])
        self.metric = config.metric if config.score is not None else None
        self.can_choose = config.validation is not None

    @property
    def question(self) -> Mapping[str, Any]:
        """Everything that a run depends on, as it stands in the file."""
        config = self._config
        return {
            "trainer": config.trainer,
            "model": config.model,
            "full": config.full,
            "dataset": config.dataset,
            "split": config.split,
            "reward": [name for name, _ in config.rewards],
            "arguments": self._arguments,
            "dtype": config.dtype,
            "unmasked": config.unmasked,
        }

    @cached_property
    def _run(self) -> Any:
        from sparsity_audit.training.trl_run import TrlRun, load_rows

        config, hub = self._config, None
        if not Path(config.model).exists():
            hub = parse_reference(config.model)
        return TrlRun(
            trainer=config.trainer,
            model=config.model if hub is None else hub.repo_id,
            revision=None if hub is None else hub.revision,
            dtype=config.dtype,
            rows=load_rows(config.trainer, config.dataset, split=config.split),
            rewards=tuple(function for _, function in config.rewards),
            arguments=self._arguments,
            unmasked=config.unmasked,
            trust_base=self._force,
        )

    def prepare(self) -> None:
        """Read the data, so that what is wrong with it is said before anything is written."""
        _ = self._run

    def train(self, job: TrainingJob, *, on_note: Callable[[str], None]) -> Trained:
        """Train one run; see `Arm`."""
        from sparsity_audit.training.trl_run import train_with_trl

        try:
            result = train_with_trl(
                self._run, job.folder, mask=job.mask, seed=job.seed, lr=job.lr, on_note=on_note
            )
        except UsageError as error:
            if "NaN" in error.found:
                raise CollapsedRunError(error.subject, error.found) from error
            raise
        proof = None
        if job.mask is not None:
            proof = ProofRecord(num_tensors=result["num_tensors"], num_frozen=result["num_frozen"])
        return Trained(checkpoint=job.folder / "final", proof=proof)

    def score(self, checkpoint: Path | str, *, validation: bool) -> Mapping[str, float]:
        """What the user's function says of a checkpoint."""
        chosen = self._config.validation if validation else self._config.score
        assert chosen is not None, "asked only where there is one"
        name, function = chosen
        kept = Path(checkpoint).parent / ("validation.json" if validation else "score.json")
        is_ours = (kept.parent / "result.json").is_file()
        if is_ours and kept.is_file() and (found := json.loads(kept.read_bytes()))["function"] == name:
            return found["score"]
        score = function(checkpoint)
        read_accuracy(score, f"{name}({checkpoint})")
        if is_ours:
            write_atomically(kept, (json.dumps({"function": name, "score": dict(score)}) + "\n").encode())
        return score
