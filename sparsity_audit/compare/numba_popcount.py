"""Vector operations on the words of masks that LLVM does not find by itself.

Contract: plain LLVM IR, so it compiles on every CPU, like `numba_simd`; with AVX-512 a full adder becomes
two instructions and a popcount one. Arrays are contiguous; the caller guarantees what is read and written.
"""

# ruff: noqa: ARG001 - numba reads the argument names and types of an intrinsic; its body uses neither.
from __future__ import annotations

from itertools import zip_longest
from typing import Any, Final

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.np import arrayobj

from sparsity_audit.compare.numba_simd import intrinsic
from sparsity_audit.compare.overlap_counts import PADDED_WORDS

__all__ = ["add_seven_rows", "add_three_rows", "ones_of_both", "or_bits", "transpose"]

_LANES: Final = 4
_VECTOR: Final = ir.VectorType(ir.IntType(64), _LANES)
_DEPTH: Final = 4
"""Carry-save levels: one popcount for 2⁴ vectors, and five at the end."""


def _call(builder: Any, name: str, result: Any, argument: Any) -> Any:
    """Call an LLVM intrinsic on a vector; llvmlite declares those of scalars alone."""
    module = builder.module
    kind = ir.FunctionType(result, [argument.type])
    return builder.call(module.globals.get(name) or ir.Function(module, kind, name), [argument])


def _add_three(builder: Any, x: Any, y: Any, z: Any) -> tuple[Any, Any]:
    """A full adder: the bits of x + y + z that stay, and those that carry."""
    either = builder.xor(x, y)
    return builder.xor(either, z), builder.or_(builder.and_(x, y), builder.and_(either, z))


class _CarrySave:
    """Adds vectors of bits: `held[l]` are those of weight 2^l, `total` counts what left the last level."""

    def __init__(self, builder: Any) -> None:
        self._builder = builder
        self._held: list[Any] = [ir.Constant(_VECTOR, None)] * _DEPTH
        self._waiting: list[Any] = [None] * _DEPTH
        self._total: Any = ir.Constant(_VECTOR, None)

    def add(self, bits: Any, level: int = 0) -> None:
        """One more vector of weight 2^level; every second one makes a carry."""
        if level == _DEPTH:
            self._total = self._builder.add(self._total, self._count(bits))
        elif self._waiting[level] is None:
            self._waiting[level] = bits
        else:
            other, self._waiting[level] = self._waiting[level], None
            self._held[level], carry = _add_three(self._builder, self._held[level], other, bits)
            self.add(carry, level + 1)

    def sum(self) -> Any:
        """Number of bits, each times its weight."""
        build, total = self._builder, self._weighted(self._total, _DEPTH)
        for level in range(_DEPTH):
            assert self._waiting[level] is None, "an even number of vectors at every level"
            total = build.add(total, self._weighted(self._count(self._held[level]), level))
        return _call(build, f"llvm.vector.reduce.add.v{_LANES}i64", ir.IntType(64), total)

    def _count(self, bits: Any) -> Any:
        return _call(self._builder, f"llvm.ctpop.v{_LANES}i64", _VECTOR, bits)

    def _weighted(self, counts: Any, level: int) -> Any:
        return self._builder.shl(counts, ir.Constant(_VECTOR, [level] * _LANES))


@intrinsic
def ones_of_both(typing_context: Any, words: Any, first: Any, second: Any) -> Any:
    """Number of bits set in both of words[first:first+PADDED_WORDS] and words[second:second+PADDED_WORDS].

    Source: Muła, Kurz, Lemire, "Faster population counts using AVX2 instructions" (2018), Harley-Seal.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = arrayobj.make_array(signature.args[0])(context, builder, args[0]).data
        rows = [builder.bitcast(builder.gep(data, [at]), _VECTOR.as_pointer()) for at in args[1:]]
        adder = _CarrySave(builder)
        for k in range(PADDED_WORDS // _LANES):
            place = [ir.Constant(ir.IntType(32), k)]
            adder.add(builder.and_(*(builder.load(builder.gep(row, place), align=8) for row in rows)))
        return adder.sum()

    return types.int64(words, types.intp, types.intp), generate


def _sum_of(builder: Any, bits: list[Any]) -> list[Any]:
    """The number of vectors, of three or seven, that hold each bit: bit planes, the lowest first."""
    ones, carries = bits[0], []
    for first in range(1, len(bits), 2):
        ones, carry = _add_three(builder, ones, bits[first], bits[first + 1])
        carries.append(carry)
    return [ones, *(carries if len(carries) == 1 else _add_three(builder, *carries))]


def _row_adder(num_rows: int) -> Any:
    def typed(
        typing_context: Any, words: Any, rows: Any, start: Any, zeros: Any, planes: Any, carry: Any
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            kinds, index = signature.args, ir.IntType(64)
            data = {i: arrayobj.make_array(kinds[i])(context, builder, args[i]).data for i in (0, 1, 3, 4, 5)}

            def at(array: int, first: Any) -> Any:
                return builder.bitcast(builder.gep(data[array], [first]), _VECTOR.as_pointer())

            zero, inputs = ir.Constant(index, 0), []
            for k in range(num_rows):
                place = builder.load(builder.gep(data[1], [ir.Constant(index, k)]))
                is_absent = builder.icmp_signed("<", place, zero)
                inputs.append(builder.select(is_absent, at(3, zero), at(0, builder.add(place, args[2]))))
            outputs = [at(4, ir.Constant(index, j * PADDED_WORDS)) for j in range(3)]
            with cgutils.for_range(builder, ir.Constant(index, PADDED_WORDS // _LANES)) as loop:
                bits = [builder.load(builder.gep(row, [loop.index]), align=8) for row in inputs]
                up = ir.Constant(_VECTOR, None)
                for plane, more in zip_longest(outputs, _sum_of(builder, bits), fillvalue=up):
                    place = builder.gep(plane, [loop.index])
                    held, up = _add_three(builder, builder.load(place, align=8), more, up)
                    builder.store(held, place, align=8)
                builder.store(up, builder.gep(at(5, zero), [loop.index]), align=8)
            return context.get_dummy_value()

        return types.void(words, rows, types.intp, zeros, planes, carry), generate

    return intrinsic(typed)


add_three_rows: Any = _row_adder(3)
"""Add three rows' bits to the number in three bit planes; `carry` gets what goes to the next plane.

