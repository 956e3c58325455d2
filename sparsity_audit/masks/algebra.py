"""and, or, xor, minus, not and k-of-n over whole masks, block by block.

Contract: the result is a `MaskSource`, so it can be written in any encoding; nothing is read until its
blocks are asked for. Masks are combined only where they speak of the same thing: same tensors, shapes,
base fingerprints, criterion and view. Forced, tensors that do not fit are left out and counted. An entry
is compared in the result where it is compared in every operand; elsewhere its bit is 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np

from sparsity_audit.errors import MaskError, UsageError
from sparsity_audit.masks.bitmask import BLOCK_BYTES, Block, at_least, combine, compared_bits
from sparsity_audit.masks.metadata import UNSPECIFIED, MaskMetadata, MaskTensor, describe_reference
from sparsity_audit.masks.sources import MaskSource

__all__ = ["CombinedSource", "LeftOut", "MaskOp", "Operand"]

MaskOp = Literal["and", "or", "minus", "not", "xor", "k-of-n"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Operand:
    """One input of an operation, with the path it came from (for messages and metadata)."""

    path: str
    source: MaskSource


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """A tensor that a forced operation could not combine."""

    name: str
    reason: str


class CombinedSource:
    """The mask that `op` makes of the operands; see the module docstring.

    `minus` takes every later mask from the first; `k-of-n` selects what at least k masks select.

    Args:
        op: The operation.
        operands: Its inputs: one for `not`, two or more otherwise.
        k: For `k-of-n`, 1 … number of operands.
        force: Combine masks of different tensors, bases or criteria all the same.

    Raises:
        UsageError: Wrong number of operands, or k out of range.
        MaskError: The masks do not belong together.
    """

    def __init__(
        self, op: MaskOp, operands: Sequence[Operand], *, k: int | None = None, force: bool = False
    ) -> None:
        _check_usage(op, len(operands), k)
        self._op: MaskOp = op
        self._operands, self._k = operands, k
        problems, self.left_out = _differences(operands)
        if problems and not force:
            raise problems[0]
        kept = operands[0].source.tensors.keys() - {tensor.name for tensor in self.left_out}
        self.tensors: Mapping[str, MaskTensor] = {
            name: _joined([operand.source.tensors[name] for operand in operands]) for name in sorted(kept)
        }
        self.metadata = _metadata(op, operands, self.tensors, k=k)

    def blocks(self, name: str, *, max_bytes: int = BLOCK_BYTES) -> Iterator[tuple[Block, np.ndarray]]:
        """Combine the operands' blocks. Raises MaskError when an operand is damaged."""
        ranges = self.tensors[name].entry_ranges
        streams = [operand.source.blocks(name, max_bytes=max_bytes) for operand in self._operands]
        for blocks in zip(*streams, strict=True):
            block, inputs = blocks[0][0], [bits for _, bits in blocks]
            if self._op == "not":
                bits = ~inputs[0]
            elif self._op == "k-of-n":
                assert self._k is not None
                bits = at_least(inputs, self._k)
            else:
                bits = combine(self._op, inputs)
            # Clears tails as well: `not` sets them.
            bits &= compared_bits(block, ranges)
            yield block, bits

    def close(self) -> None:
        """Close the operands."""
        for operand in self._operands:
            operand.source.close()


def _check_usage(op: str, count: int, k: int | None) -> None:
    if op not in get_args(MaskOp):
        raise UsageError(f"operation {op!r}", "not known", expected=", ".join(get_args(MaskOp)))
    if op == "not" and count != 1:
        raise UsageError("mask ops not", f"{count} masks", expected="one mask")
    if op != "not" and count < 2:
        raise UsageError(f"mask ops {op}", f"{count} masks", expected="two or more masks")
    if op == "k-of-n" and (k is None or not 1 <= k <= count):
        raise UsageError(
            "mask ops k-of-n", f"k = {k}", expected=f"1 … {count}, the number of masks", remedy="--k 2"
        )
    if op != "k-of-n" and k is not None:
        raise UsageError(f"mask ops {op}", f"k = {k}", expected="no k", remedy="k belongs to k-of-n")


