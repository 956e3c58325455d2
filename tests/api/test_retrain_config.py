"""The file of `retrain --config`: every key known, every value of its kind, before TRL is looked for."""

from __future__ import annotations

from pathlib import Path

import pytest

import sparsity_audit as sa
from sparsity_audit.api.retrain_config import read_retrain_config
from sparsity_audit.errors import UsageError

BASIC = "model: org/model\ntrainer: grpo\ndataset: rows.jsonl\nreward: retrain_rewards:exact\n"


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "retrain_rewards.py").write_text("def exact(completions, **_):\n    return []\n")
    (tmp_path / "broken_rewards.py").write_text("1 / 0\n")
    (tmp_path / "mask").mkdir()
    return tmp_path


def _read(folder: Path, text: str):
    (folder / "run.yaml").write_text(text)
    return read_retrain_config(folder / "run.yaml")


def test_paths_are_relative_to_the_file_and_what_is_not_there_is_the_hubs(folder) -> None:
    found = _read(folder, BASIC + "mask: mask\noutput: out\ncontrols: [random, 'other:mask']\n")
    assert (found.model, found.mask) == ("org/model", str(folder / "mask"))
    assert (found.dataset, found.output) == (str(folder / "rows.jsonl"), str(folder / "out"))
    assert found.controls == ("random", f"other:{folder / 'mask'}")
    assert (found.dtype, found.unmasked, found.control_lrs, found.metric) == ("auto", None, (), "")


def test_functions_are_found_beside_the_file_whatever_the_working_directory(folder) -> None:
    ((name, function),) = _read(folder, BASIC + "lr: 1e-6\nscore: retrain_rewards:exact\n").rewards
    assert (name, function(["w"])) == ("retrain_rewards:exact", [])
    assert _read(folder, BASIC + "lr: 1e-6\n").lr == 1e-6


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("modell: x\n", r"unknown key modell(.|\n)*some of"),
        ("trainer: sft\n", "has no model, dataset"),
        ("model: m\ndataset: d\ntrainer: ppo\n", "expected: sft or dpo or grpo"),
        ("model: m\ndataset: d\ntrainer: grpo\n", r"reward: is missing(.|\n)*module:function"),
        ("model: m\ndataset: d\ntrainer: sft\nreward: retrain_rewards:exact\n", "is read by grpo alone"),
        ("model: m\ndataset: d\ntrainer: grpo\nreward: exact\n", r"'exact'(.|\n)*rewards:exact_match"),
        ("model: m\ndataset: d\ntrainer: grpo\nreward: retrain_rewards:none\n", "has no function 'none'"),
        (
            "model: m\ndataset: d\ntrainer: grpo\nreward: no_such_module:f\n",
            "cannot be imported .Module",
        ),
        (
            "model: m\ndataset: d\ntrainer: grpo\nreward: broken_rewards:f\n",
            "cannot be imported .Zero",
        ),
        ("model: m\ndataset: d\ntrainer: sft\nseed: -1\n", "a whole number"),
        ("model: m\ndataset: d\ntrainer: sft\nlr: much\n", "a number above 0"),
        ("model: m\ndataset: d\ntrainer: sft\narguments: [1]\n", "is a list"),
        ("model: m\ndataset: d\ntrainer: sft\ncontrols: [1]\n", "names such as random"),
        ("model: [m]\ndataset: d\ntrainer: sft\n", "a path, or a name on the Hub"),
        ("model: m\ndataset: d\ntrainer: sft\ndtype: int8\n", "auto or float32 or bfloat16"),
    ],
)
def test_what_is_wrong_with_the_file_is_said(folder, text, match) -> None:
    with pytest.raises(UsageError, match=match):
        _read(folder, text)


def test_a_file_that_is_not_there_is_an_input_error(tmp_path) -> None:
    with pytest.raises(UsageError, match=r"none.yaml"):
        sa.retrain(config=tmp_path / "none.yaml")
