"""FSDP2 on two CPU processes, by hand and through TRL: frozen on every rank, as unsharded training."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="gloo over loopback is tested on Linux")


def _passed(*arguments: str) -> list[str]:
    """What two ranks of a module say they passed."""
    tests = Path(__file__).parents[1]
    places = [str(tests), str(tests / "training"), str(tests.parent), os.environ.get("PYTHONPATH", "")]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, "-m", *arguments]
    offline = {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    env = os.environ | {"PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1"} | offline
    env |= {"GLOO_SOCKET_IFNAME": "lo"}
    child = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = child.communicate(timeout=240)
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
    assert child.returncode == 0, output[-4000:]
    return [line.split()[1] for line in output.splitlines() if line.startswith("passed ")]


def test_two_ranks_of_fully_shard_freeze_and_train_as_one(tmp_path) -> None:
    passed = _passed("sharded_training", str(tmp_path / "saved"))
    assert passed == ["check_freeze", "check_resume", "check_subnetwork"]


@pytest.mark.extras
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")
def test_trl_under_accelerates_fsdp2_trains_the_subnetwork_as_data_parallel_training_does(tmp_path) -> None:
    import torch
    from trl_models import language_model

    language_model(tmp_path / "base", torch.float32)
    for wrap in ("fsdp2", "ddp"):
        assert _passed("sharded_trl", str(tmp_path), wrap) == [wrap]
        for rank in ("", "_1"):
            name = f"sparsity_audit_frozen{rank}.json"
            assert (tmp_path / wrap / "checkpoint-4" / name).is_file(), (wrap, rank)
    sharded, replicated = (torch.load(tmp_path / f"{wrap}.pt") for wrap in ("fsdp2", "ddp"))
    # Gradients are summed over ranks in another order, and Adam's first steps divide by their magnitude.
    worst = max(float((sharded[name] - replicated[name]).abs().max()) for name in sharded)
    assert worst < 1e-4
