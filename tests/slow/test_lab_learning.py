"""Every algorithm learns, shuffled rewards teach nothing: a committed result that a slow test repeats."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sparsity_audit.lab.config import ALGORITHMS

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks" / "results" / "lab-learning.json"
SWEEPS = ROOT / "benchmarks" / "results" / "lab-study-full.json"
BASE = 0.41
"""Accuracy of `mix` on the problems of the full study."""


def _rows() -> dict[tuple[str, int], dict]:
    return {(row["row"], row["seed"]): row for row in json.loads(RESULT.read_text())["rows"]}


def test_the_committed_result_has_two_seeds_of_every_algorithm_on_512_prompts() -> None:
    record = json.loads(RESULT.read_text())
    assert record["prompts"] >= 512
    trained = {row["command"].split("--algorithm ")[1].split()[0] for row in record["rows"]}
    assert trained == set(ALGORITHMS)
    assert {seed for _, seed in _rows()} == {0, 1}
    assert len(_rows()) == len(record["rows"]) == 2 * len({row["row"] for row in record["rows"]})


def test_options_that_cross_the_algorithms_gained_in_the_committed_full_study() -> None:
    """Two seeds each, at several coefficients."""
    runs = json.loads(SWEEPS.read_text())["runs"]
    priorities = ("--kl-priority shannon", "--kl-priority max-prob")
    for option in ("--kl k3", "--kl exact", *priorities):
        gains = _gains(runs, option)
        assert len(gains) >= 2, option
        assert max(gains) > 0.15, option
    assert min(_gains(runs, "--optimizer sgd")) > 0.3
    assert min(_gains(runs, "--divergence-weight")) > 0.2


def test_every_option_gained_in_the_committed_result() -> None:
    options = (
        "sgd",
        "kl-exact",
        "kl-k1",
        "kl-k2",
        "kl-k3",
        "kl-shannon",
        "kl-max-prob",
        "divergence",
        "entropy-top",
    )
    for option in options:
        assert min(_rows()[option, seed]["gain"] for seed in (0, 1)) > 0.2, option


def _gains(runs: dict, option: str) -> list[float]:
    return [run["tests"]["addition-4"][0] - BASE for run in runs.values() if f"{option} " in run["command"]]


def test_in_the_committed_result_every_row_reached_its_goal() -> None:
    assert [key for key, row in _rows().items() if not row["reaches_its_goal"]] == []


@pytest.mark.parametrize("seed", [0, 1])
def test_in_the_committed_result_grpo_gains_a_quarter_and_shuffled_rewards_nothing(seed) -> None:
    """With one update a step in bf16; with eight, where the clip acts, S also takes over."""
    for row in ("grpo-bf16", "grpo-clipped"):
        assert _rows()[row, seed]["gain"] >= 0.25
    assert _rows()["grpo-clipped", seed]["format_shares"]["S"] >= 0.8
    assert _rows()["shuffled", seed]["gain"] <= 0.02


def test_the_committed_result_says_where_grpo_misses_what_the_specification_asks() -> None:
    reached = {key: row["reaches_the_specified_goal"] for key, row in _rows().items() if "grpo" in key[0]}
    assert [key for key, yes in reached.items() if yes] == [("grpo-clipped", 0), ("grpo-clipped", 1)]
    assert len(reached) == 6


def test_in_the_committed_result_sparsity_does_not_tell_learning_from_shuffled_rewards() -> None:
    sparsity = {key: row["sparsity_as_served"] for key, row in _rows().items()}
    for seed in (0, 1):
        assert abs(sparsity["grpo-bf16", seed] - sparsity["shuffled", seed]) < 0.02


@pytest.mark.slow
def test_every_algorithm_learns_again(tmp_path) -> None:
    script = ROOT / "benchmarks" / "lab_learning.py"
    done = subprocess.run(
        [sys.executable, str(script), "--workdir", str(tmp_path)], check=False, timeout=3500
    )
    assert done.returncode == 0
