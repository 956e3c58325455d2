"""The fast exact kernel: compiled loops over chunks in cache, vector words of 64 entries.

Contract: equals `reference` bit for bit. BF16, F16, F32 and F64 are native; fp8, integers, bool and opaque
storage are rare and go to the numpy kernel, as does rounding to bf16 from anything but F32. What a work
unit needs is compiled on first use and cached; compiled code runs without the interpreter lock.

16-bit floats at level `full` are counted in a joint table of (|base code|, signed distance up to 8);
`numba_rows.joint_rows` says how, `finish` folds it. Source of the idea: counts of pairs of codes determine
every statistic of a pair.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import numpy as np
from numba import njit

from sparsity_audit.compare import numba_generic as generic
from sparsity_audit.compare import numba_rows as rows_module
from sparsity_audit.compare.accumulate import CODE_DTYPE, Accumulator, KernelSpec
from sparsity_audit.compare.numba_generic import CHUNK, COLUMN_STRIDE, OPTIONS, Buffers, Layout, Rules, Target
from sparsity_audit.compare.numpy_kernel import NumpyKernel
from sparsity_audit.types import Criterion, DType

__all__ = ["NumbaKernel"]

_NATIVE = frozenset({DType.BF16, DType.F16, DType.F32, DType.F64})
_MAX_TABLE_ENTRIES = 2**32 - 2**24
"""Entries after which 32-bit table cells are folded; blocks are far smaller than the margin."""
_RULE = {
    "bitwise": generic.BITWISE,
    "value": generic.VALUE,
    "atol": generic.ATOL,
    "rel": generic.REL,
    "ulp": generic.ULP,
}


@njit(**OPTIONS)
def _fingerprint(words, first):
    total = np.uint64(0)
    step = np.uint64(0x9E3779B97F4A7C15)
    for i in range(len(words)):
        x = words[i] ^ ((np.uint64(i) + first) * step)
        x ^= x >> np.uint64(32)
        x *= np.uint64(0xD6E8FEB86659FD93)
        total += x ^ (x >> np.uint64(29))
    return total


@njit(**OPTIONS)
def _round_to_bf16(codes, out):
    for i in range(len(codes)):
        code = np.uint32(codes[i])
        rounded = np.uint32(np.uint32(code + np.uint32(0x7FFF)) + np.uint32((code >> 16) & 1)) >> 16
        out[i] = np.uint16(0x7FC0) if np.uint32(code & 0x7FFFFFFF) > 0x7F800000 else np.uint16(rounded)


@dataclass(slots=True)
class _Scratch:
    """Working memory of one accumulator, and the entries its tables hold since they were last folded."""

    buffers: Buffers
    layout: Layout
    rules: Rules
    target: Target
    entries: int = 0


@dataclass(slots=True)
class _Pool:
    """Working memory that finished accumulators left behind, by dtype."""

    lock: Lock = field(default_factory=Lock)
    free: dict[tuple[DType, bool], list[Buffers]] = field(default_factory=dict)

    def take(self, dtype: DType, *, full: bool) -> Buffers:
        with self.lock:
            free = self.free.get((dtype, full))
            if free:
                return free.pop()
        return _new_buffers(dtype, full=full)

    def give(self, dtype: DType, buffers: Buffers, *, full: bool) -> None:
        with self.lock:
            self.free.setdefault((dtype, full), []).append(buffers)


class NumbaKernel:
    """See the module docstring; the interface is `accumulate.Kernel`."""

    name = "numba"

    def __init__(self) -> None:
        self._plain = NumpyKernel()
        self._pool = _Pool()

    def __reduce__(self) -> tuple[Any, ...]:
        """By name: another process compiles, or loads, its own code."""
        return NumbaKernel, ()

    def fingerprint(self, words: np.ndarray, first_word: int) -> int:
        """Sum of the mixed words, vectorised."""
        return int(_fingerprint(_read_only(words), np.uint64((first_word + 1) % 2**64)))

    def to_bf16(self, codes: np.ndarray, dtype: DType, out: np.ndarray) -> None:
        """Round F32 in one vector loop; other dtypes as the numpy kernel does."""
        if dtype is DType.F32 and codes.flags.c_contiguous and out.flags.c_contiguous:
            _round_to_bf16(_read_only(codes.reshape(-1)), out.reshape(-1))
        else:
            self._plain.to_bf16(codes, dtype, out)

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
        """Count a block; tables, bit counts of columns and derived counts wait for `finish`."""
        if acc.spec.dtype not in _NATIVE or not base.size:
            self._plain.compare(base, tuned, acc, first_row=first_row, first_col=first_col, bits=bits)
            return
        scratch = self._scratch_for(acc)
        if scratch.entries + base.size > _MAX_TABLE_ENTRIES:
            _fold(acc, scratch)
        scratch.entries += base.size
        acc.entries += base.size
        packed = bits if bits is not None and bits.flags.c_contiguous else None
        if bits is not None and packed is None:
            packed = np.empty(bits.shape, dtype=np.uint8)
        rows, cols = base.shape
        if acc.spec.level == "full":
            _prepare_columns(scratch, first_col, cols)
        flat = None if packed is None else packed.reshape(-1)
        a, b = _read_only(base.reshape(-1)), _read_only(tuned.reshape(-1))
        _run(_Block(a, b, rows, cols, first_row, flat), acc, scratch)
        if bits is not None and packed is not bits:
            bits[...] = packed

    def finish(self, acc: Accumulator) -> None:
        """Fold the tables and give the working memory back."""
        scratch = acc.scratch
        if not isinstance(scratch, _Scratch):
            return
        full = acc.spec.level == "full"
        _fold(acc, scratch)
        for index, kind in enumerate(scratch.rules.kinds.tolist()):
            if kind <= generic.VALUE:
                acc.changed[index] = acc.changed[kind]
        acc.scratch = None
        self._pool.give(acc.spec.dtype, scratch.buffers, full=full)

    def _scratch_for(self, acc: Accumulator) -> _Scratch:
        if not isinstance(acc.scratch, _Scratch):
            acc.scratch = _Scratch(
                buffers=self._pool.take(acc.spec.dtype, full=acc.spec.level == "full"),
                layout=_layout(acc.spec.dtype),
                rules=_rules(acc.spec),
                target=_target(acc),
            )
        return acc.scratch


@dataclass(frozen=True, slots=True)
class _Block:
    """Flat read-only codes of both sides, their shape, and the flat packed mask (None: not wanted)."""

    a: np.ndarray
    b: np.ndarray
    rows: int
    cols: int
    first_row: int
    bits: np.ndarray | None

    @property
    def packed(self) -> np.ndarray:
        return np.zeros(0, dtype=np.uint8) if self.bits is None else self.bits


def _run(block: _Block, acc: Accumulator, scratch: _Scratch) -> None:
    rules, full = scratch.rules, acc.spec.level == "full"
    mask_rule = int(rules.kinds[rules.mask])
    if full and acc.spec.dtype.itemsize == 2:
        _run_joint(block, scratch)
        if mask_rule > generic.VALUE:
            uncounted = scratch.target._replace(changed=np.zeros_like(acc.changed))
            _run_generic(block, scratch, uncounted, want_axes=True, full=False)
    elif full or rules.kinds.max() > generic.VALUE:
        _run_generic(block, scratch, scratch.target, want_axes=full, full=full)
    else:
        rows_module.word_rows(
            block.a, block.b, block.rows, block.cols, block.packed, block.bits is not None,
            mask_rule == generic.VALUE, scratch.layout, scratch.buffers.pad_a, scratch.buffers.pad_b,
            acc.changed,
        )  # fmt: skip


def _run_generic(block: _Block, scratch: _Scratch, target: Target, *, want_axes: bool, full: bool) -> None:
    a, b = block.a, block.b
    values = (a, b) if a.itemsize == 2 else (a.view(f"f{a.itemsize}"), b.view(f"f{a.itemsize}"))
    rows_module.count_rows(
        a, b, values[0], values[1], block.rows, block.cols, block.first_row, block.packed,
        block.bits is not None, want_axes, full, scratch.layout, scratch.rules, target, scratch.buffers,
    )  # fmt: skip


def _run_joint(block: _Block, scratch: _Scratch) -> None:
    buffers, target, rules = scratch.buffers, scratch.target, scratch.rules
    mask_rule = int(rules.kinds[rules.mask])
    by_words = mask_rule <= generic.VALUE
    buffers.state[generic.ROW] = buffers.state[generic.COLUMN] = 0
    while buffers.state[generic.ROW] < block.rows:
        listed = rows_module.joint_rows(
            block.a, block.b, block.rows, block.cols, block.first_row, block.packed,
            block.bits is not None and by_words, by_words, mask_rule == generic.VALUE,
            scratch.layout, target.changed, target.rows, target.cols, buffers.joint, buffers.places,
            buffers.pad_a, buffers.pad_b, buffers.list_a, buffers.list_b, buffers.columns, buffers.state,
        )  # fmt: skip
        if listed:
            rows_module.account_listed(listed, scratch.layout, rules, target, buffers)


def _fold(acc: Accumulator, scratch: _Scratch) -> None:
    if acc.spec.level != "full":
        return
    target, buffers = scratch.target, scratch.buffers
    rows_module.flush_columns(buffers.columns, target.cols, buffers.state)
    if acc.spec.dtype.itemsize == 2:
        rows_module.fold_joint(scratch.layout, scratch.rules, target, buffers)
    generic.fold_cells(buffers, target)
    generic.fold_strata(buffers, target)
    scratch.entries = 0


def _prepare_columns(scratch: _Scratch, first_col: int, cols: int) -> None:
    """Make the byte counters those of columns first_col, …; counts of other columns are flushed."""
    buffers = scratch.buffers
    state = buffers.state
    if state[generic.ROWS_HELD] and (
        state[generic.FIRST_COLUMN] != first_col or state[generic.WIDTH] != cols
    ):
        rows_module.flush_columns(buffers.columns, scratch.target.cols, state)
    if len(buffers.columns) < cols + 64:
        assert not state[generic.ROWS_HELD]
        scratch.buffers = buffers._replace(columns=np.zeros(cols + 64, dtype=np.uint8))
    state[generic.FIRST_COLUMN], state[generic.WIDTH] = first_col, cols


def _layout(dtype: DType) -> Layout:
    layout, code = dtype.layout, CODE_DTYPE[dtype.itemsize].type
    assert layout.infinity is not None
    return Layout(
        magnitude_mask=code(layout.magnitude_mask),
        first_nan=code(layout.first_nan),
        infinity=code(layout.infinity),
        negative_zero=code(layout.sign_mask),
        mantissa_bits=layout.mantissa_bits,
    )


def _rules(spec: KernelSpec) -> Rules:
    kinds = [_rule(c, spec.dtype) for c in spec.criteria]
    return Rules(
        kinds=np.array(kinds, dtype=np.int64),
        parameters=np.array([float(c.parameter) for c in spec.criteria], dtype=np.float64),
        limits=np.array(
            [min(int(c.parameter), 2**64 - 1) if c.kind == "ulp" else 0 for c in spec.criteria],
            dtype=np.uint64,
        ),
        mask=spec.mask,
        shrink=float(spec.shrink or 0.0),
    )


def _rule(criterion: Criterion, dtype: DType) -> int:
    """The criterion's number; those that say the same as `value` in this dtype get its number.

    Two numbers of m mantissa bits that differ, differ by at least 2^−(m+1) of the larger; the float64
    product of the larger with any smaller η stays below that.
    """
    tolerance_below = 2.0 ** -(dtype.layout.mantissa_bits + 1) if dtype.itemsize == 2 else 0.0
    if criterion.kind in ("atol", "ulp", "rel") and criterion.parameter == 0:
        return generic.VALUE
    if criterion.kind == "rel" and criterion.parameter < tolerance_below:
        return generic.VALUE
    return _RULE[criterion.kind]


def _target(acc: Accumulator) -> Target:
    return Target(**{name: getattr(acc, name) for name in Target._fields})


def _new_buffers(dtype: DType, *, full: bool) -> Buffers:
    code = CODE_DTYPE[dtype.itemsize]
    floats = {4: np.float32, 8: np.float64}.get(dtype.itemsize)
    strata = 2 * dtype.layout.num_exponents if full else 0
    ways = 8 if dtype is DType.F32 else 1
    listed = np.zeros((2, 16 * CHUNK), dtype=code)
    codes = _read_only(listed)
    values = codes if floats is None else codes.view(floats)
    work = np.zeros((5, CHUNK), dtype=np.float64)
    words = np.zeros((2, CHUNK // 64 + 1), dtype=np.uint64)
    joint = rows_module.JOINT_PLANES * rows_module.JOINT_CODES if full and floats is None else 0
    return Buffers(
        x=work[0],
        y=work[1],
        delta=work[2],
        term=work[3],
        squares=work[4],
        rounded=np.zeros(CHUNK, dtype=floats or np.float32),
        distance=np.zeros(CHUNK, dtype=code),
        kind=np.zeros(CHUNK + 64, dtype=np.uint8),
        verdict=np.zeros(CHUNK + 64, dtype=np.uint8),
        places=np.zeros(CHUNK + 64, dtype=np.uint32),
        bit_words=words[0],
        value_words=words[1],
        pad_a=np.zeros(64, dtype=code),
        pad_b=np.zeros(64, dtype=code),
        list_a=listed[0],
        list_b=listed[1],
        codes_a=codes[0],
        codes_b=codes[1],
        values_a=values[0],
        values_b=values[1],
        cells=np.zeros((strata * COLUMN_STRIDE, ways), dtype=np.uint32),
        strata=np.zeros((strata, 8), dtype=np.uint32),
        joint=np.zeros(joint, dtype=np.uint32),
        columns=np.zeros(64, dtype=np.uint8),
        ignored=np.zeros((2, 5), dtype=np.int64),
        state=np.zeros(6, dtype=np.int64),
    )


def _read_only(array: np.ndarray) -> np.ndarray:
    """A read-only aligned view (or copy), so that compiled functions see one array type."""
    view = array.view() if array.flags.aligned else array.copy()
    view.flags.writeable = False
    return view
