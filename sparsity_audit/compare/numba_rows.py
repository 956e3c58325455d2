"""Walk a block row by row, chunk by chunk: mask words, row and column counts, and what lies beneath.

Contract: `count_rows` serves every float width at both levels, `joint_rows` 16-bit floats at level `full`.
Both leave sums in `Buffers` that `fold_*` moves into the accumulator once per work unit.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from sparsity_audit.compare.numba_generic import (
    ATOL,
    BITWISE,
    CHUNK,
    OPTIONS,
    REL,
    ULP,
    VALUE,
    account,
    add_slot,
    count_base,
    count_decay,
    decode,
    judge,
    verdicts,
)
from sparsity_audit.compare.numba_simd import (
    add_bits,
    count_ones,
    differing_words,
    equal_word,
    from_float_bits,
    joint_words,
    lowest_bit,
    nonzero_word,
    store_word,
)
from sparsity_audit.stats.strata import IN, OUT

__all__ = ["JOINT_CODES", "JOINT_PLANES", "count_rows", "flush_columns", "fold_joint", "joint_rows"]

JOINT_CODES = 1 << 15
JOINT_PLANES = 18
_RADIUS = 8
_FAR_PLANE = 17
_MAX_ROWS_PER_BYTE = 255


@njit(**OPTIONS)
def _pad(a, start, n, pad):
    for i in range(64):
        pad[i] = 0
    for i in range(n):
        pad[i] = a[start + i]


@njit(**OPTIONS)
def _words_of_chunk(a, b, start, n, layout, buffers):
    """Fill `bit_words` and `value_words`; returns how many bits each holds."""
    bit_words, value_words = buffers.bit_words, buffers.value_words
    mask, nan = layout.magnitude_mask, layout.first_nan
    bitwise = value = np.int64(0)
    full = n >> 6
    for k in range(full):
        differ, as_numbers = differing_words(a, b, start + (k << 6), mask, nan)
        bit_words[k], value_words[k] = differ, as_numbers
        bitwise += count_ones(differ)
        value += count_ones(as_numbers)
    rest = n & 63
    if rest:
        _pad(a, start + (full << 6), rest, buffers.pad_a)
        _pad(b, start + (full << 6), rest, buffers.pad_b)
        differ, as_numbers = differing_words(buffers.pad_a, buffers.pad_b, 0, mask, nan)
        bit_words[full], value_words[full] = differ, as_numbers
        bitwise += count_ones(differ)
        value += count_ones(as_numbers)
    return bitwise, value


@njit(**OPTIONS)
def _negative_zeros(a, start, n, layout, buffers):
    code = layout.negative_zero
    total = np.int64(0)
    full = n >> 6
    for k in range(full):
        total += count_ones(equal_word(a, start + (k << 6), code))
    if n & 63:
        _pad(a, start + (full << 6), n & 63, buffers.pad_a)
        total += count_ones(equal_word(buffers.pad_a, 0, code))
    return total


@njit(**OPTIONS)
def _verdict_words(n, verdict, words):
    for i in range(n, (n + 63) & ~63):
        verdict[i] = 0
    for k in range((n + 63) >> 6):
        words[k] = nonzero_word(verdict, k << 6)


@njit(**OPTIONS)
def _write_bits(words, n, bits, offset):
    full = n >> 6
    for k in range(full):
        store_word(bits, offset + (k << 3), words[k])
    for byte in range(((n & 63) + 7) >> 3):
        bits[offset + (full << 3) + byte] = np.uint8((words[full] >> np.uint64(byte << 3)) & np.uint64(255))


@njit(**OPTIONS)
def _count_axes(words, n, column, row, target, columns):
    total = np.int64(0)
    for k in range((n + 63) >> 6):
        if words[k]:
            total += count_ones(words[k])
            add_bits(columns, column + (k << 6), words[k])
    target.rows[row] += total


@njit(**OPTIONS)
def flush_columns(target, buffers):
    """Add the byte counters of the last rows to the column counts."""
    columns, state = buffers.columns, buffers.state
    first, width = state[1], state[2]
    for i in range(width):
        target.cols[first + i] += columns[i]
    columns[:width] = 0
    state[0] = 0


@njit(**OPTIONS)
def _begin_row(target, buffers):
    if buffers.state[0] == _MAX_ROWS_PER_BYTE:
        flush_columns(target, buffers)
    buffers.state[0] += 1


@njit(**OPTIONS)
def _collect(a, b, start, words, n, list_a, list_b):
    count = np.int64(0)
    for k in range((n + 63) >> 6):
        word, first = words[k], start + (k << 6)
        while word:
            i = first + np.int64(lowest_bit(word))
            list_a[count], list_b[count] = a[i], b[i]
            count += 1
            word &= word - np.uint64(1)
    return count


@njit(**OPTIONS)
def _judge_mask(a, b, values_a, values_b, start, n, layout, rules, buffers):
    """Verdict words of a mask criterion that is neither `bitwise` nor `value`; returns its count."""
    x, y, delta = buffers.x, buffers.y, buffers.delta
    decode(values_a, start, n, layout.mantissa_bits, x)
    decode(values_b, start, n, layout.mantissa_bits, y)
    judge(a, b, start, n, layout, buffers, buffers.ignored)
    for i in range(n):
        delta[i] = abs(y[i] - x[i])
    mask = rules.mask
    verdicts(rules.kinds[mask], rules.parameters[mask], rules.limits[mask], n, buffers)
    _verdict_words(n, buffers.verdict, buffers.bit_words)


@njit(**OPTIONS)
def count_rows(
    a,
    b,
    values_a,
    values_b,
    rows,
    cols,
    first_row,
    bits,
    want_bits,
    full,
    has_shrink,
    layout,
    rules,
    target,
    buffers,
):
    """Count a block of rows × cols codes; `bits` is the flat packed mask, or anything."""
    mask_rule = rules.kinds[rules.mask]
    general = False
    for k in range(len(rules.kinds)):
        general = general or rules.kinds[k] > VALUE
    row_bytes = (cols + 7) >> 3
    for row in range(rows):
        if full:
            _begin_row(target, buffers)
        for column in range(0, cols, CHUNK):
            start, n = row * cols + column, min(CHUNK, cols - column)
            bitwise, value = _words_of_chunk(a, b, start, n, layout, buffers)
            target.changed[0] += bitwise
            target.changed[1] += value
            words = buffers.bit_words if mask_rule == BITWISE else buffers.value_words
            if full:
                buffers.state[3] += _negative_zeros(a, start, n, layout, buffers)
                count_base(a, values_a, start, n, layout, target, buffers)
            if bitwise and (full or (general and value)):
                if mask_rule <= VALUE and 2 * bitwise <= n:
                    listed = _collect(a, b, start, buffers.bit_words, n, buffers.list_a, buffers.list_b)
                    account(
                        buffers.codes_a, buffers.codes_b, buffers.values_a, buffers.values_b, 0, listed,
                        layout, rules, target, buffers, full,
                    )  # fmt: skip
                    if has_shrink:
                        count_decay(
                            buffers.codes_b, 0, listed, first_row + row, layout, rules, target, buffers
                        )
                else:
                    account(a, b, values_a, values_b, start, n, layout, rules, target, buffers, full)
                    if has_shrink:
                        count_decay(b, start, n, first_row + row, layout, rules, target, buffers)
                    if mask_rule > VALUE:
                        mask = rules.mask
                        verdicts(mask_rule, rules.parameters[mask], rules.limits[mask], n, buffers)
                        _verdict_words(n, buffers.verdict, buffers.value_words)
            if want_bits:
                _write_bits(words, n, bits, row * row_bytes + (column >> 3))
            if full and bitwise:
                _count_axes(words, n, column, first_row + row, target, buffers.columns)


@njit(**OPTIONS)
def joint_rows(
    a, b, values_a, values_b, rows, cols, first_row, bits, want_bits, layout, rules, target, buffers
):
    """Count a block of 16-bit float codes through the joint table."""
    mask_rule = rules.kinds[rules.mask]
    row_bytes = (cols + 7) >> 3
    joint, places = buffers.joint, buffers.places
    listed = np.int64(0)
    for row in range(rows):
        _begin_row(target, buffers)
        for column in range(0, cols, CHUNK):
            start, n = row * cols + column, min(CHUNK, cols - column)
            bitwise, value, listed = _joint_chunk(a, b, start, n, listed, layout, buffers)
            if listed > CHUNK:
                listed -= CHUNK
                _account_listed(listed, CHUNK, layout, rules, target, buffers)
            for i in range(n):
                joint[places[i]] += np.uint32(1)
            target.changed[0] += bitwise
            target.changed[1] += value
            words = buffers.bit_words if mask_rule != VALUE else buffers.value_words
            if mask_rule > VALUE and bitwise:
                _judge_mask(a, b, values_a, values_b, start, n, layout, rules, buffers)
            if want_bits:
                _write_bits(words, n, bits, row * row_bytes + (column >> 3))
            if bitwise:
                _count_axes(words, n, column, first_row + row, target, buffers.columns)
    if listed:
        _account_listed(0, listed, layout, rules, target, buffers)


@njit(**OPTIONS)
def _account_listed(start, n, layout, rules, target, buffers):
    account(
        buffers.codes_a, buffers.codes_b, buffers.values_a, buffers.values_b, start, n,
        layout, rules, target, buffers, True,
    )  # fmt: skip


@njit(**OPTIONS)
def _joint_chunk(a, b, start, n, listed, layout, buffers):
    bit_words, value_words, places = buffers.bit_words, buffers.value_words, buffers.places
    infinity, negative_zero = layout.infinity, layout.negative_zero
    bitwise = value = zeros = np.int64(0)
    for k in range((n + 63) >> 6):
        first = start + (k << 6)
        if n - (k << 6) < 64:
            _pad(a, first, n & 63, buffers.pad_a)
            _pad(b, first, n & 63, buffers.pad_b)
            differ, as_numbers, far = joint_words(buffers.pad_a, buffers.pad_b, 0, infinity, places, k << 6)
            zeros += count_ones(equal_word(buffers.pad_a, 0, negative_zero))
        else:
            differ, as_numbers, far = joint_words(a, b, first, infinity, places, k << 6)
            zeros += count_ones(equal_word(a, first, negative_zero))
        bit_words[k], value_words[k] = differ, as_numbers
        bitwise += count_ones(differ)
        value += count_ones(as_numbers)
        while far:
            i = first + np.int64(lowest_bit(far))
            buffers.list_a[listed], buffers.list_b[listed] = a[i], b[i]
            listed += 1
            far &= far - np.uint64(1)
    buffers.state[3] += zeros
    return bitwise, value, listed


@njit(**OPTIONS)
def fold_joint(layout, rules, target, buffers):
    """Move the joint table into the accumulator: everything its pairs of codes say, times their count."""
    joint = buffers.joint
    for block in range(0, JOINT_PLANES * JOINT_CODES, 64):
        some = np.uint32(0)
        for place in range(block, block + 64):
            some |= joint[place]
        if some == 0:
            continue
        for place in range(block, block + 64):
            count = np.int64(joint[place])
            if count:
                joint[place] = 0
                _fold_pair(place, count, layout, rules, target, buffers)


@njit(**OPTIONS)
def _fold_pair(place, count, layout, rules, target, buffers):
    size_a, plane = place & (JOINT_CODES - 1), place >> 15
    mantissa_bits = layout.mantissa_bits
    stratum = 2 * (size_a >> mantissa_bits) + np.int64((size_a & ((1 << mantissa_bits) - 1)) == 0)
    buffers.strata[0, stratum] += np.uint32(count)
    x = _value_of(size_a, mantissa_bits)
    if size_a < layout.infinity:
        add_slot(target.base_sq_slots, x * x, count)
    step = plane - _RADIUS
    if step == 0 or plane == _FAR_PLANE:
        return
    size_b = size_a + step
    y = _value_of(size_b, mantissa_bits)
    delta, larger, apart = abs(y - x), max(x, y), abs(step)
    add_slot(target.abs_slots, delta, count)
    add_slot(target.sq_slots, delta * delta, count)
    target.max_abs[0] = max(target.max_abs[0], delta)
    target.cells[stratum, (OUT if step > 0 else IN) + apart - 1] += count
    smallest_normal = 1 << mantissa_bits
    target.specials[1, 4] += count * (np.int64(size_b < smallest_normal) - np.int64(size_a < smallest_normal))
    for k in range(2, len(rules.kinds)):
        kind, parameter = rules.kinds[k], rules.parameters[k]
        changed = True
        if kind == ATOL:
            changed = delta > parameter
        elif kind == REL:
            changed = delta > parameter * larger
        elif kind == ULP:
            changed = np.uint64(apart) > rules.limits[k]
        if changed and kind > VALUE:
            target.changed[k] += count


@njit(**OPTIONS)
def _value_of(size, mantissa_bits):
    field, mantissa = size >> mantissa_bits, size & ((1 << mantissa_bits) - 1)
    bias = 127 if mantissa_bits == 7 else 15
    if field:
        mantissa += 1 << mantissa_bits
    scale = np.int64(max(field, 1) - bias - mantissa_bits + 1023)
    return np.float64(mantissa) * from_float_bits(scale << 52)
