"""What is known of the runs of a recovery beside their weights: task scores, seeds, precision.

Contract: files are read as they are given and refused where they contradict themselves; a run whose
configuration does not tell its seed has none here, and nothing is guessed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsity_audit.checkpoint.store import Catalogue
from sparsity_audit.errors import UsageError
from sparsity_audit.stats.scores import Accuracy

__all__ = ["Metrics", "RunFacts", "read_accuracy", "read_metrics", "run_facts", "verify_labels"]

_RESERVED = ("base", "full", "sub")
_MAX_JSON_BYTES = 1_000_000
_FORM = '{"base": {"accuracy": 0.363, "n": 512}, "full": {…}, "sub": {…}, "NAME of a control": {…}}'


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """Task scores.

    Args:
        metric: What they measure.
        accuracies: By label.
    """

    metric: str
    accuracies: Mapping[str, Accuracy]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """What a run's configuration tells; None where it does not."""

    seed: int | None
    precision: str | None


def verify_labels(controls: Sequence[str], masks: Sequence[str]) -> None:
    """Refuse names of controls that are taken, and masks of no control. Raises UsageError."""
    for name in controls:
        if name in _RESERVED or not name or not name.isprintable():
            raise UsageError(f"control {name!r}", "is no name for a control", expected="another name")
    unknown = [name for name in masks if name not in controls]
    if unknown:
        raise UsageError(
            f"control mask {unknown[0]!r}",
            "there is no such control",
            expected=", ".join(controls) or "a control of that name",
        )


def read_metrics(given: str | Path | Mapping[str, Any], *, labels: Sequence[str]) -> Metrics:
    """Accuracies of base, full, sub and controls.

    Args:
        given: A JSON file, or what one holds: label → `accuracy` (or `correct`) and `n`, with
            `standard_error` where trials are not independent; and `metric`, a text.
        labels: Base, full, sub and the controls.

    Raises:
        UsageError: Not readable, not of that form, or of other runs.
    """
    subject = "metrics" if isinstance(given, Mapping) else str(given)
    found = dict(given) if isinstance(given, Mapping) else _read_json(Path(given), subject)
    metric = found.pop("metric", "accuracy")
    if not isinstance(metric, str) or not metric.isprintable():
        raise UsageError(f"{subject}: metric", f"{metric!r:.80}", expected="a line of text")
    strange = sorted(found.keys() - set(labels))
    if strange:
        raise UsageError(f"{subject}: {strange[0]!r}", "is no run", expected=", ".join(labels))
    missing = [label for label in _RESERVED if label not in found]
    if missing:
        raise UsageError(subject, f"has no scores of {', '.join(missing)}", expected=_FORM)
    accuracies = {
        label: read_accuracy(found[label], f"{subject}: {label}") for label in labels if label in found
    }
    return Metrics(metric=metric, accuracies=accuracies)


def read_accuracy(entry: Any, subject: str) -> Accuracy:
    """One score: `accuracy` or `correct`, `n`, and perhaps `standard_error`. Raises UsageError."""
    allowed = {"accuracy", "correct", "n", "standard_error"}
    if not isinstance(entry, Mapping) or not entry.keys() <= allowed or "n" not in entry:
        raise UsageError(subject, f"{entry!r:.80}", expected='{"accuracy": 0.75, "n": 512}')
    if ("accuracy" in entry) == ("correct" in entry):
        raise UsageError(subject, f"{entry!r:.80}", expected="either accuracy or correct, and n")
    numbers = {key: _number(entry[key], f"{subject}: {key}") for key in entry}
    trials = numbers["n"]
    if trials <= 0:
        raise UsageError(f"{subject}: n", f"{entry['n']!r:.80}", expected="a number of trials > 0")
    value = numbers["accuracy"] if "accuracy" in numbers else numbers["correct"] / trials
    if not 0 <= value <= 1:
        raise UsageError(subject, f"an accuracy of {value:g}", expected="a share in [0, 1]")
    if "standard_error" in numbers:
        return Accuracy.from_standard_error(value, numbers["standard_error"], trials=trials)
    return Accuracy(value=value, trials=trials)


def _number(value: Any, subject: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise UsageError(subject, f"{value!r:.80}", expected="a finite number ≥ 0")
    return float(value)


def _read_json(path: Path, subject: str) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_JSON_BYTES + 1)
        value = json.loads(raw) if len(raw) <= _MAX_JSON_BYTES else None
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(
            subject, f"cannot be read as JSON ({type(error).__name__})", expected=_FORM
        ) from error
    if not isinstance(value, dict):
        raise UsageError(subject, "is no JSON object", expected=_FORM)
    return value


def run_facts(catalogue: Catalogue) -> RunFacts:
    """Seed and precision from the `run.json` of `lab train`, beside the weights or one directory up."""
    if catalogue.files[0].remote is not None:
        return RunFacts(seed=None, precision=None)
    folder = catalogue.folder
    for path in (folder / "run.json", folder.resolve().parent / "run.json"):
        try:
            config = _read_json(path, str(path)).get("config") if path.is_file() else None
        except UsageError:  # some other program's file of that name
            continue
        if isinstance(config, Mapping):
            seed, precision = config.get("seed"), config.get("precision")
            return RunFacts(
                seed=seed if type(seed) is int else None,
                precision=precision if isinstance(precision, str) else None,
            )
    return RunFacts(seed=None, precision=None)
