from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsity_audit.errors import SparsityAuditError, UsageError
from sparsity_audit.types import ByteRange, Criterion, DType, TensorSpec

amounts = st.floats(min_value=0, allow_nan=False, allow_infinity=False)
criteria = st.one_of(
    st.sampled_from([Criterion(kind="bitwise"), Criterion(kind="value")]),
    amounts.map(lambda x: Criterion(kind="atol", parameter=x)),
    amounts.map(lambda x: Criterion(kind="rel", parameter=x)),
    st.integers(0, 2**53).map(lambda k: Criterion(kind="ulp", parameter=k)),
    st.builds(
        lambda k, per_tensor: Criterion(kind="top", parameter=float(k), per_tensor=per_tensor),
        st.integers(1, 2**50),
        st.booleans(),
    ),
)


@settings(deadline=None, max_examples=300)
@given(criteria)
def test_a_criterion_parses_from_its_key(criterion):
    assert Criterion.parse(criterion.key) == criterion
    assert Criterion.parse(criterion.key).key == criterion.key


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("bitwise", "bitwise"),
        (" value ", "value"),
        ("atol:0.00001", "atol:1e-5"),
        ("atol:1e-05", "atol:1e-5"),
        ("atol:1E-8", "atol:1e-8"),
        ("atol:0", "atol:0"),
        ("atol:2", "atol:2"),
        ("atol:0.5", "atol:0.5"),
        ("rel:1e-3", "rel:1e-3"),
        ("rel:0.001", "rel:1e-3"),
        ("rel:0.00390625", "rel:3.90625e-3"),
        ("ulp:3", "ulp:3"),
        ("top:100", "top:100"),
        ("top:10%", "top:10%"),
        ("top:2.5%:tensor", "top:2.5%:tensor"),
        ("top:7:global", "top:7"),
    ],
)
def test_keys_are_canonical(text, key):
    assert Criterion.parse(text).key == key
    assert str(Criterion.parse(text)) == key


@pytest.mark.parametrize(
    "text",
    [
        "", "exact", "bitwise:1", "value:0", "atol", "atol:", "atol:-1e-5", "atol:nan", "atol:inf", "rel:x",
        "rel:-1", "ulp:-1", "ulp:1.5", "ulp:", "top", "top:0", "top:-3", "top:0%", "top:101%", "top:1.5",
        "top:5:layer", "top:nan%",
    ],
)  # fmt: skip
def test_what_is_no_criterion_is_refused_with_the_forms(text):
    with pytest.raises(UsageError, match="expected: bitwise, value") as caught:
        Criterion.parse(text)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, SparsityAuditError)
    assert caught.value.exit_code == 2


def test_names_of_dtypes_people_write():
    labels = [d.label for d in (DType.BF16, DType.F32, DType.F8_E4M3, DType.I64, DType.U8, DType.BOOL)]
    assert labels == ["bf16", "fp32", "fp8-e4m3", "int64", "uint8", "bool"]


def test_kinds_of_dtypes():
    kinds = {d: d.kind for d in DType}
    assert [d for d in DType if kinds[d] == "opaque"] == [
        DType.F8_E8M0, DType.F8_E4M3FNUZ, DType.F8_E5M2FNUZ, DType.C64
    ]  # fmt: skip
    assert (kinds[DType.BOOL], kinds[DType.U16], kinds[DType.I8], kinds[DType.F16]) == (
        "bool",
        "uint",
        "int",
        "float",
    )


@pytest.mark.parametrize("dtype", [d for d in DType if d.kind == "float"], ids=lambda d: d.label)
def test_layouts_fit_their_width(dtype):
    layout = dtype.layout
    assert layout.width_bits == 8 * dtype.itemsize
    assert layout.sign_mask + layout.magnitude_mask == 2**layout.width_bits - 1
    assert layout.first_nan <= layout.magnitude_mask
    assert layout.infinity in (None, layout.first_nan - 1)
    assert layout.num_exponents << layout.mantissa_bits == layout.sign_mask


@pytest.mark.parametrize(
    ("shape", "matrix"),
    [((), (1, 1)), ((5,), (1, 5)), ((2, 3), (2, 3)), ((2, 3, 4), (6, 4)), ((0, 4), (0, 4))],
)
def test_a_tensor_is_a_matrix_of_its_last_axis(shape, matrix):
    spec = TensorSpec(name="w", dtype=DType.F32, shape=shape, file=0, extent=ByteRange(start=0, stop=0))
    assert spec.rows_cols == matrix
    assert spec.num_entries == math.prod(shape)
    assert spec.num_bytes == 4 * math.prod(shape)


def test_a_byte_range_does_not_run_backwards():
    with pytest.raises(AssertionError):
        ByteRange(start=4, stop=3)


def test_a_list_of_criteria_repeats_the_kind_before_it() -> None:
    found = Criterion.parse_several("top:1%,5%:tensor,20%")
    assert [c.key for c in found] == ["top:1%", "top:5%:tensor", "top:20%"]
    assert [c.key for c in Criterion.parse_several("value,atol:1e-5,1e-6")] == [
        "value",
        "atol:1e-5",
        "atol:1e-6",
    ]
    with pytest.raises(UsageError, match="given twice"):
        Criterion.parse_several("atol:1e-5,atol:1e-05")
    with pytest.raises(UsageError, match="not understood"):
        Criterion.parse_several("value,5")
