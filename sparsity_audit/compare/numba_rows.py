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
    COLUMN,
    FIRST_COLUMN,
    NEGATIVE_ZEROS,
    OPTIONS,
    REL,
    ROW,
    ROWS_HELD,
    ULP,
    VALUE,
    WIDTH,
    account,
    add_slot,
    count_base,
    count_decay,
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
    prefetch,
    store_word,
)
from sparsity_audit.stats.strata import IN, OUT

__all__ = [
    "JOINT_CODES",
    "JOINT_PLANES",
    "account_listed",
    "count_rows",
    "flush_columns",
    "fold_joint",
    "joint_rows",
    "word_rows",
]

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
        prefetch(a, start + (k << 6) + CHUNK)
        prefetch(b, start + (k << 6) + CHUNK)
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
def _write_bytes(word, n, bits, offset):
    for byte in range((n + 7) >> 3):
        bits[offset + byte] = np.uint8((word >> np.uint64(byte << 3)) & np.uint64(255))


@njit(**OPTIONS)
def _write_bits(words, n, bits, offset):
    full = n >> 6
    for k in range(full):
        store_word(bits, offset + (k << 3), words[k])
    if n & 63:
        _write_bytes(words[full], n & 63, bits, offset + (full << 3))


@njit(**OPTIONS)
def _count_axes(words, n, column, row, target, columns):
    total = np.int64(0)
    for k in range((n + 63) >> 6):
        if words[k]:
            total += count_ones(words[k])
            add_bits(columns, column + (k << 6), words[k])
    target.rows[row] += total


@njit(**OPTIONS)
def flush_columns(columns, cols, state):
    """Add the byte counters of the last rows to the column counts."""
    first, width = state[FIRST_COLUMN], state[WIDTH]
    for i in range(width):
        cols[first + i] += columns[i]
    for i in range(width):
        columns[i] = 0
    state[ROWS_HELD] = 0


@njit(**OPTIONS)
def _begin_row(columns, cols, state):
    if state[ROWS_HELD] == _MAX_ROWS_PER_BYTE:
        flush_columns(columns, cols, state)
    state[ROWS_HELD] += 1


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
def count_rows(
    a, b, values_a, values_b, rows, cols, first_row, bits, want_bits, want_axes, full, layout, rules, target,
    buffers,
):  # fmt: skip
    """Count a block chunk by chunk: whole chunks where more than half of them changed, else what changed.

    `full` adds every statistic, `want_axes` row and column counts; criteria and bits come always.
    """
    mask_rule = rules.kinds[rules.mask]
    row_bytes = (cols + 7) >> 3
    for row in range(rows):
        if want_axes:
            _begin_row(buffers.columns, target.cols, buffers.state)
        for column in range(0, cols, CHUNK):
            start, n = row * cols + column, min(CHUNK, cols - column)
            bitwise, value = _words_of_chunk(a, b, start, n, layout, buffers)
            target.changed[0] += bitwise
            target.changed[1] += value
            if full:
                buffers.state[NEGATIVE_ZEROS] += _negative_zeros(a, start, n, layout, buffers)
                count_base(a[start : start + n], values_a[start : start + n], layout, target, buffers)
            if value or (bitwise and full):
                codes_a, codes_b = a[start : start + n], b[start : start + n]
                floats_a, floats_b = values_a[start : start + n], values_b[start : start + n]
                if mask_rule <= VALUE and 2 * bitwise <= n:
                    listed = _collect(a, b, start, buffers.bit_words, n, buffers.list_a, buffers.list_b)
                    codes_a, codes_b = buffers.codes_a[:listed], buffers.codes_b[:listed]
                    floats_a, floats_b = buffers.values_a[:listed], buffers.values_b[:listed]
                account(codes_a, codes_b, floats_a, floats_b, layout, rules, target, buffers, full)
                if full and rules.shrink > 0:
                    count_decay(codes_b, first_row + row, layout, rules, target, buffers)
                if mask_rule > VALUE:
                    mask = rules.mask
                    verdicts(mask_rule, rules.parameters[mask], rules.limits[mask], n, buffers)
                    _verdict_words(n, buffers.verdict, buffers.value_words)
            words = buffers.bit_words if mask_rule == BITWISE else buffers.value_words
            if want_bits:
                _write_bits(words, n, bits, row * row_bytes + (column >> 3))
            if want_axes and bitwise:
                _count_axes(words, n, column, first_row + row, target, buffers.columns)


