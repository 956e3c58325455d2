"""Turn links and fusions into pairs, skipped pairs and leftovers by looking at shapes and dtypes.

Contract: every tensor that comes in goes out entirely, as slices of pairs, skipped pairs and leftovers. Pairs
hold equal shapes and dtypes that have a common one without rounding (`types.common_dtype`), and the block
scales of fp8 sides whose values they compare.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from sparsity_audit.align.fusing import Fusion
from sparsity_audit.align.linking import Link
from sparsity_audit.align.naming import NamedSide
from sparsity_audit.align.records import (
    BlockScale,
    Leftover,
    LeftoverReason,
    Pair,
    Side,
    Skipped,
    TensorSlice,
)
from sparsity_audit.align.rules import is_vocabulary
from sparsity_audit.align.scaling import block_scale
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
        self._by_codes: Counter[str] = Counter()

    def add_link(self, link: Link) -> None:
        """A link becomes a pair of whole tensors, of common rows, or two leftovers."""
        base, tuned = self.named["base"].spec(link.base), self.named["tuned"].spec(link.tuned)
        if base.shape == tuned.shape:
            self._pair(base.name, TensorSlice.whole(base), TensorSlice.whole(tuned), link.rule)
        elif _is_resized(base, tuned):
            self._resize(base, tuned)
        else:
            is_transposed = len(base.shape) > 1 and tuned.shape in _transposed(base.shape)
            reason = LeftoverReason.TRANSPOSED if is_transposed else LeftoverReason.SHAPE
            detail = f"{list(base.shape)} in base, {list(tuned.shape)} in tuned"
            self.leave("base", base.name, reason, detail)
            self.leave("tuned", tuned.name, reason, detail)

    def add_fusion(self, fusion: Fusion) -> None:
        """A fusion becomes one pair for each part, with slices of the fused tensor."""
        other: Side = "tuned" if fusion.side == "base" else "base"
        fused, start = self.named[fusion.side].spec(fusion.fused), 0
        step = 0 if fusion.groups == 1 else fused.num_entries // fusion.groups
        reasons = self._expert_reasons(fusion) if fusion.is_stack else {}
        for part, label in zip(fusion.parts, fusion.labels, strict=True):
            reason = reasons.get(label.partition(".")[0])
            whole = TensorSlice.whole(self.named[other].spec(part))
            run = TensorSlice(
                spec=fused, start_entry=start, shape=whole.shape, num_runs=fusion.groups, step=step
            )
            start += run.run_entries
            if fusion.side == "base":
                self._pair(f"{fused.name}:{label}", run, whole, fusion.rule, reason=reason)
            else:
                self._pair(part, whole, run, fusion.rule, reason=reason)

    def leave(self, side: Side, name: str, reason: LeftoverReason, detail: str = "") -> None:
        """A whole tensor has no counterpart."""
        entries = self.named[side].spec(name).num_entries
        self.leftovers.append(
            Leftover(side=side, name=name, num_entries=entries, reason=reason, detail=detail)
        )

    def scaled_by(self) -> Mapping[tuple[Side, str], str]:
        """Side and name of each scale tensor that is used → a tensor whose values it makes."""
        found: dict[tuple[Side, str], str] = {}
        for pair in self.pairs:
            sides: tuple[tuple[Side, TensorSlice], ...] = (("base", pair.base), ("tuned", pair.tuned))
            found |= {(side, p.scale.spec.name): p.spec.name for side, p in sides if p.scale is not None}
        return found

    def summarise(self) -> list[str]:
        """Findings about skipped pairs, scaled storage and shapes."""
        found = [
            f"{count} matched tensor{'s' * (count != 1)} not compared: {reason}"
            for reason, count in sorted(Counter(pair.reason for pair in self.skipped).items())
        ]
        if self._num_scaled:
            found.append(
                f"{self._num_scaled} fp8 pair{'s' * (self._num_scaled != 1)}: values de-scaled by "
                "weight_scale_inv (code × scale of its block); bitwise compares stored codes where both "
                "sides have one fp8 format"
            )
        found += [
            f"{count} fp8 pair{'s' * (count != 1)} compared as stored codes, without scales: {why}"
            for why, count in sorted(self._by_codes.items())
        ]
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

    def _expert_reasons(self, fusion: Fusion) -> dict[str, str]:
        """Experts of which a piece cannot be compared: masks tell what was compared by whole experts."""
        other: Side = "tuned" if fusion.side == "base" else "base"
        fused = self.named[fusion.side].spec(fusion.fused)
        reasons: dict[str, str] = {}
        for part, label in zip(fusion.parts, fusion.labels, strict=True):
            sides = {fusion.side: fused, other: self.named[other].spec(part)}
            reason = self._why_not(sides["base"], sides["tuned"])
            if reason is not None:
                reasons.setdefault(label.partition(".")[0], reason)
        return reasons

    def _pair(
        self, name: str, base: TensorSlice, tuned: TensorSlice, rule: str, *, reason: str | None = None
    ) -> None:
        reason = reason or self._why_not(base.spec, tuned.spec)
        if reason is not None:
            self.skipped.append(Skipped(name=name, base=base, tuned=tuned, reason=reason))
            return
        scales = self._scales(base.spec, tuned.spec)
        if base.spec.dtype is tuned.spec.dtype and not all(isinstance(s, BlockScale) for s in scales):
            self._note_codes(base.spec, scales)
        else:
            base, tuned = (
                replace(part, scale=scale) if isinstance(scale, BlockScale) else part
                for part, scale in zip((base, tuned), scales, strict=True)
            )
        pair = Pair(name=name, base=base, tuned=tuned, rule=rule)
        self._num_scaled += pair.is_scaled
        self.pairs.append(pair)

    def _scales(self, base: TensorSpec, tuned: TensorSpec) -> tuple[BlockScale | str | None, ...]:
        return (
            block_scale(base, self.named["base"].catalogue),
            block_scale(tuned, self.named["tuned"].catalogue),
        )

    def _note_codes(self, spec: TensorSpec, scales: tuple[BlockScale | str | None, ...]) -> None:
        """Say why fp8 codes stand for themselves."""
        if spec.dtype not in _FP8:
            return
        if scales == (None, None):
            why = "they have no scale tensors"
        elif None in scales:
            why = "only one side has scale tensors"
        else:
            why = next(scale for scale in scales if isinstance(scale, str))
        self._by_codes[why] += 1

    def _why_not(self, base: TensorSpec, tuned: TensorSpec) -> str | None:
        """Why two tensors have no common values; None where they have."""
        if base.dtype is tuned.dtype:
            return None
        types = f"{base.dtype.label} in base, {tuned.dtype.label} in tuned"
        if common_dtype(base.dtype, tuned.dtype) is None:
            return f"dtypes have no common values ({types})"
        scales = self._scales(base, tuned)
        unusable = next((scale for scale in scales if isinstance(scale, str)), None)
        if unusable is not None:
            return f"fp8 values need their scales ({types}): {unusable}"
        both_fp8 = base.dtype in _FP8 and tuned.dtype in _FP8
        if both_fp8 and scales.count(None) == 1:
            return f"fp8 values need their scales ({types}): only one side has scale tensors"
        return None


_FP8 = (DType.F8_E4M3, DType.F8_E5M2)
_SENTENCE = {
    LeftoverReason.SHAPE: "shapes differ",
    LeftoverReason.TRANSPOSED: "one side is stored or fused along another axis",
    LeftoverReason.INTERLEAVED: "the order of the fused rows is unknown",
}


def _transposed(shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """All axes reversed, or the last two exchanged (stacked matrices)."""
    return shape[::-1], (*shape[:-2], shape[-1], shape[-2])


def _is_resized(base: TensorSpec, tuned: TensorSpec) -> bool:
    return (
        len(base.shape) == len(tuned.shape) >= 1
        and base.shape[1:] == tuned.shape[1:]
        and (is_vocabulary(base.name) or is_vocabulary(tuned.name))
    )
