"""Frozen values that every layer shares: dtypes, byte ranges, tensor specs, criteria, views.

Contract: standard library only, so that `--help` and header reads stay light. Shapes are tuples of
ints, offsets and sizes are bytes, an *entry* is one scalar of a tensor. A float dtype describes its
code layout (sign, exponent, mantissa) here once; every kernel derives its masks from it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from sparsity_audit.errors import UsageError

__all__ = ["ByteRange", "Criterion", "DType", "FloatLayout", "Kind", "TensorSpec", "View", "common_dtype"]

Kind = Literal["float", "int", "uint", "bool", "opaque"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatLayout:
    """Where sign, exponent and mantissa stand in a float code.

    Args:
        width_bits: Bits of one code, sign included; the sign is the top bit.
        mantissa_bits: Stored mantissa bits.
        bias: Exponent bias.
        first_nan: Smallest magnitude code (sign cleared) that is a NaN.
        infinity: Magnitude code of infinity, or None where the format has none (F8_E4M3).
    """

    width_bits: int
    mantissa_bits: int
    bias: int
    first_nan: int
    infinity: int | None

    @property
    def sign_mask(self) -> int:
        """The code with only the sign bit set (the code of −0)."""
        return 1 << (self.width_bits - 1)

    @property
    def magnitude_mask(self) -> int:
        """All bits but the sign."""
        return self.sign_mask - 1

    @property
    def num_exponents(self) -> int:
        """Number of exponent fields, subnormal and special ones included."""
        return 1 << (self.width_bits - 1 - self.mantissa_bits)


class DType(StrEnum):
    """A stored dtype, by its safetensors name."""

    BOOL = "BOOL"
    U8 = "U8"
    I8 = "I8"
    U16 = "U16"
    I16 = "I16"
    U32 = "U32"
    I32 = "I32"
    U64 = "U64"
    I64 = "I64"
    F8_E4M3 = "F8_E4M3"
    F8_E5M2 = "F8_E5M2"
    F16 = "F16"
    BF16 = "BF16"
    F32 = "F32"
    F64 = "F64"
    # Storage we can compare byte by byte (`bitwise`) but whose values we do not interpret.
    F8_E8M0 = "F8_E8M0"
    F8_E4M3FNUZ = "F8_E4M3FNUZ"
    F8_E5M2FNUZ = "F8_E5M2FNUZ"
    C64 = "C64"

    @property
    def itemsize(self) -> int:
        """Bytes of one entry."""
        return _ITEMSIZE[self]

    @property
    def kind(self) -> Kind:
        """What the bits mean; `opaque` storage has codes but no values here."""
        if self in _LAYOUT:
            return "float"
        if self is DType.BOOL:
            return "bool"
        if self.value[0] == "I":
            return "int"
        if self.value[0] == "U":
            return "uint"
        return "opaque"

    @property
    def layout(self) -> FloatLayout:
        """Code layout of a float dtype. Raises KeyError for any other dtype."""
        return _LAYOUT[self]

    @property
    def label(self) -> str:
        """The lower-case name people write: bf16, fp32, int64, fp8-e4m3."""
        return _LABEL.get(self, self.value.lower())


_LAYOUT: dict[DType, FloatLayout] = {
    DType.F8_E4M3: FloatLayout(width_bits=8, mantissa_bits=3, bias=7, first_nan=0x7F, infinity=None),
    DType.F8_E5M2: FloatLayout(width_bits=8, mantissa_bits=2, bias=15, first_nan=0x7D, infinity=0x7C),
    DType.F16: FloatLayout(width_bits=16, mantissa_bits=10, bias=15, first_nan=0x7C01, infinity=0x7C00),
    DType.BF16: FloatLayout(width_bits=16, mantissa_bits=7, bias=127, first_nan=0x7F81, infinity=0x7F80),
    DType.F32: FloatLayout(
        width_bits=32, mantissa_bits=23, bias=127, first_nan=0x7F800001, infinity=0x7F800000
    ),
    DType.F64: FloatLayout(
        width_bits=64, mantissa_bits=52, bias=1023, first_nan=0x7FF0000000000001, infinity=0x7FF0000000000000
    ),
}
_ITEMSIZE: dict[DType, int] = {
    **dict.fromkeys((DType.BOOL, DType.U8, DType.I8, DType.F8_E4M3, DType.F8_E5M2, DType.F8_E8M0), 1),
    **dict.fromkeys((DType.F8_E4M3FNUZ, DType.F8_E5M2FNUZ), 1),
    **dict.fromkeys((DType.U16, DType.I16, DType.F16, DType.BF16), 2),
    **dict.fromkeys((DType.U32, DType.I32, DType.F32), 4),
    **dict.fromkeys((DType.U64, DType.I64, DType.F64, DType.C64), 8),
}
_LABEL: dict[DType, str] = {
    DType.F16: "fp16",
    DType.F32: "fp32",
    DType.F64: "fp64",
    DType.F8_E4M3: "fp8-e4m3",
    DType.F8_E5M2: "fp8-e5m2",
    **{d: d.value.lower().replace("i", "int") for d in (DType.I8, DType.I16, DType.I32, DType.I64)},
    **{d: d.value.lower().replace("u", "uint") for d in (DType.U8, DType.U16, DType.U32, DType.U64)},
}


def common_dtype(base: DType, tuned: DType) -> DType | None:
    """The dtype in which both sides can be compared without rounding either; None where there is none.

    Equal dtypes are compared as stored. Floats meet in fp32, or in fp64 when one side is fp64. Integers
    meet in the narrowest integer that holds both; uint64 and a signed integer have none.
    """
    if base is tuned:
        return base
    kinds = {base.kind, tuned.kind}
    if kinds == {"float"}:
        return DType.F64 if DType.F64 in (base, tuned) else DType.F32
    if kinds <= {"int", "uint"}:
        signed = "int" in kinds
        bits = max(8 * d.itemsize + (signed and d.kind == "uint") for d in (base, tuned))
        for width in (8, 16, 32, 64):
            if bits <= width:
                return DType(f"{'I' if signed else 'U'}{width}")
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteRange:
    """Bytes start ≤ i < stop of one file."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        assert 0 <= self.start <= self.stop, (self.start, self.stop)

    @property
    def num_bytes(self) -> int:
        """Length of the range."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One named tensor of a checkpoint, without its data.

    Args:
        name: Name in the checkpoint.
        dtype: Stored dtype.
        shape: Shape; () is a scalar.
        file: Index into the catalogue's files.
        extent: Bytes of that file that hold the entries (for strided tensors: that span them).
        strides: Entry strides when the entries are not stored contiguously in row-major order.
        big_endian: True when the stored codes are byte-swapped.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    file: int
    extent: ByteRange
    strides: tuple[int, ...] | None = None
    big_endian: bool = False

    @property
    def num_entries(self) -> int:
        """Number of scalars (1 for a 0-d tensor)."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of the entries, without gaps."""
        return self.num_entries * self.dtype.itemsize

    @property
    def rows_cols(self) -> tuple[int, int]:
        """The tensor as a matrix: all leading axes × the last axis; [n] is 1 × n, () is 1 × 1."""
        if not self.shape:
            return 1, 1
        return math.prod(self.shape[:-1]), self.shape[-1]


