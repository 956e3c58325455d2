"""Turn links and fusions into pairs, skipped pairs and leftovers by looking at shapes and dtypes.

Contract: every tensor that comes in goes out entirely, as slices of pairs, skipped pairs and leftovers. Pairs
hold equal shapes and dtypes that have a common one without rounding (`types.common_dtype`).
"""

from __future__ import annotations

from collections import Counter

from sparsity_audit.align.fusing import Fusion
from sparsity_audit.align.linking import Link
from sparsity_audit.align.naming import NamedSide
from sparsity_audit.align.records import Leftover, LeftoverReason, Pair, Side, Skipped, TensorSlice
from sparsity_audit.align.rules import is_vocabulary
from sparsity_audit.types import DType, TensorSpec, common_dtype

__all__ = ["Ledger"]


class Ledger:
    """Collects the result; see the module docstring.

    Args:
        base: The base side.
        tuned: The tuned side.
    """

    def __init__(self, base: NamedSide, tuned: NamedSide) -> None:
        self.named: dict[Side, NamedSide] = {"base": base, "tuned": tuned}
        self.pairs: list[Pair] = []
        self.skipped: list[Skipped] = []
        self.leftovers: list[Leftover] = []
        self.findings: list[str] = []
        self._num_scaled = 0

    def add_link(self, link: Link) -> None:
        """A link becomes a pair of whole tensors, of common rows, or two leftovers."""
        base, tuned = self.named["base"].spec(link.base), self.named["tuned"].spec(link.tuned)
        if base.shape == tuned.shape:
            self._pair(base.name, TensorSlice.whole(base), TensorSlice.whole(tuned), link.rule)
        elif _is_resized(base, tuned):
            self._resize(base, tuned)
        else:
            is_transposed = len(base.shape) > 1 and base.shape == tuned.shape[::-1]
            reason = LeftoverReason.TRANSPOSED if is_transposed else LeftoverReason.SHAPE
            detail = f"{list(base.shape)} in base, {list(tuned.shape)} in tuned"
            self.leave("base", base.name, reason, detail)
            self.leave("tuned", tuned.name, reason, detail)

    def add_fusion(self, fusion: Fusion) -> None:
        """A fusion becomes one pair for each part, with slices of the fused tensor."""
        other: Side = "tuned" if fusion.side == "base" else "base"
        fused, start = self.named[fusion.side].spec(fusion.fused), 0
        for part, label in zip(fusion.parts, fusion.labels, strict=True):
            whole = TensorSlice.whole(self.named[other].spec(part))
            run = TensorSlice(spec=fused, start_entry=start, shape=whole.shape)
            start += run.num_entries
            if fusion.side == "base":
                self._pair(f"{fused.name}:{label}", run, whole, "fused")
            else:
                self._pair(part, whole, run, "fused")

    def leave(self, side: Side, name: str, reason: LeftoverReason, detail: str = "") -> None:
        """A whole tensor has no counterpart."""
        entries = self.named[side].spec(name).num_entries
        self.leftovers.append(
            Leftover(side=side, name=name, num_entries=entries, reason=reason, detail=detail)
        )

    def summarise(self) -> list[str]:
        """Findings about skipped pairs, scaled storage and shapes."""
        found = [
            f"{count} matched tensor{'s' * (count != 1)} not compared: {reason}"
            for reason, count in sorted(Counter(pair.reason for pair in self.skipped).items())
        ]
        if self._num_scaled:
            found.append(
                f"{self._num_scaled} fp8 pair{'s' * (self._num_scaled != 1)} with scale tensors: "
                "compared as stored codes, without their scales"
            )
        by_reason: dict[LeftoverReason, list[Leftover]] = {}
        for left in self.leftovers:
            by_reason.setdefault(left.reason, []).append(left)
        for reason in (LeftoverReason.SHAPE, LeftoverReason.TRANSPOSED, LeftoverReason.INTERLEAVED):
            if reason in by_reason:
                first = min(by_reason[reason], key=lambda left: (left.side, left.name))
                found.append(
                    f"{len(by_reason[reason])} leftovers because {_SENTENCE[reason]}, "
                    f"first {first.name!r}: {first.detail}"
                )
        return found

    def _resize(self, base: TensorSpec, tuned: TensorSpec) -> None:
        rows = min(base.shape[0], tuned.shape[0])
        shape = (rows, *base.shape[1:])
        self._pair(
            base.name,
            TensorSlice(spec=base, start_entry=0, shape=shape),
            TensorSlice(spec=tuned, start_entry=0, shape=shape),
            "resized",
        )
        side: Side = "base" if base.shape[0] > rows else "tuned"
        longer = base if side == "base" else tuned
        added = longer.shape[0] - rows
        entries = longer.num_entries - rows * (longer.num_entries // longer.shape[0])
        self.leftovers.append(
            Leftover(
                side=side,
                name=longer.name,
                num_entries=entries,
                reason=LeftoverReason.ADDED_ROWS,
                detail=f"rows {rows} to {longer.shape[0] - 1}",
            )
        )
        self.findings.append(
            f"vocabulary resized: {base.name!r} has {base.shape[0]} rows in base and {tuned.shape[0]} in "
            f"tuned; {rows} common rows are compared, {added} of {side} ({entries} entries) are left over"
        )

    def _pair(self, name: str, base: TensorSlice, tuned: TensorSlice, rule: str) -> None:
        has_scale = self._has_scale("base", base.spec) or self._has_scale("tuned", tuned.spec)
        reason = _why_not_comparable(base.spec.dtype, tuned.spec.dtype, has_scale=has_scale)
        if reason is None:
            self.pairs.append(Pair(name=name, base=base, tuned=tuned, rule=rule))
            self._num_scaled += has_scale
        else:
            self.skipped.append(Skipped(name=name, base=base, tuned=tuned, reason=reason))

    def _has_scale(self, side: Side, spec: TensorSpec) -> bool:
        if not spec.dtype.value.startswith("F8_"):
            return False
        tensors = self.named[side].catalogue.tensors
        return f"{spec.name}_scale_inv" in tensors or f"{spec.name}_scale" in tensors


_SENTENCE = {
    LeftoverReason.SHAPE: "shapes differ",
    LeftoverReason.TRANSPOSED: "one side is stored or fused along another axis",
    LeftoverReason.INTERLEAVED: "the order of the fused rows is unknown",
}


def _is_resized(base: TensorSpec, tuned: TensorSpec) -> bool:
    return (
        len(base.shape) == len(tuned.shape) >= 1
        and base.shape[1:] == tuned.shape[1:]
        and (is_vocabulary(base.name) or is_vocabulary(tuned.name))
    )


def _why_not_comparable(base: DType, tuned: DType, *, has_scale: bool) -> str | None:
    if base is tuned:
        return None
    types = f"{base.label} in base, {tuned.label} in tuned"
    if common_dtype(base, tuned) is None:
        return f"dtypes have no common values ({types})"
    if has_scale:
        return f"fp8 values need their scales ({types})"
    return None
