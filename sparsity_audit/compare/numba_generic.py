"""Exact accounting of chunks of float pairs in vector loops; no table over pairs of codes.

Contract: every loop runs over at most CHUNK entries without a branch, so that LLVM vectorises it; entries
with equal codes are neutral, so a caller may pass whole chunks or only the entries that differ. Sums go
into `exact_sum` slots without rounding (see `add_exact`).
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
from numba import njit, types
from numba.extending import overload

from sparsity_audit.compare.numba_simd import bit_length, float_bits, from_float_bits
from sparsity_audit.stats.exact_sum import LOW_BITS
from sparsity_audit.stats.strata import CROSS, IN, NAN_PAYLOAD, OUT, SPECIAL, ZERO_SIGN

__all__ = [
    "ATOL",
    "BITWISE",
    "CHUNK",
    "COLUMN",
    "COLUMN_STRIDE",
    "FIRST_COLUMN",
    "NEGATIVE_ZEROS",
    "OPTIONS",
    "REL",
    "ROW",
    "ROWS_HELD",
    "ULP",
    "VALUE",
    "WIDTH",
    "Buffers",
    "Layout",
    "Rules",
    "Target",
    "account",
    "add_exact",
    "add_slot",
    "count_base",
    "count_decay",
    "decode",
    "fold_cells",
    "fold_strata",
    "judge",
    "verdicts",
]

# Without `_nrt` numba counts references to arrays inside the loops, which costs more than the work itself;
# nothing here allocates. Callees are compiled in: after editing one, clear the callers' cache as well.
OPTIONS: Final[Any] = {"nogil": True, "cache": True, "error_model": "numpy", "_nrt": False}
CHUNK: Final = 2048
"""Entries of one chunk; `add_exact` sums that many 51-bit integers in 64 bits."""
COLUMN_STRIDE: Final = 256
"""Cells of one stratum in the working table; the last one collects equal codes."""
BITWISE, VALUE, ATOL, REL, ULP = range(5)
ROWS_HELD, FIRST_COLUMN, WIDTH, NEGATIVE_ZEROS, ROW, COLUMN = range(6)
_SAME, _ORDINARY, _SPECIAL = 0, 1, 2
_NO_COLUMN: Final = COLUMN_STRIDE - 1
_LARGEST_VECTOR_FIELD: Final = 2044
_LOW_MASK: Final = (1 << LOW_BITS) - 1
_INFINITY_BITS: Final = 0x7FF0000000000000


class Layout(NamedTuple):
    """A `FloatLayout` as scalars of the code's type."""

    magnitude_mask: Any
    first_nan: Any
    infinity: Any
    negative_zero: Any
    mantissa_bits: int


class Rules(NamedTuple):
    """The criteria: kind (as numbered here), float parameter, distance limit; index of the mask's."""

    kinds: np.ndarray
    parameters: np.ndarray
    limits: np.ndarray
    mask: int
    shrink: float


class Target(NamedTuple):
    """The arrays of an `Accumulator`."""

    changed: np.ndarray
    strata: np.ndarray
    cells: np.ndarray
    specials: np.ndarray
    flips: np.ndarray
    abs_slots: np.ndarray
    sq_slots: np.ndarray
    base_sq_slots: np.ndarray
    max_abs: np.ndarray
    decay: np.ndarray
    rows: np.ndarray
    cols: np.ndarray
    band: np.ndarray
    outside: np.ndarray


