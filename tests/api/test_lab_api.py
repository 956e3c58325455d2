"""`lab_pretrain` and `lab_evaluate`: recipes with other settings, references by name, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sparsity_audit as sa
from sparsity_audit.errors import CheckpointNotFoundError, UsageError
from sparsity_audit.lab.pretrain import StepRecord
from sparsity_audit.lab.recipes import RECIPES

ROOT = Path(__file__).resolve().parents[2]


def test_a_recipe_can_be_changed_in_steps_target_formats_and_lengths(tmp_path: Path) -> None:
    import json

    seen: list[StepRecord] = []
    result = sa.lab_pretrain(
        "mix",
        tmp_path / "base",
        seed=3,
        steps=2,
        target=None,
        formats={"R": 1.0},
        lengths={1: 1.0, 2: 1.0},
        on_step=seen.append,
    )
    assert [record.step for record in seen] == [1, 2]
    assert (result.converged, result.accuracy) == (True, None)
    record = json.loads((tmp_path / "base" / "pretrain.json").read_text())
    assert record["recipe"]["parts"] == [
        {"task": "addition", "formats": {"R": 1.0}, "lengths": {"1": 1.0, "2": 1.0}, "weight": 1.0}
    ]
    assert (record["recipe"]["steps"], record["recipe"]["target"], record["seed"]) == (2, None, 3)


def test_another_size_and_target_are_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECIPES, "single", replace(RECIPES["single"], final_prompts=64))
    result = sa.lab_pretrain("single", tmp_path / "small", size="small", steps=1, target=None)
    assert sum(weight.numel() for weight in result.model.parameters()) == 784_512
    result = sa.lab_pretrain("single", tmp_path / "tiny", steps=1, lengths={1: 1.0}, target=(0.5, 0.6))
    assert (result.converged, result.overshot) == (False, False)


def test_threads_are_as_before_afterwards(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        sa.lab_pretrain("single", tmp_path / "base", steps=1, target=None)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_shipped_bases_have_the_accuracy_they_are_said_to_have() -> None:
    """Windows of lab.md: the 95 % interval of 512 prompts × 2 samples meets them."""
    for name, low, high in (("mix", 0.36, 0.41), ("single", 0.27, 0.35)):
        found = sa.lab_evaluate(name, num_prompts=512, num_samples=2)
        assert found.accuracy.low < high
        assert found.accuracy.high > low
        shares = {row.format: row.share for row in found.formats}
        if name == "single":
            assert shares["S"] > 0.98
        else:
            assert min(shares[fmt] for fmt in "SRC") > 0.2


def test_a_reference_may_be_a_name_or_a_path_and_lengths_may_be_mixed(addition: Path) -> None:
    found = sa.lab_evaluate(
        addition / "grpo-bf16-seed0",
        digits={3: 1.0, 4: 1.0},
        num_prompts=16,
        num_samples=2,
        reference=addition / "base-bf16",
        betas=(0.5,),
    )
    assert found.drift is not None
    assert found.drift.kl_per_token > 0
    assert len(found.drift.optima) == 1
    assert found.lengths == {3: 1.0, 4: 1.0}
    named = sa.lab_evaluate("mix", num_prompts=4, num_samples=1, reference="mix", digits=1)
    assert named.drift is not None
    assert named.drift.kl_per_completion == 0


def test_another_task_is_asked_in_the_same_alphabet() -> None:
    found = sa.lab_evaluate("mix", task="sorting", digits=2, num_prompts=8, num_samples=1)
    assert found.task == "sorting"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "chess"}, "'chess' is not known"),
        ({"num_prompts": 0}, "prompts: 0"),
        ({"num_samples": 0}, "samples: 0"),
        ({"betas": (0.1, 0.0)}, "numbers greater than 0"),
        ({"digits": 0}, "at least 1"),
        ({"digits": 40}, "max_position_embeddings"),
        ({"digits": {}}, "mixture is empty"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        sa.lab_evaluate("single", **{"num_prompts": 2, "num_samples": 1, **arguments})


def test_an_unknown_name_is_taken_for_a_path_and_the_bases_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="one of mix, single"):
        sa.lab_evaluate("mixed")
    with pytest.raises(UsageError, match="'mixed' is not known\n  expected: one of mix, single, both"):
        sa.lab_pretrain("mixed", tmp_path / "x")
    with pytest.raises(UsageError, match="one of tiny, small, medium"):
        sa.lab_pretrain("mix", tmp_path / "x", size="huge")


def test_the_example_base_is_the_base_that_ships() -> None:
    shipped = ROOT / "sparsity_audit" / "lab" / "bases" / "mix" / "model.safetensors"
    assert (
        ROOT / "examples" / "addition" / "base" / "model.safetensors"
    ).read_bytes() == shipped.read_bytes()
