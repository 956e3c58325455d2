"""One run of TRL's SFT, DPO or GRPO trainer inside an update mask, in a directory that goes on after a kill.

Contract: the only module that imports TRL's trainers and `datasets`; needs the extra `[train]`. A run's
directory holds the trainer's checkpoints, `final/` and, last, `result.json`: with it the run is finished and
kept. It goes on from the last checkpoint that was completely written. What `final/` stores outside the mask
is compared with the base, bit for bit, after the trainer's own proof.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch

from sparsity_audit.errors import MissingExtraError, UsageError
from sparsity_audit.training.update_masks import Unmasked
from sparsity_audit.training.verify import verify_frozen

__all__ = [
    "COLUMNS",
    "RewardFunction",
    "TrlRun",
    "TrlTrainer",
    "check_arguments",
    "load_rows",
    "train_with_trl",
]

TrlTrainer = Literal["sft", "dpo", "grpo"]
RewardFunction = Callable[..., Sequence[float]]

_CLASSES: Final = {"sft": "SFT", "dpo": "DPO", "grpo": "GRPO"}
COLUMNS: Final = {
    "sft": (("text",), ("messages",), ("prompt", "completion")),
    "dpo": (("chosen", "rejected"),),
    "grpo": (("prompt",),),
}
"""Columns a data set must have, one of the alternatives; others reach reward functions as arguments."""
_FORMATS: Final = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_OURS: Final = {
    "output_dir": "output",
    "seed": "seed",
    "data_seed": "seed",
    "resume_from_checkpoint": "nothing: the same command goes on",
    "reward_funcs": "reward",
}
_DTYPES: Final = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrlRun:
    """What is trained.

    Args:
        trainer: `sft`, `dpo` or `grpo`.
        model: Directory of the base, or what names it on the Hub, as Transformers reads it.
        revision: On the Hub; None is the default branch.
        dtype: `float32`, `bfloat16`, or `auto` for the stored one.
        rows: The data set.
        rewards: Of `grpo`: verifiable rewards.
        arguments: Of TRL's configuration class.
        unmasked: What becomes of trained parameters that the mask does not speak of.
        trust_base: Do not compare the mask's base fingerprints with the weights.
    """

    trainer: TrlTrainer
    model: str
    revision: str | None
    dtype: str
    rows: Any
    rewards: tuple[RewardFunction, ...]
    arguments: Mapping[str, Any]
    unmasked: Unmasked | None
    trust_base: bool


def _trl() -> Any:
    try:
        importlib.import_module("datasets")
        return importlib.import_module("trl")
    except ImportError as error:
        raise MissingExtraError(
            "retrain --config",
            f"{error.name or 'trl'} is not installed",
            remedy="pip install 'sparsity-audit[train]'; --run repeats a run of the lab without it",
        ) from error


def check_arguments(trainer: TrlTrainer, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments as TRL's configuration class takes them, with every default of ours.

    Args:
        trainer: Whose.
        arguments: By name. YAML reads `1e-6` as text; where the class has a number it becomes one.

    Raises:
        UsageError: A name the class does not have, with the nearest it has; or one that is ours to set.
        MissingExtraError: TRL is not installed.
    """
    kind = getattr(_trl(), f"{_CLASSES[trainer]}Config")
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    for name in arguments:
        if name in _OURS:
            raise UsageError(
                f"arguments: {name}", "is set by retrain", expected=f"at the top of the file: {_OURS[name]}"
            )
        if name not in fields:
            near = difflib.get_close_matches(str(name), fields, n=1, cutoff=0.5)
            raise UsageError(
                f"arguments: {name}",
                f"is no argument of {kind.__name__}",
                expected="a field of that class",
                remedy=f"did you mean {near[0]!r}?" if near else None,
            )
    found = {name: _as_number(value, fields[name].type) for name, value in arguments.items()}
    if not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        found = {"use_cpu": True, **found}
    rate = fields["learning_rate"].default
    return {"learning_rate": rate, "disable_tqdm": True, **found}