Row k is words[rows[k] + start:][:PADDED_WORDS], or `zeros` where rows[k] < 0; plane j is
planes[j·PADDED_WORDS:][:PADDED_WORDS].
"""
add_seven_rows: Any = _row_adder(7)
"""`add_three_rows` for seven."""


@intrinsic
def or_bits(typing_context: Any, array: Any, index: Any, word: Any, value: Any) -> Any:
    """Set the bits of `value` (of the array's dtype) in array[index + i] where bit i of `word` is set."""
    lanes = 64

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lane = ir.IntType(signature.args[0].dtype.bitwidth)
        vector = ir.VectorType(lane, lanes)
        data = arrayobj.make_array(signature.args[0])(context, builder, args[0]).data
        pointer = builder.bitcast(builder.gep(data, [args[1]]), vector.as_pointer())
        wide = ir.IntType(32)
        one = builder.insert_element(ir.Constant(vector, ir.Undefined), args[3], ir.Constant(wide, 0))
        all_lanes = ir.Constant(ir.VectorType(wide, lanes), None)
        values = builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), all_lanes)
        bits = builder.bitcast(args[2], ir.VectorType(ir.IntType(1), lanes))
        chosen = builder.select(bits, values, ir.Constant(vector, None))
        align = lane.width // 8
        builder.store(builder.or_(builder.load(pointer, align=align), chosen), pointer, align=align)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.uint64, array.dtype), generate


def _paired(builder: Any, low: Any, high: Any, distance: int) -> tuple[Any, Any]:
    """Words whose positions differ by `distance` < _LANES, brought into the same lanes of two vectors."""
    lanes = range(2 * _LANES)
    picks = [i for i in lanes if not i & distance], [i for i in lanes if i & distance]
    return _shuffled(builder, low, high, picks[0]), _shuffled(builder, low, high, picks[1])


def _unpaired(builder: Any, low: Any, high: Any, distance: int) -> tuple[Any, Any]:
    lanes = range(2 * _LANES)
    order = [i for i in lanes if not i & distance] + [i for i in lanes if i & distance]
    places = [order.index(i) for i in lanes]
    return _shuffled(builder, low, high, places[:_LANES]), _shuffled(builder, low, high, places[_LANES:])


def _shuffled(builder: Any, low: Any, high: Any, places: list[int]) -> Any:
    return builder.shuffle_vector(low, high, ir.Constant(ir.VectorType(ir.IntType(32), _LANES), places))


def _exchange(builder: Any, low: Any, high: Any, distance: int) -> tuple[Any, Any]:
    """Swap the bits of `low` that lie `distance` above those of `high`."""
    keep = sum(1 << i for i in range(64) if not i & distance)
    shift, mask = (ir.Constant(_VECTOR, [value] * _LANES) for value in (distance, keep))
    swapped = builder.and_(builder.xor(builder.lshr(low, shift), high), mask)
    return builder.xor(low, builder.shl(swapped, shift)), builder.xor(high, swapped)


@intrinsic
def transpose(typing_context: Any, words: Any, first: Any) -> Any:
    """Exchange bit j of words[first + i] with bit i of words[first + j], for i, j < 64.

    Source: Warren, "Hacker's Delight", section 7-3.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = arrayobj.make_array(signature.args[0])(context, builder, args[0]).data
        row = builder.bitcast(builder.gep(data, [args[1]]), _VECTOR.as_pointer())
        places = [builder.gep(row, [ir.Constant(ir.IntType(32), k)]) for k in range(64 // _LANES)]
        held = [builder.load(place, align=8) for place in places]
        for distance in (32, 16, 8, 4, 2, 1):
            apart = max(distance // _LANES, 1)
            for k in (k for k in range(len(held)) if not k & apart):
                pair = held[k], held[k + apart]
                if distance < _LANES:
                    pair = _paired(builder, *pair, distance)
                pair = _exchange(builder, *pair, distance)
                if distance < _LANES:
                    pair = _unpaired(builder, *pair, distance)
                held[k], held[k + apart] = pair
        for place, bits in zip(places, held, strict=True):
            builder.store(bits, place, align=8)
        return context.get_dummy_value()

    return types.void(words, types.intp), generate
