"""A lab run of a second, its mask, and a retraining that a test kills.

`python -m retrain_runs RUN MASK OUT STEP`
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import sparsity_audit as sa
from sparsity_audit import seams

BASE = Path(__file__).parent / "data" / "addition" / "base-bf16"
SMALL: dict[str, Any] = {"num_prompts": 24, "num_validation": 16}


def full_run(folder: Path, **options: Any) -> Path:
    """A finished run of two steps."""
    settings = {"steps": 2, "prompts": 3, "samples": 4, "lengths": 2, "precision": "fp32", **options}
    sa.lab_train(folder, base=BASE, **settings)
    return folder


def mask_of(run: Path, path: Path, criterion: str = "top:5%") -> Path:
    """The mask of a run's largest movements."""
    sa.mask_export(run / "checkpoint-0", run / "final", path, criterion=criterion)
    return path


def main() -> None:
    """Retrain with one control, and die when the N-th training step is recorded."""
    run, mask, output, left = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])

    def observer(point: str) -> None:
        nonlocal left
        left -= point == "step recorded"
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    seams.observer = observer
    sa.retrain(output, run=run, mask=mask, controls=["random"], **SMALL)


if __name__ == "__main__":
    main()
