"""Run a kernel over the blocks of one work unit, in every view the pair has.

Contract: blocks arrive in order and cover the unit; the unit starts at a multiple of 64 entries of the
compared slice, so that fingerprint words do not depend on how units were cut. The result is a `Tally`.

Views: `native` compares the codes as stored (both widened when the dtypes differ); `served` rounds both
sides to bf16 and exists when a float side is not bf16 or fp8 already, because rounding those is exact.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from sparsity_audit.compare.accumulate import CODE_DTYPE, Accumulator, Kernel, KernelSpec, Level
from sparsity_audit.compare.convert import widen
from sparsity_audit.stats.tally import Tally, ViewTally
from sparsity_audit.types import Criterion, DType, View, common_dtype

__all__ = ["PairSpec", "UnitComparer", "unchanged_tally"]

_ROUNDS_EXACTLY = frozenset({DType.BF16, DType.F8_E4M3, DType.F8_E5M2})


@dataclass(frozen=True, slots=True, kw_only=True)
class PairSpec:
    """What is asked about one pair.

    Args:
        base: Stored dtype of the base side.
        tuned: Stored dtype of the tuned side.
        criteria: Criteria to count, starting with `bitwise`, `value`; none of kind `top`.
        mask: Index into `criteria` that decides mask bits, row and column counts.
        view: The view that decides them.
        level: How much to count.
        shrink: The c of the decay test; None to leave it out.
        scaled: Whether values are codes times block scales (see `scaled`).
        known_equal: Whether hashes of the files prove both sides' bytes equal: one side is read for both.
        unread: Whether, for that reason, neither is read; fingerprints are then 0, not known.
    """

    base: DType
    tuned: DType
    criteria: tuple[Criterion, ...]
    mask: int = 1
    view: View = View.NATIVE
    level: Level = "full"
    shrink: float | None = None
    scaled: bool = False
    known_equal: bool = False
    unread: bool = False

    @property
    def native_dtype(self) -> DType:
        """The dtype in which the native view compares."""
        if self.scaled:
            return DType.F64
        dtype = common_dtype(self.base, self.tuned)
        assert dtype is not None, (self.base, self.tuned)
        return dtype

    @property
    def has_served_view(self) -> bool:
        """Whether rounding to bf16 is a view of its own."""
        sides = {self.native_dtype} if self.scaled else {self.base, self.tuned}
        return self.native_dtype.kind == "float" and not sides <= _ROUNDS_EXACTLY

    @property
    def of_values(self) -> PairSpec:
        """The same question about blocks that hold the values of a scaled pair, as fp64 codes."""
        return replace(self, base=DType.F64, tuned=DType.F64, scaled=False) if self.scaled else self

    def kernel_spec(self, view: View) -> KernelSpec:
        """What the kernel is asked in one view."""
        served = view is View.SERVED
        return KernelSpec(
            dtype=DType.BF16 if served else self.native_dtype,
            criteria=self.criteria,
            mask=self.mask,
            level=self.level,
            shrink=None if served else self.shrink,
        )


def unchanged_tally(spec: PairSpec, num_entries: int) -> Tally:
    """The tally at level `counts` of entries that are known to be equal, without fingerprints."""
    assert spec.level == "counts", spec.level
    native, served = (
        ViewTally(
            entries=num_entries,
            changed={criterion.key: 0 for criterion in spec.kernel_spec(view).criteria},
        )
        for view in (View.NATIVE, View.SERVED)
    )
    return Tally(native=native, served=served if spec.has_served_view else None)


class UnitComparer:
    """Feed the blocks of one unit, then take its tally.

    Args:
        spec: What is asked.
        kernel: The kernel to run.
        rows: Rows of the whole pair.
        cols: Its columns.
        first_entry: Flat position of the unit's first entry; a multiple of 64.
    """

    def __init__(self, spec: PairSpec, kernel: Kernel, *, rows: int, cols: int, first_entry: int) -> None:
        assert first_entry % 64 == 0, first_entry
        self._spec, self._kernel = spec, kernel
        self._native = Accumulator(spec.kernel_spec(View.NATIVE), rows=rows, cols=cols)
        self._served = None
        if spec.has_served_view:
            self._served = Accumulator(spec.kernel_spec(View.SERVED), rows=rows, cols=cols)
        self._mask_view = (
            View.SERVED if spec.view is View.SERVED and self._served is not None else View.NATIVE
        )
        self._base_print = _Fingerprint(kernel, first_byte=first_entry * spec.base.itemsize)
        self._tuned_print = _Fingerprint(kernel, first_byte=first_entry * spec.tuned.itemsize)

    def add(
        self, base: np.ndarray, tuned: np.ndarray, *, first_row: int, first_col: int, bits: np.ndarray | None
    ) -> None:
        """Count one block of stored codes (rows, cols); write its packed mask bits where asked."""
        self._base_print.add(base)
        self._tuned_print.add(tuned)
        dtypes = self._spec.base, self._spec.tuned
        self._count(base, tuned, dtypes, first_row=first_row, first_col=first_col, bits=bits)

    def _count(
        self,
        base: np.ndarray,
        tuned: np.ndarray,
        dtypes: tuple[DType, DType],
        *,
        first_row: int,
        first_col: int,
        bits: np.ndarray | None,
    ) -> None:
        wide_base = widen(base, dtypes[0], self._native.spec.dtype)
        wide_tuned = widen(tuned, dtypes[1], self._native.spec.dtype)
        where = {"first_row": first_row, "first_col": first_col}
        native_bits = bits if self._mask_view is View.NATIVE else None
        self._kernel.compare(wide_base, wide_tuned, self._native, **where, bits=native_bits)
        if self._served is not None:
            rounded = []
            for codes, dtype in ((base, dtypes[0]), (tuned, dtypes[1])):
                out = np.empty(codes.shape, dtype=CODE_DTYPE[2])
                self._kernel.to_bf16(codes, dtype, out)
                rounded.append(out)
            served_bits = bits if self._mask_view is View.SERVED else None
            self._kernel.compare(rounded[0], rounded[1], self._served, **where, bits=served_bits)

    def tally(self) -> Tally:
        """The unit's tally; call once, after the last block."""
        self._kernel.finish(self._native)
        if self._served is not None:
            self._kernel.finish(self._served)
        axes = self._served if self._mask_view is View.SERVED and self._served is not None else self._native
        return Tally(
            native=self._native.view_tally(),
            served=None if self._served is None else self._served.view_tally(),
            base_fingerprint=self._base_print.finish(),
            tuned_fingerprint=self._tuned_print.finish(),
            axes=axes.axis_counts(),
        )


class _Fingerprint:
    """Sum of mixed words over consecutive blocks of any length; bytes short of a word are carried over."""

    def __init__(self, kernel: Kernel, *, first_byte: int) -> None:
        self._kernel, self._word, self._carry, self._sum = kernel, first_byte // 8, b"", 0

    def add(self, codes: np.ndarray) -> None:
        data = codes.reshape(-1).view(np.uint8)
        if self._carry:
            data = np.concatenate([np.frombuffer(self._carry, dtype=np.uint8), data])
        whole = len(data) // 8 * 8
        self._add_words(data[:whole].view(np.uint64))
        self._carry = data[whole:].tobytes()

    def finish(self) -> int:
        if self._carry:
            self._add_words(np.frombuffer(self._carry.ljust(8, b"\0"), dtype=np.uint64))
        return self._sum

    def _add_words(self, words: np.ndarray) -> None:
        if len(words):
            self._sum = (self._sum + self._kernel.fingerprint(words, self._word)) % 2**64
            self._word += len(words)
