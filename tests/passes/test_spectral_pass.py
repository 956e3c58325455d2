"""Chosen tensors are read whole and measured in the asked view; what is no matrix says so."""

from __future__ import annotations

import numpy as np
import pytest
from support import plan_of

from sparsity_audit.compare.numpy_kernel import NumpyKernel
from sparsity_audit.errors import UsageError
from sparsity_audit.passes.execute import run_plan
from sparsity_audit.passes.spectral import choose_spectral, measure_spectra
from sparsity_audit.types import Criterion, View


def _measure(plan, *patterns: str, criterion: str = "value", view: View = View.NATIVE, **options):
    tallies = run_plan(plan, kernel=NumpyKernel())
    chosen = choose_spectral(plan, patterns, **{"max_dim": 4096, **options})
    return measure_spectra(plan, tallies, chosen, criterion=Criterion.parse(criterion), view=view)


def _numbers(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _codes(values: np.ndarray) -> np.ndarray:
    return (values.astype(np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16)


def _values(codes: np.ndarray) -> np.ndarray:
    return (codes.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)


@pytest.mark.parametrize("unit_bytes", [1 << 26, 700])
def test_the_matrices_are_the_stored_values_however_units_are_cut(write_checkpoint, unit_bytes: int) -> None:
    base = _numbers((40, 24))
    update = (np.outer(np.arange(40), np.ones(24)) / 64).astype(np.float32)
    tuned = np.round(base * 1024).astype(np.float32) / 1024 + update
    base = np.round(base * 1024).astype(np.float32) / 1024
    plan = plan_of(
        write_checkpoint("b", {"w": base}), write_checkpoint("t", {"w": tuned}), unit_bytes=unit_bytes
    )
    (record,) = _measure(plan, "w")
    assert record.observed.rank_float64 == 1.0
    expected = np.linalg.norm(update.astype(float))
    assert record.frobenius_norm == pytest.approx(expected, rel=1e-8)
    # Entries are whole multiples of 2^-10 below 2^5: float32 adds them exactly; row 0 did not move.
    assert record.changed == 39 * 24


def test_the_criterion_decides_the_mask_and_not_the_update(write_checkpoint) -> None:
    base = np.zeros((8, 8), dtype=np.float32)
    base[0, 0] = 1.0
    tuned = base + np.float32(1e-6)
    tuned[3, :] += np.float32(1.0)
    plan = plan_of(write_checkpoint("b", {"w": base}), write_checkpoint("t", {"w": tuned}), mask="atol:1e-5")
    records = [_measure(plan, "w", criterion=text)[0] for text in ("value", "atol:1e-5", "top:3")]
    assert [r.changed for r in records] == [64, 8, 64]
    assert [r.criterion for r in records] == ["value", "atol:1e-5", "value"]
    assert len({r.frobenius_norm for r in records}) == 1


def test_the_served_view_measures_what_bf16_shows(write_checkpoint) -> None:
    base = _numbers((20, 16))
    tuned = base + 1e-3 * _numbers((20, 16), 1)
    plan = plan_of(write_checkpoint("b", {"w": base}), write_checkpoint("t", {"w": tuned}), view=View.SERVED)
    native, served = (_measure(plan, "w", view=view)[0] for view in View)
    assert (native.view, served.view) == (View.NATIVE, View.SERVED)
    assert native.changed == 320
    assert 0 < served.changed < 320
    kernel, rounded = NumpyKernel(), []
    from sparsity_audit.types import DType

    for side in (base, tuned):
        codes = np.empty(side.shape, dtype=np.uint16)
        kernel.to_bf16(side.view(np.uint32), DType.F32, codes)
        rounded.append(_values(codes))
    assert served.frobenius_norm == pytest.approx(np.linalg.norm(rounded[1] - rounded[0]), rel=1e-8)
    assert served.tolerances.rounding > 100 * native.tolerances.rounding


def test_sides_of_different_dtypes_meet_without_rounding(write_checkpoint) -> None:
    base = _codes(_numbers((12, 10)))
    tuned = (_values(base) + 2.0**-12).astype(np.float32)
    plan = plan_of(write_checkpoint("b", {"w": base}), write_checkpoint("t", {"w": tuned}))
    (record,) = _measure(plan, "w")
    expected = np.linalg.norm(tuned.astype(float) - _values(base))
    assert record.frobenius_norm == pytest.approx(expected, rel=1e-8)


def test_what_is_no_float_matrix_is_refused_with_the_reason_and_the_rest_measured(write_checkpoint) -> None:
    tensors = {
        "conv": _numbers((3, 4, 5)),
        "norm": _numbers((7,)),
        "steps": np.arange(12, dtype=np.int32).reshape(3, 4),
        "nan": np.array([[1.0, np.nan], [1.0, 2.0]], dtype=np.float32),
        "empty": np.zeros((0, 4), dtype=np.float32),
        "w": _numbers((6, 5)),
    }
    tuned = {name: (array * 2).astype(array.dtype) for name, array in tensors.items()}
    plan = plan_of(write_checkpoint("b", tensors), write_checkpoint("t", tuned))
    records = {record.name: record for record in _measure(plan, "*")}
    assert "[3, 4, 5] is no matrix" in records["conv"].refused
    assert "[7] is no matrix" in records["norm"].refused
    assert "int32" in records["steps"].refused
    assert "NaN" in records["nan"].refused
    if "empty" in records:
        assert "no entries" in records["empty"].refused
    assert records["w"].refused == ""
    assert records["w"].observed.nss == pytest.approx(1.0, rel=1e-8)
    assert all(record.observed is None for name, record in records.items() if name != "w")


def test_block_scaled_fp8_is_measured_by_its_values(tmp_path) -> None:
    import json

    from sparsity_audit.compare.numpy_kernel import to_float64
    from sparsity_audit.types import DType

    codes = [np.arange(number, 16 + number, dtype=np.uint8).reshape(4, 4) for number in (40, 43)]
    scales = 0.5, 3.0
    for name, side, scale in zip(("b", "t"), codes, scales, strict=True):
        header = {
            "w.weight": {"dtype": "F8_E4M3", "shape": [4, 4], "data_offsets": [0, 16]},
            "w.weight_scale_inv": {"dtype": "F32", "shape": [1, 1], "data_offsets": [16, 20]},
        }
        text = json.dumps(header).encode()
        data = side.tobytes() + np.float32(scale).tobytes()
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
        config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [4, 4]}}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    record = _measure(plan_of(tmp_path / "b", tmp_path / "t"), "w.weight")[0]
    values = [to_float64(c, DType.F8_E4M3) * scale for c, scale in zip(codes, scales, strict=True)]
    assert record.frobenius_norm == pytest.approx(np.linalg.norm(values[1] - values[0]), rel=1e-8)
    assert record.tolerances.rounding is record.observed.rank_rounding is None


