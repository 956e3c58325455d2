"""A run killed in the middle of an optimizer step and resumed from its last save ends in the same bits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_models import outside_is_equal, random_mask, snapshot, token_model
from training_runs import KINDS, train


def killed_run(kind: str, folder: Path, kill_at: int) -> int:
    tests = Path(__file__).parents[1]
    path = os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "training_runs", kind, str(folder), str(kill_at)]
    return subprocess.run(command, check=False, timeout=120, env=os.environ | {"PYTHONPATH": path}).returncode


# Named points passed a step: one with `freeze_outside`, one a parameter (six) with a subnetwork optimizer.
@pytest.mark.parametrize(("kind", "kill_at"), [("frozen", 8), ("compact", 52), ("stochastic", 29)])
def test_a_killed_step_resumes_to_the_bits_of_an_uninterrupted_run(tmp_path, kind, kill_at) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    train(kind, whole)
    assert killed_run(kind, killed, kill_at) == -signal.SIGKILL
    assert (killed / "save.pt").exists()
    assert not (killed / "end.pt").exists()
    train(kind, killed)
    ends = []
    for folder in (whole, killed):
        model = token_model(9, dtype=KINDS[kind])
        model.load_state_dict(torch.load(folder / "end.pt", weights_only=True))
        ends.append(snapshot(model))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    base = token_model(0, dtype=KINDS[kind])
    assert outside_is_equal(snapshot(base), ends[0], random_mask(base, 1))
