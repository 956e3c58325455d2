"""`runs.yaml`: which runs to overlap, under which question, and what they have in common by design.

Contract: every value is checked before anything is opened; a message names the file, the run and the key.
Relative paths are relative to the YAML file. What the caller asks for wins over what the file says. Keys of a
run other than `run` and `label` are factors, which every run has; a level is text, a number or true/false,
and levels are the same where they are equal (`3e-4`, `3.0e-4` and `0.0003` are).
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sparsity_audit.api.overlap_inputs import place_of
from sparsity_audit.api.yaml_values import (
    as_choice,
    as_criterion,
    as_map,
    as_text,
    located,
    read_yaml,
    refuse_unknown,
)
from sparsity_audit.errors import UsageError
from sparsity_audit.types import Criterion, View

__all__ = ["RunsQuestion", "is_runs_file", "labels_of", "question_of", "read_runs"]

_SUFFIXES = (".yaml", ".yml")
_TOP_KEYS = frozenset({"base", "reference", "criterion", "view", "runs"})
_RUN_KEYS = frozenset({"run", "label"})
# YAML 1.1 reads 3e-4 as text: it wants 3.0e-4.
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d{1,2}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunsQuestion:
    """Runs and what is asked of them.

    Args:
        runs: Masks or checkpoints.
        labels: Run → what tables and figures call it; runs without one are called by the end of their path.
        levels: Run → factor → level; empty where no factors are known.
        base: The checkpoint that all runs started from.
        reference: The run that learned nothing.
        criterion: What "changed" means for checkpoints.
        view: `native` or `served`, for checkpoints.
    """

    runs: tuple[str, ...]
    labels: Mapping[str, str] = field(default_factory=dict)
    levels: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    base: str | Path | None = None
    reference: str | Path | None = None
    criterion: Criterion | str | None = None
    view: View | str | None = None


def question_of(
    runs: str | Path | Sequence[str | Path],
    *,
    base: str | Path | None,
    reference: str | Path | None,
    criterion: Criterion | str | None,
    view: View | str | None,
) -> RunsQuestion:
    """What is asked, by a file of runs or in so many words; None leaves it to the file.

    Raises:
        UsageError: A file of runs stands beside other runs, or is not understood.
    """
    given = [runs] if isinstance(runs, (str, Path)) else list(runs)
    files = [run for run in given if is_runs_file(run)]
    if files and len(given) > 1:
        raise UsageError(
            str(files[0]),
            "a file of runs beside other runs",
            expected="either the file, or the runs themselves",
        )
    found = read_runs(files[0]) if files else RunsQuestion(runs=tuple(map(str, given)))
    asked = {"base": base, "reference": reference, "criterion": criterion, "view": view}
    found = replace(found, **{key: value for key, value in asked.items() if value is not None})
    named: dict[str | Path | None, str] = {label: run for run, label in found.labels.items()}
    return replace(found, reference=named.get(found.reference, found.reference))


def is_runs_file(run: str | Path) -> bool:
    """Whether it is named like a YAML file; a directory of that name is a mask or a checkpoint."""
    return str(run).endswith(_SUFFIXES) and not Path(run).expanduser().is_dir()


def labels_of(question: RunsQuestion, given: Sequence[str]) -> list[str]:
    """What to call each run: its label, else the end of its path, else, where others share that, its path."""
    names = [question.labels.get(text) or Path(text).name or text for text in given]
    return [
        name if names.count(name) == 1 or text in question.labels else text
        for name, text in zip(names, given, strict=True)
    ]


def read_runs(path: str | Path) -> RunsQuestion:
    """What a YAML file of runs asks.

    Raises:
        UsageError: It cannot be read, or something in it is not understood; the message says where.
    """
    path = Path(path).expanduser()
    label, folder = path.name, path.parent
    document = read_yaml(path, holding="runs")
    refuse_unknown(label, document, _TOP_KEYS)
    rows = document.get("runs")
    if not isinstance(rows, list) or not rows:
        raise UsageError(label, "lists no runs", expected="`runs:` with two entries or more")
    maps = [as_map(f"{label}: run {number}", row) for number, row in enumerate(rows, 1)]
    runs = tuple(
        _place(f"{label}: run {number}, run", row.get("run"), folder) for number, row in enumerate(maps, 1)
    )
    for number, run in enumerate(runs, 1):
        first = place_of(runs, run)
        if first != number - 1:
            raise UsageError(
                f"{label}: run {number}, run",
                f"{maps[number - 1]['run']} is run {(first or 0) + 1} already",
                expected="different runs: a run overlaps with itself entirely",
            )
    labels = _labels(label, runs, maps)
    levels = _levels(label, maps)
    question = RunsQuestion(
        runs=runs, labels=labels, levels=dict(zip(runs, levels, strict=True)) if levels else {}
    )
    return replace(question, **_asked(label, document, folder, named=frozenset(labels.values())))


def _asked(label: str, document: Mapping[str, Any], folder: Path, *, named: frozenset[str]) -> dict[str, Any]:
    """Base, reference, criterion and view, where the file gives them."""
    found: dict[str, Any] = {}
    if document.get("base") is not None:
        found["base"] = _place(f"{label}: base", document["base"], folder)
    reference = document.get("reference")
    if reference is not None:
        is_label = isinstance(reference, str) and reference in named
        found["reference"] = reference if is_label else _place(f"{label}: reference", reference, folder)
    if document.get("criterion") is not None:
        found["criterion"] = as_criterion(f"{label}: criterion", document["criterion"])
    if document.get("view") is not None:
        found["view"] = as_choice(label, "view", document, [view.value for view in View])
    return found


def _place(where: str, text: Any, folder: Path) -> str:
    path, parsed = located(where, text, folder=folder)
    return path if parsed is None else parsed.uri


def _labels(label: str, runs: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Run → label, for the runs that have one."""
    found: dict[str, str] = {}
    taken: dict[str, int] = {}
    for number, (run, row) in enumerate(zip(runs, rows, strict=True), 1):
        text = row.get("label")
        if text is None:
            continue
        where = f"{label}: run {number}, label"
        name = as_text(where, text) if isinstance(text, str) else _level(where, text)
        if not name:
            raise UsageError(where, "is empty", expected="a label, or none: the end of the path is one")
        if name in taken:
            raise UsageError(where, f"{name!r} is that of run {taken[name]} too", expected="different labels")
        taken[name] = number
        found[run] = name
    return found


