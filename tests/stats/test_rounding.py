"""The half-ULP law on real runs, and the displacement fit on simulated ones."""

import math
from pathlib import Path

import numpy as np
import pytest

from sparsity_audit.checkpoint.opening import open_checkpoint
from sparsity_audit.checkpoint.store import LocalFile
from sparsity_audit.compare.accumulate import CODE_DTYPE, Accumulator, KernelSpec
from sparsity_audit.compare.numpy_kernel import NumpyKernel, to_float64
from sparsity_audit.stats.rounding import fit_displacement, half_ulp_interval
from sparsity_audit.stats.tally import ViewTally
from sparsity_audit.types import Criterion, DType

DATA = Path(__file__).parents[1] / "data" / "addition"
CRITERIA = (Criterion.parse("bitwise"), Criterion.parse("value"))


def codes_of(folder):
    catalogue = open_checkpoint(DATA / folder)
    parts = []
    for spec in catalogue.tensors.values():
        buffer = bytearray(spec.num_bytes)
        with LocalFile(catalogue.files[spec.file]) as source:
            source.read_into(memoryview(buffer), spec.extent.start)
        parts.append(np.frombuffer(buffer, dtype=CODE_DTYPE[spec.dtype.itemsize]))
    return np.concatenate(parts)


def tally(base, tuned, dtype=DType.BF16):
    acc = Accumulator(
        KernelSpec(dtype=dtype, criteria=CRITERIA, mask=1, level="full"), rows=1, cols=base.size
    )
    NumpyKernel().compare(base.reshape(1, -1), tuned.reshape(1, -1), acc, first_row=0, first_col=0, bits=None)
    return acc.view_tally()


def rounded(values):
    out = np.empty(values.shape, dtype=np.uint16)
    NumpyKernel().to_bf16(values.view(np.uint64), DType.F64, out)
    return out


@pytest.mark.parametrize(
    ("folder", "lr", "law", "measured"),
    [
        ("grpo-bf16-lr1e-4-seed0", 1e-4, 0.807, 0.8155),
        ("grpo-bf16-lr1e-4-seed1", 1e-4, 0.807, 0.8136),
        ("grpo-bf16-seed0", 3e-4, 0.363, 0.3802),
        ("sft-bf16", 3e-4, 0.363, 0.3782),
    ],
)
def test_the_law_gives_the_known_shares_and_its_interval_holds_the_measured_ones(folder, lr, law, measured):
    view = tally(codes_of("base-bf16"), codes_of(folder))
    prediction = half_ulp_interval(view, DType.BF16, lr=lr, weights_dtype=DType.BF16)
    assert prediction.reason is None
    assert prediction.entries == 148_928
    assert round(prediction.at_lr, 3) == law
    sparsity = 1 - view.changed["value"] / view.entries
    assert sparsity == pytest.approx(measured, abs=5e-5)
    assert prediction.lower < sparsity < prediction.upper


def test_the_law_is_one_step_per_octave():
    base = codes_of("base-bf16")
    view = tally(base, base)
    found = {
        half_ulp_interval(view, DType.BF16, lr=lr, weights_dtype=DType.BF16).at_lr
        for lr in (6.2e-5, 8e-5, 1e-4, 1.2e-4)
    }
    assert len(found) == 1


def test_powers_of_two_freeze_at_half_the_step_inwards():
    # 1.0 has half gaps 2^-8 above and 2^-9 below; 1.0078125 has 2^-8 on both sides.
    for code, lower in ((0x3F80, 0.0), (0x3F81, 1.0)):
        base = np.array([code], dtype=np.uint16)
        prediction = half_ulp_interval(
            tally(base, base), DType.BF16, lr=1.5 * 2.0**-10, weights_dtype=DType.BF16
        )
        assert (prediction.lower, prediction.at_lr, prediction.upper) == (lower, 1.0, 1.0)


def test_the_law_is_refused_for_wide_masters_and_wide_bases_with_the_reason():
    view = tally(codes_of("base-bf16"), codes_of("sft-bf16"))
    prediction = half_ulp_interval(view, DType.BF16, lr=1e-4, weights_dtype=DType.F32)
    assert prediction.at_lr is prediction.lower is prediction.upper is None
    assert "not for fp32 weights that are cast at the end" in prediction.reason
    wide = half_ulp_interval(ViewTally(), DType.F32, lr=1e-4, weights_dtype=DType.BF16)
    assert "stored in fp32" in wide.reason
    nothing = half_ulp_interval(ViewTally(), DType.BF16, lr=1e-4, weights_dtype=DType.BF16)
    assert nothing.reason == "there are no finite base values"


@pytest.mark.parametrize("sigma", [1e-6, 3e-5, 1e-4, 1e-3])
def test_a_normal_update_of_real_weights_rounded_once_gives_its_sigma_back(sigma):
    base = codes_of("base-bf16")
    update = np.random.default_rng(7).normal(0, sigma, base.size)
    view = tally(base, rounded(to_float64(base, DType.BF16) + update))
    fit = fit_displacement(view, DType.BF16)
    # Information on log σ: an entry near its threshold contributes about 1.
    assert fit.changed > 200
    assert abs(math.log(fit.sigma / sigma)) < 4 / math.sqrt(fit.changed)
    assert fit.pseudo_r2 > 0.95
    assert fit.max_residual < 0.1
    assert fit.entries == np.count_nonzero(base & 0x7FFF)


def test_the_fit_needs_the_half_gap_below_powers_of_two():
    base = np.repeat(np.array([0x3C00, 0x3C01], dtype=np.uint16), 200_000)
    update = np.random.default_rng(3).normal(0, 1.2e-5, base.size)
    fit = fit_displacement(tally(base, rounded(to_float64(base, DType.BF16) + update)), DType.BF16)
    assert fit.sigma == pytest.approx(1.2e-5, rel=0.02)
    assert fit.max_residual < 0.002


def test_a_rate_that_does_not_depend_on_the_exponent_is_called_a_bad_fit():
    base = codes_of("base-bf16")
    moved = np.random.default_rng(5).random(base.size) < 0.3
    fit = fit_displacement(tally(base, base + moved.astype(np.uint16)), DType.BF16)
    assert fit.pseudo_r2 < 0
    assert fit.max_residual > 0.3


@pytest.mark.parametrize(
    ("base", "tuned", "reason"),
    [
        ([0x3F81, 0x3F82], [0x3F81, 0x3F82], "no entry changed"),
        ([0x3F81, 0x3F82], [0x3F80, 0x3F83], "every entry changed"),
        ([0x0000, 0x7FC0], [0x0001, 0x7FC0], "there are no non-zero finite base values"),
    ],
)
def test_sigma_is_undefined_where_nothing_or_everything_changed(base, tuned, reason):
    fit = fit_displacement(tally(np.array(base, np.uint16), np.array(tuned, np.uint16)), DType.BF16)
    assert fit.reason == reason
    assert fit.sigma is fit.deviance is fit.pseudo_r2 is fit.max_residual is None


def test_extreme_exponents_do_not_break_the_fit():
    values = np.array([5e-324, 1.0, 1.7e308, -1.0])
    tuned = np.array([1e-323, 1.0, 1.7e308, -1.0])
    fit = fit_displacement(tally(values.view(np.uint64), tuned.view(np.uint64), DType.F64), DType.F64)
    assert math.isfinite(fit.sigma)
    assert math.isfinite(fit.deviance)
