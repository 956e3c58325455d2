"""Follow a run's outputs along its saved steps, end to end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from sparsity_audit.api.lab_outputs import verify_counts, verify_folder
from sparsity_audit.lab.determinism import one_thread
from sparsity_audit.lab.saved_run import read_run
from sparsity_audit.lab.track import Track, track
from sparsity_audit.report.lab_track import TRACK_FILES, render_track
from sparsity_audit.report.output import write_below

__all__ = ["lab_track"]


def lab_track(
    run: str | Path,
    *,
    num_prompts: int = 256,
    num_samples: int = 8,
    seed: int = 0,
    betas: Sequence[float] = (0.05, 0.2, 1.0),
    output: str | Path | None = None,
    overwrite: bool = False,
    on_point: Callable[[int, int], None] = lambda _done, _all: None,
) -> Track:
    """Judge every saved step of a run: formats, accuracy, best of k, entropy, drift.

    Args:
        run: The folder that `lab train` wrote.
        num_prompts: Problems, the same at every step.
        num_samples: Samples of each, at temperature 1.
        seed: Of problems and noise.
        betas: KL coefficients to give the distance to the KL-optimal policy for; all > 0.
        output: Directory for record, table and figures; nothing is written without it.
        overwrite: Replace what an earlier call left there.
        on_point: Called with saved steps done and in all.

    Raises:
        UsageError: A number that cannot be.
        CheckpointNotFoundError: No run is there, or its base is gone.
        OutputError: `output` holds a track, or cannot be written.
        SparsityAuditError: A checkpoint cannot be loaded.
    """
    verify_counts(num_prompts=num_prompts, num_samples=num_samples, betas=betas)
    saved = read_run(run)
    if output is not None:
        verify_folder(Path(output), TRACK_FILES, overwrite=overwrite, inputs=[Path(run)])
    with one_thread():
        found = track(
            saved, num_prompts=num_prompts, num_samples=num_samples, seed=seed, betas=betas, on_point=on_point
        )
    if output is not None:
        for name, data in render_track(found).items():
            write_below(Path(output), name, data)
    return found
