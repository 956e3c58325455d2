"""The controls of a retraining: what is asked for, and the runs that answer it, as plain data.

Contract: pure. Labels are unique, fit for a directory name, and none of `base`, `full`, `sub`. A control that
is not known, given twice, or lacks its argument is refused with the form it should have.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from sparsity_audit.errors import UsageError

__all__ = ["Control", "ControlKind", "parse_controls", "parse_rates"]

ControlKind = Literal["random", "magnitude", "complement", "other", "seed", "layer"]

_FORMS = {
    "random": "random",
    "magnitude": "magnitude",
    "complement": "complement",
    "other": "other:MASK",
    "seed": "seed",
    "layer": "layer:N",
}
_MEANING = {
    "random": "a random mask of equal density in every tensor",
    "magnitude": "a random mask of equal density at every magnitude of the base's weights",
    "complement": "the entries that the mask leaves out",
    "other": "another run's mask",
    "seed": "a full run with another seed",
    "layer": "one layer alone, all of its entries",
}
_KNOWN = ", ".join(_FORMS.values())
_PLAIN = re.compile(r"[^A-Za-z0-9._]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """A control.

    Args:
        kind: What it is.
        label: Its name, of a directory too.
        mask: Of `other`: the mask as it was given.
        layer: Of `layer`: the layer's key.
        seed: Of `seed:N`: the seed; None takes the retrained run's, or the next one where that is the full
            run's.
    """

    kind: ControlKind
    label: str
    mask: Path | None = None
    layer: str | None = None
    seed: int | None = None

    @property
    def meaning(self) -> str:
        """What it is, in words."""
        return _MEANING[self.kind]

    @property
    def is_masked(self) -> bool:
        """Whether it is trained inside a mask; only then is its learning rate tuned."""
        return self.kind != "seed"


def parse_controls(texts: Sequence[str]) -> tuple[Control, ...]:
    """The controls of their names: `random`, `magnitude`, `complement`, `other:MASK`, `seed`, `layer:N`.

    Raises:
        UsageError: A name is not known, lacks its argument, has one too many, or stands twice.
    """
    found: list[Control] = []
    for text in texts:
        control = _parse(text.strip())
        if control.kind == "other":
            control = _numbered(control, found)
        if any(other.label == control.label for other in found):
            raise UsageError("--controls", f"{control.label!r} stands twice", expected="each control once")
        found.append(control)
    return tuple(found)


def _parse(text: str) -> Control:
    kind, colon, argument = text.partition(":")
    if kind not in _FORMS:
        near = difflib.get_close_matches(kind, _FORMS, n=1, cutoff=0.5)
        raise UsageError(
            "--controls",
            f"{text!r} is not known",
            expected=f"some of {_KNOWN}",
            remedy=f"did you mean {_FORMS[near[0]]!r}?" if near else None,
        )
    if kind == "other" and argument:
        return Control(kind="other", label=_label("other", Path(argument).name), mask=Path(argument))
    if kind == "layer" and argument:
        return Control(kind="layer", label=_label("layer", argument), layer=argument)
    if kind == "seed" and argument.isdecimal():
        return Control(kind="seed", label=f"seed-{int(argument)}", seed=int(argument))
    if colon or ":" in _FORMS[kind]:
        form = "seed or seed:N" if kind == "seed" else _FORMS[kind]
        raise UsageError("--controls", f"{text!r}", expected=form)
    if kind == "seed":
        return Control(kind="seed", label="seed")
    return Control(kind=kind, label=kind)  # pyright: ignore[reportArgumentType] - the three plain kinds


def _numbered(control: Control, before: Sequence[Control]) -> Control:
    """Another label where another mask has it: names of directories need not differ, their paths do."""
    same = [other for other in before if other.kind == "other" and other.mask == control.mask]
    labels, number = {other.label for other in before}, 2
    label = control.label
    while not same and label in labels:
        label, number = f"{control.label}-{number}", number + 1
    return replace(control, label=same[0].label if same else label)


def _label(kind: str, argument: str) -> str:
    return f"{kind}-{_PLAIN.sub('-', argument).strip('-') or 'mask'}"


def parse_rates(rates: Sequence[float]) -> tuple[float, ...]:
    """Multiples of the learning rate that controls are trained at, ascending.

    Raises:
        UsageError: There is none, or one is not positive.
    """
    strange = [rate for rate in rates if not (math.isfinite(rate) and rate > 0)]
    if strange or not rates:
        raise UsageError(
            "--control-lrs", f"{list(rates)}", expected="multiples of the learning rate such as 1,3"
        )
    return tuple(sorted(set(rates)))
