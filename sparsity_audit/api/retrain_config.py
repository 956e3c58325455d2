"""The YAML file of `retrain --config`: which model TRL trains on what, and what is asked for.

Contract: every key is known, every value of its kind, before anything is loaded; paths are relative to the
file. A function is `module:function`, importable from the file's directory or the environment.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from sparsity_audit.api.yaml_values import as_choice, as_list, as_map, as_number, read_yaml, refuse_unknown
from sparsity_audit.errors import UsageError

__all__ = ["RetrainConfig", "read_retrain_config"]

_KEYS = frozenset(
    {
        *("model", "mask", "full", "output", "trainer", "dataset", "split", "reward", "arguments", "dtype"),
        *("unmasked", "seed", "lr", "controls", "control-lrs", "score", "validation", "metric", "full-seed"),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrainConfig:
    """What the file says.

    Args:
        model: The base: a directory, or what names it on the Hub.
        mask: The mask; None where it is not said.
        full: The full run's checkpoint; None where there is none.
        full_seed: Its seed, where it is known.
        output: Where to write; None where it is not said.
        trainer: `sft`, `dpo` or `grpo`.
        dataset: A JSONL or Parquet file, or a data set on the Hub.
        split: Of a data set on the Hub.
        rewards: Of `grpo`: name and function.
        arguments: Of TRL's configuration class, as they stand in the file.
        dtype: `auto`, `float32` or `bfloat16`.
        unmasked: What becomes of trained parameters that the mask does not speak of.
        seed: Of the retrained run.
        lr: Its learning rate.
        controls: Their names.
        control_lrs: Multiples of the learning rate.
        score: Name and function, checkpoint → score; None without.
        validation: The same on other prompts.
        metric: What scores measure.
    """

    model: str
    mask: str | None
    full: str | None
    full_seed: int | None
    output: str | None
    trainer: Literal["sft", "dpo", "grpo"]
    dataset: str
    split: str
    rewards: tuple[tuple[str, Callable[..., Any]], ...]
    arguments: Mapping[str, Any]
    dtype: Literal["auto", "float32", "bfloat16"]
    unmasked: Literal["freeze", "train"] | None
    seed: int | None
    lr: float | None
    controls: tuple[str, ...]
    control_lrs: tuple[float, ...]
    score: tuple[str, Callable[..., Any]] | None
    validation: tuple[str, Callable[..., Any]] | None
    metric: str


def read_retrain_config(given: str | Path | Mapping[str, Any]) -> RetrainConfig:
    """What a file, or its content, asks for.

    Raises:
        UsageError: A key that is not known or missing, a value of another kind, or a function that cannot be
            imported.
    """
    if isinstance(given, Mapping):
        return _config("config", dict(given), Path())
    path = Path(given)
    return _config(str(path), read_yaml(path, holding="a retraining"), path.parent)


def _config(where: str, given: dict[str, Any], folder: Path) -> RetrainConfig:
    refuse_unknown(where, given, _KEYS)
    missing = [key for key in ("model", "trainer", "dataset") if given.get(key) is None]
    if missing:
        raise UsageError(where, f"has no {', '.join(missing)}", expected="model, trainer and dataset")
    trainer = cast(
        "Literal['sft', 'dpo', 'grpo']", as_choice(where, "trainer", given, ["sft", "dpo", "grpo"])
    )
    rewards = _functions(f"{where}, reward", given.get("reward"), folder)
    if bool(rewards) != (trainer == "grpo"):
        found = "is missing" if trainer == "grpo" else f"is read by grpo alone, not by {trainer}"
        raise UsageError(f"{where}, reward", found, expected="module:function with grpo, else nothing")
    score, validation = (
        _function(f"{where}, {key}", given[key], folder) if given.get(key) is not None else None
        for key in ("score", "validation")
    )
    unmasked = given.get("unmasked")
    return RetrainConfig(
        model=_place(where, "model", given, folder) or "",
        mask=_place(where, "mask", given, folder),
        full=_place(where, "full", given, folder),
        full_seed=_whole(where, "full-seed", given),
        output=_place(where, "output", given, folder, must_exist=False),
        trainer=trainer,
        dataset=_place(where, "dataset", given, folder) or "",
        split=str(given.get("split") or "train"),
        rewards=rewards,
        arguments=as_map(f"{where}, arguments", given.get("arguments") or {}),
        dtype=cast("Any", as_choice(where, "dtype", given, ["auto", "float32", "bfloat16"], "auto")),
        unmasked=None
        if unmasked is None
        else cast("Any", as_choice(where, "unmasked", given, ["freeze", "train"])),
        seed=_whole(where, "seed", given),
        lr=as_number(f"{where}, lr", given.get("lr"), above=0),
        controls=tuple(_control(where, item, folder) for item in as_list(where, "controls", given)),
        control_lrs=tuple(
            cast("float", as_number(f"{where}, control-lrs", item, above=0))
            for item in as_list(where, "control-lrs", given)
        ),
        score=score,
        validation=validation,
        metric=str(given.get("metric") or (score[0] if score else "")),
    )


def _control(where: str, item: Any, folder: Path) -> str:
    if not isinstance(item, str):
        raise UsageError(f"{where}, controls", repr(item), expected="names such as random or layer:1")
    kind, colon, argument = item.partition(":")
    return f"other:{folder / argument}" if kind == "other" and colon and argument else item


def _place(
    where: str, key: str, given: Mapping[str, Any], folder: Path, *, must_exist: bool = True
) -> str | None:
    """A path relative to the file where something is there, else the text itself, which may be the Hub's."""
    text = given.get(key)
    if text is None:
        return None
    if not isinstance(text, str) or not text:
        raise UsageError(f"{where}, {key}", repr(text), expected="a path, or a name on the Hub")
    path = folder / Path(text).expanduser()
    if not must_exist or path.exists() or path.suffix in (".jsonl", ".json", ".parquet"):
        return str(path)
    return text


def _whole(where: str, key: str, given: Mapping[str, Any]) -> int | None:
    found = given.get(key)
    if found is None:
        return None
    if type(found) is not int or found < 0:
        raise UsageError(f"{where}, {key}", repr(found), expected="a whole number ≥ 0")
    return found


def _functions(where: str, found: Any, folder: Path) -> tuple[tuple[str, Callable[..., Any]], ...]:
    items = found if isinstance(found, list) else [] if found is None else [found]
    return tuple(_function(where, item, folder) for item in items)


def _function(where: str, text: Any, folder: Path) -> tuple[str, Callable[..., Any]]:
    """`module:function`, and the function. Raises UsageError."""
    if not isinstance(text, str):
        raise UsageError(where, f"{text!r:.80}", expected="module:function")
    module, colon, name = text.partition(":")
    if not (module and colon and name):
        raise UsageError(where, f"{text!r}", expected="module:function, for instance rewards:exact_match")
    try:
        with _importable(folder):
            found = getattr(importlib.import_module(module), name, None)
    except Exception as error:
        raise UsageError(
            where,
            f"{module!r} cannot be imported ({type(error).__name__}: {error})",
            expected="a module beside the file, or an installed one",
        ) from error
    if not callable(found):
        raise UsageError(where, f"{module!r} has no function {name!r}", expected="module:function")
    return text, found


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let modules beside the file be imported."""
    place = str(folder.resolve())
    sys.path.insert(0, place)
    try:
        yield
    finally:
        sys.path.remove(place)
