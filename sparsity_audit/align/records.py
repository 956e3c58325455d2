"""What a matching of two checkpoints consists of.

Contract: every entry of either side's storage stands in exactly one pair, skipped pair or leftover, so
that compared + skipped + leftover = total on both sides (`Alignment.accounts`). All names of pairs are
in base coordinates. Fused tensors are matched by slices, which are runs of consecutive entries in row-major
order: one run, or equally long runs at equal distances where the rows of several parts alternate.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import groupby
from math import prod
from typing import Literal

from sparsity_audit.errors import AlignmentError
from sparsity_audit.types import ByteRange, TensorSpec

__all__ = [
    "Account",
    "Alignment",
    "BlockScale",
    "Leftover",
    "LeftoverReason",
    "Pair",
    "Side",
    "Skipped",
    "TensorSlice",
]

Side = Literal["base", "tuned"]


class LeftoverReason(StrEnum):
    """Why entries have no counterpart."""

    ONLY_HERE = "only on this side"
    ADDED_ROWS = "rows beyond the other side's vocabulary"
    TRANSPOSED = "fused along another axis (transposed)"
    SHAPE = "shapes differ"
    UNTIED = "tied on the other side"
    INTERLEAVED = "fused in an order that shapes do not tell"


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockScale:
    """The factors of a block-scaled tensor.

    Args:
        spec: The tensor that holds them, one for each block of the last two axes.
        block: Rows and columns of a block.
    """

    spec: TensorSpec
    block: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSlice:
    """A part of one tensor; usually all of it.

    Args:
        spec: The tensor.
        start_entry: First entry in row-major order; of a matrix, the first of a row.
        shape: Shape of the part; its last axis is the tensor's own, but for a vector.
        num_runs: Runs of consecutive entries, equally long; more than one only along the first axis.
        step: Entries from the start of one run to the start of the next; 0 for a single run.
        scale: Factors that make values of the tensor's codes; None where codes are values.
    """

    spec: TensorSpec
    start_entry: int
    shape: tuple[int, ...]
    num_runs: int = 1
    step: int = 0
    scale: BlockScale | None = None

    @classmethod
    def whole(cls, spec: TensorSpec) -> TensorSlice:
        """All of a tensor."""
        return cls(spec=spec, start_entry=0, shape=spec.shape)

    @property
    def num_entries(self) -> int:
        """Entries in the part."""
        return prod(self.shape)

    @property
    def run_entries(self) -> int:
        """Entries in each run."""
        return self.num_entries // self.num_runs

    @property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """First entry of each run and the entry after its last, in the tensor."""
        starts = (self.start_entry + number * self.step for number in range(self.num_runs))
        return tuple((start, start + self.run_entries) for start in starts)

    @property
    def source(self) -> tuple[TensorSpec, int]:
        """A tensor, and the entry in it, from which the part can be read as consecutive entries."""
        if self.num_runs == 1:
            return self.spec, self.start_entry
        spec, inner = self.spec, prod(self.spec.shape[1:])
        strides = spec.strides or tuple(prod(spec.shape[axis + 1 :]) for axis in range(len(spec.shape)))
        first_byte = self.start_entry // inner * strides[0] * spec.dtype.itemsize
        view = replace(
            spec,
            shape=(self.num_runs, self.run_entries // inner, *spec.shape[1:]),
            extent=ByteRange(start=spec.extent.start + first_byte, stop=spec.extent.stop),
            strides=(self.step // inner * strides[0], *strides),
        )
        return view, 0

    @property
    def rows_cols(self) -> tuple[int, int]:
        """The part as a matrix: all leading axes × the last axis; [n] is 1 × n, () is 1 × 1."""
        return (prod(self.shape[:-1]), self.shape[-1]) if self.shape else (1, 1)

    @property
    def is_whole(self) -> bool:
        """Whether the part is the whole tensor."""
        return self.shape == self.spec.shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two equally shaped slices that are compared entry by entry.

    Args:
        name: The base tensor's name; with `:part` appended when several pairs share a base tensor.
        base: The base side.
        tuned: The tuned side.
        rule: The rule that matched them: `exact`, `prefix`, `map`, `tied`, `resized`, `fused` or
            `interleaved`.
    """

    name: str
    base: TensorSlice
    tuned: TensorSlice
    rule: str

    @property
    def is_scaled(self) -> bool:
        """Whether values of at least one side are codes times block scales."""
        return self.base.scale is not None or self.tuned.scale is not None

    def __post_init__(self) -> None:
        assert self.base.shape == self.tuned.shape, (self.name, self.base.shape, self.tuned.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """A matched pair that cannot be compared, with the reason; both sides have the same entries."""

    name: str
    base: TensorSlice
    tuned: TensorSlice
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Leftover:
    """Entries of one side without a counterpart."""

    side: Side
    name: str
    num_entries: int
    reason: LeftoverReason
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """Where one side's entries went; `total` is the sum of the other three."""

    total: int
    compared: int
    skipped: int
    leftover: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Alignment:
    """The result of matching.

    Args:
        pairs: Matched slices in base-name order.
        skipped: Matched but not comparable.
        leftovers: Not matched.
        findings: Sentences a user must read: tied on one side only, renamed prefixes, resized vocabulary.
        totals: Entries in storage on each side (tied names once).
    """

    pairs: tuple[Pair, ...]
    skipped: tuple[Skipped, ...]
    leftovers: tuple[Leftover, ...]
    findings: tuple[str, ...]
    totals: dict[Side, int]

    def account(self, side: Side) -> Account:
        """Where the entries of `side` went."""
        return Account(
            total=self.totals[side],
            compared=sum(pair.base.num_entries for pair in self.pairs),
            skipped=sum(pair.base.num_entries for pair in self.skipped),
            leftover=sum(left.num_entries for left in self.leftovers if left.side == side),
        )

    def verify_accounts(self) -> None:
        """Raise when an entry of either side stands nowhere or in two places.

        Raises:
            AlignmentError: A defect of this package, never of a checkpoint.
        """
        matched = (*self.pairs, *self.skipped)
        _verify_side("base", self.account("base"), [pair.base for pair in matched], self.leftovers)
        _verify_side("tuned", self.account("tuned"), [pair.tuned for pair in matched], self.leftovers)


def _verify_side(
    side: Side, account: Account, slices: Iterable[TensorSlice], leftovers: Iterable[Leftover]
) -> None:
    left: dict[str, int] = {}
    for leftover in leftovers:
        if leftover.side == side:
            if leftover.name in left:
                raise _defect(side, f"{leftover.name!r} is a leftover twice")
            left[leftover.name] = leftover.num_entries
    # Sorted, not gathered in a dictionary of lists: that took a tenth of the memory of a plan.
    for name, grouped in groupby(sorted(slices, key=_name_of), key=_name_of):
        of_tensor = list(grouped)
        if len(of_tensor) == 1 and _is_all(of_tensor[0]) and name not in left:
            continue
        end = 0
        for start, stop in sorted(run for part in of_tensor for run in part.runs):
            if start < end:
                raise _defect(side, f"entries of {name!r} are compared twice")
            end = stop
        found = sum(run.num_entries for run in of_tensor) + left.get(name, 0)
        if end > of_tensor[0].spec.num_entries or found != of_tensor[0].spec.num_entries:
            raise _defect(side, f"{found} entries of {name!r}, which has {of_tensor[0].spec.num_entries}")
    found = account.compared + account.skipped + account.leftover
    if found != account.total:
        raise _defect(side, f"{found} entries accounted for, {account.total} in storage")


def _name_of(run: TensorSlice) -> str:
    return run.spec.name


def _is_all(run: TensorSlice) -> bool:
    return run.is_whole and run.start_entry == 0


def _defect(side: Side, found: str) -> AlignmentError:
    return AlignmentError(
        f"alignment, {side} side",
        found,
        expected="every entry in exactly one pair, skipped pair or leftover",
        remedy="this is a defect of sparsity-audit: please report it with both outputs of `inspect`",
    )
