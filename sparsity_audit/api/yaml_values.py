"""Checks of what a YAML file holds, value by value.

Contract: each function returns the value in its type or raises a UsageError that names the place, what stands
there and what may.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparsity_audit.errors import UsageError

__all__ = ["as_choice", "as_list", "as_map", "as_number", "as_text", "refuse_unknown"]


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
