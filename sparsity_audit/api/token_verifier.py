"""Who judges completions: the lab's task, or a function the user names.

Contract: a verifier of a user is called with the prompt's own JSON object and the completion's text, without
the end token, and gives a truth value or a number in [0, 1]. What it raises, or returns beside that, is kept
as the reason why this completion has no score; the run goes on. The lab's verifier sees the end token, and is
strict about it.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsity_audit.api.token_prompts import PromptLine
from sparsity_audit.errors import UsageError
from sparsity_audit.models.protocol import Tokenizer

__all__ = ["Verifier", "judge_required", "load_verifier", "score_completion", "who_judges"]

Verifier = Callable[[Mapping[str, Any], str], Any]
"""(the prompt's JSON object, the completion's text) → truth value or number in [0, 1]."""


def load_verifier(text: str) -> Verifier:
    """The function that `module:function` or `path/to/file.py:function` names.

    Raises:
        UsageError: No such module or function.
    """
    place, _, name = text.rpartition(":")
    if not place or not name:
        raise UsageError(
            "verifier", f"{text!r} names no function", expected="module:function or path/to/file.py:function"
        )
    try:
        module = _file_module(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:
        raise UsageError(
            "verifier",
            f"{place} cannot be imported: {type(error).__name__}: {error}",
            remedy="give a module on PYTHONPATH, or the path of a .py file",
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UsageError(
            "verifier",
            f"{place} has no function {name!r}",
            expected="(the prompt's JSON object, the completion's text) -> truth value or number in [0, 1]",
        )
    return function


def who_judges(verifier: str | Verifier | None, task: str | None) -> tuple[str | None, Verifier | None]:
    """The judge's name for the record, and the function; no function for a task's own, no name for nobody.

    Raises:
        UsageError: A verifier beside a task, which has its own, or one that cannot be loaded.
    """
    if verifier is not None and task is not None:
        raise UsageError("verifier", "a task of the lab judges by itself", remedy="leave --verifier out")
    if verifier is None:
        return (None if task is None else f"{task} (built in)"), None
    if isinstance(verifier, str):
        return verifier, load_verifier(verifier)
    return getattr(verifier, "__qualname__", type(verifier).__qualname__), verifier


def judge_required(verifier: str | Verifier | None, task: str | None) -> tuple[str, Verifier | None]:
    """`who_judges`, where somebody must. Raises UsageError."""
    name, judge = who_judges(verifier, task)
    if name is None:
        raise UsageError(
            "verifier", "nobody judges the completions", remedy="--verifier module:function, or --task"
        )
    return name, judge


def _file_module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module


def score_completion(
    line: PromptLine,
    ids: Sequence[int],
    *,
    verifier: Verifier | None,
    tokenizer: Tokenizer,
    eos_ids: Sequence[int],
) -> tuple[float, str | None]:
    """Score in [0, 1] of a completion; NaN with the reason where the verifier gave none."""
    try:
        if verifier is None:
            assert line.judge is not None, "a task's prompts have a judge"
            found = line.judge(tokenizer.decode(ids))
        else:
            inside = ids[:-1] if ids and ids[-1] in eos_ids else ids
            found = verifier(line.fields, tokenizer.decode(inside))
        score = float(found)
    except Exception as error:  # noqa: BLE001 - a user's function may raise anything; it is reported
        return math.nan, f"the verifier raised {type(error).__name__}: {error}"
    if not 0 <= score <= 1:
        return math.nan, f"the verifier returned {found!r}, which is no number in [0, 1]"
    return score, None
