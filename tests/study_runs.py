"""The smoke study that several tests look at: made once for all workers of a test session."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from sparsity_audit import lab_study
from sparsity_audit.report.study import StudyReport

__all__ = ["smoke_study"]


def smoke_study(factory: pytest.TempPathFactory) -> tuple[StudyReport, Path]:
    """The report and its folder. A worker that comes second waits, and finds every job done."""
    root = factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    with (root / "smoke-study.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return lab_study(root / "smoke-study", smoke=True), root / "smoke-study"
