"""Arithmetic on codes in torch: what a pair of entries is, rounding, widening, unsigned 64-bit numbers.

Contract: torch has no complete unsigned types, so codes are int64 tensors; those of 64-bit dtypes hold the
code's bits, and distances are unsigned in the same way. Each function is exact, for every code.
"""

from __future__ import annotations

import math
from functools import cached_property

import torch

from sparsity_audit.stats.strata import CROSS, IN, NAN_PAYLOAD, OUT, SPECIAL, ZERO_SIGN
from sparsity_audit.types import Criterion, DType

__all__ = [
    "LOW32",
    "FloatPairs",
    "IntegerPairs",
    "Pairs",
    "bf16_of_f32",
    "bf16_of_f64",
    "block_codes",
    "codes_of",
    "f64_of_f32",
    "float_of_unsigned",
    "integer_values",
    "shift_right",
    "signed",
    "strata_of",
    "unsigned",
]

LOW32 = 0xFFFFFFFF
_CODE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MIN64 = -(1 << 63)
_SIGNIFICAND = (1 << 52) - 1


def codes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's codes, on the same storage: uint8, int16, int32 or int64."""
    return tensor.detach().view(_CODE[tensor.element_size()])


def block_codes(raw: torch.Tensor, dtype: DType, shape: tuple[int, int]) -> torch.Tensor:
    """Raw bytes (uint8) of a block as its codes (rows, cols), on the same storage."""
    return raw.view(_CODE[dtype.itemsize]).view(shape)


class FloatPairs:
    """What criteria and bins need of float entries whose codes differ; computed when first asked for.

    Args:
        a: Base codes, int64 (64-bit codes as their bits).
        b: Tuned codes.
        dtype: Their dtype.
        x: Base values, float64.
        y: Tuned values.
    """

    def __init__(
        self, a: torch.Tensor, b: torch.Tensor, dtype: DType, *, x: torch.Tensor, y: torch.Tensor
    ) -> None:
        layout = dtype.layout
        self.a, self.b, self.dtype, self.x, self.y = a, b, dtype, x, y
        self.size_a, self.size_b = a & layout.magnitude_mask, b & layout.magnitude_mask
        self.nan_a, self.nan_b = self.size_a >= layout.first_nan, self.size_b >= layout.first_nan
        self.both_nan = self.nan_a & self.nan_b
        self.both_zero = (self.size_a | self.size_b) == 0
        self.differs = ~(self.both_nan | self.both_zero)

    @cached_property
    def special(self) -> torch.Tensor:
        """A NaN or an infinity on one side, or infinities of both signs."""
        one_nan = self.nan_a ^ self.nan_b
        infinity = self.dtype.layout.infinity
        if infinity is None:
            return one_nan
        return one_nan | (((self.size_a == infinity) | (self.size_b == infinity)) & ~self.both_nan)

    @cached_property
    def delta(self) -> torch.Tensor:
        """|Δ|, float64."""
        return (self.y - self.x).abs()

    @cached_property
    def crossing(self) -> torch.Tensor:
        """Both non-zero, signs differ (NaN included)."""
        sign_differs = ((self.a ^ self.b) & signed(self.dtype.layout.sign_mask)) != 0
        return sign_differs & (self.size_a != 0) & (self.size_b != 0)

    @cached_property
    def distance(self) -> torch.Tensor:
        """Ordered codes between the sides; unsigned 64 bits."""
        apart = (self.size_b - self.size_a).abs()
        return torch.where(self.crossing, self.size_a + self.size_b, apart)

    @property
    def strata(self) -> torch.Tensor:
        """Stratum of each base code."""
        return strata_of(self.a, self.dtype)

    @property
    def column(self) -> torch.Tensor:
        """Cell column of each entry."""
        side = torch.where(self.size_b > self.size_a, OUT, IN)
        column = torch.where(self.crossing, CROSS, side) + _buckets(self.distance)
        column = torch.where(self.special, SPECIAL, column)
        column = torch.where(self.both_zero, ZERO_SIGN, column)
        return torch.where(self.both_nan, NAN_PAYLOAD, column)

    def verdict(self, criterion: Criterion) -> torch.Tensor:
        """Bool: changed under the criterion."""
        if criterion.kind == "bitwise":
            return torch.ones_like(self.differs)
        if criterion.kind == "value":
            return self.differs
        if criterion.kind == "ulp":
            beyond = _above(self.distance, int(criterion.parameter))
        elif criterion.kind == "atol":
            beyond = self.delta > criterion.parameter
        else:
            beyond = self.delta > criterion.parameter * torch.maximum(self.x.abs(), self.y.abs())
        return self.special | (self.differs & beyond)


