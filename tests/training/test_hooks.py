"""Transformers' and TRL's own trainers, on a model built here: only the subnetwork moves."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import changed_inside, outside_is_equal, random_mask, snapshot
from trl_models import language_model, tokenizer

import sparsity_audit as sa
from sparsity_audit.errors import FrozenEntryChangedError, MissingExtraError, UsageError

HAS_TRL = importlib.util.find_spec("trl") is not None
needs_trl = pytest.mark.skipif(not HAS_TRL, reason="trl is not installed")


@pytest.mark.skipif(importlib.util.find_spec("transformers") is not None, reason="transformers is installed")
def test_without_transformers_the_extra_is_named() -> None:
    with pytest.raises(
        MissingExtraError, match=r"transformers is not installed(.|\n)*sparsity-audit\[train\]"
    ):
        sa.SubnetworkCallback  # noqa: B018 - looking it up is the test


def options(folder: Path, **more: Any) -> dict[str, Any]:
    common = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "report_to": [],
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_steps": 2,
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }
    return common | more


def trainer_of(kind: str, model: Any, folder: Path, callbacks: list[Any], **more: Any) -> Any:
    import trl
    from datasets import Dataset

    common = {"model": model, "processing_class": tokenizer(), "callbacks": callbacks}
    if kind == "sft":
        rows = [{"text": f"w{i} w{i + 1} w{i + 2} w{i + 3}"} for i in range(16)]
        config = trl.SFTConfig(**options(folder, max_length=16, **more))
        return trl.SFTTrainer(args=config, train_dataset=Dataset.from_list(rows), **common)
    if kind == "dpo":
        rows = [
            {"prompt": f"w{i}", "chosen": f"w{i + 1} w{i + 2}", "rejected": f"w{i + 3}"} for i in range(16)
        ]
        config = trl.DPOConfig(**options(folder, max_length=16, **more))
        return trl.DPOTrainer(args=config, train_dataset=Dataset.from_list(rows), **common)
    rows = [{"prompt": f"w{i} w{i + 1}"} for i in range(16)]
    config = trl.GRPOConfig(**options(folder, num_generations=4, max_completion_length=6, **more))

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(sum(map(ord, text)) % 5) for text in completions]

    return trl.GRPOTrainer(args=config, reward_funcs=reward, train_dataset=Dataset.from_list(rows), **common)


def tampering(mask: dict[str, torch.Tensor], at: int) -> Any:
    """A callback that writes outside the mask after a step, past the optimizer."""
    from transformers import TrainerCallback

    class Tamper(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == at:
                name, bits = next(iter(mask.items()))
                with torch.no_grad():
                    dict(kwargs["model"].named_parameters())[name][~bits] += 0.5

    return Tamper()


@pytest.mark.extras
@needs_trl
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["sft", "dpo", "grpo"])
def test_trl_trains_only_the_subnetwork(tmp_path, kind, dtype) -> None:
    model = language_model(tmp_path / "base", dtype)
    mask, before = random_mask(model, 1), snapshot(model)
    callback = sa.SubnetworkCallback(mask)
    live = sa.LiveAudit(every=2, criteria=["bitwise", "value"])
    trainer = trainer_of(kind, model, tmp_path / "out", [callback, live])
    trainer.train()
    after = snapshot(model)
    assert outside_is_equal(before, after, mask)
    moved = changed_inside(before, after, mask)
    assert moved > 50
    selected = sum(int(bits.sum()) for bits in mask.values())
    entries = sum(bits.numel() for bits in mask.values())
    logged = [row for row in trainer.state.log_history if "sparsity_audit/density" in row]
    assert logged[-1]["sparsity_audit/density"] == selected / entries
    assert logged[-1]["sparsity_audit/changed_ratio"] == moved / selected
    assert [record.step for record in live.records] == [2, 4]
    assert live.records[-1].compared == entries
    assert live.records[-1].changed["bitwise"] == moved
    last = [row for row in trainer.state.log_history if "sparsity_audit/update_sparsity/value" in row][-1]
    assert last["sparsity_audit/update_sparsity/value"] == live.records[-1].sparsity("value")
    saved = json.loads((tmp_path / "out" / "checkpoint-4" / "sparsity_audit_frozen.json").read_text())
    assert set(saved["frozen"]) == set(mask)


@pytest.mark.extras
@needs_trl
@pytest.mark.parametrize("at", [1, 3])
def test_a_write_outside_the_mask_is_found_at_the_save_and_at_the_end(tmp_path, at) -> None:
    model = language_model(tmp_path / "base", torch.float32)
    mask = random_mask(model, 1)
    # The optimizer's next step restores what was written, so the write must come last before a proof.
    steps = {"max_steps": at, "save_strategy": "no"} if at == 1 else {"save_steps": 3, "max_steps": 6}
    trainer = trainer_of(
        "sft", model, tmp_path / "out", [tampering(mask, at), sa.SubnetworkCallback(mask)], **steps
    )
    with pytest.raises(FrozenEntryChangedError, match=r"lies outside the update mask and changed"):
        trainer.train()
    assert trainer.state.global_step == at


@pytest.mark.extras
@needs_trl
def test_a_resumed_trainer_ends_where_an_uninterrupted_one_ends(tmp_path) -> None:
    ends = []
    for name, halts in (("whole", ()), ("halted", (2,))):
        model = language_model(tmp_path / name, torch.float32, tied=True)
        mask = random_mask(model, 1)
        base = snapshot(model)
        out = tmp_path / f"{name}-out"
        for stop in halts:
            from transformers import TrainerCallback

            class Halt(TrainerCallback):
                def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                    control.should_training_stop = state.global_step == stop  # noqa: B023

            trainer_of("sft", model, out, [sa.SubnetworkCallback(mask), Halt()]).train()
            model = language_model(tmp_path / name, torch.float32, tied=True)
        trainer = trainer_of("sft", model, out, [sa.SubnetworkCallback(mask)])
        trainer.train(resume_from_checkpoint=bool(halts))
        assert outside_is_equal(base, snapshot(trainer.model), mask)
        ends.append(snapshot(trainer.model))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    (out / "checkpoint-2" / "sparsity_audit_frozen.json").unlink()
    trainer = trainer_of("sft", language_model(tmp_path / "again", torch.float32, tied=True), out, [])
    trainer.add_callback(sa.SubnetworkCallback(mask))
    with pytest.raises(UsageError, match=r"does not exist, and training goes on from step 2"):
        trainer.train(resume_from_checkpoint=str(out / "checkpoint-2"))
    trainer = trainer_of("sft", language_model(tmp_path / "live", torch.float32, tied=True), out, [])
    trainer.add_callback(sa.LiveAudit())
    with pytest.raises(UsageError, match=r"goes on from step 2, whose weights are not the base"):
        trainer.train(resume_from_checkpoint=str(out / "checkpoint-2"))


@pytest.mark.extras
@needs_trl
def test_attached_first_the_figures_reach_later_loggers(tmp_path) -> None:
    from transformers import TrainerCallback

    seen: list[dict[str, Any]] = []

    class Logger(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(dict(kwargs["logs"]))

    model = language_model(tmp_path / "base", torch.float32)
    trainer = trainer_of("sft", model, tmp_path / "out", [Logger()], save_strategy="no")
    sa.SubnetworkCallback(random_mask(model, 1)).attach(trainer)
    sa.LiveAudit(every=1).attach(trainer)
    trainer.train()
    assert {"sparsity_audit/density", "sparsity_audit/update_sparsity/atol:1e-5"} <= seen[0].keys()


@pytest.mark.extras
@needs_trl
def test_a_mask_of_another_model_ends_training_before_the_first_step(tmp_path) -> None:
    model = language_model(tmp_path / "base", torch.float32)
    before = snapshot(model)
    trainer = trainer_of("sft", model, tmp_path / "out", [sa.SubnetworkCallback({"x": torch.ones(1).bool()})])
    with pytest.raises(ValueError, match=r"'x': names no parameter of the model"):
        trainer.train()
    assert all(torch.equal(before[name], bits) for name, bits in snapshot(model).items())
