"""Pretraining: it learns, repeats itself to the bit, goes on after a kill, and says when it failed."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sparsity_audit.errors import OutputError, UsageError
from sparsity_audit.lab.model import LlamaConfig
from sparsity_audit.lab.names import BASES, RECIPE_NAMES
from sparsity_audit.lab.pretrain import NotFiniteError, Pretrained, Pretraining, written_solutions
from sparsity_audit.lab.pretrain_run import run_pretraining
from sparsity_audit.lab.recipes import RECIPES, Part, Recipe, Target

CONFIG = LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
RECIPE = Recipe(
    parts=(Part(task="addition", formats={"R": 1}, lengths={1: 1}),),
    steps=12,
    target=Target(task="addition", length=1, low=0.9, high=1.0),
    batch=16,
    evaluate_every=4,
    evaluation_prompts=16,
    final_prompts=64,
)


def run(output: Path, recipe: Recipe = RECIPE, *, seed: int = 0, overwrite: bool = False) -> Pretrained:
    return run_pretraining(recipe, CONFIG, output, seed=seed, overwrite=overwrite, on_step=lambda _: None)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_few_steps_lower_the_loss_from_that_of_a_uniform_guess() -> None:
    training = Pretraining(replace(RECIPE, steps=40, target=None, adamw_lr=0.03), CONFIG, seed=0)
    losses = [training.step().loss for _ in range(40)]
    assert abs(losses[0] - 2.9957) < 1e-3, "ln 20"
    assert sum(losses[-5:]) / 5 < 1.6
    assert training.finished


def test_the_loss_is_on_completions_alone() -> None:
    batch = written_solutions(RECIPE.parts[0], 4, generator=torch.Generator().manual_seed(0))
    assert batch.rewards.all()
    assert all(text.startswith("R") for text in batch.texts())


def test_the_same_seed_gives_the_same_folder_and_another_another(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(tmp_path / name, seed=seed)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a")["model.safetensors"] != contents(tmp_path / "c")["model.safetensors"]
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "c"}


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
from sparsity_audit import seams
from lab.test_pretrain import RECIPE, run
torch.set_num_threads(1)
seams.observer = lambda point: os.kill(os.getpid(), signal.SIGKILL)
run(Path({output!r}))
"""


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    run(tmp_path / "whole")
    code = KILLED.format(tests=str(Path(__file__).parents[1]), output=str(tmp_path / "killed"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert (tmp_path / "killed.resume").exists()
    assert not (tmp_path / "killed").exists()
    steps: list[int] = []
    run_pretraining(
        RECIPE, CONFIG, tmp_path / "killed", seed=0, overwrite=False, on_step=lambda r: steps.append(r.step)
    )
    assert steps == list(range(5, 13)), "killed at the first look, after step 4"
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert not (tmp_path / "killed.resume").exists()


def test_a_base_below_its_target_did_not_converge_and_one_above_it_stops(tmp_path: Path) -> None:
    short = run(tmp_path / "short")
    assert (short.converged, short.steps) == (False, 12)
    assert json.loads((tmp_path / "short" / "pretrain.json").read_text())["converged"] is False
    assert RECIPE.target is not None
    easy = replace(RECIPE, target=replace(RECIPE.target, low=1e-9), evaluation_prompts=512, steps=400)
    done = run(tmp_path / "easy", easy)
    assert done.converged
    assert done.steps % 4 == 0
    assert done.steps < 400
    assert done.accuracy is not None
    assert done.accuracy.num_prompts == 64


def test_without_a_target_all_steps_are_taken_and_nothing_is_claimed() -> None:
    training = Pretraining(replace(RECIPE, target=None), CONFIG, seed=0)
    while not training.finished:
        assert training.step().accuracy is None
    result = training.result()
    assert (result.steps, result.converged, result.accuracy) == (12, True, None)


def test_the_result_lies_on_the_bf16_grid_and_its_tables_agree(tmp_path: Path) -> None:
    result = run(tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in result.model.state_dict().items():
        assert torch.equal(stored[name].float(), weight)
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["step"] for row in rows if row["accuracy"] is not None] == [4, 8, 12]
    table = list(csv.DictReader((tmp_path / "out" / "metrics.csv").open()))
    assert [float(row["loss"]) for row in table] == [row["loss"] for row in rows]


def test_the_rates_follow_a_cosine_from_one_to_zero() -> None:
    training = Pretraining(replace(RECIPE, target=None), CONFIG, seed=0)
    scales = [training.step().lr_scale for _ in range(12)]
    assert scales[0] == 1
    assert abs(scales[6] - 0.5) < 1e-12
    assert scales == sorted(scales, reverse=True)
    assert scales[-1] > 0


def test_what_is_there_is_not_replaced_unless_asked(tmp_path: Path) -> None:
    run(tmp_path / "out")
    with pytest.raises(OutputError, match="exists and is not empty"):
        run(tmp_path / "out", seed=1)
    run(tmp_path / "out", seed=1, overwrite=True)
    assert json.loads((tmp_path / "out" / "pretrain.json").read_text())["seed"] == 1


def test_the_state_of_another_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out.resume").write_bytes(b"junk")
    with pytest.raises(OutputError, match="is not the state of a pretraining run"):
        run(tmp_path / "out")
    torch.save({"settings": "{}", "state": {}}, tmp_path / "out.resume")
    with pytest.raises(OutputError, match="a run with other settings"):
        run(tmp_path / "out")
    run(tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out.resume").exists()


def test_a_rate_that_explodes_is_said_at_the_step(tmp_path: Path) -> None:
    with pytest.raises(NotFiniteError, match=r"loss (nan|inf) at step \d+\n  remedy: lower the rates"):
        run(tmp_path / "out", replace(RECIPE, adamw_lr=1e30, target=None))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (replace(RECIPE, parts=()), "has no data"),
        (replace(RECIPE, parts=(Part(task="addition", formats={}, lengths={1: 1}),)), "mixture is empty"),
        (
            replace(RECIPE, parts=(Part(task="addition", formats={"X": 1}, lengths={1: 1}),)),
            "'X' is not known",
        ),
        (replace(RECIPE, parts=(Part(task="addition", formats={"S": 1}, lengths={}),)), "mixture is empty"),
        (
            replace(RECIPE, parts=(Part(task="chess", formats={"S": 1}, lengths={1: 1}),)),
            "'chess' is not known",
        ),
        (replace(RECIPE, steps=0), "steps: 0"),
        (replace(RECIPE, target=Target(task="addition", length=1, low=0.5, high=0.4)), "0.5 to 0.4"),
        (replace(RECIPE, target=Target(task="addition", length=1, low=0.0, high=0.4)), "0.0 to 0.4"),
    ],
)
def test_a_recipe_that_cannot_be_followed_is_refused(recipe: Recipe, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Pretraining(recipe, CONFIG, seed=0)


def test_recipes_can_be_followed_and_are_known_by_name() -> None:
    assert tuple(RECIPES) == RECIPE_NAMES
    for recipe in RECIPES.values():
        recipe.check()


@pytest.mark.parametrize("name", BASES)
def test_the_shipped_bases_are_what_their_recipes_say(name: str) -> None:
    from sparsity_audit.lab.folder import resolve_base

    record = json.loads((resolve_base(name) / "pretrain.json").read_text())
    assert record["recipe"] == json.loads(json.dumps(RECIPES[name].to_json()))
    assert (record["seed"], record["converged"]) == (0, True)
