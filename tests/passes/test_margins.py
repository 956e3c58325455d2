"""The second pass over the base: nulls by brute force, in every view, whatever the units and workers."""

import json
import math
import os
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support import plan_of

from sparsity_audit.compare.numpy_kernel import NumpyKernel
from sparsity_audit.errors import ChangedInputError
from sparsity_audit.passes import margins
from sparsity_audit.passes.execute import run_plan
from sparsity_audit.passes.margins import magnitude_nulls, margin_bytes
from sparsity_audit.passes.plan import Plan, blocks_of
from sparsity_audit.stats.stripes import describe_lines
from sparsity_audit.stats.tally import Tally
from sparsity_audit.types import View

BF16 = ml_dtypes.bfloat16
ADDITION = Path(__file__).resolve().parents[1] / "data" / "addition"


def compare(base: Path, tuned: Path, **options) -> tuple[Plan, tuple[Tally, ...]]:
    plan = plan_of(base, tuned, **options)
    return plan, run_plan(plan, kernel=NumpyKernel())


def write(folder: Path, **arrays: np.ndarray) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(
        {name.replace("__", "."): array for name, array in arrays.items()}, folder / "model.safetensors"
    )
    return folder


def stratum(value: float) -> tuple[int, bool]:
    """Exponent and whether the mantissa is zero, for numbers that are normal or zero."""
    mantissa, exponent = math.frexp(abs(value))
    return (exponent if value else -9999, mantissa in (0.0, 0.5))


def brute_force(base: np.ndarray, changed: np.ndarray) -> float:
    """The expected row score, from its definition, entry by entry."""
    lines, across = base.shape
    total, n = int(changed.sum()), base.size
    groups: dict[tuple[int, bool], list[tuple[int, int]]] = {}
    for place in np.ndindex(*base.shape):
        groups.setdefault(stratum(float(base[place])), []).append(place)
    mean, variance = [0.0] * lines, [0.0] * lines
    for places in groups.values():
        size, hits = len(places), sum(bool(changed[place]) for place in places)
        p = hits / size
        for line in range(lines):
            here = sum(row == line for row, _ in places)
            mean[line] += here * p
            if size > 1:
                variance[line] += here * p * (1 - p) * (size - here) / (size - 1)
    spread = sum(v + (m - total / lines) ** 2 for m, v in zip(mean, variance, strict=True)) / (lines - 1)
    return spread / (across * (total / n) * (1 - total / n) * n / (n - 1))


def pair(shape, *, base_dtype, tuned_dtype, seed=0) -> tuple[np.ndarray, np.ndarray]:
    """Weights with a magnitude gradient along the rows, and an update that the dtypes absorb in part."""
    rng = np.random.default_rng(seed)
    coarse = np.dtype(base_dtype).itemsize == 1
    base = rng.standard_normal(shape) * np.exp2(np.arange(shape[0]) % 5 - 6)[:, None] * (256 if coarse else 1)
    base[0, :3] = [0.0, 0.25, -0.5]
    base = base.astype(base_dtype)
    size = 0.5 if coarse else 2e-4
    tuned = (base.astype(np.float64) + size * rng.standard_normal(shape)).astype(tuned_dtype)
    keep = rng.random(shape) < 0.2
    return base, np.where(keep, base.astype(tuned_dtype), tuned)


