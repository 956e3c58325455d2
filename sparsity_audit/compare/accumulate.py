"""The contract between a kernel and everything above it.

Contract: a kernel gets two equally shaped blocks of *codes* (unsigned integers of the view's dtype,
C-contiguous) and adds what it counts to an `Accumulator`; it writes mask bits (1 = changed, packed
little-endian along the row, zero tail) where asked. Every kernel leaves equal accumulators, bit for bit.

Special values, the same in every kernel (`bitwise` compares codes and needs no table):

| base / tuned | value, atol, rel, ulp | column | sums |
|---|---|---|---|
| NaN / NaN, any payload | unchanged | NAN_PAYLOAD if codes differ | left out |
| NaN / not NaN | changed | SPECIAL | left out, counted in `nonfinite_deltas` |
| Inf / the same Inf | unchanged | none | left out |
| Inf / finite, or the other Inf | changed | SPECIAL | left out, counted |
| +0 / −0 | unchanged, distance 0 | ZERO_SIGN | Δ = 0 |
| 0 / x | by Δ = x; distance = code of |x| | OUT | in |
| subnormal | as numbers, never flushed | OUT, IN, CROSS | in |
| x / −x | by Δ; distance counts the codes between | CROSS | in |
| finite, Δ or Δ² overflows float64 (fp64 only) | by Δ = Inf | as above | left out, counted |

Δ is one float64 subtraction; `rel` compares it with one float64 product η·max(|a|, |b|). Integers:
Δ and `ulp` distance exact; `atol:x` is |Δ| ≤ ⌊x⌋; `rel` compares float64(|Δ|) with η·float64(max).
bool counts as the integers 0 and 1 (any non-zero byte is 1 under value criteria). Opaque storage has
codes only: every criterion is `bitwise` there, and the report says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from sparsity_audit.stats.exact_sum import empty_slots, slots_to_int
from sparsity_audit.stats.strata import NUM_COLUMNS
from sparsity_audit.stats.tally import AxisCounts, DecayCounts, SpecialCounts, ViewTally
from sparsity_audit.types import Criterion, DType

__all__ = ["CODE_DTYPE", "Accumulator", "Kernel", "KernelSpec", "Level"]

Level = Literal["counts", "full"]
"""`counts`: criteria, fingerprints, mask bits. `full`: every statistic."""

CODE_DTYPE: dict[int, np.dtype] = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.uint16),
    4: np.dtype(np.uint32),
    8: np.dtype(np.uint64),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSpec:
    """What one view of a pair asks of a kernel.

    Args:
        dtype: Dtype of both blocks' codes.
        criteria: Criteria to count, without `top`; starts with `bitwise`, `value`.
        mask: Index into `criteria` that decides bits, row and column counts.
        level: How much to count.
        shrink: The c of the decay test, for fp32 and fp64 at level `full`; None to leave it out.
    """

    dtype: DType
    criteria: tuple[Criterion, ...]
    mask: int
    level: Level
    shrink: float | None = None

    def __post_init__(self) -> None:
        assert [c.kind for c in self.criteria[:2]] == ["bitwise", "value"], self.criteria
        assert all(c.kind != "top" for c in self.criteria), self.criteria
        assert 0 <= self.mask < len(self.criteria)

    @property
    def num_strata(self) -> int:
        """Strata of the base codes (see `stats.strata`)."""
        return 2 * self.dtype.layout.num_exponents if self.dtype.kind == "float" else 1


class Accumulator:
    """Where kernels add; one per view and work unit, never shared between threads.

    Attributes:
        entries: int, entries seen.
        changed: int64[len(criteria)].
        strata: int64[num_strata], entries by stratum of the base code (level `full`).
        cells: int64[num_strata, NUM_COLUMNS], entries whose codes differ (level `full`).
        specials: int64[2, 5]: base, tuned × NaN, Inf, +0, −0, subnormal (float, level `full`).
        flips: int64[2]: sign flips, nonfinite deltas.
        abs_slots, sq_slots, base_sq_slots: int64[2, 2048], see `stats.exact_sum`.
        max_abs: float64[1].
        decay: int64[3]: within one ULP, band, mirror.
        rows: int64[rows]; cols: int64[cols] (level `full`).
        band, outside: int64[rows], where a shrink is tested.
        scratch: Whatever a kernel keeps between blocks; `Kernel.finish` folds it in.
    """

    def __init__(self, spec: KernelSpec, *, rows: int, cols: int) -> None:
        full = spec.level == "full"
        self.spec = spec
        self.entries = 0
        self.changed = np.zeros(len(spec.criteria), dtype=np.int64)
        self.strata = np.zeros(spec.num_strata if full else 0, dtype=np.int64)
        self.cells = np.zeros((spec.num_strata if full else 0, NUM_COLUMNS), dtype=np.int64)
        self.specials = np.zeros((2, 5), dtype=np.int64)
        self.flips = np.zeros(2, dtype=np.int64)
        self.abs_slots, self.sq_slots, self.base_sq_slots = empty_slots(), empty_slots(), empty_slots()
        self.max_abs = np.zeros(1, dtype=np.float64)
        self.decay = np.zeros(3, dtype=np.int64)
        self.rows = np.zeros(rows if full else 0, dtype=np.int64)
        self.cols = np.zeros(cols if full else 0, dtype=np.int64)
        tested = full and spec.shrink is not None
        self.band = np.zeros(rows if tested else 0, dtype=np.int64)
        self.outside = np.zeros(rows if tested else 0, dtype=np.int64)
        self.scratch: object | None = None

    def view_tally(self) -> ViewTally:
        """The counts as an immutable tally."""
        held = np.flatnonzero(self.strata)  # few of many thousand rows: no other has a cell
        rows, columns = np.nonzero(self.cells[held])
        strata = held[rows]
        return ViewTally(
            entries=self.entries,
            changed={c.key: int(n) for c, n in zip(self.spec.criteria, self.changed, strict=True)},
            strata={int(s): int(self.strata[s]) for s in np.flatnonzero(self.strata)},
            cells={(int(s), int(c)): int(self.cells[s, c]) for s, c in zip(strata, columns, strict=True)},
            base_specials=SpecialCounts(**dict(zip(_SPECIALS, self.specials[0].tolist(), strict=True))),
            tuned_specials=SpecialCounts(**dict(zip(_SPECIALS, self.specials[1].tolist(), strict=True))),
            sign_flips=int(self.flips[0]),
            nonfinite_deltas=int(self.flips[1]),
            abs_sum=slots_to_int(self.abs_slots),
            sq_sum=slots_to_int(self.sq_slots),
            base_sq_sum=slots_to_int(self.base_sq_slots),
            max_abs=float(self.max_abs[0]),
            decay=None
            if self.spec.shrink is None
            else DecayCounts(
                within_one_ulp=int(self.decay[0]), band=int(self.decay[1]), mirror=int(self.decay[2])
            ),
        )

    def axis_counts(self) -> AxisCounts | None:
        """Row and column counts, or None at level `counts`."""
        if self.spec.level == "counts":
            return None
        return AxisCounts(rows=self.rows, cols=self.cols, band=self.band, outside=self.outside)


_SPECIALS = ("nan", "inf", "pos_zero", "neg_zero", "subnormal")


class Kernel(Protocol):
    """What a kernel module offers; blocks are C-contiguous, codes unsigned."""

    name: str

    def fingerprint(self, words: np.ndarray, first_word: int) -> int:
        """Σ mix(word ⊕ (position + 1)·φ) mod 2⁶⁴ over uint64 `words` from position `first_word` on."""
        ...

    def to_bf16(self, codes: np.ndarray, dtype: DType, out: np.ndarray) -> None:
        """Write the bf16 codes (uint16) of float `codes`, rounded to nearest even.

        NaN becomes 0x7FC0, overflow infinity; codes that are bf16 already are copied.
        """
        ...

    def compare(
        self,
        base: np.ndarray,
        tuned: np.ndarray,
        acc: Accumulator,
        *,
        first_row: int,
        first_col: int,
        bits: np.ndarray | None,
    ) -> None:
        """Add block (rows, cols) at (first_row, first_col) to `acc`; write its mask bits.

        `bits` is uint8[rows, ceil(cols/8)]; first_col is a multiple of 8 when it is given.
        """
        ...

    def finish(self, acc: Accumulator) -> None:
        """Fold whatever the kernel kept in `acc.scratch` into the counts; call once, after the last block."""
        ...