class View(StrEnum):
    """How a pair is looked at: `native` as stored, `served` with both sides rounded to bf16."""

    NATIVE = "native"
    SERVED = "served"


CriterionKind = Literal["bitwise", "value", "atol", "rel", "ulp", "top"]


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Criterion:
    """The rule that decides whether an entry changed; part of every result's identity.

    Kinds (an entry is *unchanged* when): `bitwise` the stored codes are equal; `value` equal as
    numbers; `atol:x` |Δ| ≤ x with Δ in float64; `rel:η` |Δ| ≤ η·max(|base|, |tuned|); `ulp:k` at
    most k ordered codes apart. `top:k` selects the k entries (or k % of them) of largest |Δ| ≠ 0,
    over the whole checkpoint, or per tensor when written `top:k:tensor`.

    Source: `atol` 2505.11711, `rel` 2511.08567 Def. 2.1.

    Args:
        kind: One of the kinds above.
        parameter: x, η or k; 0 for kinds without one. For `top` the count, or the fraction.
        is_fraction: `top` only: the parameter is a fraction of the compared entries.
        per_tensor: `top` only: select within each tensor.
    """

    kind: CriterionKind
    parameter: float = 0.0
    is_fraction: bool = False
    per_tensor: bool = False

    @classmethod
    def parse(cls, text: str) -> Criterion:
        """The criterion that `text` names. Raises UsageError with the accepted forms."""
        kind, _, rest = text.strip().partition(":")
        try:
            if kind in ("bitwise", "value") and not rest:
                return cls(kind=kind)
            if kind in ("atol", "rel"):
                value = float(rest)
                if math.isfinite(value) and value >= 0:
                    return cls(kind=kind, parameter=value)
            if kind == "ulp" and int(rest) >= 0:
                return cls(kind="ulp", parameter=int(rest))
            if kind == "top":
                return cls._parse_top(rest)
        except ValueError:
            pass
        raise UsageError(
            f"criterion {text!r}",
            "not understood",
            expected="bitwise, value, atol:X, rel:X, ulp:K, top:K, top:P%, or top:…:tensor",
            remedy="for instance --criterion atol:1e-5",
        )

    @classmethod
    def parse_several(cls, text: str) -> tuple[Criterion, ...]:
        """The criteria of a list: `top:1%,5%,20%` is short for `top:1%,top:5%,top:20%`. Raises UsageError."""
        found: list[Criterion] = []
        for item in text.split(","):
            is_short = bool(found) and found[-1].parameter > 0 and item.strip()[:1].isdigit()
            found.append(cls.parse(f"{found[-1].kind}:{item.strip()}" if is_short else item))
        doubled = next((c.key for n, c in enumerate(found) if c in found[:n]), None)
        if doubled is not None:
            raise UsageError(f"criteria {text!r}", f"{doubled} is given twice", expected="different ones")
        return tuple(found)

    @classmethod
    def _parse_top(cls, rest: str) -> Criterion:
        amount, _, scope = rest.partition(":")
        if scope not in ("", "tensor", "global"):
            raise ValueError(scope)
        is_fraction = amount.endswith("%")
        value = float(amount[:-1]) / 100 if is_fraction else float(int(amount))
        if not (0 < value <= (1 if is_fraction else math.inf)):
            raise ValueError(amount)
        return cls(kind="top", parameter=value, is_fraction=is_fraction, per_tensor=scope == "tensor")

    @property
    def key(self) -> str:
        """Canonical spelling; parsing it gives the same criterion."""
        if self.kind in ("bitwise", "value"):
            return self.kind
        if self.kind == "ulp":
            return f"ulp:{int(self.parameter)}"
        if self.kind == "top":
            amount = f"{100 * self.parameter:.12g}%" if self.is_fraction else f"{int(self.parameter)}"
            return f"top:{amount}" + (":tensor" if self.per_tensor else "")
        return f"{self.kind}:{_shortest(self.parameter)}"

    def __str__(self) -> str:
        return self.key


def _shortest(value: float) -> str:
    """Shortest text that parses to the same float: 1e-05 becomes 1e-5, 0.0 becomes 0."""
    mantissa, _, exponent = repr(float(value)).partition("e")
    mantissa = mantissa.removesuffix(".0")
    if exponent:
        return f"{mantissa}e{int(exponent)}"
    if value != 0 and abs(value) < 1e-2:
        mantissa, _, exponent = f"{value:e}".partition("e")
        text = f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
        return text if float(text) == value else repr(value)
    return mantissa
