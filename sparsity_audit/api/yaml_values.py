"""YAML files, and checks of what they hold, value by value.

Contract: each function returns the value in its type or raises a UsageError that names the place, what stands
there and what may. A key that stands twice is refused: YAML libraries keep the last one in silence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsity_audit.checkpoint.hub_reference import HubReference, parse_reference
from sparsity_audit.errors import UsageError
from sparsity_audit.types import Criterion

__all__ = [
    "as_choice",
    "as_criterion",
    "as_list",
    "as_map",
    "as_number",
    "as_text",
    "located",
    "parse_yaml",
    "read_yaml",
    "refuse_unknown",
]


def read_yaml(path: Path, *, holding: str) -> dict[str, Any]:
    """What a YAML file holds.

    Args:
        path: The file.
        holding: What it should list, for the message: `pairs`.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        raise UsageError(
            str(path), reason or "cannot be read", expected=f"a YAML file of {holding}"
        ) from error
    return parse_yaml(path.name, text)


def parse_yaml(label: str, text: str) -> dict[str, Any]:
    """A YAML text whose top is a map."""
    import yaml

    try:
        nodes, found = yaml.compose(text, Loader=yaml.SafeLoader), yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f" in line {mark.line + 1}"
        raise UsageError(label, f"is not YAML{line}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(label, "is not YAML that can be read") from error
    _refuse_doubled(label, nodes)
    return as_map(label, found)


def _refuse_doubled(label: str, top: Any) -> None:
    """Raise for a map with two keys of one name, wherever it stands."""
    import yaml

    waiting, seen = [top], set[int]()
    while waiting:
        node = waiting.pop()
        if not isinstance(node, yaml.CollectionNode) or id(node) in seen:
            continue
        seen.add(id(node))
        if not isinstance(node, yaml.MappingNode):
            waiting += node.value
            continue
        names = set[str]()
        for key, value in node.value:
            waiting.append(value)
            if isinstance(key, yaml.ScalarNode) and key.value in names:
                raise UsageError(
                    f"{label}, line {key.start_mark.line + 1}", f"{key.value} stands twice in one map"
                )
            if isinstance(key, yaml.ScalarNode):
                names.add(key.value)


def located(where: str, text: Any, *, folder: Path | None) -> tuple[str, HubReference | None]:
    """What a reference leads to: the path, relative to the file, and else what it names on the Hub.

    A path that exists is none of the Hub's. The first value is the path as text, or the text itself.
    """
    if not isinstance(text, str) or not text:
        raise UsageError(where, repr(text), expected="a path or a Hub reference")
    path = None if folder is None or text.startswith("hf://") else _local(where, folder, text)
    try:
        parsed = None if path is not None and path.exists() else parse_reference(text)
    except UsageError as error:
        raise UsageError(where, error.found, expected=error.expected) from error
    return (text if path is None else str(path)), parsed


def _local(where: str, folder: Path, text: str) -> Path:
    try:
        path = folder / Path(text).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(where, f"{text[:200]!r} cannot be looked up") from error
    return path


def as_map(where: str, found: Any) -> dict[str, Any]:
    """A map with text keys."""
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise UsageError(where, f"is {_kind(found)}", expected="keys and values")
    return found


def as_list(where: str, key: str, given: Mapping[str, Any]) -> Sequence[Any]:
    """A list; empty where the key is absent."""
    found = given.get(key)
    if found is None:
        return ()
    if not isinstance(found, list):
        raise UsageError(f"{where}, {key}", f"is {_kind(found)}", expected="a list")
    return found


def _kind(found: Any) -> str:
    return "empty" if found is None else f"a {type(found).__name__}"


def refuse_unknown(where: str, given: Mapping[str, Any], known: frozenset[str] | set[str]) -> None:
    """Raise for keys that mean nothing here, naming those that do."""
    unknown = sorted(given.keys() - known)
    if unknown:
        raise UsageError(
            where, f"unknown key {', '.join(unknown)}", expected=f"some of {', '.join(sorted(known))}"
        )


def as_text(where: str, found: Any) -> str:
    """Text without space around it; empty where there is none."""
    if found is None:
        return ""
    if not isinstance(found, str):
        raise UsageError(where, f"is {_kind(found)}", expected="text")
    return found.strip()


def as_choice(
    where: str, key: str, given: Mapping[str, Any], choices: list[str], default: str | None = None
) -> str:
    """One of a few words."""
    found = given.get(key, default)
    if found not in choices:
        raise UsageError(f"{where}, {key}", repr(found), expected=" or ".join(choices))
    return str(found)


def as_number(where: str, found: Any, *, above: float, below: float = float("inf")) -> float | None:
    """A number with above < number ≤ below; None where there is none."""
    if found is None:
        return None
    # YAML 1.1 reads 1e-6 as text: it wants 1.0e-6.
    try:
        value = None if isinstance(found, bool) else float(found)
    except (TypeError, ValueError):
        value = None
    if value is None or not above < value <= below:
        limits = f"a number above {max(above, 0):g}" + (f", at most {below:g}" if below < 1e300 else "")
        raise UsageError(where, repr(found), expected=limits)
    return value


def as_criterion(where: str, found: Any) -> str:
    """The key of a criterion."""
    text = as_text(where, found)
    try:
        return Criterion.parse(text).key
    except UsageError as error:
        raise UsageError(where, f"{found!r} is not understood", expected=error.expected) from error
