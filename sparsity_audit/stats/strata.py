"""How entries are binned: strata of |w_base| and buckets of the ULP distance.

Contract: pure index arithmetic, shared by every kernel and every reader of a tally.

*Stratum* of a float entry: 2·E + z, E the exponent field of the base code, z = 1 when its mantissa is
zero (powers of two, zero, infinity). The bit z matters: below a power of two the grid is half as wide.
Integers and bools have the single stratum 0.

*Cell column* of an entry whose codes differ, with ordered-code distance d ≥ 1:

| columns | meaning |
|---|---|
| OUT + bucket(d) | same sign, or one side zero; \\|tuned\\| > \\|base\\| (integers: Δ > 0) |
| IN + bucket(d) | same sign, or one side zero; \\|tuned\\| < \\|base\\| (integers: Δ < 0) |
| CROSS + bucket(d) | both non-zero, signs differ; d counts every code between |
| ZERO_SIGN | +0 against −0 (d = 0; changed only under `bitwise`) |
| NAN_PAYLOAD | both NaN, codes differ (changed only under `bitwise`) |
| SPECIAL | a NaN or an infinity on one side, or infinities of both signs: changed under every criterion |

bucket(d) = d − 1 for d ≤ 8, else 5 + ⌊log2 d⌋: exact to 8, then 9–15, 16–31, 32–63, …
"""

from __future__ import annotations

from typing import Final

__all__ = [
    "CROSS",
    "IN",
    "NAN_PAYLOAD",
    "NUM_BUCKETS",
    "NUM_COLUMNS",
    "OUT",
    "SPECIAL",
    "ZERO_SIGN",
    "bucket_bounds",
    "bucket_of",
]

NUM_BUCKETS: Final = 69
OUT: Final = 0
IN: Final = NUM_BUCKETS
CROSS: Final = 2 * NUM_BUCKETS
ZERO_SIGN: Final = 3 * NUM_BUCKETS
NAN_PAYLOAD: Final = ZERO_SIGN + 1
SPECIAL: Final = ZERO_SIGN + 2
NUM_COLUMNS: Final = ZERO_SIGN + 3


def bucket_of(distance: int) -> int:
    """Bucket of an ordered-code distance ≥ 1."""
    assert distance >= 1
    return distance - 1 if distance <= 8 else distance.bit_length() + 4


def bucket_bounds(bucket: int) -> tuple[int, int]:
    """Smallest and largest distance of a bucket."""
    assert 0 <= bucket < NUM_BUCKETS
    if bucket < 8:
        return bucket + 1, bucket + 1
    low = 1 << (bucket - 5)
    return max(low, 9), 2 * low - 1
