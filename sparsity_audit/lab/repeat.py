"""Repeat a finished run from its own base, with updates inside a mask alone, and prove that they were.

Contract: base, data, algorithm, every setting and the number of updates are those of the run; only seed,
learning rate and mask may be others. What is stored outside the mask has the bits of the base as training
began, cast and rounded as the run's precision says, or an error names the first entry that has not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from sparsity_audit.errors import CheckpointNotFoundError, UsageError
from sparsity_audit.lab.config import TrainConfig
from sparsity_audit.lab.folder import load_model
from sparsity_audit.lab.runs import TrainResult, run_training
from sparsity_audit.lab.saved_run import SavedRun, read_run
from sparsity_audit.lab.update import UpdateMask, mask_sha256
from sparsity_audit.training.parameters import name_parameters
from sparsity_audit.training.update_masks import bind_mask
from sparsity_audit.training.verify import FrozenProof, verify_frozen

__all__ = [
    "config_record",
    "finished_full_run",
    "prove_outside",
    "read_update_mask",
    "repeat_run",
    "repeated_config",
]

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def finished_full_run(path: str | Path) -> SavedRun:
    """A run that trained every entry to its end.

    Raises:
        CheckpointNotFoundError: It is not the folder of a run, or its base is gone.
        UsageError: It is not finished, or was itself confined to a mask.
    """
    folder = Path(path)
    saved = read_run(folder)
    if not (folder / "result.json").is_file() or not (folder / "final").is_dir():
        done, steps = len(saved.metrics), saved.config["steps"]
        raise UsageError(
            str(path),
            f"is not finished: {done} of {steps} steps are done",
            expected="a run that came to its end",
            remedy="repeat its `lab train` command, which goes on from there",
        )
    if saved.config["update_mask_sha256"] is not None:
        raise UsageError(
            str(path),
            "was itself trained inside a mask",
            expected="the full run, which trained every entry",
            remedy="give the run that the mask was made from",
        )
    return saved


def read_update_mask(path: Path, base: Path) -> UpdateMask:
    """A mask directory as bool tensors by parameter name, once it is proven to be of this base.

    A parameter that the mask does not speak of is frozen.

    Raises:
        MaskError: The mask is no mask of the base.
    """
    model = load_model(base)
    bound = bind_mask(name_parameters(model), path)
    return {
        name: bound.selected.get(id(weight), torch.zeros(weight.shape, dtype=torch.bool))
        for name, weight in model.named_parameters()
    }


def repeat_run(
    saved: SavedRun,
    output: Path,
    *,
    update_mask: UpdateMask | None,
    seed: int,
    lr: float,
    on_note: Callable[[str], None],
) -> TrainResult:
    """Train again; a killed repetition goes on.

    Args:
        saved: The run that is repeated.
        output: Folder of the new one.
        update_mask: Where entries may move; None trains all.
        seed: Of problems, samples and shuffles.
        lr: Learning rate.
        on_note: Called with lines for the user.

    Raises:
        OutputError: The folder holds something else, or cannot be written.
        NotFiniteError: The run collapsed.
    """
    config = repeated_config(saved, update_mask=update_mask, seed=seed, lr=lr)
    return run_training(
        config,
        load_model(saved.reference),
        output,
        update_mask=update_mask,
        overwrite=False,
        state_every=5,
        on_step=lambda _metrics: None,
        on_note=on_note,
    )


def repeated_config(saved: SavedRun, *, update_mask: UpdateMask | None, seed: int, lr: float) -> TrainConfig:
    """The run's own settings but for seed, learning rate, mask, and where the base now lies."""
    settings: dict[str, Any] = dict(saved.config)
    # PRIME's reward model learns at the policy's rate unless it was given another.
    if settings["algorithm"] == "prime" and settings["critic_lr"] == settings["lr"]:
        settings["critic_lr"] = lr
    changed = {
        # Absolute, so that a repetition that is resumed from another directory is the same one.
        "base": str(saved.reference.resolve()),
        "base_sha256": _sha256(saved.reference / "model.safetensors"),
        "update_mask_sha256": None if update_mask is None else mask_sha256(update_mask),
        "lengths": saved.lengths,
        "seed": seed,
        "lr": lr,
        "checkpoints": "last",
    }
    try:
        return TrainConfig(**{**settings, **changed})
    except TypeError as error:
        raise UsageError(
            str(saved.path / "run.json"),
            f"has not the settings of this version: {error}",
            remedy="repeat it with the version that wrote it, or train it anew",
        ) from error


def prove_outside(saved: SavedRun, final: Path, *, update_mask: UpdateMask | None) -> FrozenProof | None:
    """That a repetition's stored weights have the base's bits outside the mask; None without a mask.

    Raises:
        FrozenEntryChangedError: An entry changed.
    """
    if update_mask is None:
        return None
    # As training began: the bf16 arm rounds its base first, the fp32 arm widens it.
    start = {
        name: weight.detach().to(_DTYPES[saved.config["precision"]])
        for name, weight in load_model(saved.reference).state_dict().items()
    }
    return verify_frozen(load_file(final / "model.safetensors"), start, update_mask)


def config_record(saved: SavedRun) -> Mapping[str, Any]:
    """What identifies the run: its settings, and the weights it ended with."""
    config = {key: value for key, value in saved.config.items() if key != "base"}
    return json.loads(json.dumps({**config, "final_sha256": _sha256(saved.path / "final/model.safetensors")}))


def _sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise CheckpointNotFoundError(str(path), error.strerror or "cannot be read") from error
