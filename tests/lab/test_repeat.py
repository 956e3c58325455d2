"""A repeated run has the settings of the run it repeats, and its proof is one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lab_runs import ADDITION, config

from sparsity_audit.errors import FrozenEntryChangedError, UsageError
from sparsity_audit.lab.config import ALGORITHMS
from sparsity_audit.lab.folder import load_model, save_model
from sparsity_audit.lab.repeat import prove_outside, repeated_config
from sparsity_audit.lab.saved_run import SavedRun

BASE = ADDITION / "base-bf16"


def _saved(algorithm: str, **changes) -> SavedRun:
    settings = config(algorithm, **changes).to_json()
    return SavedRun(path=Path("run"), config=settings, reference=BASE, checkpoints=(), metrics=())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_only_seed_rate_mask_and_base_differ(algorithm) -> None:
    saved = _saved(algorithm, epochs=1, steps=5)
    mask = {"w": torch.ones(1, dtype=torch.bool)}
    again = repeated_config(saved, update_mask=mask, seed=7, lr=1e-4).to_json()
    differing = {key for key in again if again[key] != saved.config[key]}
    assert differing == {"base", "base_sha256", "update_mask_sha256", "seed", "lr", "checkpoints"}
    assert (again["seed"], again["lr"], again["checkpoints"]) == (7, 1e-4, "last")


def test_the_rate_of_an_implicit_reward_model_follows_unless_it_was_given() -> None:
    same = repeated_config(_saved("prime", critic_lr=3e-4), update_mask=None, seed=0, lr=1e-3)
    own = repeated_config(_saved("prime", critic_lr=5e-4), update_mask=None, seed=0, lr=1e-3)
    assert (same.critic_lr, own.critic_lr) == (1e-3, 5e-4)


def test_a_run_of_another_version_says_so() -> None:
    saved = _saved("grpo")
    strange = SavedRun(
        path=saved.path, config={**saved.config, "warp": 9}, reference=BASE, checkpoints=(), metrics=()
    )
    with pytest.raises(UsageError, match=r"has not the settings of this version(.|\n)*train it anew"):
        repeated_config(strange, update_mask=None, seed=0, lr=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_entry_that_moved_outside_the_mask_is_named(tmp_path, precision) -> None:
    saved = _saved("grpo", precision=precision)
    model = load_model(BASE)
    mask = {name: torch.zeros(weight.shape, dtype=torch.bool) for name, weight in model.named_parameters()}
    mask["lm_head.weight"][3] = True
    with torch.no_grad():
        model.lm_head.weight[3] += 1.0
    save_model(model, tmp_path / "inside", dtype=precision)
    proof = prove_outside(saved, tmp_path / "inside", update_mask=mask)
    assert proof is not None
    assert proof.num_frozen == 148_928 - 64
    with torch.no_grad():
        model.lm_head.weight[4, 7] *= -1
    save_model(model, tmp_path / "outside", dtype=precision)
    with pytest.raises(FrozenEntryChangedError, match=r"tensor 'lm_head.weight', entry \[4, 7\]"):
        prove_outside(saved, tmp_path / "outside", update_mask=mask)