def _levels(label: str, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Each run's levels, factors in the order in which the file first names them; empty without factors."""
    factors = list(dict.fromkeys(key for row in rows for key in row if key not in _RUN_KEYS))
    for number, row in enumerate(rows, 1):
        for key in row:
            _check_factor(f"{label}: run {number}, {key}", key)
        missing = [factor for factor in factors if factor not in row]
        if missing:
            has = next(other for other, found in enumerate(rows, 1) if missing[0] in found)
            raise UsageError(
                f"{label}: run {number}",
                f"has no {missing[0]}, which run {has} has",
                expected="the same factors for every run",
            )
    if not factors:
        return []
    return [
        {factor: _level(f"{label}: run {number}, {factor}", row[factor]) for factor in factors}
        for number, row in enumerate(rows, 1)
    ]


def _check_factor(where: str, key: str) -> None:
    if key in _RUN_KEYS:
        return
    if key in _TOP_KEYS:
        raise UsageError(
            where,
            "a factor cannot have this name",
            expected="another name; base, reference, criterion and view stand at the top, for all runs",
        )
    if not key.strip():
        raise UsageError(where, "a factor without a name")
    if difflib.get_close_matches(key.lower(), ["label"], cutoff=0.8):
        raise UsageError(
            where, "a factor cannot have a name so close to `label`", expected="label, or another name"
        )


def _level(where: str, found: Any) -> str:
    """One spelling for equal values."""
    if isinstance(found, bool):
        return "true" if found else "false"
    if isinstance(found, str) and found.strip():
        text = found.strip()
        return _number(float(text)) if _NUMBER.fullmatch(text) else text
    if isinstance(found, (int, float)) and math.isfinite(found):
        return str(found) if isinstance(found, int) else _number(found)
    raise UsageError(where, repr(found), expected="text, a number, true or false")


def _number(value: float) -> str:
    return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)