class Buffers(NamedTuple):
    """Working memory of one worker, reused from block to block.

    Args:
        x: float64[CHUNK], base values.
        y: float64[CHUNK], tuned values.
        delta: float64[CHUNK], |Δ|.
        term: float64[CHUNK], terms of a sum.
        squares: float64[CHUNK], their squares.
        rounded: float32 or float64[CHUNK], decayed base values in the native dtype.
        distance: codes[CHUNK], ordered-code distances.
        kind: uint8[CHUNK + 64], whether an entry is the same, ordinary or special.
        verdict: uint8[CHUNK + 64], what a criterion says.
        places: uint32[CHUNK + 64], table places.
        bit_words: uint64[CHUNK / 64 + 1], mask words `bitwise`.
        value_words: the same for `value`.
        pad_a: codes[64], the end of a row, zero-padded.
        pad_b: codes[64].
        list_a: codes[16 · CHUNK], collected entries.
        list_b: codes[16 · CHUNK].
        codes_a: `list_a`, read-only, so that compiled functions see one array type.
        codes_b: the same for `list_b`.
        values_a: `codes_a` as floats where the dtype is wider than 16 bits, else the codes.
        values_b: the same for `codes_b`.
        cells: uint32[strata · COLUMN_STRIDE, n], n a power of two; the columns add up.
        strata: uint32[strata, 8], base strata; the columns add up.
        joint: uint32[18 · 2¹⁵], the joint table of 16-bit codes.
        columns: uint8[…], changed entries per column of the last `state[0]` rows.
        ignored: int64[2, 5], where special classes go that nobody asked for.
        state: int64[6]: rows held in `columns`, their first column, their width, base −0 entries, and the
            row and column where `joint_rows` goes on.
    """

    x: np.ndarray
    y: np.ndarray
    delta: np.ndarray
    term: np.ndarray
    squares: np.ndarray
    rounded: np.ndarray
    distance: np.ndarray
    kind: np.ndarray
    verdict: np.ndarray
    places: np.ndarray
    bit_words: np.ndarray
    value_words: np.ndarray
    pad_a: np.ndarray
    pad_b: np.ndarray
    list_a: np.ndarray
    list_b: np.ndarray
    codes_a: np.ndarray
    codes_b: np.ndarray
    values_a: np.ndarray
    values_b: np.ndarray
    cells: np.ndarray
    strata: np.ndarray
    joint: np.ndarray
    columns: np.ndarray
    ignored: np.ndarray
    state: np.ndarray


def decode(values: np.ndarray, mantissa_bits: int, out: np.ndarray) -> None:
    """Write the float64 values of `values`: floats, or 16-bit float codes."""
    raise NotImplementedError


@overload(decode, jit_options=OPTIONS)
def _decode(values: Any, mantissa_bits: Any, out: Any) -> Any:
    del mantissa_bits, out
    if isinstance(values.dtype, types.Float):

        def from_floats(values: Any, mantissa_bits: Any, out: Any) -> None:  # noqa: ARG001 - one signature
            for i in range(len(values)):
                out[i] = values[i]

        return from_floats

    def from_codes(values: Any, mantissa_bits: Any, out: Any) -> None:
        # The code moved to the top of a float64, with the exponent bias put right by an exact product.
        shift = np.int64(52 - mantissa_bits)
        scale = 2.0**896 if mantissa_bits == 7 else 2.0**1008
        special = (np.int64(0x7F80) if mantissa_bits == 7 else np.int64(0x7C00)) << shift
        bits = out.view(np.int64)
        for i in range(len(values)):
            code = np.int64(values[i])
            size = (code & 0x7FFF) << shift
            size = size | (_INFINITY_BITS if size >= special else 0)
            bits[i] = size | ((code >> 15) << 63)
        for i in range(len(values)):
            out[i] = out[i] * scale

    return from_codes


@njit(**OPTIONS)
def add_slot(slots, value, count):
    """Add one non-negative finite float64, `count` times."""
    bits = float_bits(value)
    field = bits >> 52
    significand = bits & ((1 << 52) - 1)
    if field > 0:
        significand |= 1 << 52
    slots[0, np.uint64(field)] += (significand >> LOW_BITS) * count
    slots[1, np.uint64(field)] += (significand & _LOW_MASK) * count


@njit(**OPTIONS)
def _largest_bits(values, n):
    largest = np.int64(0)
    for i in range(n):
        largest = max(largest, float_bits(values[i]))
    return largest


