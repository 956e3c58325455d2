"""Sixty-four entries at a time: the few vector operations that LLVM does not find by itself.

Contract: each intrinsic is plain LLVM IR over <64 × iW> vectors, so it compiles on every CPU; where the
CPU has mask registers a 64-bit word of results is one compare. Bit i of a word is entry i (little-endian).
Arrays are one-dimensional and contiguous; the caller guarantees that 64 entries can be read or written.
"""

# ruff: noqa: ARG001 - numba reads the argument names and types of an intrinsic; its body uses neither.
from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic as _intrinsic
from numba.np import arrayobj

__all__ = [
    "add_bits",
    "bit_length",
    "count_ones",
    "differing_words",
    "equal_word",
    "float_bits",
    "from_float_bits",
    "joint_words",
    "lowest_bit",
    "nonzero_word",
    "prefetch",
    "store_word",
]

intrinsic: Any = _intrinsic
"""Typed loosely: a call passes all arguments but the typing context."""
_LANES = 64
_JOINT_RADIUS = 8
"""Largest distance in the joint table; `numba_blocks16` lays its planes out by it."""


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, index: Any, lane: ir.IntType) -> Any:
    data = arrayobj.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), ir.VectorType(lane, _LANES).as_pointer())


def _load(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    lane = ir.IntType(array_type.dtype.bitwidth)
    return builder.load(_pointer(context, builder, array_type, array, index, lane), align=lane.width // 8)


def _splat(builder: Any, scalar: Any) -> Any:
    vector = ir.VectorType(scalar.type, _LANES)
    undefined = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(ir.IntType(32), 0))
    lanes = ir.Constant(ir.VectorType(ir.IntType(32), _LANES), None)
    return builder.shuffle_vector(first, undefined, lanes)


def _constant(lane: ir.IntType, value: int) -> Any:
    return ir.Constant(ir.VectorType(lane, _LANES), [value] * _LANES)


def _word(builder: Any, condition: Any) -> Any:
    return builder.bitcast(condition, ir.IntType(_LANES))


def _smaller(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.icmp_unsigned("<", a, b), a, b)


def _larger(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.icmp_unsigned(">", a, b), a, b)


def _count_bits(name: str, builder: Any, x: Any) -> Any:
    """Call `llvm.ctlz` or `llvm.cttz`, defined for 0 too."""
    flag = ir.IntType(1)
    kind = ir.FunctionType(x.type, [x.type, flag])
    return builder.call(builder.module.declare_intrinsic(name, [x.type], kind), [x, ir.Constant(flag, 0)])


@intrinsic
def count_ones(typing_context: Any, x: Any) -> Any:
    """Number of 1 bits, as int64."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return types.int64(types.uint64), generate


@intrinsic
def lowest_bit(typing_context: Any, x: Any) -> Any:
    """Position of the lowest 1 bit of a word that is not 0."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _count_bits("llvm.cttz", builder, args[0])

    return types.uint64(types.uint64), generate


@intrinsic
def bit_length(typing_context: Any, x: Any) -> Any:
    """Bits of an unsigned integer without leading zeros."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lane = args[0].type
        return builder.sub(ir.Constant(lane, lane.width), _count_bits("llvm.ctlz", builder, args[0]))

    return x(x), generate


@intrinsic
def float_bits(typing_context: Any, x: Any) -> Any:
    """The code of a float, as a signed integer of its width."""
    width = x.bitwidth

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(width))

    return (types.int32 if width == 32 else types.int64)(x), generate


@intrinsic
def from_float_bits(typing_context: Any, x: Any) -> Any:
    """The float64 with the int64 code x."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.DoubleType())

    return types.float64(types.int64), generate


@intrinsic
def equal_word(typing_context: Any, array: Any, index: Any, value: Any) -> Any:
    """Bits of the entries array[index:index+64] equal to `value` (of the array's dtype)."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        codes = _load(context, builder, signature.args[0], args[0], args[1])
        return _word(builder, builder.icmp_unsigned("==", codes, _splat(builder, args[2])))

    return types.uint64(array, types.intp, array.dtype), generate


@intrinsic
def nonzero_word(typing_context: Any, array: Any, index: Any) -> Any:
    """Bits of the entries array[index:index+64] that are not zero."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values = _load(context, builder, signature.args[0], args[0], args[1])
        return _word(builder, builder.icmp_unsigned("!=", values, _constant(values.type.element, 0)))

    return types.uint64(array, types.intp), generate


@intrinsic
def prefetch(typing_context: Any, array: Any, index: Any) -> Any:
    """Ask for the cache lines of array[index:index+64]; the place may lie beyond the end."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array_type, wide = signature.args[0], ir.IntType(32)
        first = arrayobj.make_array(array_type)(context, builder, args[0]).data
        first = builder.bitcast(builder.gep(first, [args[1]]), ir.IntType(8).as_pointer())
        flags = [ir.Constant(wide, flag) for flag in (0, 3, 1)]
        kind = ir.FunctionType(ir.VoidType(), [first.type, wide, wide, wide])
        function = builder.module.declare_intrinsic("llvm.prefetch", [first.type], kind)
        for line in range(array_type.dtype.bitwidth // 8):
            builder.call(function, [builder.gep(first, [ir.Constant(wide, 64 * line)]), *flags])
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


@intrinsic
def store_word(typing_context: Any, array: Any, index: Any, word: Any) -> Any:
    """Write a 64-bit word over array[index:index+8] of bytes."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = arrayobj.make_array(signature.args[0])(context, builder, args[0]).data
        pointer = builder.bitcast(builder.gep(data, [args[1]]), ir.IntType(64).as_pointer())
        builder.store(args[2], pointer, align=1)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.uint64), generate


