"""`lab_train` resolves defaults, refuses what cannot be, and its runs feed the auditor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sparsity_audit import diff, lab_train
from sparsity_audit.errors import CheckpointNotFoundError, UsageError
from sparsity_audit.lab.config import ALGORITHMS
from sparsity_audit.lab.folder import load_model
from sparsity_audit.types import View

BASE = Path(__file__).parents[1] / "data" / "addition" / "base-bf16"
TINY = {"base": BASE, "steps": 1, "prompts": 2, "samples": 2, "lengths": 2, "checkpoints": "last"}


def _config(output: Path) -> dict:
    return json.loads((output / "run.json").read_bytes())["config"]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_runs_with_nothing_but_its_name(tmp_path, algorithm) -> None:
    result = lab_train(tmp_path / "out", algorithm=algorithm, **TINY)
    assert result.steps == 1
    assert load_model(tmp_path / "out" / "final").config.hidden_size == 64


def test_defaults_are_those_of_the_specification(tmp_path) -> None:
    lab_train(tmp_path / "out", **{**TINY, "prompts": 16, "samples": 8})
    config = _config(tmp_path / "out")
    expected = {
        "algorithm": "grpo",
        "precision": "bf16",
        "lr": 3e-4,
        "clip": 0.2,
        "grad_clip": 1.0,
        "weight_decay": 0.0,
        "temperature": 1.0,
        "optimizer": "adamw",
        "divide_by_std": True,
        "kl": "none",
        "beta": None,
        "max_new_tokens": 20,
    }
    assert {name: config[name] for name in expected} == expected


def test_the_base_is_identified_by_its_weights_not_by_its_path(tmp_path) -> None:
    import shutil

    lab_train(tmp_path / "one", **TINY)
    shutil.copytree(BASE, tmp_path / "copy")
    lab_train(tmp_path / "two", **{**TINY, "base": tmp_path / "copy"})
    assert _config(tmp_path / "one")["base_sha256"] == _config(tmp_path / "two")["base_sha256"]


def test_a_run_is_a_pair_that_diff_audits(tmp_path) -> None:
    """At 3e-4 the half-ULP law freezes about a third of the entries of this base."""
    lab_train(tmp_path / "out", **{**TINY, "steps": 2, "prompts": 4, "samples": 4})
    report = diff(BASE, tmp_path / "out" / "final")
    assert 0.3 < report.headline("value", View.NATIVE).sparsity < 0.9


def test_an_update_mask_confines_the_update_and_belongs_to_the_runs_identity(tmp_path) -> None:
    model = load_model(BASE)
    mask = {
        name: torch.rand(weight.shape, generator=torch.manual_seed(0)) < 0.05
        for name, weight in model.named_parameters()
    }
    options = {**TINY, "prompts": 4, "samples": 4, "update_mask": mask}
    lab_train(tmp_path / "out", **options)
    tuned = load_model(tmp_path / "out" / "final")
    moved = 0
    for (name, before), after in zip(model.named_parameters(), tuned.parameters(), strict=True):
        assert torch.equal(before[~mask[name]], after[~mask[name]])
        moved += int((before != after).sum())
    assert moved > 500
    other = {**mask, "lm_head.weight": ~mask["lm_head.weight"]}
    with pytest.raises(OSError, match="update_mask_sha256"):
        lab_train(tmp_path / "out", **{**options, "update_mask": other})


def test_an_unknown_algorithm_leaves_no_folder_behind(tmp_path) -> None:
    with pytest.raises(UsageError, match="did you mean 'grpo'"):
        lab_train(tmp_path / "out", algorithm="gpro", **TINY)
    assert not (tmp_path / "out").exists()


def test_a_base_that_is_not_there_is_refused(tmp_path) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"no config\.json"):
        lab_train(tmp_path / "out", **{**TINY, "base": tmp_path / "none"})


def test_an_empty_format_is_refused_by_name(tmp_path) -> None:
    with pytest.raises(UsageError, match="'' is not known"):
        lab_train(tmp_path / "out", algorithm="sft", solutions="written", formats={"": 1.0}, **TINY)
