"""The number line of a float dtype, stratum by stratum: exponents, gaps between codes, magnitudes.

Contract: everything follows from `FloatLayout`; there is no table of any dtype. A *magnitude code* is a
code with the sign cleared; magnitudes of float64 and narrower are exact in float64. Exponent e of a
stratum means 2^e ≤ |w| < 2^(e+1). Strata are those of `stats.strata`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sparsity_audit.types import DType, FloatLayout

__all__ = ["Stratum", "StratumKind", "describe", "last_finite", "magnitude", "magnitudes", "ulp_of_exponent"]

StratumKind = Literal["zero", "subnormal", "normal", "normal_or_nan", "infinity", "nan", "not_float"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stratum:
    """What a stratum index means for a dtype.

    Args:
        kind: Class of the numbers in it. `normal_or_nan` is the top exponent of a format without
            infinity (F8_E4M3), where the highest codes are NaN; `not_float` is the only stratum of
            integers, bools and opaque storage.
        exponent: e with 2^e ≤ |w| < 2^(e+1), for normal numbers; else None.
        is_power_of_two: The mantissa is zero, so that the gap below is half the gap above.
        first: Smallest finite magnitude code in it (0 where there is none).
        last: Largest finite magnitude code in it; below `first` where there is none.
        gap_out: Distance to the next larger magnitude; 0 where there are no numbers.
        gap_in: Distance to the next smaller magnitude (for zero, the same as outwards).
    """

    kind: StratumKind
    exponent: int | None
    is_power_of_two: bool
    first: int
    last: int
    gap_out: float
    gap_in: float


def describe(stratum: int, dtype: DType) -> Stratum:
    """What `stratum` means for `dtype`."""
    if dtype.kind != "float":
        return _without_numbers("not_float")
    layout = dtype.layout
    field, mantissa_is_zero = divmod(stratum, 2)
    assert 0 <= field < layout.num_exponents, (stratum, dtype)
    if field == layout.num_exponents - 1 and layout.infinity is not None:
        return _without_numbers("infinity" if mantissa_is_zero else "nan")
    start = field << layout.mantissa_bits
    first, last = (start, start) if mantissa_is_zero else (start + 1, start + (1 << layout.mantissa_bits) - 1)
    gap = ulp_of_exponent(field - layout.bias, layout)
    kind: StratumKind = "normal"
    if field == 0:
        kind = "zero" if mantissa_is_zero else "subnormal"
    elif last >= layout.first_nan:
        kind, last = "normal_or_nan", layout.first_nan - 1
    return Stratum(
        kind=kind,
        exponent=field - layout.bias if field else None,
        is_power_of_two=bool(mantissa_is_zero) and field > 0,
        first=first,
        last=last,
        gap_out=gap,
        # Below the smallest normal number lie the subnormals, on the same grid.
        gap_in=gap / 2 if mantissa_is_zero and field > 1 else gap,
    )


def ulp_of_exponent(exponent: int, layout: FloatLayout) -> float:
    """Distance between neighbouring numbers with 2^exponent ≤ |w| < 2^(exponent+1); subnormal below."""
    return math.ldexp(1.0, max(exponent, 1 - layout.bias) - layout.mantissa_bits)


def magnitude(code: int, layout: FloatLayout) -> float:
    """The number a finite magnitude code stands for."""
    field, mantissa = code >> layout.mantissa_bits, code & ((1 << layout.mantissa_bits) - 1)
    if field:
        mantissa += 1 << layout.mantissa_bits
    return math.ldexp(mantissa, max(field, 1) - layout.bias - layout.mantissa_bits)


def magnitudes(codes: np.ndarray, layout: FloatLayout) -> np.ndarray:
    """The numbers that finite magnitude codes (int64) stand for, float64."""
    field, mantissa = codes >> layout.mantissa_bits, codes & ((1 << layout.mantissa_bits) - 1)
    significand = mantissa + np.where(field > 0, 1 << layout.mantissa_bits, 0)
    return np.ldexp(significand.astype(np.float64), np.maximum(field, 1) - layout.bias - layout.mantissa_bits)


def last_finite(layout: FloatLayout) -> int:
    """The largest finite magnitude code."""
    return (layout.first_nan if layout.infinity is None else layout.infinity) - 1


def _without_numbers(kind: StratumKind) -> Stratum:
    return Stratum(
        kind=kind,
        exponent=None,
        is_power_of_two=False,
        first=0,
        last=-1,
        gap_out=0.0,
        gap_in=0.0,
    )