@intrinsic
def add_bits(typing_context: Any, array: Any, index: Any, word: Any) -> Any:
    """Add bit i of `word` to the byte array[index + i]."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte = ir.IntType(8)
        pointer = _pointer(context, builder, signature.args[0], args[0], args[1], byte)
        bits = builder.bitcast(args[2], ir.VectorType(ir.IntType(1), _LANES))
        total = builder.add(builder.load(pointer, align=1), builder.zext(bits, ir.VectorType(byte, _LANES)))
        builder.store(total, pointer, align=1)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.uint64), generate


@intrinsic
def differing_words(
    typing_context: Any, base: Any, tuned: Any, index: Any, magnitude_mask: Any, first_nan: Any
) -> Any:
    """Bits of the 64 entries whose codes differ, and of those that differ as numbers."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        a = _load(context, builder, signature.args[0], args[0], args[2])
        b = _load(context, builder, signature.args[1], args[1], args[2])
        mask, nan = _splat(builder, args[3]), _splat(builder, args[4])
        differs = builder.icmp_unsigned("!=", a, b)
        one_nonzero = builder.icmp_unsigned(
            "!=", builder.and_(builder.or_(a, b), mask), _constant(a.type.element, 0)
        )
        smaller = _smaller(builder, builder.and_(a, mask), builder.and_(b, mask))
        not_both_nan = builder.icmp_unsigned("<", smaller, nan)
        as_numbers = builder.and_(differs, builder.and_(one_nonzero, not_both_nan))
        words = [_word(builder, differs), _word(builder, as_numbers)]
        return context.make_tuple(builder, signature.return_type, words)

    code = base.dtype
    signature = types.UniTuple(types.uint64, 2)(base, tuned, types.intp, code, code)
    return signature, generate


@intrinsic
def joint_words(
    typing_context: Any, base: Any, tuned: Any, index: Any, infinity: Any, places: Any, place: Any
) -> Any:
    """Table places of 64 pairs of 16-bit codes; returns the words (differ, differ as numbers, far).

    places[place + i] = plane · 2¹⁵ + |base code|. A pair whose codes have one sign, are finite, not zero
    and at most 8 apart (or are equal) lies in plane 8 + signed distance of the magnitudes, a *far* one in
    plane 17.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        short, wide = ir.IntType(16), ir.IntType(32)
        a = _load(context, builder, signature.args[0], args[0], args[2])
        b = _load(context, builder, signature.args[1], args[1], args[2])
        mask, infinite = _constant(short, 0x7FFF), _splat(builder, args[3])
        size_a, size_b = builder.and_(a, mask), builder.and_(b, mask)
        differs = builder.icmp_unsigned("!=", a, b)
        plane = builder.add(builder.sub(size_b, size_a), _constant(short, _JOINT_RADIUS))
        near = builder.icmp_unsigned("<=", plane, _constant(short, 2 * _JOINT_RADIUS))
        one_sign = builder.icmp_unsigned("<=", builder.xor(a, b), mask)
        finite = builder.icmp_unsigned("<", _larger(builder, size_a, size_b), infinite)
        both_nonzero = builder.icmp_unsigned("!=", _smaller(builder, size_a, size_b), _constant(short, 0))
        ordinary = builder.and_(builder.and_(near, one_sign), builder.and_(finite, both_nonzero))
        far = builder.and_(differs, builder.not_(ordinary))
        plane = builder.select(far, _constant(short, 2 * _JOINT_RADIUS + 1), plane)
        wide_vector = ir.VectorType(wide, _LANES)
        high = builder.shl(builder.zext(plane, wide_vector), _constant(wide, 15))
        target = _pointer(context, builder, signature.args[4], args[4], args[5], wide)
        builder.store(builder.or_(high, builder.zext(size_a, wide_vector)), target, align=4)
        one_nonzero = builder.icmp_unsigned("!=", builder.or_(size_a, size_b), _constant(short, 0))
        not_both_nan = builder.icmp_unsigned("<=", _smaller(builder, size_a, size_b), infinite)
        as_numbers = builder.and_(differs, builder.and_(one_nonzero, not_both_nan))
        words = [_word(builder, w) for w in (differs, as_numbers, far)]
        return context.make_tuple(builder, signature.return_type, words)

    code = base.dtype
    signature = types.UniTuple(types.uint64, 3)(base, tuned, types.intp, code, places, types.intp)
    return signature, generate
