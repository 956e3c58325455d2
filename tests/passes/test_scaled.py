"""Block-scaled fp8 against a slow re-calculation in exact fractions, however the pass is cut."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from coded_checkpoint import blocks_config, write
from hypothesis import given, settings
from hypothesis import strategies as st
from support import BitCollector, plan_of

from sparsity_audit.compare.numpy_kernel import NumpyKernel, to_float64
from sparsity_audit.compare.reference import ReferenceKernel
from sparsity_audit.errors import ChangedInputError
from sparsity_audit.passes import execute
from sparsity_audit.passes.execute import run_plan
from sparsity_audit.passes.margins import magnitude_nulls
from sparsity_audit.passes.topk import select_top
from sparsity_audit.types import Criterion, DType, View


@st.composite
def scaled_side(draw, shape, block):
    """fp8 codes without NaN, and scales of any sign and size."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    codes = rng.integers(0, 256, shape, dtype=np.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0x3F
    grid = (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
    scales = np.ldexp(rng.normal(size=grid), rng.integers(-40, 40, grid)).astype(np.float32)
    return codes, scales


def exact_values(codes: np.ndarray, scales: np.ndarray, block: tuple[int, int]) -> list[Fraction]:
    numbers = to_float64(np.arange(256, dtype=np.uint8), DType.F8_E4M3)
    values = []
    for place in np.ndindex(codes.shape):
        *lead, row, col = place
        scale = scales[(*lead, row // block[0], col // block[1])]
        values.append(Fraction(float(numbers[codes[place]])) * Fraction(float(scale)))
    return values


def _bf16(value: Fraction) -> float:
    """To nearest, ties to even, in exact arithmetic."""
    if value == 0:
        return 0.0
    exponent = math.frexp(float(value))[1] - 1  # the value is a float64, exactly
    step = Fraction(2) ** (max(exponent, -126) - 7)
    return float(round(value / step) * step)


@settings(deadline=None, max_examples=30)
@given(
    data=st.data(),
    shape=st.sampled_from([(7, 9), (3, 5, 6), (16, 20), (1, 130)]),
    block=st.sampled_from([(2, 3), (4, 64), (128, 128)]),
    unit_bytes=st.sampled_from([64, 200, 1 << 20]),
    other=st.sampled_from(["scales", "codes", "both", "bf16"]),
)
def test_values_are_exact_products_and_codes_are_counted_apart(
    tmp_path_factory, data, shape, block, unit_bytes, other
) -> None:
    codes, scales = data.draw(scaled_side(shape, block))
    more_codes, more_scales = data.draw(scaled_side(shape, block))
    keep = np.random.default_rng(math.prod(shape)).random(shape) < 0.5
    more_codes = np.where(keep, codes, more_codes)
    values, folder = exact_values(codes, scales, block), tmp_path_factory.mktemp("scaled")
    sides = [{"w.weight": ("F8_E4M3", codes), "w.weight_scale_inv": ("F32", scales)}]
    if other == "bf16":
        tuned = [_bf16(value) for value in values]
        stored = (np.array(tuned, dtype=np.float32).view(np.uint32) >> 16).astype(np.uint16).reshape(shape)
        sides.append({"w.weight": ("BF16", stored)})
        changed_codes = None
    else:
        new_codes = codes if other == "scales" else more_codes
        new_scales = scales if other == "codes" else more_scales
        sides.append({"w.weight": ("F8_E4M3", new_codes), "w.weight_scale_inv": ("F32", new_scales)})
        tuned = exact_values(new_codes, new_scales, block)
        changed_codes = int((codes != new_codes).sum())
    paths = [
        write(folder / name, side, blocks_config(*block))
        for name, side in zip(("base", "tuned"), sides, strict=True)
    ]
    plan, bits = plan_of(*paths, unit_bytes=unit_bytes), BitCollector()
    number = next(i for i, pair in enumerate(plan.pairs) if pair.name == "w.weight")
    assert plan.specs[number].native_dtype is DType.F64
    tally = run_plan(plan, kernel=NumpyKernel(), bits=bits)[number]
    differs = np.array([a != b for a, b in zip(values, tuned, strict=True)])
    assert tally.native.changed["value"] == differs.sum()
    if changed_codes is not None:
        assert tally.native.changed["bitwise"] == changed_codes
    deltas = [abs(float(b) - float(a)) for a, b in zip(values, tuned, strict=True)]
    assert tally.native.changed["atol:1e-5"] == sum(delta > 1e-5 for delta in deltas)
    assert tally.native.max_abs == max(deltas)
    assert tally.served is not None
    assert tally.served.changed["value"] == sum(
        _bf16(a) != _bf16(Fraction(b)) for a, b in zip(values, tuned, strict=True)
    )
    cols = shape[-1]
    assert np.array_equal(bits.masks["w.weight"][:, :cols], differs.reshape(-1, cols))
    assert tally.axes is not None
    assert tally.axes.rows.tolist() == differs.reshape(-1, cols).sum(axis=1).tolist()


@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_with_equal_scales_value_counts_the_codes_that_are_other_numbers(tmp_path_factory, data) -> None:
    codes, scales = data.draw(scaled_side((9, 20), (4, 8)))
    other, _ = data.draw(scaled_side((9, 20), (4, 8)))
    codes[0, :3], other[0, :3] = 0x00, 0x80
    folder = tmp_path_factory.mktemp("equal")
    paths = [
        write(
            folder / name,
            {"w.weight": ("F8_E4M3", side), "w.weight_scale_inv": ("F32", scales)},
            blocks_config(4, 8),
        )
        for name, side in (("base", codes), ("tuned", other))
    ]
    tally = run_plan(plan_of(*paths), kernel=ReferenceKernel())[0]
    both_zero = ((codes | other) & 0x7F) == 0
    assert tally.native.changed["bitwise"] == (codes != other).sum()
    assert tally.native.changed["value"] == ((codes != other) & ~both_zero).sum()


def _pair(tmp_path: Path, *, shape=(20, 30), block=(8, 16)) -> tuple[Path, Path, np.ndarray, np.ndarray]:
    """A pair in which a code changed here and a scale there; and which codes and which values changed."""
    rng = np.random.default_rng(3)
    codes = rng.integers(8, 0x70, shape, dtype=np.uint8)
    scales = np.ones((-(-shape[0] // block[0]), -(-shape[1] // block[1])), dtype=np.float32)
    new_codes, new_scales = codes.copy(), scales.copy()
    new_codes[1, 2:5] += 1
    new_scales[1, 1] = 2.0
    sides = []
    for name, c, s in (("base", codes, scales), ("tuned", new_codes, new_scales)):
        side = {"w.weight": ("F8_E4M3", c), "w.weight_scale_inv": ("F32", s)}
        sides.append(write(tmp_path / name, side, blocks_config(*block)))
    by_code = codes != new_codes
    by_value = by_code.copy()
    by_value[block[0] : 2 * block[0], block[1] : 2 * block[1]] = True
    return sides[0], sides[1], by_code, by_value


@pytest.mark.parametrize("mask", ["bitwise", "value"])
@pytest.mark.parametrize("unit_bytes", [64, 1 << 20])
def test_mask_rows_and_columns_follow_the_mask_criterion(tmp_path, mask, unit_bytes) -> None:
    base, tuned, by_code, by_value = _pair(tmp_path)
    expected = by_code if mask == "bitwise" else by_value
    bits = BitCollector()
    plan = plan_of(base, tuned, unit_bytes=unit_bytes, mask=mask)
    tally = run_plan(plan, kernel=NumpyKernel(), bits=bits, workers=2)[0]
    assert np.array_equal(bits.masks["w.weight"][:, :30], expected)
    assert tally.axes is not None
    assert tally.axes.rows.tolist() == expected.sum(axis=1).tolist()
    assert tally.axes.cols.tolist() == expected.sum(axis=0).tolist()
    assert tally.base_fingerprint != tally.tuned_fingerprint


@pytest.mark.parametrize("view", list(View))
def test_the_largest_movements_are_those_of_values(tmp_path, view) -> None:
    base, tuned, _, by_value = _pair(tmp_path)
    plan, bits = plan_of(base, tuned, unit_bytes=128), BitCollector()
    tallies = run_plan(plan, kernel=NumpyKernel())
    criterion = Criterion.parse(f"top:{int(by_value.sum())}:tensor")
    select_top(plan, tallies, criterion, view=view, workers=1, bits=bits)
    assert np.array_equal(bits.masks["w.weight"][:, :30], by_value)


def test_a_scaled_pair_counts_what_a_pair_of_fp64_tensors_with_its_values_counts(tmp_path) -> None:
    base, tuned, _, by_value = _pair(tmp_path)
    numbers = to_float64(np.arange(256, dtype=np.uint8), DType.F8_E4M3)
    wide = []
    for path in (base, tuned):
        data = (path / "model.safetensors").read_bytes()[-(600 + 4 * 6) :]
        codes = np.frombuffer(data[:600], dtype=np.uint8).reshape(20, 30)
        factors = np.frombuffer(data[600:], dtype=np.float32).reshape(3, 2).astype(np.float64)
        values = numbers[codes] * np.kron(factors, np.ones((8, 16)))[:20, :30]
        wide.append(write(tmp_path / f"wide-{path.name}", {"w.weight": ("F64", values)}))
    results = []
    for pair in ((base, tuned), tuple(wide)):
        plan = plan_of(*pair, unit_bytes=256)
        tallies = run_plan(plan, kernel=NumpyKernel())
        nulls = magnitude_nulls(plan, tallies, view=View.NATIVE)
        changed = {key: n for key, n in tallies[0].native.changed.items() if key != "bitwise"}
        results.append(
            (replace(tallies[0].native, changed=changed), tallies[0].served, tallies[0].axes, nulls[0])
        )
    assert results[0] == results[1]
    assert results[0][3] is not None
    assert results[0][0].changed["value"] == by_value.sum()


def test_nan_codes_of_any_sign_are_equal_values_in_other_codes(tmp_path) -> None:
    sides = [
        write(
            tmp_path / name,
            {
                "w.weight": ("F8_E4M3", np.array([[code, 0x38]], dtype=np.uint8)),
                "w.weight_scale_inv": ("F32", np.array([[0.5]], dtype=np.float32)),
            },
        )
        for name, code in (("base", 0x7F), ("tuned", 0xFF))
    ]
    tally = run_plan(plan_of(*sides), kernel=NumpyKernel())[0]
    assert (tally.native.changed["bitwise"], tally.native.changed["value"]) == (1, 0)
    assert tally.native.base_specials.nan == 1


def test_scales_in_another_file_that_is_rewritten_during_the_pass_are_an_error(tmp_path) -> None:
    base = _pair(tmp_path)[0]
    scales = {"w.weight_scale_inv": ("F32", np.ones((3, 2), dtype=np.float32))}
    weights = {"w.weight": ("F8_E4M3", np.full((20, 30), 0x38, dtype=np.uint8))}
    split = tmp_path / "split"
    write(split, {}, blocks_config(8, 16))
    (split / "model.safetensors").unlink()
    names = {}
    for number, part in enumerate((weights, scales), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        (write(tmp_path / f"part{number}", part) / "model.safetensors").rename(split / file)
        names |= dict.fromkeys(part, file)
    (split / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    plan = plan_of(base, split, unit_bytes=128)
    file = split / "model-00002-of-00002.safetensors"
    with pytest.raises(ChangedInputError, match="changed during the run"):
        run_plan(plan, kernel=NumpyKernel(), on_unit=lambda _unit: file.write_bytes(file.read_bytes()))


def test_a_device_gets_plain_pairs_and_scaled_ones_are_counted_all_the_same(tmp_path, monkeypatch) -> None:
    codes = np.full((8, 8), 0x38, dtype=np.uint8)
    scales = np.ones((1, 1), dtype=np.float32)
    sides = []
    for name, step in (("base", 0), ("tuned", 1)):
        side = {
            "a.weight": ("BF16", np.full((4, 4), 0x3F80 + step, dtype=np.uint16)),
            "w.weight": ("F8_E4M3", codes + np.uint8(step)),
            "w.weight_scale_inv": ("F32", scales),
        }
        sides.append(write(tmp_path / name, side))
    plan = plan_of(*sides)
    expected = run_plan(plan, kernel=NumpyKernel())
    streamed: list[str] = []

    class DeviceKernel(NumpyKernel):
        name = "device"

    def stream_units(plan, units, *, kernel, base, tuned, bits):
        streamed.extend(plan.pairs[unit.pair].name for unit in units)
        for unit in units:
            yield unit, execute._run_unit(plan, unit, base=base, tuned=tuned, kernel=kernel, bits=bits)

    for module, names in (
        ("compare.device_kernel", {"DeviceKernel": DeviceKernel}),
        ("passes.device_stream", {"stream_units": stream_units}),
    ):
        stand_in = ModuleType(f"sparsity_audit.{module}")
        stand_in.__dict__.update(names)
        monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    assert run_plan(plan, kernel=DeviceKernel()) == expected
    assert streamed == ["a.weight", "w.weight_scale_inv"]
