"""`retrain --config` really runs TRL's SFT, DPO and GRPO inside a mask, on a model built here."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from trl_models import language_model

import sparsity_audit as sa
from sparsity_audit.errors import MissingExtraError, UsageError

HAS_TRL = all(importlib.util.find_spec(name) is not None for name in ("trl", "datasets"))
needs_trl = pytest.mark.skipif(not HAS_TRL, reason="trl is not installed")

REWARDS = """
def last_is_even(completions, **_):
    return [float(text.strip()[-1:] in tuple("02468")) for text in completions]
"""
SCORES = """
from pathlib import Path
CALLS = []

def score(checkpoint):
    CALLS.append(str(checkpoint))
    return {"correct": 10 if "runs" in str(checkpoint) else 5, "n": 64}

def validate(checkpoint):
    return {"accuracy": 0.9 if str(checkpoint).endswith("-x2/final") else 0.3, "n": 16}
"""
ROWS = {
    "sft": [{"text": f"w{i} w{i + 1} w{i + 2} w{i + 3}"} for i in range(16)],
    "dpo": [{"prompt": f"w{i}", "chosen": f"w{i + 1} w{i + 2}", "rejected": f"w{i + 3}"} for i in range(16)],
    "grpo": [{"prompt": f"w{i} w{i + 1}"} for i in range(16)],
}
OWN: dict[str, dict[str, Any]] = {
    "sft": {"max_length": 16},
    "dpo": {"max_length": 16},
    "grpo": {"num_generations": 4, "max_completion_length": 6, "temperature": 1.5},
}


@pytest.fixture(autouse=True)
def _own_caches(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def project(folder: Path, trainer: str, *, dtype: torch.dtype = torch.float32, **more: Any) -> Path:
    """Model, full run, mask, data, functions and a file that names them."""
    model = language_model(folder / "base", dtype)
    full = {name: weight.clone() for name, weight in load_file(folder / "base" / "model.safetensors").items()}
    generator = torch.Generator().manual_seed(1)
    for weight in full.values():
        weight[torch.rand(weight.shape, generator=generator) < 0.3] += 0.25
    (folder / "full").mkdir()
    save_file(full, folder / "full" / "model.safetensors", metadata={"format": "pt"})
    sa.mask_export(folder / "base", folder / "full", folder / "mask")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[trainer]))
    (folder / "my_rewards.py").write_text(REWARDS)
    (folder / "my_scores.py").write_text(SCORES)
    settings = {
        "model": "base",
        "mask": "mask",
        "trainer": trainer,
        "dataset": "rows.jsonl",
        "dtype": str(dtype).removeprefix("torch."),
        "output": "out",
        "seed": 3,
        "arguments": {
            "max_steps": 3,
            "per_device_train_batch_size": 4,
            "learning_rate": "1e-2",
            "weight_decay": 0.1,
            "logging_steps": 1,
            "save_steps": 2,
            "bf16": False,
            **OWN[trainer],
        },
    }
    if trainer == "grpo":
        settings["reward"] = "my_rewards:last_is_even"
    del model
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({**settings, **more}))
    return path


def _moved(folder: Path, place: str) -> tuple[int, int]:
    """Entries that differ from the base inside of the mask of a run, and outside."""
    before, after = (load_file(folder / name / "model.safetensors") for name in ("base", place))
    sa.mask_convert(folder / "mask", folder / "bits", "pt") if not (folder / "bits").exists() else None
    bits = torch.load(folder / "bits" / "mask.pt")
    code = {2: torch.int16, 4: torch.int32}[next(iter(before.values())).element_size()]
    moved = {name: before[name].view(code) != after[name].view(code) for name in before}
    return tuple(sum(int((moved[n] & (bits[n] == side)).sum()) for n in moved) for side in (True, False))


@pytest.mark.extras
@needs_trl
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trainer", ["sft", "dpo", "grpo"])
def test_trl_trains_inside_the_mask_alone_and_the_record_says_so(tmp_path, trainer, dtype) -> None:
    path = project(tmp_path, trainer, dtype=dtype, full="full")
    found = sa.retrain(config=path)
    inside, outside = _moved(tmp_path, "out/runs/sub/final")
    assert inside > 50
    assert outside == 0
    entries = sum(w.numel() for w in load_file(tmp_path / "base" / "model.safetensors").values())
    assert found.report.sub.proof.num_frozen == entries - found.report.sub.selected
    assert (found.report.trainer, found.report.sub.seed, found.report.sub.lr) == (trainer, 3, 0.01)
    assert found.recovery.sub.frozen.moved == 0
    assert found.recovery.sub.seed == 3
    assert any("no task metrics" in warning for warning in found.report.warnings)


@pytest.mark.extras
@needs_trl
def test_fp32_masters_of_a_bf16_base_are_proven_and_judged_against_it(tmp_path) -> None:
    path = project(tmp_path, "sft", dtype=torch.bfloat16, full="full")
    settings = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**settings, "dtype": "float32"}))
    found = sa.retrain(config=path)
    stored = load_file(tmp_path / "out/runs/sub/final/model.safetensors")
    assert {weight.dtype for weight in stored.values()} == {torch.float32}
    assert found.recovery.sub.frozen.moved == 0
    assert found.recovery.sub.precision == "fp32"


@pytest.mark.extras
@needs_trl
def test_controls_scores_and_rates_chosen_on_other_prompts(tmp_path) -> None:
    path = project(
        tmp_path,
        "sft",
        full="full",
        score="my_scores:score",
        validation="my_scores:validate",
        controls=["random", "seed", "layer:0"],
        **{"control-lrs": [1, 2]},
    )
    found = sa.retrain(config=path)
    assert [run.label for run in found.report.runs] == ["sub", "random", "seed", "layer-0"]
    random = found.report.run("random")
    assert (random.lr, random.folder) == (0.02, "runs/random-x2")
    assert found.report.metric == "my_scores:score"
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["base"] == {"correct": 5, "n": 64}
    assert scores["sub"] == {"correct": 10, "n": 64}
    dense = _moved(tmp_path, "out/runs/seed/final")
    assert dense[1] > 0, "the second full run trains every entry"
    import my_scores

    calls = len(my_scores.CALLS)
    notes: list[str] = []
    before = (tmp_path / "out" / "retrain.json").read_bytes()
    sa.retrain(config=path, on_note=notes.append)
    assert sum("finished; nothing was done" in note for note in notes) == 6
    assert len(my_scores.CALLS) == calls + 2, (
        "base and full alone have no directory of ours to keep a score in"
    )
    assert (tmp_path / "out" / "retrain.json").read_bytes() == before


@pytest.mark.extras
@needs_trl
def test_a_killed_trainer_goes_on_from_its_last_save_to_the_same_bits(tmp_path) -> None:
    path = project(tmp_path, "sft")
    code = (
        "import os, signal, sys, transformers, sparsity_audit as sa\n"
        "begin = transformers.Trainer.training_step\n"
        "def step(self, *a, **k):\n"
        "    if self.state.global_step == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return begin(self, *a, **k)\n"
        "transformers.Trainer.training_step = step\n"
        "sa.retrain(config=sys.argv[1])\n"
    )
    root = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": str(root)}
    killed = subprocess.run([sys.executable, "-c", code, str(path)], check=False, env=env, timeout=200)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "out" / "runs" / "sub" / "final").exists()
    notes: list[str] = []
    sa.retrain(config=path, on_note=notes.append)
    assert any(note == "going on from checkpoint-2" for note in notes)
    sa.retrain(tmp_path / "whole", config=path)
    ends = [load_file(tmp_path / o / "runs/sub/final/model.safetensors") for o in ("out", "whole")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.extras
@needs_trl
def test_a_parquet_file_is_read(tmp_path) -> None:
    import datasets

    from sparsity_audit.training.trl_run import load_rows

    datasets.Dataset.from_list(ROWS["grpo"]).to_parquet(str(tmp_path / "rows.parquet"))
    rows = load_rows("grpo", str(tmp_path / "rows.parquet"), split="train")
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in ROWS["grpo"]]


@pytest.mark.extras
@needs_trl
@pytest.mark.parametrize(
    ("more", "match"),
    [
        (
            {"arguments": {"learning_rat": 1}},
            r"is no argument of SFTConfig(.|\n)*did you mean 'learning_rate'",
        ),
        ({"arguments": {"output_dir": "x"}}, r"is set by retrain(.|\n)*output"),
        ({"arguments": {"save_strategy": "sometimes"}}, r"arguments of SFTConfig"),
        ({"dataset": "nowhere.jsonl"}, "is not there"),
        ({"control-lrs": [1, 3], "controls": ["random"]}, "no validation set to choose by"),
    ],
)
def test_what_trl_would_stumble_over_is_said_before_training(tmp_path, more, match) -> None:
    path = project(tmp_path, "sft", **more)
    with pytest.raises(UsageError, match=match):
        sa.retrain(config=path)
    assert not (tmp_path / "out" / "runs" / "sub" / "final").exists()


@pytest.mark.extras
@needs_trl
def test_data_of_another_trainer_is_refused_by_its_columns(tmp_path) -> None:
    path = project(tmp_path, "sft")
    (tmp_path / "rows.jsonl").write_text('{"question": "w1"}\n')
    with pytest.raises(UsageError, match=r"has the columns question(.|\n)*text or messages or prompt and"):
        sa.retrain(config=path)
    (tmp_path / "rows.jsonl").write_text("not json\n")
    with pytest.raises(UsageError, match=r"rows.jsonl: cannot be read"):
        sa.retrain(config=path)


@pytest.mark.skipif(HAS_TRL, reason="trl is installed")
def test_without_trl_the_extra_is_named(tmp_path, addition) -> None:
    config = {"model": str(addition / "base-bf16"), "trainer": "sft", "dataset": "rows.jsonl"}
    config |= {"mask": "mask", "output": str(tmp_path / "out")}
    with pytest.raises(MissingExtraError, match=r"is not installed(.|\n)*sparsity-audit\[train\]"):
        sa.retrain(config=config)
    assert not (tmp_path / "out").exists()
