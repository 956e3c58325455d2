"""The obvious kernel: one entry at a time, every rule spelled out. Slow, and the definition.

Contract: the special-value table of `accumulate`, read line by line. Values are decoded from the code's
bits, rounding goes through exact fractions; nothing is shared with the fast kernels but the bins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from sparsity_audit.compare.accumulate import Accumulator
from sparsity_audit.stats.exact_sum import LOW_BITS
from sparsity_audit.stats.strata import CROSS, IN, NAN_PAYLOAD, OUT, SPECIAL, ZERO_SIGN, bucket_of
from sparsity_audit.types import Criterion, DType

__all__ = ["PHI", "ReferenceKernel", "decode", "encode_bf16", "mix"]

PHI = 0x9E3779B97F4A7C15
_MULTIPLIER = 0xD6E8FEB86659FD93
_MASK64 = 2**64 - 1


def mix(word: int, position: int) -> int:
    """The fingerprint's term for one 64-bit word: x ^= x≫32; x ×= M; x ^= x≫29 of word ⊕ (position+1)·φ."""
    x = word ^ ((position + 1) * PHI & _MASK64)
    x ^= x >> 32
    x = x * _MULTIPLIER & _MASK64
    return x ^ (x >> 29)


def decode(code: int, dtype: DType) -> float:
    """The number a float code stands for; every 8- to 64-bit float is exact in float64."""
    layout = dtype.layout
    magnitude = code & layout.magnitude_mask
    sign = -1.0 if code & layout.sign_mask else 1.0
    if magnitude >= layout.first_nan:
        return math.nan
    if magnitude == layout.infinity:
        return sign * math.inf
    field, mantissa = magnitude >> layout.mantissa_bits, magnitude & ((1 << layout.mantissa_bits) - 1)
    if field:
        mantissa += 1 << layout.mantissa_bits
    return sign * math.ldexp(mantissa, max(field, 1) - layout.bias - layout.mantissa_bits)


def encode_bf16(value: float) -> int:
    """The bf16 code nearest to `value`, ties to even; NaN gives 0x7FC0, overflow infinity."""
    if math.isnan(value):
        return 0x7FC0
    sign = 0x8000 if math.copysign(1.0, value) < 0 else 0
    if math.isinf(value):
        return sign | 0x7F80
    if value == 0:
        return sign
    exponent = max(math.frexp(value)[1] - 1, -126)
    steps = round(Fraction(abs(value)) / Fraction(2) ** (exponent - 7))  # rounds half to even
    # `steps` < 128 is subnormal; a carry to 256 moves into the next exponent by itself.
    code = steps + ((exponent + 126) << 7)
    return sign | min(code, 0x7F80)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """One entry of both sides: values, and the facts criteria and bins need."""

    value_differs: bool
    is_special: bool
    distance: int
    delta: float
    magnitude: float
    column: int


