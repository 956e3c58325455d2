"""A pretraining run on disk: what it writes, and how it goes on after it was killed.

Contract: the output folder appears complete, when the base is finished: an ordinary model folder with
`pretrain.json` (recipe, seed, result) and the table of steps (`metrics.jsonl`, `metrics.csv`), all a function
of the settings alone. Until then one file beside it, `NAME.resume`, holds the state after each look at the
target; a run with the same settings goes on from it to the same bytes, a run with other settings refuses it.
"""

from __future__ import annotations

import csv
import io
import json
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sparsity_audit.errors import OutputError
from sparsity_audit.lab.folder import save_model, write_file
from sparsity_audit.lab.model import LlamaConfig
from sparsity_audit.lab.pretrain import Pretrained, Pretraining, StepRecord
from sparsity_audit.lab.recipes import Recipe
from sparsity_audit.seams import reached

__all__ = ["run_pretraining"]

_FORMAT, _VERSION = "sparsity-audit/pretraining", 1


def run_pretraining(
    recipe: Recipe,
    config: LlamaConfig,
    output: Path,
    *,
    seed: int,
    overwrite: bool,
    on_step: Callable[[StepRecord], None],
) -> Pretrained:
    """Make a base and write it.

    Args:
        recipe: What to train on, and until when.
        config: The model's shape.
        output: The folder to write.
        seed: Of everything random.
        overwrite: Replace what is there, a finished base or the state of a killed run.
        on_step: Called after each new step.

    Raises:
        UsageError: The recipe cannot be followed.
        OutputError: Something else is there, or the folder cannot be written.
        NotFiniteError: The loss diverged.
    """
    if not overwrite and output.exists() and (output.is_file() or any(output.iterdir())):
        raise OutputError(
            str(output), "exists and is not empty", remedy="choose another -o, or add --overwrite"
        )
    run = Pretraining(recipe, config, seed=seed)
    settings = {"recipe": recipe.to_json(), "config": asdict(config), "seed": seed}
    resume = output.with_name(output.name + ".resume")
    if overwrite:
        resume.unlink(missing_ok=True)
    _load(run, resume, settings)
    while not run.finished:
        on_step(run.step())
        if run.records[-1].step % recipe.evaluate_every == 0:
            _save(run, resume, settings)
            reached("training state written")
    result = run.result()
    save_model(
        result.model,
        output,
        dtype="bf16",
        overwrite=overwrite,
        beside=_tables(result) | {"pretrain.json": _record(result, settings)},
    )
    resume.unlink(missing_ok=True)
    return result


def _save(run: Pretraining, resume: Path, settings: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save({"settings": json.dumps(settings), "state": run.state()}, buffer)
    write_file(resume, buffer.getvalue())


def _load(run: Pretraining, resume: Path, settings: dict[str, Any]) -> None:
    """Go on from a killed run's state where there is one. Raises OutputError where it is another run's."""
    if not resume.exists():
        return
    anew = "add --overwrite to begin anew"
    if not zipfile.is_zipfile(resume):
        raise OutputError(str(resume), "is not the state of a pretraining run", remedy=anew)
    try:
        saved = torch.load(resume, weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise OutputError(str(resume), f"cannot be read: {error}", remedy=anew) from error
    if saved["settings"] != json.dumps(settings):
        raise OutputError(
            str(resume),
            "is the state of a run with other settings",
            remedy=f"repeat that run's settings, choose another -o, or {anew}",
        )
    run.load_state(saved["state"])


def _record(result: Pretrained, settings: dict[str, Any]) -> bytes:
    record = {
        "format": _FORMAT,
        "version": _VERSION,
        **settings,
        "steps": result.steps,
        "converged": result.converged,
        "overshot": result.overshot,
        "accuracy": None if result.accuracy is None else asdict(result.accuracy),
    }
    return (json.dumps(record, indent=1) + "\n").encode()


def _tables(result: Pretrained) -> dict[str, bytes]:
    rows = [asdict(record) for record in result.records]
    table = io.StringIO()
    writer = csv.DictWriter(table, fieldnames=list(StepRecord.__dataclass_fields__), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return {
        "metrics.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode(),
        "metrics.csv": table.getvalue().encode(),
    }