@njit(**OPTIONS)
def add_exact(values, n, slots):
    """Add non-negative finite `values[:n]` to exact slots; overwrites them.

    Adding σ = 1.5·2^k ≥ 2·|value| rounds a value to a multiple of ulp(σ); that multiple is the integer by
    which the sum's code exceeds σ's, and integers add in any order. The remainder is exact in float64 and
    goes the same way 52 binary places further down, until nothing remains.
    Source: the error-free extraction of Rump, Ogita and Oishi, SIAM J. Sci. Comput. 31 (2008), 189-224.
    """
    largest = _largest_bits(values, n)
    field = (largest >> 52) + 2
    if field - 2 > _LARGEST_VECTOR_FIELD:
        for i in range(n):
            add_slot(slots, values[i], 1)
        return
    remains = largest
    while remains != 0:
        lower = max(field - 52, 1)
        origin = (np.int64(field) << 52) | (1 << 51)
        origin_lower = (np.int64(lower) << 52) | (1 << 51)
        sigma, sigma_lower = from_float_bits(origin), from_float_bits(origin_lower)
        total = np.int64(0)
        total_lower = np.int64(0)
        remains = np.int64(0)
        for i in range(n):
            value = values[i]
            high = value + sigma
            total += float_bits(high) - origin
            value = value - (high - sigma)
            low = value + sigma_lower
            total_lower += float_bits(low) - origin_lower
            value = value - (low - sigma_lower)
            values[i] = value
            remains |= float_bits(value) << 1
        slots[0, np.uint64(field)] += total >> LOW_BITS
        slots[1, np.uint64(field)] += total & _LOW_MASK
        slots[0, np.uint64(lower)] += total_lower >> LOW_BITS
        slots[1, np.uint64(lower)] += total_lower & _LOW_MASK
        field = max(lower - 52, 1)


@njit(**OPTIONS)
def judge(a, b, layout, buffers, specials):
    """Classify pairs: kind, distance, table place. Adds the tuned-minus-base special classes.

    Returns the sign flips.
    """
    kind, distance, places = buffers.kind, buffers.distance, buffers.places
    # Arithmetic on narrow integers widens them in numba; cast back, it stays narrow and vectors full.
    code = a.dtype.type
    magnitude_mask, first_nan, infinity = layout.magnitude_mask, layout.first_nan, layout.infinity
    mantissa_bits = code(layout.mantissa_bits)
    smallest_normal = code(code(1) << mantissa_bits)
    mantissa_mask = code(smallest_normal - code(1))
    normal_span = code(infinity - smallest_normal)
    flips = unusual = code(0)
    for i in range(len(a)):
        size_a, size_b = code(a[i] & magnitude_mask), code(b[i] & magnitude_mask)
        larger, smaller = max(size_a, size_b), min(size_a, size_b)
        differs = a[i] != b[i]
        as_numbers = differs & (larger != 0) & (smaller < first_nan)
        special = as_numbers & (larger >= infinity)
        crossing = (code(a[i] ^ b[i]) > magnitude_mask) & (smaller != 0)
        apart = code(larger + smaller) if crossing else code(larger - smaller)
        distance[i] = apart
        kind[i] = np.uint8(as_numbers) + np.uint8(special)
        bucket = code(apart - code(1)) if apart <= code(8) else code(bit_length(apart) + code(4))
        side = code(CROSS) if crossing else (code(OUT) if size_b > size_a else code(IN))
        column = code(side + bucket)
        column = code(SPECIAL) if special else column
        column = code(ZERO_SIGN) if larger == 0 else column
        column = code(NAN_PAYLOAD) if smaller >= first_nan else column
        column = column if differs else code(_NO_COLUMN)
        stratum = code(code(size_a >> mantissa_bits) << code(1)) | code((size_a & mantissa_mask) == 0)
        places[i] = np.uint32(np.uint32(stratum) * np.uint32(COLUMN_STRIDE)) + np.uint32(column)
        flips = code(flips + code(crossing & (larger < first_nan)))
        normal = (code(size_a - smallest_normal) < normal_span) & (
            code(size_b - smallest_normal) < normal_span
        )
        unusual = code(unusual | code(not normal))
    if unusual:
        _compare_specials(a, b, layout, specials)
    return np.int64(flips)


