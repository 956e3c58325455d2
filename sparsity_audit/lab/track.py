"""How a policy's outputs move along a run: formats, accuracy, entropy and drift at its saved steps.

Contract: every saved step is judged on the same problems, against the weights that the run started from; the
estimators are those of `evaluate`. The run's own metrics, which describe training batches of 128 completions
or so at every step, are kept beside.

Source: 2504.07912 tracks shares and accuracies of formats over an epoch of RL, with pass@64 and maj@64.
Departure: checkpoints are log-spaced, because the collapse happens early.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sparsity_audit.lab.determinism import stream
from sparsity_audit.lab.evaluate import evaluate
from sparsity_audit.lab.evaluation import Evaluation
from sparsity_audit.lab.folder import load_model
from sparsity_audit.lab.saved_run import SavedRun
from sparsity_audit.lab.tasks import named_task

__all__ = ["TRACK_FORMAT", "TRACK_VERSION", "BatchShares", "Track", "TrackPoint", "track"]

TRACK_FORMAT = "sparsity-audit/lab-track"
TRACK_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackPoint:
    """One saved step.

    Args:
        step: Updates' steps behind it; 0 is the base.
        evaluation: Its behaviour, with the drift from the base.
    """

    step: int
    evaluation: Evaluation


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchShares:
    """Formats of one training step's rollouts.

    Args:
        step: The step whose rollouts these are; they come from the policy before it, of `step` − 1.
        shares: Share by format.
    """

    step: int
    shares: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Track:
    """A run's outputs along its saved steps.

    Args:
        format: `sparsity-audit/lab-track`.
        version: Version of this record.
        run: The run in words.
        algorithm: Its algorithm.
        betas: KL coefficients of the optima in `drift`.
        points: The saved steps.
        batches: Format shares of the run's own rollouts; empty for runs that make none.
    """

    format: str = TRACK_FORMAT
    version: int = TRACK_VERSION
    run: str
    algorithm: str
    betas: tuple[float, ...]
    points: tuple[TrackPoint, ...]
    batches: tuple[BatchShares, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)

    def share(self, fmt: str, *, place: int) -> float:
        """Share of a format at one of the points, counted as a list index."""
        return next(row.share for row in self.points[place].evaluation.formats if row.format == fmt)


def track(
    run: SavedRun,
    *,
    num_prompts: int,
    num_samples: int,
    seed: int,
    betas: Sequence[float],
    on_point: Callable[[int, int], None],
) -> Track:
    """Judge every saved step of a run.

    Args:
        run: The run.
        num_prompts: Problems, the same at every step, of the run's task and lengths.
        num_samples: Samples of each.
        seed: Of problems and noise.
        betas: KL coefficients to give the distance to the optimum for.
        on_point: Called with points done and in all.
    """
    reference = load_model(run.reference)
    points = []
    for step, folder in run.checkpoints:
        found = evaluate(
            load_model(folder),
            task=named_task(run.task),
            lengths=run.lengths,
            num_prompts=num_prompts,
            num_samples=num_samples,
            generator=stream(seed, "evaluation"),
            reference=reference,
            betas=betas,
        )
        points.append(TrackPoint(step=step, evaluation=found))
        on_point(len(points), len(run.checkpoints))
    batches = tuple(
        BatchShares(step=row["step"], shares=row["format_shares"])
        for row in run.metrics
        if row["format_shares"]
    )
    return Track(
        run=run.title,
        algorithm=run.config["algorithm"],
        betas=tuple(betas),
        points=tuple(points),
        batches=batches,
    )
