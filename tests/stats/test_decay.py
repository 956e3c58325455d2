"""Weight decay found where it was put, and not where it was not."""

import numpy as np
import pytest

from sparsity_audit.compare.accumulate import Accumulator, KernelSpec
from sparsity_audit.compare.numpy_kernel import NumpyKernel
from sparsity_audit.stats.decay import decay_verdict, estimate_shrink
from sparsity_audit.stats.tally import Tally, ViewTally
from sparsity_audit.types import Criterion, DType

CRITERIA = (Criterion.parse("bitwise"), Criterion.parse("value"))


def decayed(base, steps, lr_wd):
    """AdamW's decay in fp32: `steps` multiplications, each rounded."""
    w, factor = base.copy(), np.float32(1.0 - lr_wd)
    for _ in range(steps):
        w *= factor
    return w


def simulate(seed, *, steps, lr_wd, moved, shape=(400, 64), size=1e-3):
    rng = np.random.default_rng(seed)
    base = rng.normal(0, 0.05, shape).astype(np.float32)
    tuned = decayed(base, steps, lr_wd)
    rows = rng.random(shape[0]) < moved
    tuned[rows] += rng.normal(0, size, (int(rows.sum()), shape[1])).astype(np.float32)
    return base, tuned, rows


def tally(base, tuned, shrink):
    acc = Accumulator(
        KernelSpec(dtype=DType.F32, criteria=CRITERIA, mask=1, level="full", shrink=shrink),
        rows=base.shape[0],
        cols=base.shape[1],
    )
    codes = base.view(np.uint32), tuned.view(np.uint32)
    NumpyKernel().compare(*codes, acc, first_row=0, first_col=0, bits=None)
    return Tally(native=acc.view_tally(), axes=acc.axis_counts())


@pytest.mark.parametrize("moved", [0.0, 0.1, 0.6, 0.95])
def test_the_shrink_of_adamw_decay_is_found_among_moved_rows(moved):
    base, tuned, _ = simulate(1, steps=600, lr_wd=2e-7, moved=moved)
    # 2e-7 is 1.7 to 3.4 ULP of an fp32 number: each step rounds to 2 or 3, so c is 1.2e-4 only up to that.
    found = estimate_shrink(base.reshape(-1).astype(np.float64), tuned.reshape(-1).astype(np.float64))
    assert found == pytest.approx(1.2e-4, rel=0.2)


def test_one_decay_step_without_rounding_spread_is_found_to_a_percent():
    base, tuned, _ = simulate(2, steps=1, lr_wd=1e-3, moved=0.5, size=1e-2)
    found = estimate_shrink(base.reshape(-1).astype(np.float64), tuned.reshape(-1).astype(np.float64))
    assert found == pytest.approx(1e-3, rel=0.01)


@pytest.mark.parametrize("size", [1e-6, 1e-4, 1e-2])
def test_symmetric_updates_have_no_shrink(size):
    rng = np.random.default_rng(4)
    base = rng.normal(0, 0.05, 50_000)
    assert estimate_shrink(base, base + rng.normal(0, size, base.size)) is None


def test_growth_is_not_decay():
    base = np.random.default_rng(5).normal(0, 0.05, 10_000)
    assert estimate_shrink(base, base * (1 + 1e-4)) is None


def test_nothing_changed_zeros_and_special_values_give_no_shrink():
    base = np.array([0.0, -0.0, np.nan, np.inf, -np.inf, 1.0, 5e-324, 1.7e308])
    assert estimate_shrink(base, base) is None
    assert estimate_shrink(base, base[::-1].copy()) is None
    assert estimate_shrink(np.empty(0), np.empty(0)) is None


def test_a_handful_of_entries_is_not_significant():
    base = np.random.default_rng(6).normal(0, 0.05, 30)
    assert estimate_shrink(base, base * (1 - 1e-4)) is None


def test_the_verdict_counts_decayed_rows_and_the_parts_add_up():
    base, tuned, rows = simulate(7, steps=600, lr_wd=2e-7, moved=0.3)
    c = estimate_shrink(base.reshape(-1).astype(np.float64), tuned.reshape(-1).astype(np.float64))
    verdict = decay_verdict(tally(base, tuned, c), shrink=c)
    assert verdict.verdict == "decay"
    assert verdict.unchanged + verdict.band + verdict.moved == verdict.entries == base.size
    assert verdict.unchanged_share + verdict.band_share + verdict.moved_share == pytest.approx(1, abs=1e-12)
    assert verdict.decay_only_rows == np.count_nonzero(~rows)
    # The net share is that of the decayed rows: false positives in the band are taken off by the mirror.
    assert verdict.net_decay_share == pytest.approx(np.count_nonzero(~rows) / len(rows), abs=0.005)
    assert verdict.mirror > 0


def test_a_band_no_clearer_than_its_mirror_is_no_decay():
    rng = np.random.default_rng(8)
    base = rng.normal(0, 0.05, (100, 100)).astype(np.float32)
    tuned = base + rng.normal(0, 1e-4, base.shape).astype(np.float32)
    verdict = decay_verdict(tally(base, tuned, 1e-3), shrink=1e-3)
    assert verdict.band > 100
    assert verdict.mirror > 100
    assert verdict.verdict == "no decay"
    assert verdict.net_decay_share == max(0, verdict.band - verdict.mirror) / base.size


def test_a_tally_without_decay_counts_has_no_verdict():
    assert decay_verdict(Tally(native=ViewTally(entries=1, changed={"value": 0})), shrink=1e-4) is None


def test_an_empty_tensor_has_no_shares():
    verdict = decay_verdict(
        tally(np.empty((0, 3), np.float32), np.empty((0, 3), np.float32), 1e-4), shrink=1e-4
    )
    assert verdict.net_decay_share is verdict.band_share is None
    assert verdict.verdict == "no decay"
