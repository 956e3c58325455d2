"""Every sentence with known numbers, and silence where there is nothing to say."""

import dataclasses

import numpy as np
import pytest

from sparsity_audit.stats.decay import DecayVerdict
from sparsity_audit.stats.findings import findings, percent
from sparsity_audit.stats.rollup import TensorTally
from sparsity_audit.stats.tally import SpecialCounts, Tally, ViewTally
from sparsity_audit.types import DType


def tensor(name="w", dtype=DType.BF16, *, entries=1000, served=None, specials=(0, 0), **changed):
    counts = {"bitwise": 0, "value": 0, **{k.replace("_", ":"): n for k, n in changed.items()}}
    view = ViewTally(
        entries=entries,
        changed=counts,
        base_specials=SpecialCounts(nan=specials[0]),
        tuned_specials=SpecialCounts(nan=specials[1]),
    )
    narrow = None if served is None else ViewTally(entries=entries, changed={**counts, "value": served})
    return TensorTally(
        name=name,
        layer=None,
        module=name,
        kind="matrix",
        base_dtype=dtype,
        tuned_dtype=dtype,
        native_dtype=dtype,
        tally=Tally(native=view, served=narrow),
    )


def with_key(t, old, new):
    changed = {new if k == old else k: n for k, n in t.tally.native.changed.items()}
    return dataclasses.replace(
        t, tally=dataclasses.replace(t.tally, native=dataclasses.replace(t.tally.native, changed=changed))
    )


def test_rel_that_equals_value_is_said_once_for_bf16():
    t = with_key(tensor(bitwise=5, value=5, rel=5), "rel", "rel:1e-3")
    assert findings([t, t]) == (
        (
            "rel:1e-3 equals value on bf16 weights (native view): neighbouring numbers differ by at least "
            "2^-8 relative, so one column stands for both."
        ),
    )


@pytest.mark.parametrize(("dtype", "key"), [(DType.F32, "rel:1e-3"), (DType.BF16, "rel:1e-2")])
def test_rel_that_hides_changes_is_not_called_value(dtype, key):
    assert findings([with_key(tensor(dtype=dtype, bitwise=5, value=5, rel=4), "rel", key)]) == ()


def test_rel_equals_value_in_the_served_view_of_a_wide_pair():
    t = with_key(tensor(dtype=DType.F32, bitwise=9, value=9, rel=5, served=9), "rel", "rel:1e-3")
    served = ViewTally(entries=1000, changed={"bitwise": 9, "value": 9, "rel:1e-3": 9})
    t = dataclasses.replace(t, tally=dataclasses.replace(t.tally, served=served))
    (sentence,) = findings([t])
    assert sentence.startswith("rel:1e-3 equals value on bf16 weights (served view): ")


def test_a_tolerance_says_what_it_hides_and_where():
    t = with_key(tensor(bitwise=250, value=250, atol=147), "atol", "atol:1e-5")
    assert findings([t]) == (
        (
            "atol:1e-5 hides 41.2 % of the entries changed under value in the native view (103 of 250): "
            "changes of up to 1 ULP below |w| < 2^-9, 2 ULP below |w| < 2^-10, 5 ULP below |w| < 2^-11, "
            "10 ULP below |w| < 2^-12, 20 ULP below |w| < 2^-13 in bf16."
        ),
    )


def test_a_tolerance_on_fp32_has_no_list_of_ulps_and_speaks_of_both_views():
    t = with_key(tensor(dtype=DType.F32, bitwise=250, value=250, atol=100), "atol", "atol:1e-5")
    served = ViewTally(entries=1000, changed={"bitwise": 150, "value": 150, "atol:1e-5": 100})
    t = dataclasses.replace(t, tally=dataclasses.replace(t.tally, served=served))
    sentences = findings([t])
    assert sentences[0] == (
        "atol:1e-5 hides 60.0 % of the entries changed under value in the native view (150 of 250)."
    )
    assert sentences[1].startswith(
        "atol:1e-5 hides 33.3 % of the entries changed under value in the served view (50 of 150): changes of"
    )