def test_a_glob_without_a_match_is_an_error_and_globs_join(write_checkpoint) -> None:
    names = ("layers.0.q", "layers.0.k", "layers.1.q")
    base = {name: _numbers((4, 4), i) for i, name in enumerate(names)}
    tuned = {name: array + 1 for name, array in base.items()}
    plan = plan_of(write_checkpoint("b", base), write_checkpoint("t", tuned))
    chosen = choose_spectral(plan, ("*.q", "layers.0.*"), max_dim=4096)
    assert [plan.pairs[i].name for i in chosen.pairs] == ["layers.0.k", "layers.0.q", "layers.1.q"]
    with pytest.raises(UsageError, match=r"--spectral 'layers\.7\.\*': matches no compared tensor"):
        choose_spectral(plan, ("*.q", "layers.7.*"), max_dim=4096)


def test_the_note_states_matrices_operations_time_and_memory(write_checkpoint) -> None:
    base = {"w": _numbers((300, 200)), "v": _numbers((5,))}
    tuned = {name: array + 1 for name, array in base.items()}
    plan = plan_of(write_checkpoint("b", base), write_checkpoint("t", tuned))
    note = choose_spectral(plan, ("*",), max_dim=4096).note
    # 5 decompositions at 14·300·200² + 8·200³ and 4 of values at 4·300·200² − 4/3·200³.
    assert "1 matrix (1 more refused)" in note
    assert "3 random references" in note
    assert "1.3e+09 float64 operations" in note
    assert "MiB" in note


def test_two_runs_give_equal_records_whatever_the_workers(addition) -> None:
    found = []
    for unit_bytes, workers in ((1 << 26, 1), (4096, 2)):
        plan = plan_of(addition / "base-bf16", addition / "grpo-bf16-seed0", unit_bytes=unit_bytes)
        tallies = run_plan(plan, kernel=NumpyKernel(), workers=workers)
        chosen = choose_spectral(plan, ("*",), max_dim=4096, num_draws=2)
        found.append(
            measure_spectra(plan, tallies, chosen, criterion=Criterion.parse("value"), view=View.NATIVE)
        )
    assert found[0] == found[1]
    measured = [record for record in found[0] if not record.refused]
    assert measured
    for record in measured:
        assert record.reference_mean is not None
        assert 0 < record.observed.stable_rank <= record.full_rank
        assert record.observed.stable_rank <= record.observed.effective_rank_energy + 1e-6 * record.full_rank
        assert record.observed.effective_rank_energy <= record.observed.effective_rank + 1e-6