def _differences(operands: Sequence[Operand]) -> tuple[list[MaskError], tuple[LeftOut, ...]]:
    """Every way in which the masks do not fit the first one, and the tensors that cannot be combined."""
    problems: list[MaskError] = []
    left_out: dict[str, str] = {}
    first = operands[0]
    for other in operands[1:]:
        subject = f"{first.path} and {other.path}"
        mine, theirs = first.source, other.source
        for what, a, b in (
            ("criterion", mine.metadata.criterion, theirs.metadata.criterion),
            ("view", mine.metadata.view, theirs.metadata.view),
        ):
            if a != b:
                problems.append(_problem(subject, f"{what} {a!r} and {b!r}", f"the same {what}"))
        for name in sorted(mine.tensors.keys() | theirs.tensors.keys()):
            a, b = mine.tensors.get(name), theirs.tensors.get(name)
            tensor = f"{subject}: tensor {name!r}"
            if a is None or b is None:
                left_out.setdefault(name, f"not in {(first if a is None else other).path}")
                problems.append(
                    _problem(tensor, f"only in {(other if a is None else first).path}", "in both")
                )
            elif a.shape != b.shape:
                found = f"shapes {list(a.shape)} and {list(b.shape)}"
                left_out.setdefault(name, found)
                problems.append(_problem(tensor, found, "the same shape"))
    problems += _different_bases(operands)
    return problems, tuple(LeftOut(name=name, reason=left_out[name]) for name in sorted(left_out))


def _problem(subject: str, found: str, expected: str) -> MaskError:
    return MaskError(subject, found, expected=expected, remedy="--force combines them all the same")


def _different_bases(operands: Sequence[Operand]) -> list[MaskError]:
    problems: list[MaskError] = []
    # A fingerprint speaks of the compared slices, so it only tells where those are the same.
    known: dict[tuple[str, object], tuple[str, int]] = {}
    for operand in operands:
        for name, tensor in operand.source.tensors.items():
            mine = tensor.fingerprints[0]
            if mine == 0:
                continue
            path, other = known.setdefault((name, tensor.compared), (operand.path, mine))
            if mine != other:
                subject = f"{path} and {operand.path}: tensor {name!r}"
                found = f"base fingerprints {other:016x} and {mine:016x}"
                problems.append(_problem(subject, found, "masks made from the same base"))
    return problems


def _joined(tensors: Sequence[MaskTensor]) -> MaskTensor:
    first = tensors[0]
    compared = first.compared
    for tensor in tensors[1:]:
        compared = compared if tensor.compared == compared else _intersection(compared, tensor.compared)
    same_slices = all(tensor.compared == first.compared for tensor in tensors)
    sides = [{tensor.fingerprints[side] for tensor in tensors} for side in (0, 1)]
    base, tuned = (side.pop() if same_slices and len(side) == 1 else 0 for side in sides)
    return replace(first, compared=compared, fingerprints=(base, tuned))


def _intersection(
    left: tuple[tuple[int, int], ...], right: tuple[tuple[int, int], ...]
) -> tuple[tuple[int, int], ...]:
    both = ((max(a, c), min(b, d)) for a, b in left for c, d in right)
    return tuple(sorted((start, stop) for start, stop in both if start < stop))


def _metadata(
    op: MaskOp, operands: Sequence[Operand], tensors: Mapping[str, MaskTensor], *, k: int | None
) -> MaskMetadata:
    described = [operand.source.metadata for operand in operands]
    origin: dict[str, Any] = {"inputs": [_describe(operand) for operand in operands], "operation": op}
    if k is not None:
        origin["k"] = k
    aliases = {
        alias: name
        for alias, name in described[0].aliases.items()
        if name in tensors and all(other.aliases.get(alias) == name for other in described)
    }
    return MaskMetadata(
        criterion=_common([m.criterion for m in described]) or UNSPECIFIED,
        view=_common([m.view for m in described]) or UNSPECIFIED,
        base=_common([m.base for m in described]),
        tuned=_common([m.tuned for m in described]),
        aliases=aliases,
        origin=origin,
    )


def _describe(operand: Operand) -> dict[str, Any]:
    metadata = operand.source.metadata
    return {
        "base": describe_reference(metadata.base),
        "criterion": metadata.criterion,
        "origin": dict(metadata.origin),
        "path": operand.path,
        "tuned": describe_reference(metadata.tuned),
        "view": metadata.view,
    }


def _common(values: Sequence[Any]) -> Any:
    return values[0] if all(value == values[0] for value in values) else None
