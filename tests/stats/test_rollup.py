"""Records and roll-ups against hand-made tensors and the known answers of the addition runs."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from sparsity_audit.checkpoint.opening import open_checkpoint
from sparsity_audit.checkpoint.store import LocalFile
from sparsity_audit.compare.accumulate import CODE_DTYPE, Accumulator, KernelSpec
from sparsity_audit.compare.numpy_kernel import NumpyKernel
from sparsity_audit.stats.rollup import (
    QUANTILES,
    TensorTally,
    by_kind,
    by_layer,
    by_layer_and_module,
    by_module,
    headlines,
    roll_up,
    summarise,
    totals,
)
from sparsity_audit.stats.tally import Tally, ViewTally
from sparsity_audit.types import Criterion, DType, View

DATA = Path(__file__).parents[1] / "data" / "addition"
CRITERIA = (Criterion.parse("bitwise"), Criterion.parse("value"))


def compare(base, tuned, dtype, *, level="full", shrink=None):
    acc = Accumulator(
        KernelSpec(dtype=dtype, criteria=CRITERIA, mask=1, level=level, shrink=shrink),
        rows=base.shape[0],
        cols=base.shape[1],
    )
    NumpyKernel().compare(base, tuned, acc, first_row=0, first_col=0, bits=None)
    return acc


def make(
    name, base, tuned, *, layer=None, module="m", kind="matrix", dtype=DType.F32, served=False, shrink=None
):
    code = CODE_DTYPE[dtype.itemsize]
    base, tuned = (np.atleast_2d(np.asarray(x)).view(code) for x in (base, tuned))
    acc = compare(base, tuned, dtype, shrink=shrink)
    narrow = None
    if served:
        pair = [np.empty(base.shape, np.uint16) for _ in range(2)]
        for codes, out in zip((base, tuned), pair, strict=True):
            NumpyKernel().to_bf16(codes, dtype, out)
        narrow = compare(*pair, DType.BF16).view_tally()
    return TensorTally(
        name=name,
        layer=layer,
        module=module,
        kind=kind,
        base_dtype=dtype,
        tuned_dtype=dtype,
        native_dtype=dtype,
        tally=Tally(native=acc.view_tally(), served=narrow, axes=acc.axis_counts()),
    )


def f32(*values):
    return np.array(values, dtype=np.float32)


def addition(base, tuned):
    tensors, sides = [], []
    for folder in (base, tuned):
        catalogue = open_checkpoint(DATA / folder)
        side = {}
        for name, spec in catalogue.tensors.items():
            buffer = bytearray(spec.num_bytes)
            with LocalFile(catalogue.files[spec.file]) as source:
                source.read_into(memoryview(buffer), spec.extent.start)
            codes = np.frombuffer(buffer, dtype=CODE_DTYPE[spec.dtype.itemsize])
            side[name] = spec.dtype, codes.reshape(spec.rows_cols)
        sides.append(side)
    for name, (dtype, codes) in sides[0].items():
        kind = "norm" if "norm" in name else "embedding" if "embed" in name else "matrix"
        kind = "head" if "lm_head" in name else kind
        layer = int(name.split(".")[2]) if ".layers." in name else None
        tensors.append(
            make(
                name, codes, sides[1][name][1], layer=layer, kind=kind, dtype=dtype, served=dtype is DType.F32
            )
        )
    return tensors


def test_a_tensor_record_holds_exact_counts_norms_and_axes():
    tensor = make("w", [f32(3, 4, 0), f32(0, 0, 1)], [f32(0, 8, 0), f32(0, 0, 1)], layer=2, kind="matrix")
    record = summarise(tensor)
    view = record.native
    assert [(h.criterion, h.compared, h.changed) for h in view.counts] == [("bitwise", 6, 2), ("value", 6, 2)]
    assert view.counts[1].density == 2 / 6
    assert view.counts[1].sparsity == 4 / 6
    assert (view.l1, view.l2, view.max_abs) == (7.0, 5.0, 4.0)
    assert (view.base_l2, view.relative_l2) == (math.sqrt(26), 5 / math.sqrt(26))
    assert (record.rows.lines, record.rows.touched, record.rows.touched_share) == (2, 1, 0.5)
    assert (record.cols.lines, record.cols.touched) == (3, 2)
    assert record.rows.density_quantiles == (0.0, 0.0, 0.0, 0.0, 2 / 3, 2 / 3, 2 / 3)
    assert (record.name, record.layer, record.served, record.is_identical) == ("w", 2, None, False)
    assert record.decay_only_rows is None


def test_quantiles_are_observed_densities():
    changed = np.arange(100)
    base = np.zeros((100, 100), dtype=np.float32)
    tuned = (np.arange(100) < changed[:, None]).astype(np.float32)
    record = summarise(make("w", base, tuned))
    assert len(record.rows.density_quantiles) == len(QUANTILES)
    assert record.rows.density_quantiles == (0.0, 0.09, 0.24, 0.49, 0.74, 0.89, 0.99)


def test_undefined_numbers_are_none_and_no_float_is_nan_or_infinite():
    empty = summarise(make("e", np.empty((0, 4), np.float32), np.empty((0, 4), np.float32)))
    assert empty.native.counts[0].density is None
    assert empty.rows.touched_share is None
    assert empty.rows.density_quantiles == ()
    zero = summarise(make("z", f32(0, 0), f32(1, np.nan)))
    assert zero.native.relative_l2 is None
    assert (zero.native.nonfinite_deltas, zero.native.tuned_specials.nan) == (1, 1)
    huge = np.array([1e154, -1e154] * 8)
    wide = summarise(make("h", np.full(16, 5e-324), huge, dtype=DType.F64))
    assert math.isfinite(wide.native.l2)
    assert wide.native.relative_l2 is None


def test_l1_beyond_float64_is_none():
    tally = Tally(native=ViewTally(entries=1, changed={"bitwise": 1, "value": 1}, abs_sum=1 << 2200))
    record = summarise(dataclasses.replace(make("w", f32(1), f32(1)), tally=tally))
    assert record.native.l1 is None
    assert record.rows is None


def test_size_weighted_and_unweighted_shares_differ_and_are_both_right():
    big = make("big", np.ones(90, np.float32), np.ones(90, np.float32))
    small = make("small", np.ones(10, np.float32), np.full(10, 2, np.float32), kind="norm")
    empty = make("empty", np.empty((0, 3), np.float32), np.empty((0, 3), np.float32))
    (group,) = roll_up([big, small, empty], key=lambda t: "g")
    value = group.counts[1]
    assert (value.total.changed, value.total.compared, value.total.density) == (10, 100, 0.1)
    assert (value.mean_density, value.mean_sparsity) == (0.5, 0.5)
    assert (group.num_tensors, group.num_identical, group.entries) == (3, 2, 100)
    assert group.l2 == math.sqrt(10)
    assert group.relative_l2 == math.sqrt(10) / 10


def test_groups_follow_their_key_and_leave_out_none():
    tensors = [
        make("a", f32(1), f32(1), layer=0, module="q"),
        make("b", f32(1), f32(2), layer=1, module="q", kind="bias"),
        make("c", f32(1), f32(1), layer=None, module="embed", kind="embedding"),
        make("d", f32(1), f32(1), layer=1, module="o"),
    ]

    def groups(key):
        return [(g.key, g.num_tensors, g.counts[1].total.changed) for g in roll_up(tensors, key=key)]

    assert groups(by_layer) == [("0", 1, 0), ("1", 2, 1)]
    assert groups(by_module) == [("q", 2, 1), ("embed", 1, 0), ("o", 1, 0)]
    assert groups(by_kind) == [("matrix", 2, 0), ("bias", 1, 1), ("embedding", 1, 0)]
    assert groups(by_layer_and_module) == [("0/q", 1, 0), ("1/q", 1, 1), ("1/o", 1, 0)]


def test_the_parts_of_the_totals_add_up_to_all():
    kinds = ("matrix", "embedding", "head", "norm", "bias", "other", "matrix")
    tensors = [make(str(i), f32(*range(i + 1)), f32(*range(1, i + 2)), kind=k) for i, k in enumerate(kinds)]
    whole, *parts = totals(tensors)
    assert [p.key for p in parts] == ["matrices", "embeddings+head", "norms", "biases", "other"]
    assert whole.num_tensors == sum(p.num_tensors for p in parts) == 7
    assert whole.entries == sum(p.entries for p in parts) == 28
    for i in range(2):
        assert whole.counts[i].total.changed == sum(p.counts[i].total.changed for p in parts)


def test_a_served_rollup_takes_narrow_tensors_as_they_are_stored():
    wide = make("wide", f32(1, 1), f32(1.0001, 2), served=True)
    narrow = make("narrow", np.array([1, 2], np.uint16), np.array([1, 3], np.uint16), dtype=DType.BF16)
    (group,) = roll_up([wide, narrow], key=lambda t: "g", view=View.SERVED)
    assert (group.counts[1].total.changed, group.counts[1].total.view) == (2, View.SERVED)
    assert [wide.view_dtype(v) for v in View] == [DType.F32, DType.BF16]
    assert summarise(wide).served.counts[1].changed == 1


@pytest.mark.parametrize(
    ("base", "tuned", "native", "served"),
    [
        ("base-bf16", "grpo-bf16-seed0", 0.3802, None),
        ("base-bf16", "grpo-bf16-seed1", 0.3793, None),
        ("base-bf16", "dpo-bf16", 0.3789, None),
        ("base-bf16", "grpo-bf16-lr1e-4-seed0", 0.8155, None),
        ("base-fp32", "grpo-fp32-seed0", 0.0, 0.1237),
        ("base-fp32", "sft-fp32", 0.0, 0.1028),
    ],
)
def test_headlines_are_the_known_answers_with_their_denominators(base, tuned, native, served):
    found = {(h.view, h.criterion): h for h in headlines(addition(base, tuned))}
    line = found[View.NATIVE, "value"]
    assert line.compared == 148_928
    assert line.sparsity == pytest.approx(native, abs=5e-4 if native == 0 else 5e-5)
    assert line.density == line.changed / line.compared
    if served is None:
        assert (View.SERVED, "value") not in found
    else:
        assert found[View.SERVED, "value"].sparsity == pytest.approx(served, abs=5e-5)


def test_no_tensors_give_no_headlines():
    assert headlines([]) == ()
    assert totals([]) == ()


@pytest.mark.parametrize("view", View)
def test_a_criterion_counted_in_one_view_only_is_rolled_up_in_that_view_alone(view):
    ones = np.ones((2, 2), np.float32)
    bf16 = make("a", ones.view(np.uint16), ones.view(np.uint16) + np.uint16(1), dtype=DType.BF16, layer=0)
    fp32 = make("b", ones, ones * 2, served=True, layer=1)
    tensors = [
        dataclasses.replace(t, tally=t.tally.with_count("top:3", 3, served=view is View.SERVED, lines=None))
        for t in (bf16, fp32)
    ]
    for shown in View:
        for rollup in (*totals(tensors, view=shown), *roll_up(tensors, key=by_layer, view=shown)):
            found = {count.total.criterion: count.total.changed for count in rollup.counts}
            assert set(found) == {"bitwise", "value"} | ({"top:3"} if shown is view else set()), rollup.key
    (row,) = [h for h in headlines(tensors) if h.criterion == "top:3"]
    assert (row.view, row.changed) == (view, 6)
