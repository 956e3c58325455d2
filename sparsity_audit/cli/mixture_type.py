"""The click type of a mixture by weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

__all__ = ["MixtureType"]


class MixtureType(click.ParamType):
    """A mixture by weight: `S=.3,C=.35,R=.35`, `3=2,4=1`, or one key alone.

    Args:
        key: What turns the text of a key into the key.
    """

    name = "key=weight,…"

    def __init__(self, key: Callable[[str], Any]) -> None:
        self._key = key

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> dict[Any, float]:
        """Parse the text."""
        if isinstance(value, dict):
            return value
        try:
            parts = [part.partition("=") for part in str(value).split(",")]
            mixture = {self._key(key): float(weight) if sign else 1.0 for key, sign, weight in parts}
        except ValueError:
            self.fail(f"{value!r} is not a mixture such as 3=2,4=1", param, ctx)
        if len(mixture) < len(parts):
            self.fail(f"{value!r} names a key twice", param, ctx)
        return mixture