@pytest.mark.parametrize(
    ("base_dtype", "tuned_dtype", "view"),
    [
        (BF16, BF16, View.NATIVE),
        (np.float16, np.float16, View.NATIVE),
        (np.float32, np.float32, View.NATIVE),
        (np.float32, np.float32, View.SERVED),
        (np.float32, BF16, View.NATIVE),
        (BF16, np.float32, View.SERVED),
        (np.float64, np.float64, View.NATIVE),
        (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e4m3fn, View.NATIVE),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_expectations_of_rows_and_columns_are_those_of_brute_force(tmp_path, base_dtype, tuned_dtype, view):
    base, tuned = pair((9, 14), base_dtype=base_dtype, tuned_dtype=tuned_dtype)
    plan, tallies = compare(write(tmp_path / "b", w=base), write(tmp_path / "t", w=tuned), view=view)
    (null,) = magnitude_nulls(plan, tallies, view=view)
    if view is View.SERVED:
        base, tuned = base.astype(BF16), tuned.astype(BF16)
    changed = base.astype(np.float64) != tuned.astype(np.float64)
    assert 0 < changed.sum() < changed.size
    assert null is not None
    assert null.rows.expected == pytest.approx(brute_force(base, changed), rel=1e-12)
    assert null.cols.expected == pytest.approx(brute_force(base.T, changed.T), rel=1e-12)


def test_integers_are_one_stratum_and_not_read(tmp_path, monkeypatch):
    base = np.arange(24, dtype=np.int32).reshape(4, 6)
    tuned = base + (base % 5 == 0)
    plan, tallies = compare(write(tmp_path / "b", w=base), write(tmp_path / "t", w=tuned.astype(np.int32)))
    monkeypatch.setattr(margins, "read_entries", None)
    (null,) = magnitude_nulls(plan, tallies, view=View.NATIVE)
    assert null is not None
    assert null.rows.expected == pytest.approx(1, rel=1e-12)
    assert null.cols.expected == pytest.approx(1, rel=1e-12)


def test_vectors_and_unchanged_and_fully_changed_matrices_have_no_null(tmp_path):
    weights = np.random.default_rng(0).standard_normal((4, 5)).astype(np.float32)
    base = write(tmp_path / "b", same=weights, all=weights, norm=weights[0], some=weights)
    some = weights.copy()
    some[0, 0] += 1
    tuned = write(tmp_path / "t", same=weights, all=weights + 1, norm=weights[0] + 1, some=some)
    plan, tallies = compare(base, tuned)
    nulls = dict(
        zip([p.name for p in plan.pairs], magnitude_nulls(plan, tallies, view=View.NATIVE), strict=True)
    )
    assert {name for name, null in nulls.items() if null is not None} == {"some"}
    assert margin_bytes(plan) == 3 * 4 * 5 * 4


def test_a_tolerance_that_cuts_through_strata_has_no_null(tmp_path):
    base, tuned = pair((9, 14), base_dtype=np.float32, tuned_dtype=np.float32)
    plan, tallies = compare(write(tmp_path / "b", w=base), write(tmp_path / "t", w=tuned), mask="atol:1e-4")
    assert magnitude_nulls(plan, tallies, view=View.NATIVE) == (None,)


def test_slices_of_fused_and_resized_tensors_are_read_where_they_lie(tmp_path):
    base, tuned = pair((12, 14), base_dtype=BF16, tuned_dtype=BF16)
    write(tmp_path / "b", model__layers__0__self_attn__qkv_proj__weight=base)
    parts = {
        f"model__layers__0__self_attn__{name}_proj__weight": np.ascontiguousarray(tuned[rows])
        for name, rows in (("q", slice(0, 6)), ("k", slice(6, 9)), ("v", slice(9, 12)))
    }
    write(tmp_path / "t", **parts)
    plan, tallies = compare(tmp_path / "b", tmp_path / "t")
    nulls = dict(
        zip([p.name for p in plan.pairs], magnitude_nulls(plan, tallies, view=View.NATIVE), strict=True)
    )
    null = nulls["model.layers.0.self_attn.qkv_proj.weight:q_proj"]
    assert null is not None
    assert null.rows.expected == pytest.approx(brute_force(base[:6], (base != tuned)[:6]), rel=1e-12)


def test_alternating_rows_of_a_fused_base_are_read_group_by_group(tmp_path):
    base, tuned = pair((24, 14), base_dtype=BF16, tuned_dtype=BF16)
    folder = write(tmp_path / "b", model__layers__0__self_attn__query_key_value__weight=base)
    config = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 12}
    (folder / "config.json").write_text(json.dumps(config))
    grouped = tuned.reshape(2, 4, 3, 14)  # group × (two queries, key, value) × rows × columns
    parts = {"q": grouped[:, :2], "k": grouped[:, 2], "v": grouped[:, 3]}
    write(
        tmp_path / "t",
        **{
            f"model__layers__0__self_attn__{name}_proj__weight": np.ascontiguousarray(part.reshape(-1, 14))
            for name, part in parts.items()
        },
    )
    plan, tallies = compare(folder, tmp_path / "t")
    assert len(plan.pairs) == 3
    nulls = dict(
        zip([p.name for p in plan.pairs], magnitude_nulls(plan, tallies, view=View.NATIVE), strict=True)
    )
    null = nulls["model.layers.0.self_attn.query_key_value.weight:q_proj"]
    queries = base.reshape(2, 4, 3, 14)[:, :2].reshape(-1, 14)
    assert null is not None
    assert null.rows.expected == pytest.approx(
        brute_force(queries, queries != parts["q"].reshape(-1, 14)), rel=1e-12
    )


def _long_rows(tmp_path) -> tuple[Path, Path]:
    base, tuned = pair((7, 700), base_dtype=np.float32, tuned_dtype=np.float32)
    more = pair((50, 30), base_dtype=BF16, tuned_dtype=BF16, seed=1)
    return write(tmp_path / "b", w=base, x=more[0]), write(tmp_path / "t", w=tuned, x=more[1])


def test_results_are_the_same_bits_for_any_units_and_workers(tmp_path):
    base, tuned = _long_rows(tmp_path)
    found = set()
    for unit_bytes, workers in ((1 << 26, 1), (1 << 26, 3), (256, 1), (4096, 2)):
        plan, tallies = compare(base, tuned, view=View.SERVED, unit_bytes=unit_bytes)
        found.add(magnitude_nulls(plan, tallies, view=View.SERVED, workers=workers))
    assert len(found) == 1


def test_rows_longer_than_a_block_are_counted_whole(tmp_path, monkeypatch):
    base, tuned = _long_rows(tmp_path)
    plan, tallies = compare(base, tuned, view=View.SERVED)
    whole = magnitude_nulls(plan, tallies, view=View.SERVED)
    monkeypatch.setattr(margins, "blocks_of", partial(blocks_of, block_bytes=256))
    read: list[int] = []
    pieces = magnitude_nulls(plan, tallies, view=View.SERVED, on_bytes=read.append)
    assert sum(read) == margin_bytes(plan)
    for one, other in zip(whole, pieces, strict=True):
        assert one is not None
        assert other is not None
        for x, y in ((one.rows, other.rows), (one.cols, other.cols)):
            assert (x.expected, x.sd) == pytest.approx((y.expected, y.sd), rel=1e-12)


def test_a_base_that_changed_since_the_first_pass_is_refused(tmp_path):
    base, tuned = _long_rows(tmp_path)
    plan, tallies = compare(base, tuned)
    os.utime(base / "model.safetensors", ns=(1, 1))
    with pytest.raises(ChangedInputError, match=r"model\.safetensors"):
        magnitude_nulls(plan, tallies, view=View.SERVED)


def _lines(plan: Plan, tallies: tuple[Tally, ...], view: View):
    """(name, rows, cols) of every matrix with a null."""
    nulls = magnitude_nulls(plan, tallies, view=view)
    for p, tally, null in zip(plan.pairs, tallies, nulls, strict=True):
        if null is not None:
            assert tally.axes is not None
            rows, cols = p.base.rows_cols
            yield (
                p.name,
                describe_lines(tally.axes.rows, cols, null.rows),
                describe_lines(tally.axes.cols, rows, null.cols),
            )


def test_rounding_alone_stripes_real_weights_as_much_as_expected(tmp_path):
    """A normal update of one size, rounded once to bf16: every score above 1 is the magnitudes' doing."""
    rng = np.random.default_rng(5)
    source = ADDITION / "base-bf16" / "model.safetensors"
    tuned = {}
    for name, weights in load_file(source).items():
        moved = weights.astype(np.float64) + 3e-4 * rng.standard_normal(weights.shape)
        tuned[name] = moved.astype(BF16)
    (tmp_path / "t").mkdir()
    save_file(tuned, tmp_path / "t" / "model.safetensors")
    found = list(_lines(*compare(ADDITION / "base-bf16", tmp_path / "t"), View.NATIVE))
    assert len(found) == 23
    lines = [line for _, rows, cols in found for line in (rows, cols)]
    z = np.array([line.z for line in lines])
    assert np.max(np.abs(z)) < 4, "46 scores"
    assert np.std(z) == pytest.approx(1, abs=0.3)
    assert max(line.expected for line in lines) > 1.5, "magnitudes alone do stripe these weights"
    assert not any(line.is_striped for line in lines)


def test_stripes_planted_in_real_weights_stand_out(tmp_path):
    rng = np.random.default_rng(6)
    tensors = load_file(ADDITION / "base-bf16" / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    tuned = {}
    for key, weights in tensors.items():
        size = np.full(weights.shape, 3e-4)
        if key == name:
            size[:, [4, 77, 120]] *= 30
        tuned[key] = (weights.astype(np.float64) + size * rng.standard_normal(size.shape)).astype(BF16)
    (tmp_path / "t").mkdir()
    save_file(tuned, tmp_path / "t" / "model.safetensors")
    found = _lines(*compare(ADDITION / "base-bf16", tmp_path / "t"), View.NATIVE)
    striped = [(n, axis) for n, *axes in found for axis, line in enumerate(axes) if line.is_striped]
    assert striped == [(name, 1)]