def test_a_tolerance_that_hides_nothing_is_not_mentioned():
    assert findings([with_key(tensor(bitwise=5, value=5, atol=5), "atol", "atol:1e-5")]) == ()


def test_the_share_that_bf16_does_not_show_is_said_per_dtype():
    pair = [
        tensor("a", DType.F32, bitwise=800, value=800, served=300),
        tensor("b", DType.F32, bitwise=200, value=200, served=155),
    ]
    assert findings(pair) == (
        (
            "54.5 % of the fp32 changes are invisible in bf16 "
            "(545 of 1,000 entries changed under value round to the same number)."
        ),
    )


def test_unchanged_tensors_are_counted_and_named():
    moved = tensor("moved", bitwise=1, value=1)
    still = [tensor(f"t{i}") for i in range(7)]
    assert findings([moved, *still[:2]]) == ("2 of 3 tensors did not change at all (bitwise): t0, t1.",)
    assert findings([moved, *still]) == (
        "7 of 8 tensors did not change at all (bitwise): t0, t1, t2, t3, t4 and 2 more.",
    )
    assert findings(still) == ("All 7 compared tensors are identical, bit for bit.",)


def test_codes_that_differ_without_a_difference_in_value_are_mentioned():
    assert findings([tensor(bitwise=7, value=5)]) == (
        (
            "2 entries differ in the stored code but not as a number (the sign of zero, a NaN payload): "
            "changed under bitwise alone."
        ),
    )


def test_opaque_storage_is_mentioned():
    assert findings([tensor(dtype=DType.F8_E8M0, bitwise=1, value=1)]) == (
        (
            "1,000 entries are stored in a format whose values are not interpreted: there every "
            "criterion is bitwise."
        ),
    )


def test_nan_and_infinity_are_counted_on_both_sides():
    assert findings([tensor(bitwise=1, value=1, specials=(0, 1))]) == (
        "1 entry is NaN or infinite in the tuned checkpoint, 0 in the base.",
    )


def test_different_dtypes_of_the_sides_are_mentioned():
    t = dataclasses.replace(
        tensor(bitwise=1, value=1), base_dtype=DType.F32, tuned_dtype=DType.BF16, native_dtype=DType.F32
    )
    assert findings([t, t]) == (
        (
            "2 tensors are stored in fp32 in the base and in bf16 in the tuned checkpoint; "
            "the native view compares them as fp32."
        ),
    )


def verdict(**overrides):
    fields = {
        "shrink": 9.2e-5,
        "entries": 1000,
        "unchanged": 10,
        "band": 940,
        "moved": 50,
        "mirror": 5,
        "within_one_ulp": 500,
        "unchanged_share": 0.01,
        "band_share": 0.94,
        "moved_share": 0.05,
        "net_decay_share": 0.935,
        "decay_only_rows": 28442,
        "verdict": "decay",
    }
    return DecayVerdict(**{**fields, **overrides})


def test_rows_that_only_decayed_are_said_with_the_shrink():
    assert findings([tensor(bitwise=1, value=1)], decay={"embed": verdict()}) == (
        "embed: 28,442 rows moved by weight decay only (c = 9.2e-5); it accounts for 93.5 % of the entries.",
    )
    assert findings([tensor(bitwise=1, value=1)], decay={"embed": verdict(decay_only_rows=0)}) == (
        "embed: weight decay alone accounts for 93.5 % of the entries (c = 9.2e-5).",
    )
    assert findings([tensor(bitwise=1, value=1)], decay={"embed": verdict(verdict="no decay")}) == ()


def test_percentages_never_round_to_nothing_or_everything():
    assert percent(0, 3) == "0.0 %"
    assert percent(1, 10**6) == "less than 0.1 %"
    assert percent(10**6 - 1, 10**6) == "more than 99.9 %"
    assert percent(3, 3) == "100.0 %"
    assert percent(np.int64(1), 8) == "12.5 %"


def test_nothing_is_said_about_nothing():
    assert findings([]) == ()