class IntegerPairs:
    """The same for integer and bool entries whose codes differ."""

    def __init__(self, a: torch.Tensor, b: torch.Tensor, dtype: DType) -> None:
        self.a, self.b, self.dtype = a, b, dtype
        if dtype is DType.U64:
            # Order and differences of unsigned values survive flipping the sign bit.
            self.x, self.y = a ^ _MIN64, b ^ _MIN64
        else:
            self.x, self.y = integer_values(a, dtype), integer_values(b, dtype)
        self.grows = self.y > self.x
        self.distance = torch.where(self.grows, self.y - self.x, self.x - self.y)
        self.differs = self.distance != 0

    @cached_property
    def delta(self) -> torch.Tensor:
        """|Δ|, rounded to float64."""
        return float_of_unsigned(self.distance)

    @property
    def strata(self) -> torch.Tensor:
        """Integers have one stratum."""
        return torch.zeros_like(self.a)

    @property
    def column(self) -> torch.Tensor:
        """Cell column of each entry; bools of one value and two codes stand with the NaN payloads."""
        column = torch.where(self.grows, OUT, IN) + _buckets(self.distance)
        return torch.where(self.differs, column, NAN_PAYLOAD)

    def verdict(self, criterion: Criterion) -> torch.Tensor:
        """Bool: changed under the criterion."""
        if criterion.kind == "bitwise":
            return torch.ones_like(self.differs)
        if criterion.kind == "value":
            return self.differs
        if criterion.kind in ("ulp", "atol"):
            return _above(self.distance, math.floor(criterion.parameter))
        if self.dtype is DType.U64:
            largest = torch.maximum(self.x, self.y) ^ _MIN64
        else:
            # The smallest int64 stays itself, which is its magnitude when read as unsigned.
            sizes = [torch.where(v < 0, -v, v) for v in (self.x, self.y)]
            largest = torch.maximum(sizes[0] ^ _MIN64, sizes[1] ^ _MIN64) ^ _MIN64
        return self.differs & (self.delta > criterion.parameter * float_of_unsigned(largest))


Pairs = FloatPairs | IntegerPairs


def strata_of(codes: torch.Tensor, dtype: DType) -> torch.Tensor:
    """Stratum of each float code (see `stats.strata`)."""
    layout = dtype.layout
    size = codes & layout.magnitude_mask
    power_of_two = (size & ((1 << layout.mantissa_bits) - 1)) == 0
    return 2 * (size >> layout.mantissa_bits) + power_of_two


def _buckets(distance: torch.Tensor) -> torch.Tensor:
    """`strata.bucket_of` of unsigned 64-bit distances; 0 counts as 1."""
    high, low = shift_right(distance, 32), distance & LOW32
    part = torch.where(high > 0, high, low).clamp_min(1)
    # The exponent field of an exact float64 is the bit length plus 1022.
    length = (part.to(torch.float64).view(torch.int64) >> 52) - 1022 + 32 * (high > 0)
    return torch.where((high == 0) & (low <= 8), part - 1, length + 4)


def _above(distance: torch.Tensor, limit: int) -> torch.Tensor:
    """Unsigned distance > limit, for any limit ≥ 0."""
    return (distance ^ _MIN64) > min(limit, 2**64 - 1) - 2**63


def integer_values(codes: torch.Tensor, dtype: DType) -> torch.Tensor:
    """int64 values of integer and bool codes; not for U64."""
    if dtype.kind == "bool":
        return (codes != 0).to(torch.int64)
    if dtype.kind == "uint" or dtype is DType.I64:
        return codes
    sign = 1 << (8 * dtype.itemsize - 1)
    return (codes ^ sign) - sign


def float_of_unsigned(values: torch.Tensor) -> torch.Tensor:
    """float64 of unsigned 64-bit values, rounded once: halve to odd what does not fit int64."""
    halved = shift_right(values, 1) | (values & 1)
    return torch.where(values < 0, 2.0 * halved.to(torch.float64), values.to(torch.float64))


def bf16_of_f32(codes: torch.Tensor) -> torch.Tensor:
    """bf16 codes (int16) of int32 codes, rounded to nearest even; a NaN, and only that, may wrap."""
    rounded = (codes + (0x7FFF + ((codes >> 16) & 1))) >> 16
    return torch.where((codes & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded).to(torch.int16)


def bf16_of_f64(codes: torch.Tensor) -> torch.Tensor:
    """bf16 codes (int16) of int64 codes, rounded to nearest even, once.

    The significand is cut where bf16 ends; below its normal range that place moves up.
    """
    size = codes & ~_MIN64
    field = size >> 52
    below = (897 - field).clamp(0, 9)  # 897: exponent field of bf16's smallest normal number
    significand = (size & _SIGNIFICAND) | ((field > 0).to(torch.int64) << 52)
    number = torch.where(below > 0, significand, size - (896 << 52))
    shift = 45 + below
    half = torch.ones_like(shift) << (shift - 1)
    steps = (number + (half - 1) + ((number >> shift) & 1)) >> shift
    result = torch.where(size > 0x7FF0000000000000, 0x7FC0, steps.clamp_max(0x7F80))
    negative = (codes < 0) & (size <= 0x7FF0000000000000)
    return (result - 0x8000 * negative).to(torch.int16)


def f64_of_f32(codes: torch.Tensor) -> torch.Tensor:
    """int64 codes of the same numbers; a NaN keeps its payload and becomes quiet, as on a CPU."""
    wide = codes.view(torch.float32).to(torch.float64).view(torch.int64)
    payload = ((codes & 0x007FFFFF).to(torch.int64) << 29) | 0x7FF8000000000000
    nan = torch.where(codes < 0, payload | _MIN64, payload)
    return torch.where((codes & 0x7FFFFFFF) > 0x7F800000, nan, wide)


def unsigned(codes: torch.Tensor) -> torch.Tensor:
    """int64 of codes read as unsigned (64-bit codes keep their bits); an index for narrow ones."""
    wide = codes.to(torch.int64)
    return wide & ((1 << (8 * codes.element_size())) - 1) if codes.element_size() in (2, 4) else wide


def signed(value: int) -> int:
    """The int64 with the low 64 bits of `value`."""
    return (value + 2**63) % 2**64 - 2**63


def shift_right(values: torch.Tensor, count: int) -> torch.Tensor:
    """Logical shift of int64 bits."""
    return (values >> count) & ((1 << (64 - count)) - 1)
