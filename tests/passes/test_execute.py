"""The pass gives the same tallies and bits however it is cut, and notices inputs that change."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support import BitCollector, plan_of

from sparsity_audit.compare.accumulate import Accumulator
from sparsity_audit.compare.numpy_kernel import NumpyKernel
from sparsity_audit.compare.reference import ReferenceKernel
from sparsity_audit.errors import ChangedInputError
from sparsity_audit.passes.execute import run_plan
from sparsity_audit.types import View


@pytest.mark.parametrize("pair", [("base-bf16", "grpo-bf16-seed0"), ("base-fp32", "grpo-fp32-seed0")])
def test_tallies_and_bits_do_not_depend_on_units_or_workers(addition: Path, pair: tuple[str, str]) -> None:
    results = []
    for unit_bytes, workers in ((1 << 26, 1), (1000, 1), (1000, 3), (128, 2)):
        bits = BitCollector()
        plan = plan_of(addition / pair[0], addition / pair[1], unit_bytes=unit_bytes)
        results.append((run_plan(plan, kernel=NumpyKernel(), workers=workers, bits=bits), bits.masks))
    for tallies, masks in results[1:]:
        assert tallies == results[0][0]
        assert all(np.array_equal(masks[name], results[0][1][name]) for name in masks)


def test_the_pass_equals_the_reference_kernel_on_whole_tensors(addition: Path) -> None:
    plan = plan_of(addition / "base-bf16", addition / "grpo-bf16-lr1e-4-seed0", unit_bytes=3000)
    bits = BitCollector()
    tallies = run_plan(plan, kernel=NumpyKernel(), bits=bits)
    number = next(
        i for i, pair in enumerate(plan.pairs) if pair.name == "model.layers.1.self_attn.k_proj.weight"
    )
    pair, spec = plan.pairs[number], plan.specs[number]
    codes = [_codes(side, part) for side, part in ((plan.base, pair.base), (plan.tuned, pair.tuned))]
    rows, cols = pair.base.rows_cols
    acc = Accumulator(spec.kernel_spec(View.NATIVE), rows=rows, cols=cols)
    packed = np.empty((rows, -(-cols // 8)), dtype=np.uint8)
    ReferenceKernel().compare(*codes, acc, first_row=0, first_col=0, bits=packed)
    assert tallies[number].native == acc.view_tally()
    assert tallies[number].axes == acc.axis_counts()
    assert np.array_equal(
        np.unpackbits(packed, axis=1, bitorder="little").astype(bool), bits.masks[pair.name]
    )


def _codes(catalogue, part) -> np.ndarray:
    data = catalogue.files[part.spec.file].path.read_bytes()
    raw = data[part.spec.extent.start : part.spec.extent.stop]
    return np.frombuffer(raw, dtype=np.uint16).reshape(part.rows_cols)


def test_fingerprints_do_not_depend_on_units_and_tell_changed_tensors_from_equal_ones(addition: Path) -> None:
    runs = []
    for unit_bytes in (1 << 26, 1000):
        plan = plan_of(addition / "base-bf16", addition / "sft-bf16", unit_bytes=unit_bytes)
        runs.append(run_plan(plan, kernel=NumpyKernel()))
    prints = [[(t.base_fingerprint, t.tuned_fingerprint) for t in tallies] for tallies in runs]
    assert prints[0] == prints[1]
    for tally in runs[0]:
        assert (tally.base_fingerprint == tally.tuned_fingerprint) == (tally.native.changed["bitwise"] == 0)


def test_a_file_that_is_rewritten_during_the_pass_is_an_error(write_checkpoint) -> None:
    codes = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    base, tuned = write_checkpoint("base", {"w": codes}), write_checkpoint("tuned", {"w": codes + 1})
    plan = plan_of(base, tuned, unit_bytes=128)
    file = tuned / "model.safetensors"

    def rewrite(_unit: object) -> None:
        file.write_bytes(file.read_bytes())

    with pytest.raises(ChangedInputError, match="changed during the run"):
        run_plan(plan, kernel=NumpyKernel(), on_unit=rewrite)


def test_a_file_that_is_truncated_during_the_pass_is_an_error(write_checkpoint) -> None:
    codes = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    base, tuned = write_checkpoint("base", {"w": codes}), write_checkpoint("tuned", {"w": codes + 1})
    plan = plan_of(base, tuned, unit_bytes=1 << 20)
    file = tuned / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ChangedInputError, match="ends at byte"):
        run_plan(plan, kernel=NumpyKernel())


def test_sides_of_different_dtypes_meet_without_rounding(write_checkpoint) -> None:
    values = np.array([[1.0, -2.0, 0.5, 3.0]], dtype=np.float32)
    tuned_values = values.copy()
    tuned_values[0, 1] = np.nextafter(np.float32(-2.0), np.float32(0))
    bf16 = (values.view(np.uint32) >> 16).astype(np.uint16)
    plan = plan_of(write_checkpoint("base", {"w": bf16}), write_checkpoint("tuned", {"w": tuned_values}))
    (tally,) = run_plan(plan, kernel=NumpyKernel())
    assert tally.native.changed["value"] == 1
    assert tally.served is not None
    assert tally.served.changed["value"] == 0
