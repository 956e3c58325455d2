"""`pairs.yaml`: which pairs to compare, how, and what is expected of them.

Contract: every value is checked before anything is opened; a message names the file, the pair and the key,
and says what is accepted. Relative paths are relative to the YAML file. `published:SET` reads the pairs that
come with the package.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from sparsity_audit.api.presets import PRESETS
from sparsity_audit.api.yaml_values import (
    as_choice,
    as_criterion,
    as_list,
    as_map,
    as_number,
    as_text,
    located,
    parse_yaml,
    read_yaml,
    refuse_unknown,
)
from sparsity_audit.errors import UsageError
from sparsity_audit.types import View

__all__ = ["Expected", "PairEntry", "PairsFile", "read_pairs"]

PUBLISHED = "published:"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_RESERVED = frozenset({"figures"})
_TOP_KEYS = frozenset({"title", "source", "note", "defaults", "pairs"})
_QUESTION_KEYS = frozenset({"preset", "criteria", "view", "maps", "stats", "lr", "weights_dtype"})
_LABEL_KEYS = frozenset({"algorithm", "kind", "source", "note"})
_PAIR_KEYS = (
    _QUESTION_KEYS
    | _LABEL_KEYS
    | {"name", "base", "tuned", "base_revision", "tuned_revision", "expected", "skip"}
)
_EXPECTED_KEYS = frozenset({"sparsity", "tolerance", "criterion", "view"})
DEFAULT_TOLERANCE = 1.0
"""Percentage points: what the groups' figures differ by for one pair."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """A published or agreed value.

    Args:
        sparsity: Update sparsity in percent.
        tolerance: Allowed distance in percentage points.
        criterion: Judge by this criterion instead of the pair's preset or first criterion.
        view: The view to judge, with `criterion`.
    """

    sparsity: float
    tolerance: float = DEFAULT_TOLERANCE
    criterion: str | None = None
    view: View | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PairEntry:
    """One pair.

    Args:
        name: Names its row and its sub-directory.
        base: Reference of the base, ready to open.
        tuned: The same of the tuned side.
        algorithm: What trained it, for the table: GRPO, DPO, …
        kind: Its group in the figure: RL, SFT, …
        criteria: What to count beside the usual ones; the first decides the headline.
        view: View of mask criterion and headline.
        preset: The paper whose number is asked for.
        maps: (REGEX, REPL) rules.
        stats: `full` or `counts`.
        lr: Peak learning rate, for the half-ULP law.
        weights_dtype: How the trainer kept weights between steps.
        expected: What the number is compared with.
        source: Where the expected value stands.
        note: What a reader of the table should know.
        skip: Why it is listed and not run; None to run it.
    """

    name: str
    base: str
    tuned: str
    algorithm: str = ""
    kind: str = ""
    criteria: tuple[str, ...] = ()
    view: View = View.NATIVE
    preset: str | None = None
    maps: tuple[tuple[str, str], ...] = ()
    stats: str = "full"
    lr: float | None = None
    weights_dtype: str | None = None
    expected: Expected | None = None
    source: str = ""
    note: str = ""
    skip: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PairsFile:
    """All pairs of one file, in its order."""

    label: str
    title: str
    source: str
    note: str
    pairs: tuple[PairEntry, ...]


def read_pairs(reference: str | Path) -> PairsFile:
    """The pairs that a YAML file, or `published:SET`, lists.

    Raises:
        UsageError: It cannot be read, or something in it is not understood; the message says where.
    """
    text = str(reference)
    if text.startswith(PUBLISHED):
        return _published(text)
    path = Path(reference)
    return _document(read_yaml(path, holding="pairs"), label=path.name, folder=path.parent)


def _published(text: str) -> PairsFile:
    data = resources.files("sparsity_audit.api").joinpath("published.yaml").read_text(encoding="utf-8")
    sets = parse_yaml("published.yaml", data)
    name = text.removeprefix(PUBLISHED)
    if name not in sets:
        raise UsageError(text, "no such set", expected=", ".join(PUBLISHED + key for key in sorted(sets)))
    return _document(sets[name], label=text, folder=None)


def _document(found: Any, *, label: str, folder: Path | None) -> PairsFile:
    document = as_map(label, found)
    refuse_unknown(label, document, _TOP_KEYS)
    rows = document.get("pairs")
    if not isinstance(rows, list) or not rows:
        raise UsageError(label, "lists no pairs", expected="`pairs:` with at least one entry")
    defaults = as_map(f"{label}: defaults", document.get("defaults") or {})
    refuse_unknown(f"{label}: defaults", defaults, _QUESTION_KEYS | _LABEL_KEYS)
    entries = [
        _entry(label, number, row, defaults=defaults, folder=folder) for number, row in enumerate(rows, 1)
    ]
    seen: dict[str, str] = {}
    for entry in entries:
        other = seen.get(entry.name.lower())
        if other is not None:
            raise UsageError(
                f"{label}: pair {entry.name!r}",
                "occurs twice" if other == entry.name else f"is named like {other!r}",
                expected="different names, also without regard to case: they name directories",
            )
        seen[entry.name.lower()] = entry.name
    texts = {key: as_text(f"{label}: {key}", document.get(key)) for key in ("title", "source", "note")}
    return PairsFile(label=label, pairs=tuple(entries), **texts)


def _entry(
    label: str, number: int, row: Any, *, defaults: Mapping[str, Any], folder: Path | None
) -> PairEntry:
    where = f"{label}: pair {number}"
    given = as_map(where, row)
    name = given.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name.lower() in _RESERVED:
        raise UsageError(
            f"{where}, name",
            repr(name),
            expected="letters, digits, '.', '_' and '-', a letter or digit first: it names a directory",
        )
    where = f"{label}: pair {name!r}"
    refuse_unknown(where, given, _PAIR_KEYS)
    merged = {**defaults, **given}
    preset = merged.get("preset")
    if preset is not None and preset not in PRESETS:
        raise UsageError(f"{where}, preset", repr(preset), expected=" or ".join(sorted(PRESETS)))
    criteria = tuple(as_criterion(f"{where}, criteria", c) for c in as_list(where, "criteria", merged))
    expected = _expected(where, merged.get("expected"))
    if expected is not None and expected.criterion not in (None, *criteria):
        criteria = (*(criteria or ("value",)), expected.criterion)
    return PairEntry(
        name=name,
        base=_reference(where, "base", merged, folder),
        tuned=_reference(where, "tuned", merged, folder),
        criteria=tuple(dict.fromkeys(criteria)),
        view=View(as_choice(where, "view", merged, [v.value for v in View], View.NATIVE.value)),
        preset=preset,
        maps=tuple(_map_rule(where, rule) for rule in as_list(where, "maps", merged)),
        stats=as_choice(where, "stats", merged, ["full", "counts"], "full"),
        lr=as_number(f"{where}, lr", merged.get("lr"), above=0),
        weights_dtype=merged.get("weights_dtype")
        and as_choice(where, "weights_dtype", merged, ["bf16", "fp32"]),
        expected=expected,
        skip=as_text(f"{where}, skip", merged.get("skip")) or None,
        **{key: as_text(f"{where}, {key}", merged.get(key)) for key in sorted(_LABEL_KEYS)},
    )


def _expected(where: str, found: Any) -> Expected | None:
    if found is None:
        return None
    where = f"{where}, expected"
    given = as_map(where, found)
    refuse_unknown(where, given, _EXPECTED_KEYS)
    sparsity = as_number(f"{where}, sparsity", given.get("sparsity"), above=-1e-9, below=100)
    if sparsity is None:
        raise UsageError(where, "has no sparsity", expected="sparsity in percent, for instance 81.4")
    tolerance = as_number(f"{where}, tolerance", given.get("tolerance", DEFAULT_TOLERANCE), above=-1e-9)
    criterion, view = given.get("criterion"), given.get("view")
    return Expected(
        sparsity=sparsity,
        tolerance=DEFAULT_TOLERANCE if tolerance is None else tolerance,
        criterion=None if criterion is None else as_criterion(f"{where}, criterion", criterion),
        view=None if view is None else View(as_choice(where, "view", given, [v.value for v in View])),
    )


def _reference(where: str, side: str, given: Mapping[str, Any], folder: Path | None) -> str:
    """A path relative to the file, or else a Hub reference in its full form, with its revision.

    The full form keeps a directory of that name below the working directory from being taken for it.
    """
    text, revision = given.get(side), given.get(f"{side}_revision")
    path, parsed = located(f"{where}, {side}", text, folder=folder)
    if parsed is None:
        if revision is not None:
            raise UsageError(f"{where}, {side}_revision", "given for a local path")
        return path
    if revision is None:
        return parsed.uri
    if not isinstance(revision, str) or parsed.revision is not None:
        raise UsageError(
            f"{where}, {side}_revision", repr(revision), expected="the revision, said once and as text"
        )
    return parsed.pinned(revision).uri


def _map_rule(where: str, found: Any) -> tuple[str, str]:
    pattern, sign, replacement = found.partition("=") if isinstance(found, str) else ("", "", "")
    if not sign:
        raise UsageError(f"{where}, maps", repr(found), expected="REGEX=REPL")
    return pattern, replacement