@njit(**OPTIONS)
def _compare_specials(a, b, layout, specials):
    magnitude_mask, first_nan, infinity = layout.magnitude_mask, layout.first_nan, layout.infinity
    smallest_normal = np.uint64(1) << np.uint64(layout.mantissa_bits)
    negative_zero = layout.negative_zero
    nans = infinities = zeros = negative_zeros = subnormals = np.int64(0)
    for i in range(len(a)):
        size_a, size_b = a[i] & magnitude_mask, b[i] & magnitude_mask
        nans += np.int64(size_b >= first_nan) - np.int64(size_a >= first_nan)
        infinities += np.int64(size_b == infinity) - np.int64(size_a == infinity)
        zeros += np.int64(size_b == 0) - np.int64(size_a == 0)
        negative_zeros += np.int64(b[i] == negative_zero) - np.int64(a[i] == negative_zero)
        subnormals += np.int64(size_b < smallest_normal) - np.int64(size_a < smallest_normal)
    specials[1, 0] += nans
    specials[1, 1] += infinities
    specials[1, 2] += zeros - negative_zeros
    specials[1, 3] += negative_zeros
    specials[1, 4] += subnormals - zeros


@njit(**OPTIONS)
def verdicts(rule, parameter, limit, n, buffers):
    """Write what an `atol`, `rel` or `ulp` criterion says of judged entries; returns how many changed."""
    kind, verdict, delta = buffers.kind, buffers.verdict, buffers.delta
    x, y, distance = buffers.x, buffers.y, buffers.distance
    changed = np.int64(0)
    if rule == ATOL:
        for i in range(n):
            verdict[i] = (kind[i] == _SPECIAL) | ((kind[i] == _ORDINARY) & (delta[i] > parameter))
    elif rule == REL:
        for i in range(n):
            size_x, size_y = abs(x[i]), abs(y[i])
            bound = parameter * (size_x if size_x > size_y else size_y)
            verdict[i] = (kind[i] == _SPECIAL) | ((kind[i] == _ORDINARY) & (delta[i] > bound))
    else:
        for i in range(n):
            verdict[i] = (kind[i] == _SPECIAL) | ((kind[i] == _ORDINARY) & (distance[i] > limit))
    for i in range(n):
        changed += verdict[i]
    return changed


@njit(**OPTIONS)
def account(a, b, values_a, values_b, layout, rules, target, buffers, full):
    """Add pairs to everything but the counts under `bitwise` and `value` and the base's own statistics.

    Leaves `judge`'s results, x, y and delta of the chunk in `buffers`.
    """
    n = len(a)
    decode(values_a, layout.mantissa_bits, buffers.x)
    decode(values_b, layout.mantissa_bits, buffers.y)
    flips = judge(a, b, layout, buffers, target.specials if full else buffers.ignored)
    x, y, delta, term, kind = buffers.x, buffers.y, buffers.delta, buffers.term, buffers.kind
    for i in range(n):
        delta[i] = abs(y[i] - x[i])
    for k in range(2, len(rules.kinds)):
        if rules.kinds[k] > VALUE:
            target.changed[k] += verdicts(rules.kinds[k], rules.parameters[k], rules.limits[k], n, buffers)
    if not full:
        return
    target.flips[0] += flips
    left_out = np.int64(0)
    for i in range(n):
        usable = (kind[i] == _ORDINARY) & (delta[i] * delta[i] < np.inf)
        left_out += np.int64((kind[i] != _SAME) & (not usable))
        term[i] = delta[i] if usable else 0.0
    target.flips[1] += left_out
    largest = np.int64(0)
    for i in range(n):
        largest = max(largest, float_bits(term[i]))
    if largest > float_bits(target.max_abs[0]):
        for i in range(n):
            target.max_abs[0] = max(target.max_abs[0], term[i])
    squares = buffers.squares
    for i in range(n):
        squares[i] = term[i] * term[i]
    add_exact(term, n, target.abs_slots)
    add_exact(squares, n, target.sq_slots)
    _add_places(buffers.places, n, buffers.cells)


@njit(**OPTIONS)
def _add_places(places, n, cells):
    # Neighbouring entries often share a cell; counters that take turns do not wait for each other.
    ways = np.uint64(cells.shape[1] - 1)
    for i in range(n):
        cells[places[i], np.uint64(i) & ways] += np.uint32(1)