@njit(**OPTIONS)
def word_rows(a, b, rows, cols, bits, want_bits, use_value, layout, pad_a, pad_b, changed):
    """Count a block under `bitwise` and `value` and write its mask bits: nothing else is asked."""
    mask, nan = layout.magnitude_mask, layout.first_nan
    row_bytes = (cols + 7) >> 3
    bitwise = value = np.int64(0)
    for row in range(rows):
        start = row * cols
        for column in range(0, cols - 63, 64):
            prefetch(a, start + column + CHUNK)
            prefetch(b, start + column + CHUNK)
            differ, as_numbers = differing_words(a, b, start + column, mask, nan)
            bitwise += count_ones(differ)
            value += count_ones(as_numbers)
            if want_bits:
                store_word(bits, row * row_bytes + (column >> 3), as_numbers if use_value else differ)
        rest = cols & 63
        if rest:
            column = cols - rest
            _pad(a, start + column, rest, pad_a)
            _pad(b, start + column, rest, pad_b)
            differ, as_numbers = differing_words(pad_a, pad_b, 0, mask, nan)
            bitwise += count_ones(differ)
            value += count_ones(as_numbers)
            if want_bits:
                word = as_numbers if use_value else differ
                _write_bytes(word, rest, bits, row * row_bytes + (column >> 3))
    changed[0] += bitwise
    changed[1] += value


@njit(**OPTIONS)
def joint_rows(
    a, b, rows, cols, first_row, bits, want_bits, want_axes, use_value, layout, changed, row_counts,
    col_counts, joint, places, pad_a, pad_b, list_a, list_b, columns, state,
):  # fmt: skip
    """Count a block of 16-bit float codes through the joint table, from the row and column in `state` on.

    Far pairs go to the lists. Returns how many those hold: at the end of the block, or when they are full
    and have to be accounted before the next call goes on.
    """
    row_bytes = (cols + 7) >> 3
    row, column = state[ROW], state[COLUMN]
    listed = np.int64(0)
    while row < rows:
        if want_axes and column == 0:
            _begin_row(columns, col_counts, state)
        while column < cols:
            if listed > len(list_a) - CHUNK:
                break
            stop = min(column + CHUNK, cols)
            bitwise = value = in_mask = zeros = group = np.int64(0)
            while column < stop:
                n = min(64, stop - column)
                first = row * cols + column
                if n == 64:
                    prefetch(a, first + CHUNK)
                    prefetch(b, first + CHUNK)
                    differ, as_numbers, far = joint_words(a, b, first, layout.infinity, places, group)
                    zeros += count_ones(equal_word(a, first, layout.negative_zero))
                else:
                    _pad(a, first, n, pad_a)
                    _pad(b, first, n, pad_b)
                    differ, as_numbers, far = joint_words(pad_a, pad_b, 0, layout.infinity, places, group)
                    zeros += count_ones(equal_word(pad_a, 0, layout.negative_zero))
                bitwise += count_ones(differ)
                value += count_ones(as_numbers)
                while far:
                    i = first + np.int64(lowest_bit(far))
                    list_a[listed], list_b[listed] = a[i], b[i]
                    listed += 1
                    far &= far - np.uint64(1)
                word = as_numbers if use_value else differ
                if want_bits:
                    if n == 64:
                        store_word(bits, row * row_bytes + (column >> 3), word)
                    else:
                        _write_bytes(word, n, bits, row * row_bytes + (column >> 3))
                if want_axes and word:
                    in_mask += count_ones(word)
                    add_bits(columns, column, word)
                column += n
                group += n
            for i in range(group):
                joint[places[i]] += np.uint32(1)
            changed[0] += bitwise
            changed[1] += value
            state[NEGATIVE_ZEROS] += zeros
            if want_axes:
                row_counts[first_row + row] += in_mask
        if column < cols:
            break
        column = 0
        row += 1
    state[ROW], state[COLUMN] = row, column
    return listed


@njit(**OPTIONS)
def account_listed(listed, layout, rules, target, buffers):
    """Account the far pairs that `joint_rows` listed."""
    for start in range(0, listed, CHUNK):
        stop = min(start + CHUNK, listed)
        account(
            buffers.codes_a[start:stop], buffers.codes_b[start:stop],
            buffers.values_a[start:stop], buffers.values_b[start:stop],
            layout, rules, target, buffers, full=True,
        )  # fmt: skip


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
    buffers.strata[stratum, 0] += np.uint32(count)
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
