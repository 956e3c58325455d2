"""Where to substitute: positions from a file, from a divergence, or those where a model is least certain.

Contract: a place names a completion by its prompt's number and its own, and a token of it from 0. Places that
are not there are refused with the first one. Random places are of the same completions, as many in each, and
none of those that were chosen.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sparsity_audit.errors import UsageError
from sparsity_audit.models.noise import row_seed
from sparsity_audit.tokens.critical import Place, Reading

__all__ = [
    "DivergentSet",
    "least_certain",
    "most_divergent",
    "places_from_file",
    "random_places",
    "read_divergent",
]

_Key = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class DivergentSet:
    """Completions of a divergence's output folder.

    Args:
        name: The set: `base`, `tuned` or `given`.
        source: Where its prompts came from, in the record's words.
        tokens: (prompt, sample) → ids.
        js: (prompt, sample) → JS at each of them.
    """

    name: str
    source: str
    tokens: Mapping[_Key, tuple[int, ...]]
    js: Mapping[_Key, tuple[float, ...]]


def places_from_file(path: str | Path, sequences: Mapping[_Key, int], lengths: Sequence[int]) -> list[Place]:
    """The places of a JSONL file: `prompt` (its number), `position`, and perhaps `sample` (default 0).

    Args:
        path: The file.
        sequences: (prompt, sample) → number of the sequence.
        lengths: Tokens of each sequence.

    Raises:
        UsageError: The file cannot be read, or names what is not there.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(str(path), f"cannot be read: {error}", expected="a JSONL file, UTF-8") from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        subject = f"{path}, line {number}"
        try:
            value = json.loads(line)
            key, position = (int(value["prompt"]), int(value.get("sample", 0))), int(value["position"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(subject, "names no position", expected='{"prompt": 0, "position": 3}') from error
        if key not in sequences:
            raise UsageError(subject, f"prompt {key[0]} has no completion {key[1]} that can be used")
        if not 0 <= position < lengths[sequences[key]]:
            length = lengths[sequences[key]]
            raise UsageError(
                subject, f"position {position} of {length} tokens", expected=f"0 to {length - 1}"
            )
        found.append(Place(sequence=sequences[key], position=position))
    if not found:
        raise UsageError(str(path), "names no positions")
    return sorted(set(found))


def read_divergent(folder: str | Path, *, wanted: str) -> DivergentSet:
    """A set of completions, and its divergences, from what `tokens diverge -o` wrote. Raises UsageError."""
    place = Path(folder)
    expected = "a folder that `tokens diverge -o` wrote, with positions.csv"
    try:
        record = json.loads((place / "tokens.json").read_bytes())
        with (place / "positions.csv").open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["set"] == wanted]
        tokens: dict[_Key, list[int]] = {}
        js: dict[_Key, list[float]] = {}
        for row in rows:
            key = (int(row["prompt"]), int(row["sample"]))
            tokens.setdefault(key, []).append(int(row["token"]))
            js.setdefault(key, []).append(float(row["js"]))
        source = str(record["source"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(str(folder), f"cannot be read: {type(error).__name__}", expected=expected) from error
    if not tokens:
        raise UsageError(str(folder), f"has no completions of the set {wanted!r}", expected=expected)
    return DivergentSet(
        name=wanted,
        source=source,
        tokens={key: tuple(ids) for key, ids in tokens.items()},
        js={key: tuple(values) for key, values in js.items()},
    )


def most_divergent(js: Sequence[Sequence[float]], *, per_completion: int) -> list[Place]:
    """The `per_completion` positions of largest JS of each completion; among equals the first."""
    return _smallest([-np.asarray(values) for values in js], per_completion)


def least_certain(reading: Reading, *, per_completion: int) -> list[Place]:
    """The `per_completion` positions of smallest J of each completion; among equals the first."""
    return _smallest(reading.certainty, per_completion)


def _smallest(values: Sequence[np.ndarray], num: int) -> list[Place]:
    return [
        Place(sequence=sequence, position=int(position))
        for sequence, row in enumerate(values)
        for position in sorted(np.argsort(row, kind="stable")[:num])
    ]


def random_places(chosen: Sequence[Place], lengths: Sequence[int], *, seed: int) -> list[Place]:
    """As many other positions of each completion as were chosen there, or all that are left."""
    found: list[Place] = []
    taken: dict[int, set[int]] = {}
    for place in chosen:
        taken.setdefault(place.sequence, set()).add(place.position)
    for sequence, positions in sorted(taken.items()):
        free = [position for position in range(lengths[sequence]) if position not in positions]
        rng = np.random.default_rng(row_seed(seed, "random places", sequence))
        drawn = rng.permutation(len(free))[: len(positions)]
        found += [Place(sequence=sequence, position=free[n]) for n in sorted(drawn.tolist())]
    return found