def _as_number(value: Any, annotation: Any) -> Any:
    if isinstance(value, str) and "float" in str(annotation) and "str" not in str(annotation):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def load_rows(trainer: TrlTrainer, dataset: str, *, split: str) -> Any:
    """A data set from a JSONL or Parquet file, or from the Hub.

    Raises:
        UsageError: It cannot be read, is empty, or lacks the columns the trainer needs.
        MissingExtraError: `datasets` is not installed.
    """
    _trl()
    kind = _FORMATS.get(Path(dataset).suffix)
    if kind is not None and not Path(dataset).is_file():
        raise UsageError(f"dataset: {dataset}", "is not there", expected="a JSONL or Parquet file")
    datasets = importlib.import_module("datasets")
    try:
        if kind is not None:
            rows = datasets.load_dataset(kind, data_files=dataset, split="train")
        else:
            rows = datasets.load_dataset(dataset, split=split)
    except Exception as error:
        raise UsageError(
            f"dataset: {dataset}",
            f"cannot be read ({type(error).__name__}: {str(error).partition(chr(10))[0]:.200})",
            expected="a .jsonl or .parquet file, or a data set on the Hub",
        ) from error
    columns = set(rows.column_names)
    if not any(set(wanted) <= columns for wanted in COLUMNS[trainer]):
        raise UsageError(
            f"dataset: {dataset}",
            f"has the columns {', '.join(sorted(columns))}",
            expected=" or ".join(" and ".join(wanted) for wanted in COLUMNS[trainer]),
        )
    if not len(rows):
        raise UsageError(f"dataset: {dataset}", "has no rows", expected="at least one")
    return rows


def train_with_trl(
    run: TrlRun,
    folder: Path,
    *,
    mask: Path | None,
    seed: int,
    lr: float,
    on_note: Callable[[str], None],
) -> dict[str, Any]:
    """Train one run to its end, and prove it.

    Args:
        run: What is trained.
        folder: The run's directory.
        mask: A packed mask directory; None trains every entry.
        seed: Of data order, sampling and dropout.
        lr: Learning rate.
        on_note: Called with lines for the user.

    Returns:
        `num_tensors` and `num_frozen` of the proof, None without a mask.

    Raises:
        FrozenEntryChangedError: An entry outside the mask changed.
        UsageError: An argument has a value that TRL refuses.
        SparsityAuditError: As `freeze_outside`.
    """
    done = folder / "result.json"
    if done.is_file():
        on_note(f"{folder} holds this run, finished; nothing was done")
        return json.loads(done.read_bytes())
    folder.mkdir(parents=True, exist_ok=True)
    trainer, precision = _trainer(run, folder, mask=mask, seed=seed, lr=lr)
    config = {"seed": seed, "precision": precision, "lr": lr, "trainer": run.trainer}
    _write(folder / "run.json", {"config": config})
    last = _last_checkpoint(folder / "checkpoints", masked=mask is not None)
    if last is not None:
        on_note(f"going on from {last.name}")
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    trainer.save_model(str(folder / "final"))
    result: dict[str, Any] = {"steps": trainer.state.global_step, "num_tensors": None, "num_frozen": None}
    if mask is not None:
        proof = _prove_stored(run, folder / "final", mask)
        result |= {"num_tensors": proof.num_tensors, "num_frozen": proof.num_frozen}
    _write(done, result)
    return result


def _trainer(run: TrlRun, folder: Path, *, mask: Path | None, seed: int, lr: float) -> tuple[Any, str]:
    """The trainer, and how its weights are kept between steps."""
    trl = _trl()
    transformers = importlib.import_module("transformers")
    from sparsity_audit.training.hooks import SubnetworkCallback

    settings = {"save_total_limit": 2, **run.arguments, "learning_rate": lr, "seed": seed}
    name = _CLASSES[run.trainer]
    try:
        arguments = getattr(trl, f"{name}Config")(output_dir=str(folder / "checkpoints"), **settings)
    except (TypeError, ValueError) as error:
        raise UsageError(f"arguments of {name}Config", str(error).splitlines()[0]) from error
    model = _load(run, run.model, revision=run.revision)
    more: dict[str, Any] = {"reward_funcs": list(run.rewards)} if run.trainer == "grpo" else {}
    base = "trust" if run.trust_base else "verify"
    callbacks = [] if mask is None else [SubnetworkCallback(mask, unmasked=run.unmasked, base=base)]
    trainer = getattr(trl, f"{name}Trainer")(
        model=model,
        args=arguments,
        train_dataset=run.rows,
        processing_class=transformers.AutoTokenizer.from_pretrained(run.model, revision=run.revision),
        callbacks=callbacks,
        **more,
    )
    return trainer, _DTYPES.get(str(model.dtype).removeprefix("torch."), str(model.dtype))


def _load(run: TrlRun, place: str, *, revision: str | None = None) -> Any:
    transformers = importlib.import_module("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(place, revision=revision, dtype=run.dtype)


def _prove_stored(run: TrlRun, final: Path, mask: Path) -> Any:
    base = _load(run, run.model, revision=run.revision)
    return verify_frozen(_load(run, str(final)), base, mask, unmasked=run.unmasked or "freeze")


def _last_checkpoint(folder: Path, *, masked: bool) -> Path | None:
    """The latest checkpoint that is complete: what is written last is there."""
    from sparsity_audit.training.hooks import FROZEN_NAME

    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    wanted = FROZEN_NAME if masked else "trainer_state.json"
    return next((path for path in reversed(found) if (path / wanted).is_file()), None)


def _write(path: Path, value: Mapping[str, Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