class ReferenceKernel:
    """See the module docstring; the interface is `accumulate.Kernel`."""

    name = "reference"

    def fingerprint(self, words: np.ndarray, first_word: int) -> int:
        """Sum of `mix` over the words."""
        return sum(mix(int(w), first_word + i) for i, w in enumerate(words)) & _MASK64

    def to_bf16(self, codes: np.ndarray, dtype: DType, out: np.ndarray) -> None:
        """Round each entry through exact fractions; bf16 is left as it is."""
        flat = out.reshape(-1)
        for i, code in enumerate(codes.reshape(-1).tolist()):
            flat[i] = code if dtype is DType.BF16 else encode_bf16(decode(code, dtype))

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
        """Count entry by entry."""
        if bits is not None:
            bits[...] = 0
        for row, col in np.ndindex(base.shape):
            a, b = int(base[row, col]), int(tuned[row, col])
            with np.errstate(over="ignore"):  # Δ of fp64 may be infinite, and is counted as such
                in_mask = _count(a, b, acc, row=first_row + row, col=first_col + col)
            if in_mask and bits is not None:
                bits[row, col // 8] |= 1 << (col % 8)

    def finish(self, acc: Accumulator) -> None:
        """Nothing is kept between blocks."""


def _count(a: int, b: int, acc: Accumulator, *, row: int, col: int) -> bool:
    spec, full = acc.spec, acc.spec.level == "full"
    acc.entries += 1
    entry = _judge(a, b, spec.dtype)
    verdicts = [_changed(c, a, b, entry, spec.dtype) for c in spec.criteria]
    acc.changed += verdicts
    if not full:
        return verdicts[spec.mask]
    acc.strata[_stratum(a, spec.dtype)] += 1
    if a != b:
        acc.cells[_stratum(a, spec.dtype), entry.column] += 1
    if verdicts[spec.mask]:
        acc.rows[row] += 1
        acc.cols[col] += 1
    value_a, value_b = _value(a, spec.dtype), _value(b, spec.dtype)
    if spec.dtype.kind == "float":
        for side, code in enumerate((a, b)):
            kind = _special_class(code, spec.dtype)
            if kind is not None:
                acc.specials[side, kind] += 1
        ordered = not math.isnan(value_a) and not math.isnan(value_b)
        if ordered and value_a != 0 and value_b != 0:
            acc.flips[0] += (value_a < 0) != (value_b < 0)
    base_square = float(value_a) * float(value_a)
    if spec.dtype.kind != "opaque" and math.isfinite(base_square):
        _add_exact(acc.base_sq_slots, base_square)
    if spec.dtype.kind != "opaque" and entry.value_differs:
        _add_delta(acc, entry)
        if spec.shrink is not None:
            _judge_decay(acc, b, value_a, value_b, row)
    return verdicts[spec.mask]


def _judge(a: int, b: int, dtype: DType) -> _Entry:
    if dtype.kind == "opaque":
        return _Entry(
            value_differs=a != b,
            is_special=False,
            distance=int(a != b),
            delta=0.0,
            magnitude=0.0,
            column=SPECIAL,
        )
    x, y = _value(a, dtype), _value(b, dtype)
    if dtype.kind != "float":
        distance = abs(y - x)
        column = (OUT if y > x else IN) + bucket_of(int(distance)) if distance else NAN_PAYLOAD
        return _Entry(
            value_differs=x != y,
            is_special=False,
            distance=int(distance),
            delta=float(distance),
            magnitude=float(max(abs(x), abs(y))),
            column=column,
        )
    if math.isnan(x) and math.isnan(y):
        return _Entry(
            value_differs=False, is_special=False, distance=0, delta=0.0, magnitude=0.0, column=NAN_PAYLOAD
        )
    if math.isnan(x) or math.isnan(y) or ((math.isinf(x) or math.isinf(y)) and x != y):
        return _Entry(
            value_differs=True, is_special=True, distance=0, delta=math.nan, magnitude=0.0, column=SPECIAL
        )
    if x == y:
        return _Entry(
            value_differs=False, is_special=False, distance=0, delta=0.0, magnitude=abs(x), column=ZERO_SIGN
        )
    magnitude_mask = dtype.layout.magnitude_mask
    size_a, size_b = a & magnitude_mask, b & magnitude_mask
    if x != 0 and y != 0 and (x < 0) != (y < 0):
        distance = size_a + size_b
        column = CROSS + bucket_of(distance)
    else:
        distance = abs(size_b - size_a)
        column = (OUT if size_b > size_a else IN) + bucket_of(distance)
    return _Entry(
        value_differs=True,
        is_special=False,
        distance=distance,
        delta=abs(float(np.subtract(y, x))),
        magnitude=max(abs(x), abs(y)),
        column=column,
    )


def _changed(criterion: Criterion, a: int, b: int, entry: _Entry, dtype: DType) -> bool:
    if criterion.kind == "bitwise" or dtype.kind == "opaque":
        return a != b
    if criterion.kind == "value" or entry.is_special or not entry.value_differs:
        return entry.value_differs
    if criterion.kind == "ulp":
        return entry.distance > criterion.parameter
    if criterion.kind == "rel":
        return entry.delta > criterion.parameter * entry.magnitude
    if dtype.kind == "float":
        return entry.delta > criterion.parameter
    return entry.distance > math.floor(criterion.parameter)


def _value(code: int, dtype: DType) -> float | int:
    if dtype.kind == "float":
        return decode(code, dtype)
    if dtype.kind == "bool":
        return int(code != 0)
    bits = 8 * dtype.itemsize
    return code - (1 << bits) if dtype.kind == "int" and code >> (bits - 1) else code


def _stratum(code: int, dtype: DType) -> int:
    if dtype.kind != "float":
        return 0
    layout = dtype.layout
    magnitude = code & layout.magnitude_mask
    mantissa = magnitude & ((1 << layout.mantissa_bits) - 1)
    return 2 * (magnitude >> layout.mantissa_bits) + (mantissa == 0)


def _special_class(code: int, dtype: DType) -> int | None:
    layout = dtype.layout
    value, magnitude = decode(code, dtype), code & layout.magnitude_mask
    if math.isnan(value):
        return 0
    if math.isinf(value):
        return 1
    if magnitude == 0:
        return 3 if code else 2
    return 4 if magnitude >> layout.mantissa_bits == 0 else None


def _add_delta(acc: Accumulator, entry: _Entry) -> None:
    square = entry.delta * entry.delta
    if not math.isfinite(square):
        acc.flips[1] += 1
        return
    _add_exact(acc.abs_slots, entry.delta)
    _add_exact(acc.sq_slots, square)
    acc.max_abs[0] = max(acc.max_abs[0], entry.delta)


def _judge_decay(acc: Accumulator, b: int, x: float, y: float, row: int) -> None:
    shrink, dtype = acc.spec.shrink, acc.spec.dtype
    assert shrink is not None
    in_band = False
    if x != 0 and math.isfinite(x) and math.isfinite(y):
        step = (x - y) if x > 0 else (y - x)
        low, high = 0.5 * shrink * abs(x), 2.0 * shrink * abs(x)
        in_band = low <= step <= high
        acc.decay[1] += in_band
        acc.decay[2] += low <= -step <= high
        target = np.float64(x) * np.float64(1.0 - shrink)
        native = {DType.F32: np.float32, DType.F64: np.float64}[dtype]
        code = int(np.asarray(target, dtype=native).view(f"u{dtype.itemsize}"))
        acc.decay[0] += abs(_ordered(code, dtype) - _ordered(b, dtype)) <= 1
    acc.band[row] += in_band
    acc.outside[row] += not in_band


def _ordered(code: int, dtype: DType) -> int:
    magnitude = code & dtype.layout.magnitude_mask
    return -magnitude if code & dtype.layout.sign_mask else magnitude


def _add_exact(slots: np.ndarray, value: float) -> None:
    code = int(np.float64(value).view(np.uint64))
    field, significand = code >> 52, code & ((1 << 52) - 1)
    if field:
        significand += 1 << 52
    slots[0, field] += significand >> LOW_BITS
    slots[1, field] += significand & ((1 << LOW_BITS) - 1)
