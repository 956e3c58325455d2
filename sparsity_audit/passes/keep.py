"""Which part of an update is kept: a value that is parsed from `top:5%`, and what it is called.

Contract: pure. A fraction of `top` and `random` is one of the *compared* entries, a fraction of `bottom` one
of the entries that *moved* (Δ neither 0 nor NaN), so that `bottom:95%` leaves out what `top:5%` of them
holds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sparsity_audit.errors import UsageError
from sparsity_audit.types import Criterion

__all__ = ["Keep", "keep_folders"]

_FORMS = (
    "top:5%, bottom:80%, random:5% (or a count of entries; …:tensor in each tensor), mask:DIR, all or none"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """The entries of an update that are kept.

    Kinds: `top` the largest |Δ|; `bottom` the smallest |Δ| among entries that moved; `random` any compared
    entries; `mask` those of a mask directory; `all`; `none`.

    Args:
        kind: One of the kinds above.
        amount: How many, of `top`, `bottom`, `random`: a `top` criterion, whose own kind says nothing here.
        mask: The mask directory as typed, of `mask`.
        complement: Keep the compared entries that are not selected.
    """

    kind: Literal["top", "bottom", "random", "mask", "all", "none"]
    amount: Criterion | None = None
    mask: str | None = None
    complement: bool = False

    @classmethod
    def parse(cls, text: str, *, per_tensor: bool = False, complement: bool = False) -> Keep:
        """The selection that `text` names.

        Args:
            text: As in the message of the error.
            per_tensor: Select within each tensor, as `:tensor` after the amount does.
            complement: Keep the rest.

        Raises:
            UsageError: Not understood, with the accepted forms.
        """
        kind, _, rest = text.strip().partition(":")
        if kind in ("all", "none") and not rest:
            return cls(kind=kind, complement=complement)
        if kind == "mask" and rest:
            return cls(kind="mask", mask=rest, complement=complement)
        if kind in ("top", "bottom", "random"):
            scope = ":tensor" if per_tensor and rest.count(":") == 0 else ""
            try:
                amount = Criterion.parse(f"top:{rest}{scope}")
            except UsageError:
                amount = None
            if amount is not None:
                return cls(kind=kind, amount=amount, complement=complement)
        raise UsageError(f"keep {text!r}", "not understood", expected=_FORMS, remedy="--keep top:5%")

    @property
    def key(self) -> str:
        """Canonical spelling, without the complement."""
        if self.amount is not None:
            return self.amount.key.replace("top", self.kind, 1)
        return self.kind if self.mask is None else f"mask:{self.mask}"

    @property
    def sentence(self) -> str:
        """What is kept, in words."""
        text = _WORDS[self.kind]
        if self.amount is not None:
            amount, where = self.amount, " in each tensor" if self.amount.per_tensor else ""
            size = f"{100 * amount.parameter:.12g} %" if amount.is_fraction else f"{int(amount.parameter):,}"
            text = text.format(size) + where
        return f"all compared entries but {text}" if self.complement else text

    @property
    def folder(self) -> str:
        """A name for a directory: `top:5%` becomes `top-5pct`."""
        text = self.key if self.mask is None else f"mask-{Path(self.mask).expanduser().resolve().name}"
        text = text.replace("%", "pct").replace(":", "-")
        return f"{text}-complement" if self.complement else text


_WORDS = {
    "top": "the {} of the compared entries with the largest |Δ|",
    "bottom": "the {} of the entries with Δ ≠ 0 with the smallest |Δ|",
    "random": "{} of the compared entries, drawn at random",
    "mask": "the entries of the mask",
    "all": "every compared entry",
    "none": "no entry",
}


def keep_folders(keeps: Sequence[Keep]) -> tuple[str, ...]:
    """Names of the directories of several selections. Raises UsageError where two would have one name."""
    names = tuple(keep.folder for keep in keeps)
    doubled = next((name for name, count in Counter(names).items() if count > 1), None)
    if doubled is not None:
        raise UsageError(
            "keep",
            f"two selections for the directory {doubled!r}",
            expected="different ones",
            remedy="run once for each, with an -o of its own",
        )
    return names