@njit(**OPTIONS)
def count_base(a, values, layout, target, buffers):
    """Add the base's strata and squares; leaves its values in `buffers.x`."""
    n = len(a)
    decode(values, layout.mantissa_bits, buffers.x)
    x, term, places = buffers.x, buffers.term, buffers.places
    for i in range(n):
        square = x[i] * x[i]
        term[i] = square if square < np.inf else 0.0
    add_exact(term, n, target.base_sq_slots)
    code = a.dtype.type
    magnitude_mask, mantissa_bits = layout.magnitude_mask, code(layout.mantissa_bits)
    mantissa_mask = code(code(code(1) << mantissa_bits) - code(1))
    for i in range(n):
        size = code(a[i] & magnitude_mask)
        places[i] = np.uint32(
            code(code(size >> mantissa_bits) << code(1)) | code((size & mantissa_mask) == 0)
        )
    strata = buffers.strata
    for i in range(n):
        strata[places[i], np.uint64(i) & np.uint64(7)] += np.uint32(1)


@njit(**OPTIONS)
def count_decay(b, row, layout, rules, target, buffers):
    """Judge accounted entries against a shrink of the base by 1 − c (see `DecayCounts`)."""
    x, y, kind, rounded = buffers.x, buffers.y, buffers.kind, buffers.rounded
    shrink, n = rules.shrink, len(b)
    magnitude_mask = np.uint64(layout.magnitude_mask)
    for i in range(n):
        rounded[i] = x[i] * (1.0 - shrink)
    near = band = mirror = differing = np.int64(0)
    for i in range(n):
        differs = kind[i] != _SAME
        judged = differs & (x[i] != 0) & (abs(x[i]) < np.inf) & (abs(y[i]) < np.inf)
        step = x[i] - y[i] if x[i] > 0 else y[i] - x[i]
        low, high = 0.5 * shrink * abs(x[i]), 2.0 * shrink * abs(x[i])
        band += np.int64(judged & (low <= step) & (step <= high))
        mirror += np.int64(judged & (low <= -step) & (-step <= high))
        target_code, code = np.uint64(float_bits(rounded[i])), np.uint64(b[i])
        size_t, size_b = target_code & magnitude_mask, code & magnitude_mask
        larger, smaller = max(size_t, size_b), min(size_t, size_b)
        one_sign = ((target_code ^ code) & (magnitude_mask + np.uint64(1))) == 0
        apart = larger - smaller if one_sign else larger + smaller
        near += np.int64(judged & (apart <= np.uint64(1)))
        differing += np.int64(differs)
    target.decay[0] += near
    target.decay[1] += band
    target.decay[2] += mirror
    target.band[row] += band
    target.outside[row] += differing - band


@njit(**OPTIONS)
def fold_cells(buffers, target):
    """Move the working table of cells into the accumulator."""
    cells = buffers.cells
    strata, columns = target.cells.shape
    for stratum in range(strata):
        first = stratum * COLUMN_STRIDE
        for column in range(columns):
            for way in range(cells.shape[1]):
                target.cells[stratum, column] += cells[first + column, way]
        for column in range(COLUMN_STRIDE):
            for way in range(cells.shape[1]):
                cells[first + column, way] = 0


@njit(**OPTIONS)
def fold_strata(buffers, target):
    """Move the base strata into the accumulator, and derive the special classes from them."""
    num_strata = len(target.strata)
    for stratum in range(num_strata):
        count = np.int64(0)
        for way in range(8):
            count += buffers.strata[stratum, way]
            buffers.strata[stratum, way] = 0
        target.strata[stratum] += count
        slot = -1
        if stratum >= num_strata - 2:
            slot = stratum - (num_strata - 2)
        elif stratum < 2:
            slot = 2 if stratum == 1 else 4
        if slot >= 0:
            target.specials[0, slot] += count
            target.specials[1, slot] += count
    negative_zeros = buffers.state[NEGATIVE_ZEROS]
    buffers.state[NEGATIVE_ZEROS] = 0
    for side in range(2):
        target.specials[side, 2] -= negative_zeros
        target.specials[side, 3] += negative_zeros
