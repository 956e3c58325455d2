"""The exact kernel in numpy: used for small pairs and wherever numba is not wanted.

Contract: equals `reference` bit for bit. Cheap vector operations over the block find the entries whose
codes differ; everything else is computed for those alone.
"""

from __future__ import annotations

import numpy as np

from sparsity_audit.compare.accumulate import CODE_DTYPE, Accumulator
from sparsity_audit.stats.exact_sum import add_to_slots
from sparsity_audit.stats.strata import (
    CROSS,
    IN,
    NAN_PAYLOAD,
    NUM_COLUMNS,
    OUT,
    SPECIAL,
    ZERO_SIGN,
)
from sparsity_audit.types import DType

__all__ = ["NumpyKernel", "integer_distance", "strata_of", "to_float64"]

_PHI = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIER = np.uint64(0xD6E8FEB86659FD93)
_MAX_CHUNK = 1 << 16


class NumpyKernel:
    """See the module docstring; the interface is `accumulate.Kernel`."""

    name = "numpy"

    def fingerprint(self, words: np.ndarray, first_word: int) -> int:
        """Sum of the mixed words, in chunks that stay in cache."""
        total = 0
        for start in range(0, len(words), _MAX_CHUNK):
            part = words[start : start + _MAX_CHUNK]
            first = np.uint64(first_word + start + 1)
            x = np.arange(len(part), dtype=np.uint64)
            x += first
            x *= _PHI
            x ^= part
            x ^= x >> np.uint64(32)
            x *= _MULTIPLIER
            x ^= x >> np.uint64(29)
            total += int(x.sum(dtype=np.uint64))
        return total % 2**64

    def to_bf16(self, codes: np.ndarray, dtype: DType, out: np.ndarray) -> None:
        """Round through float32 codes; float64 is first rounded to odd, so that rounding happens once."""
        if dtype is DType.BF16:
            np.copyto(out, codes)
            return
        wide = codes if dtype is DType.F32 else _float32_codes(codes, dtype)
        magnitude = wide & np.uint32(0x7FFFFFFF)
        rounded = (wide + (np.uint32(0x7FFF) + ((wide >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
        out[...] = np.where(magnitude > np.uint32(0x7F800000), np.uint32(0x7FC0), rounded)

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
        """Find differing codes with one vector comparison, then judge only those."""
        acc.entries += base.size
        cols = base.shape[1]
        if acc.spec.level == "full" and base.size:
            _count_base(base.reshape(-1), acc)
        flat = np.flatnonzero((base != tuned).reshape(-1))
        a, b = base.reshape(-1)[flat], tuned.reshape(-1)[flat]
        in_mask = _count_changed(a, b, flat // max(cols, 1) + first_row, acc)
        selected = flat[in_mask]
        if acc.spec.level == "full":
            np.add.at(acc.rows, selected // max(cols, 1) + first_row, 1)
            np.add.at(acc.cols, selected % max(cols, 1) + first_col, 1)
        if bits is not None:
            changed = np.zeros(base.shape, dtype=np.bool_)
            changed.reshape(-1)[selected] = True
            bits[...] = np.packbits(changed, axis=-1, bitorder="little")

    def finish(self, acc: Accumulator) -> None:
        """Nothing is kept between blocks."""


def to_float64(codes: np.ndarray, dtype: DType) -> np.ndarray:
    """The numbers that float codes stand for, in float64 (exact for every float dtype)."""
    if dtype is DType.F64:
        return codes.view(np.float64)
    with np.errstate(invalid="ignore"):  # a signalling NaN becomes quiet
        if dtype is DType.F32:
            return codes.view(np.float32).astype(np.float64)
        if dtype is DType.F16:
            return codes.view(np.float16).astype(np.float64)
        if dtype is DType.BF16:
            return (codes.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    return _fp8_table(dtype)[codes]


def _fp8_table(dtype: DType) -> np.ndarray:
    layout = dtype.layout
    codes = np.arange(256)
    magnitude = codes & layout.magnitude_mask
    field, mantissa = magnitude >> layout.mantissa_bits, magnitude & ((1 << layout.mantissa_bits) - 1)
    significand = mantissa + np.where(field > 0, 1 << layout.mantissa_bits, 0)
    exponent = np.maximum(field, 1) - layout.bias - layout.mantissa_bits
    value = np.ldexp(significand.astype(np.float64), exponent)
    if layout.infinity is not None:
        value[magnitude == layout.infinity] = np.inf
    value[magnitude >= layout.first_nan] = np.nan
    return np.where(codes & layout.sign_mask, -value, value)


def _float32_codes(codes: np.ndarray, dtype: DType) -> np.ndarray:
    wide = to_float64(codes, dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        narrow = wide.astype(np.float32)
    if dtype is not DType.F64:
        return narrow.view(np.uint32)
    result = narrow.view(np.uint32)
    back = narrow.astype(np.float64)
    inexact = (back != wide) & ~np.isnan(wide)
    # Round to odd: step to the neighbour towards the true value when the even one was taken.
    even = inexact & ((result & np.uint32(1)) == 0)
    outward = np.abs(wide) > np.abs(back)
    return np.where(even, np.where(outward, result + np.uint32(1), result - np.uint32(1)), result)


def _count_base(a: np.ndarray, acc: Accumulator) -> None:
    dtype = acc.spec.dtype
    if dtype.kind != "float":
        acc.strata[0] += a.size
        if dtype.kind != "opaque":
            value = _integer_values(a, dtype).astype(np.float64)
            add_to_slots(acc.base_sq_slots, value * value)
        return
    for start in range(0, a.size, _MAX_CHUNK):
        part = a[start : start + _MAX_CHUNK]
        acc.strata += np.bincount(strata_of(part, dtype), minlength=len(acc.strata))
        special = _special_counts(part, dtype)
        acc.specials[0] += special
        acc.specials[1] += special  # corrected for changed entries in `_count_changed`
        with np.errstate(over="ignore", invalid="ignore"):
            value = to_float64(part, dtype)
            square = value * value
        add_to_slots(acc.base_sq_slots, square[np.isfinite(square)])


def _count_changed(a: np.ndarray, b: np.ndarray, rows: np.ndarray, acc: Accumulator) -> np.ndarray:
    """Count entries whose codes differ; returns which of them the mask criterion calls changed."""
    in_mask = np.zeros(len(a), dtype=np.bool_)
    for start in range(0, len(a), _MAX_CHUNK):
        part = slice(start, start + _MAX_CHUNK)
        if acc.spec.dtype.kind == "float":
            in_mask[part] = _count_floats(a[part], b[part], rows[part], acc)
        elif acc.spec.dtype.kind == "opaque":
            in_mask[part] = _count_opaque(a[part], acc)
        else:
            in_mask[part] = _count_integers(a[part], b[part], acc)
    return in_mask


def _count_opaque(a: np.ndarray, acc: Accumulator) -> np.ndarray:
    acc.changed += len(a)
    if acc.spec.level == "full":
        acc.cells[0, SPECIAL] += len(a)
    return np.ones(len(a), dtype=np.bool_)


def _count_floats(a: np.ndarray, b: np.ndarray, rows: np.ndarray, acc: Accumulator) -> np.ndarray:
    spec = acc.spec
    layout, code = spec.dtype.layout, a.dtype.type
    size_a, size_b = a & code(layout.magnitude_mask), b & code(layout.magnitude_mask)
    with np.errstate(over="ignore", invalid="ignore"):
        x, y = to_float64(a, spec.dtype), to_float64(b, spec.dtype)
        delta = np.abs(y - x)
    nan_a, nan_b = size_a >= code(layout.first_nan), size_b >= code(layout.first_nan)
    both_nan = nan_a & nan_b
    both_zero = (size_a | size_b) == 0
    special = (nan_a ^ nan_b) | ((np.isinf(x) | np.isinf(y)) & ~both_nan)
    differs = ~(both_nan | both_zero)
    crossing = (x != 0) & (y != 0) & ((a ^ b) >= code(layout.sign_mask))
    apart = np.where(size_b > size_a, size_b - size_a, size_a - size_b)
    distance = np.where(crossing, size_a + size_b, apart)
    ordinary = differs & ~special
    verdicts = []
    for criterion in spec.criteria:
        if criterion.kind == "bitwise":
            verdicts.append(np.ones(len(a), dtype=np.bool_))
        elif criterion.kind == "value":
            verdicts.append(differs)
        else:
            if criterion.kind == "ulp":
                beyond = distance > code(min(int(criterion.parameter), int(np.iinfo(code).max)))
            elif criterion.kind == "atol":
                beyond = delta > criterion.parameter
            else:
                with np.errstate(over="ignore", invalid="ignore"):
                    beyond = delta > criterion.parameter * np.maximum(np.abs(x), np.abs(y))
            verdicts.append(special | (ordinary & beyond))
    acc.changed += [int(np.count_nonzero(v)) for v in verdicts]
    if spec.level == "counts":
        return verdicts[spec.mask]
    bucket = _buckets(np.maximum(distance, code(1)))
    column = np.where(crossing, CROSS, np.where(size_b > size_a, OUT, IN)) + bucket
    column = np.select([both_nan, both_zero, special], [NAN_PAYLOAD, ZERO_SIGN, SPECIAL], column)
    cell = strata_of(a, spec.dtype) * NUM_COLUMNS + column
    found, counts = np.unique(cell, return_counts=True)
    acc.cells.reshape(-1)[found] += counts
    acc.specials[1] += _special_counts(b, spec.dtype) - _special_counts(a, spec.dtype)
    acc.flips[0] += np.count_nonzero(crossing & ~nan_a & ~nan_b)
    with np.errstate(over="ignore", invalid="ignore"):
        square = delta * delta
    usable = differs & np.isfinite(square)
    acc.flips[1] += np.count_nonzero(differs & ~usable)
    add_to_slots(acc.abs_slots, delta[usable])
    add_to_slots(acc.sq_slots, square[usable])
    acc.max_abs[0] = max(acc.max_abs[0], delta[usable].max(initial=0.0))
    if spec.shrink is not None:
        _count_decay(x[differs], y[differs], b[differs], rows[differs], acc)
    return verdicts[spec.mask]


def _count_decay(x: np.ndarray, y: np.ndarray, b: np.ndarray, rows: np.ndarray, acc: Accumulator) -> None:
    shrink, dtype = acc.spec.shrink, acc.spec.dtype
    assert shrink is not None
    layout = dtype.layout
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        judged = (x != 0) & np.isfinite(x) & np.isfinite(y)
        step = np.where(x > 0, x - y, y - x)
        low, high = 0.5 * shrink * np.abs(x), 2.0 * shrink * np.abs(x)
        band = judged & (low <= step) & (step <= high)
        mirror = judged & (low <= -step) & (-step <= high)
        target = x * (1.0 - shrink)
        native = np.float32 if dtype is DType.F32 else np.float64
        code = target.astype(native).view(CODE_DTYPE[dtype.itemsize])
    signed = np.int64
    mask, sign = code.dtype.type(layout.magnitude_mask), code.dtype.type(layout.sign_mask)
    ordered_t = np.where(code & sign, -(code & mask).astype(signed), (code & mask).astype(signed))
    ordered_b = np.where(b & sign, -(b & mask).astype(signed), (b & mask).astype(signed))
    # Signs that differ are more than one apart unless both are next to zero; no overflow can hide that.
    near = judged & ((ordered_t - ordered_b <= 1) & (ordered_b - ordered_t <= 1))
    acc.decay += [np.count_nonzero(near), np.count_nonzero(band), np.count_nonzero(mirror)]
    np.add.at(acc.band, rows[band], 1)
    np.add.at(acc.outside, rows[~band], 1)


def _count_integers(a: np.ndarray, b: np.ndarray, acc: Accumulator) -> np.ndarray:
    spec = acc.spec
    x, y = _integer_values(a, spec.dtype), _integer_values(b, spec.dtype)
    grows = y > x
    distance = integer_distance(a, b, spec.dtype)
    delta = distance.astype(np.float64)
    verdicts = []
    for criterion in spec.criteria:
        if criterion.kind == "bitwise":
            verdicts.append(np.ones(len(a), dtype=np.bool_))
        elif criterion.kind == "rel":
            largest = np.maximum(_absolute(x, spec.dtype), _absolute(y, spec.dtype)).astype(np.float64)
            verdicts.append((distance > 0) & (delta > criterion.parameter * largest))
        else:
            limit = 0 if criterion.kind == "value" else int(np.floor(criterion.parameter))
            verdicts.append(distance > np.uint64(min(limit, 2**64 - 1)))
    acc.changed += [int(np.count_nonzero(v)) for v in verdicts]
    if spec.level == "full":
        column = np.where(grows, OUT, IN) + _buckets(np.maximum(distance, np.uint64(1)))
        column = np.where(distance == 0, NAN_PAYLOAD, column)
        found, counts = np.unique(column, return_counts=True)
        acc.cells[0, found] += counts
        changed = delta[distance > 0]
        add_to_slots(acc.abs_slots, changed)
        add_to_slots(acc.sq_slots, changed * changed)
        acc.max_abs[0] = max(acc.max_abs[0], changed.max(initial=0.0))
    return verdicts[spec.mask]


def integer_distance(a: np.ndarray, b: np.ndarray, dtype: DType) -> np.ndarray:
    """|b − a| of integer or bool codes, exact, as uint64."""
    x, y = _integer_values(a, dtype), _integer_values(b, dtype)
    return np.where(y > x, y.view(np.uint64) - x.view(np.uint64), x.view(np.uint64) - y.view(np.uint64))


def _integer_values(codes: np.ndarray, dtype: DType) -> np.ndarray:
    """int64 for signed and bool, uint64 for unsigned; exact."""
    if dtype.kind == "bool":
        return (codes != 0).astype(np.int64)
    if dtype.kind == "uint":
        return codes.astype(np.uint64)
    return codes.view(codes.dtype.str.replace("u", "i")).astype(np.int64)


def _absolute(values: np.ndarray, dtype: DType) -> np.ndarray:
    if dtype.kind == "uint":
        return values
    unsigned = values.view(np.uint64)
    return np.where(values < 0, np.uint64(0) - unsigned, unsigned)


def strata_of(codes: np.ndarray, dtype: DType) -> np.ndarray:
    """Stratum of each float code (see `stats.strata`), as integers of the platform's size."""
    layout, code = dtype.layout, codes.dtype.type
    magnitude = codes & code(layout.magnitude_mask)
    power_of_two = (magnitude & code((1 << layout.mantissa_bits) - 1)) == 0
    return 2 * (magnitude >> code(layout.mantissa_bits)).astype(np.intp) + power_of_two


def _special_counts(codes: np.ndarray, dtype: DType) -> np.ndarray:
    layout, code = dtype.layout, codes.dtype.type
    magnitude = codes & code(layout.magnitude_mask)
    nan = np.count_nonzero(magnitude >= code(layout.first_nan))
    inf = 0 if layout.infinity is None else np.count_nonzero(magnitude == code(layout.infinity))
    zero = np.count_nonzero(magnitude == 0)
    negative_zero = np.count_nonzero(codes == code(layout.sign_mask))
    subnormal = np.count_nonzero((magnitude > 0) & (magnitude < code(1 << layout.mantissa_bits)))
    return np.array([nan, inf, zero - negative_zero, negative_zero, subnormal], dtype=np.int64)


def _buckets(distance: np.ndarray) -> np.ndarray:
    """`strata.bucket_of` of distances ≥ 1, exact for all 64 bits."""
    wide = distance.astype(np.uint64)
    high, low = (wide >> np.uint64(32)).astype(np.float64), (wide & np.uint64(0xFFFFFFFF)).astype(np.float64)
    length = np.where(high > 0, 32 + np.frexp(high)[1], np.frexp(low)[1])
    return np.where(wide <= np.uint64(8), wide.astype(np.int64) - 1, length + 4)
