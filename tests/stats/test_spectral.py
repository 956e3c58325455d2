"""Spectral measures equal brute force and constructed spectra; a scattered update is the reference."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsity_audit.stats.base_masks import ALPHAS
from sparsity_audit.stats.factorise import ExactSvd, SketchedSvd, principal_angles, shuffled
from sparsity_audit.stats.spectral import (
    SpectralQuestion,
    rounding_edge,
    spectral_cost,
    spectral_record,
    subspace_rank,
)
from sparsity_audit.types import DType, View

NINE_DIGITS = 1e-8
"""Reported floats have nine significant digits."""


def _question(**changes) -> SpectralQuestion:
    question = SpectralQuestion(
        name="w",
        view=View.NATIVE,
        dtype=DType.F64,
        criterion="value",
        max_dim=4096,
        num_draws=3,
        seed=7,
    )
    return dataclasses.replace(question, **changes)


def _record(base: np.ndarray, tuned: np.ndarray, **changes):
    return spectral_record(base, tuned, base != tuned, _question(**changes))


def _orthonormal(rng: np.random.Generator, rows: int, cols: int) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((rows, cols)))[0]


def _with_values(rng: np.random.Generator, rows: int, cols: int, values: np.ndarray) -> np.ndarray:
    count = len(values)
    return (_orthonormal(rng, rows, count) * values) @ _orthonormal(rng, cols, count).T


def _bf16(values: np.ndarray) -> np.ndarray:
    """Rounded to bf16, ties away from even ignored: good enough to make stored values."""
    codes = values.astype(np.float32).view(np.uint32)
    return ((codes + np.uint32(0x8000)) & np.uint32(0xFFFF0000)).view(np.float32).astype(np.float64)


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (25, 25)])
def test_measures_of_a_constructed_spectrum_are_the_formulas(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    values = np.array([8.0, 4.0, 2.0, 1.0, 0.5])
    delta = _with_values(rng, *shape, values)
    record = _record(np.zeros(shape), delta)
    observed = record.observed
    assert observed is not None
    assert (observed.rank_float64, observed.rank_float32) == (5.0, 5.0)
    energies = values**2
    assert observed.stable_rank == pytest.approx(energies.sum() / 64, rel=NINE_DIGITS)
    for found, weights in ((observed.effective_rank, values), (observed.effective_rank_energy, energies)):
        shares = weights / weights.sum()
        assert found == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=NINE_DIGITS)
    # 64 + 16 = 80 of 85.25 is 93.8 %, with 4 98.5 %, with 1 99.7 %.
    assert observed.rank_99 == 4.0
    assert record.spectral_norm == pytest.approx(8.0, rel=NINE_DIGITS)
    assert record.frobenius_norm == pytest.approx(math.sqrt(85.25), rel=NINE_DIGITS)
    assert record.full_rank == min(shape)
    assert observed.nss is None, "the drift of a spectrum of zeros is not defined"


def test_equal_singular_values_have_effective_and_stable_rank_of_their_number() -> None:
    rng = np.random.default_rng(1)
    observed = _record(np.zeros((20, 12)), _with_values(rng, 20, 12, np.full(7, 3.0))).observed
    assert observed.stable_rank == observed.effective_rank == observed.effective_rank_energy == 7.0
    assert observed.rank_99 == observed.rank_float64 == 7.0


@pytest.mark.parametrize("rank", [1, 3, 10])
def test_the_rank_of_an_integer_low_rank_update_is_exact(rank: int) -> None:
    rng = np.random.default_rng(rank)
    base = rng.integers(-50, 50, size=(32, 24)).astype(float)
    left, right = rng.integers(-5, 6, size=(32, rank)), rng.integers(-5, 6, size=(rank, 24))
    delta = (left @ right).astype(float)
    observed = _record(base, base + delta).observed
    assert observed.rank_float64 == np.linalg.matrix_rank(delta) == rank


def test_a_scattered_fifth_has_full_rank_as_its_reference_has() -> None:
    rng = np.random.default_rng(2)
    base = rng.standard_normal((60, 50))
    delta = np.where(rng.random(base.shape) < 0.2, rng.standard_normal(base.shape), 0.0)
    record = _record(base, base + delta, num_draws=4)
    assert record.observed.rank_float64 == record.reference_mean.rank_float64 == record.full_rank == 50
    assert record.reference_sd.rank_float64 == 0.0
    # An update that is itself scattered cannot be told from the reference: 5 sd of 4 draws.
    for name in ("effective_rank", "stable_rank", "nss", "left_mean_cosine"):
        mean, sd = getattr(record.reference_mean, name), getattr(record.reference_sd, name)
        assert abs(getattr(record.observed, name) - mean) < 5 * sd + 0.02 * mean, name


def test_a_low_rank_update_stands_far_from_its_reference() -> None:
    rng = np.random.default_rng(3)
    base = rng.standard_normal((60, 50))
    record = _record(base, base + 0.01 * rng.standard_normal((60, 2)) @ rng.standard_normal((2, 50)))
    assert record.observed.rank_float64 == 2.0
    assert record.reference_mean.rank_float64 == 50.0
    assert record.observed.effective_rank < 2.01 < 30 < record.reference_mean.effective_rank


def test_storing_a_low_rank_update_in_bf16_makes_it_full_rank_but_not_above_rounding() -> None:
    rng = np.random.default_rng(4)
    base = _bf16(rng.standard_normal((96, 80)))
    update = _with_values(rng, 96, 80, np.array([6.0, 5.0, 4.0]))
    observed = _record(base, _bf16(base + update), dtype=DType.BF16).observed
    assert observed.rank_float64 == observed.rank_float32 == 80.0
    assert observed.rank_rounding == 3.0


@pytest.mark.parametrize(("dtype", "ulp"), [(DType.BF16, 2.0**-7), (DType.F16, 2.0**-10)])
def test_the_rounding_edge_of_equal_variances_is_the_known_one_and_holds(dtype: DType, ulp: float) -> None:
    rng = np.random.default_rng(5)
    values = rng.uniform(1.0, 2.0, size=(120, 90)) * np.where(rng.random((120, 90)) < 0.5, -1, 1)
    edge = rounding_edge(values, dtype)
    assert edge == pytest.approx(ulp / math.sqrt(12) * (math.sqrt(120) + math.sqrt(90)), rel=1e-12)
    error = np.round(values / ulp) * ulp - values
    assert 0.9 * edge < np.linalg.norm(error, 2) < 1.02 * edge


def test_the_rounding_edge_uses_subnormal_steps_near_zero() -> None:
    assert rounding_edge(np.zeros((1, 1)), DType.F16) == pytest.approx(
        2 * 2.0**-24 / math.sqrt(12), rel=1e-12
    )


def test_drift_and_angles_are_those_of_full_decompositions() -> None:
    rng = np.random.default_rng(6)
    base = rng.standard_normal((30, 20))
    tuned = base + 0.05 * rng.standard_normal((30, 20))
    record = _record(base, tuned)
    (u0, s0, v0), (u1, s1, v1) = (np.linalg.svd(m, full_matrices=False) for m in (base, tuned))
    k = record.k
    assert k == 5
    assert record.gap == pytest.approx((s0[4] - s0[5]) / s0[4], rel=NINE_DIGITS)
    nss = np.linalg.norm(s1 - s0) / np.linalg.norm(s0)
    assert record.observed.nss == pytest.approx(nss, rel=NINE_DIGITS)
    for side, first, second in (("left", u0[:, :k], u1[:, :k]), ("right", v0[:k].T, v1[:k].T)):
        cosines = np.linalg.svd(first.T @ second, compute_uv=False)
        assert getattr(record.observed, f"{side}_mean_cosine") == pytest.approx(cosines.mean(), abs=1e-9)
        assert getattr(record.observed, f"{side}_min_cosine") == pytest.approx(cosines.min(), abs=1e-9)
        degrees = math.degrees(math.acos(cosines.min()))
        assert getattr(record.observed, f"{side}_max_angle_deg") == pytest.approx(degrees, abs=2e-6)


@pytest.mark.parametrize("angle", [1e-9, 1e-4, 0.3, 1.2, math.pi / 2])
def test_the_angle_of_a_rotated_plane_is_found_small_or_large(angle: float) -> None:
    rng = np.random.default_rng(7)
    frame = _orthonormal(rng, 12, 4)
    turned = np.stack([frame[:, 0], math.cos(angle) * frame[:, 1] + math.sin(angle) * frame[:, 2]], axis=1)
    mixed = turned @ _orthonormal(rng, 2, 2)
    angles = principal_angles(frame[:, :2], mixed)
    # 1e-15 is the rounding of unit vectors; arccos of a cosine alone would be off by 1e-8.
    assert angles == pytest.approx([0.0, angle], abs=5e-15)


def test_a_pure_rotation_turns_subspaces_but_drifts_no_value() -> None:
    rng = np.random.default_rng(8)
    base = _with_values(rng, 24, 16, np.linspace(4, 1, 16))
    rotation = _orthonormal(rng, 24, 24)
    observed = _record(base, rotation @ base, num_draws=0).observed
    assert observed.nss < 1e-11
    assert observed.left_max_angle_deg > 30
    assert observed.right_max_angle_deg < 1e-6


def test_scaling_a_matrix_drifts_by_the_factor_and_turns_nothing() -> None:
    base = np.random.default_rng(9).standard_normal((10, 8))
    observed = _record(base, 1.25 * base).observed
    assert observed.nss == pytest.approx(0.25, rel=NINE_DIGITS)
    assert observed.left_max_angle_deg == observed.right_max_angle_deg == 0.0


def _slow_overlap(scores: np.ndarray, mask: np.ndarray, wanted: int) -> float:
    """Mean over all ways to break ties: whole entries above the cut, the rest in proportion."""
    order = sorted(scores.ravel().tolist(), reverse=True)
    if wanted == 0:
        return 0.0
    cut, inside = order[wanted - 1], 0.0
    above = sum(score > cut for score in order)
    ties = order.count(cut)
    for score, changed in zip(scores.ravel().tolist(), mask.ravel().tolist(), strict=True):
        if changed:
            inside += 1.0 if score > cut else (wanted - above) / ties if score == cut else 0.0
    return inside / mask.sum()


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 9), cols=st.integers(1, 9))
def test_overlaps_equal_a_loop_over_entries_with_ties_in_proportion(seed: int, rows: int, cols: int) -> None:
    rng = np.random.default_rng(seed)
    base = rng.integers(-3, 4, size=(rows, cols)).astype(float)
    base[0, 0] = 2.0
    tuned = base + (rng.random(base.shape) < 0.4)
    tuned[0, 0] = 5.0
    mask = base != tuned
    record = spectral_record(base, tuned, mask, _question(num_draws=0))
    left, values, right = np.linalg.svd(base, full_matrices=False)
    k = subspace_rank(rows, cols)
    principal = np.abs((left[:, :k] * values[:k]) @ right[:k])
    found = {(o.target, o.alpha): o for o in record.overlaps}
    assert len(record.overlaps) == 2 * (len(ALPHAS) + 1)
    for (target, alpha), overlap in found.items():
        assert overlap.entries == round(alpha * mask.size) or abs(alpha * mask.size % 1 - 0.5) < 1e-6
        assert overlap.chance == pytest.approx(overlap.entries / mask.size, rel=NINE_DIGITS)
        if target == "low-magnitude":
            expected = _slow_overlap(-np.abs(base), mask, overlap.entries)
            assert overlap.share == pytest.approx(expected, rel=NINE_DIGITS, abs=1e-9)
        elif len(np.unique(np.round(principal, 9))) == mask.size:  # no ties that rounding could break
            expected = _slow_overlap(principal, mask, overlap.entries)
            assert overlap.share == pytest.approx(expected, rel=NINE_DIGITS, abs=1e-9)


def test_updates_of_small_weights_overlap_with_the_low_magnitude_mask_alone() -> None:
    rng = np.random.default_rng(10)
    base = rng.standard_normal((50, 40)) + 3 * rng.standard_normal((50, 1)) @ rng.standard_normal((1, 40))
    small = np.abs(base) < np.quantile(np.abs(base), 0.1)
    record = _record(base, np.where(small, base + 1e-3, base))
    low, principal = (
        next(o for o in record.overlaps if o.target == target and o.alpha == 0.1)
        for target in ("low-magnitude", "principal")
    )
    assert low.share == 1.0
    assert principal.share == 0.0
    assert low.chance == 0.1


def test_a_mask_that_depends_on_the_exponent_alone_overlaps_as_magnitudes_give() -> None:
    rng = np.random.default_rng(17)
    base = rng.standard_normal((60, 50)) + rng.standard_normal((60, 3)) @ rng.standard_normal((3, 50))
    rate = np.clip(0.5 ** np.frexp(np.abs(base))[1] / 4, 0, 1)
    record = _record(base, np.where(rng.random(base.shape) < rate, base * 1.001, base), num_draws=0)
    for overlap in record.overlaps:
        assert abs(overlap.share - overlap.magnitude_share) <= 4 * overlap.magnitude_sd + 1e-9, overlap
    principal = next(o for o in record.overlaps if o.target == "principal" and o.alpha == 0.1)
    assert principal.share < principal.chance - 5 * principal.chance_sd, "far from chance all the same"


def test_what_magnitudes_give_equals_a_sum_over_groups_by_hand() -> None:
    # Groups: {3, 3.5, 2.5}, {2} (a power of two), {1.5, 1.25}, {0, 0}.
    base = np.array([[3.0, 3.5, 2.5, 2.0], [1.5, -1.25, 0.0, 0.0]])
    mask = np.array([[True, False, False, True], [True, True, False, True]])
    record = spectral_record(base, np.where(mask, base + 1, base), mask, _question(num_draws=0))
    found = next(o for o in record.overlaps if o.target == "low-magnitude" and o.alpha == 0.5)
    # The four smallest are both of the last two groups; the update has two and one entries there.
    assert (found.entries, found.share, found.magnitude_share, found.magnitude_sd) == (4, 0.6, 0.6, 0.0)
    found = next(o for o in record.overlaps if o.target == "low-magnitude" and o.alpha == 0.2)
    # Two of eight: both zeros. The update has one of them.
    assert (found.entries, found.share, found.magnitude_share) == (2, 0.2, 0.2)
    # Five of eight, its own density .625: the last two groups and 2; the update has four of these.
    assert (record.overlaps[-1].entries, record.overlaps[-1].share) == (5, 0.8)
    assert record.overlaps[-1].magnitude_share == 0.8


def test_the_spread_that_magnitudes_give_is_that_of_draws_within_groups() -> None:
    rng = np.random.default_rng(18)
    base = rng.standard_normal((24, 20))
    groups = np.frexp(np.abs(base))[1]
    first = rng.random(base.shape) < 0.3
    shares = []
    for _ in range(200):
        mask = np.zeros(base.shape, dtype=bool)
        for group in np.unique(groups):
            places = np.argwhere(groups == group)
            count = int(first[groups == group].sum())
            mask[tuple(places[rng.choice(len(places), count, replace=False)].T)] = True
        record = _record(base, np.where(mask, base + 1, base), num_draws=0)
        overlap = next(o for o in record.overlaps if o.target == "principal" and o.alpha == 0.2)
        shares.append(overlap.share)
    # Limits as for the chance level: 4 errors of a mean and of an sd over 200 draws.
    assert abs(np.mean(shares) - overlap.magnitude_share) < 4 * overlap.magnitude_sd / math.sqrt(200)
    assert abs(np.std(shares) / overlap.magnitude_sd - 1) < 0.2


def test_the_chance_level_of_an_overlap_is_that_of_random_masks() -> None:
    rng = np.random.default_rng(11)
    base = rng.standard_normal((30, 30))
    shares = []
    for _ in range(200):
        mask = np.zeros(900, dtype=bool)
        mask[rng.choice(900, 90, replace=False)] = True
        tuned = np.where(mask.reshape(30, 30), base + 1, base)
        record = _record(base, tuned, num_draws=0)
        overlap = next(o for o in record.overlaps if o.target == "low-magnitude" and o.alpha == 0.2)
        shares.append(overlap.share)
    # 200 draws: the mean has an error of sd/14, the sd one of 5 %; limits are 4 of these.
    assert abs(np.mean(shares) - overlap.chance) < 4 * overlap.chance_sd / math.sqrt(200)
    assert abs(np.std(shares) / overlap.chance_sd - 1) < 0.2


def test_nothing_moved_is_rank_zero_and_no_drift() -> None:
    base = np.random.default_rng(12).standard_normal((9, 8))
    record = spectral_record(base, base.copy(), np.zeros(base.shape, dtype=bool), _question())
    observed = record.observed
    assert (observed.rank_float64, observed.rank_99, observed.nss) == (0.0, 0.0, 0.0)
    assert (observed.left_max_angle_deg, observed.right_min_cosine) == (0.0, 1.0)
    assert observed.stable_rank is None
    assert (record.num_draws, record.reference_mean, record.overlaps) == (0, None, ())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_values_without_a_spectrum_are_refused_with_the_reason(value: float, side: int) -> None:
    sides = [np.ones((3, 3)), np.full((3, 3), 2.0)]
    sides[side][1, 2] = value
    record = spectral_record(*sides, np.ones((3, 3), dtype=bool), _question())
    assert "NaN or Inf" in record.refused
    assert record.observed is None


def test_the_same_infinity_on_both_sides_and_huge_values_are_refused() -> None:
    infinite = np.full((2, 2), np.inf)
    assert "Inf" in _record(infinite, infinite.copy()).refused
    assert "overflow" in _record(np.zeros((2, 2)), np.full((2, 2), 1e200)).refused
    assert "no entries" in _record(np.zeros((0, 3)), np.zeros((0, 3))).refused


def test_a_tiny_update_underflows_nowhere() -> None:
    rng = np.random.default_rng(13)
    delta = 1e-200 * _with_values(rng, 8, 6, np.array([2.0, 1.0]))
    observed = _record(np.zeros((8, 6)), delta).observed
    assert observed.stable_rank == pytest.approx(1.25, rel=NINE_DIGITS)
    assert observed.rank_float64 == 2.0


def test_a_sketch_of_a_decaying_spectrum_agrees_with_the_exact_values() -> None:
    rng = np.random.default_rng(14)
    values = 0.9 ** np.arange(100)
    base = _with_values(rng, 160, 140, values)
    tuned = base + _with_values(rng, 160, 140, 0.02 * 0.8 ** np.arange(60))
    exact, sketch = (_record(base, tuned, num_draws=1, max_dim=limit) for limit in (4096, 100))
    assert not exact.is_estimate
    assert sketch.is_estimate
    assert "160" in sketch.estimate_reason
    assert "--spectral-max-dim 100" in sketch.estimate_reason
    # Error of subspace iteration: (σ_43/σ_32)^9 = .9^(9·11) = 3e-5 on the last vectors, its square on values.
    assert sketch.observed.stable_rank == pytest.approx(exact.observed.stable_rank, rel=1e-6)
    assert sketch.spectral_norm == pytest.approx(exact.spectral_norm, rel=1e-6)
    for side in ("left", "right"):
        names = f"{side}_max_angle_deg", f"{side}_mean_cosine"
        assert getattr(sketch.observed, names[0]) == pytest.approx(
            getattr(exact.observed, names[0]), rel=0.01
        )
        assert getattr(sketch.observed, names[1]) == pytest.approx(
            getattr(exact.observed, names[1]), abs=1e-5
        )
    of_top = (np.linalg.svd(m, compute_uv=False)[: sketch.k] for m in (base, tuned))
    first, second = of_top
    expected = np.linalg.norm(second - first) / np.linalg.norm(first)
    assert sketch.observed.nss == pytest.approx(expected, rel=1e-4)
    for name in ("rank_float64", "rank_rounding", "effective_rank", "effective_rank_energy", "rank_99"):
        assert getattr(sketch.observed, name) is None, "out of reach of the first k values"


def test_a_sketch_of_a_flat_spectrum_errs_on_the_known_side() -> None:
    matrix = np.random.default_rng(15).standard_normal((200, 180))
    exact, sketch = ExactSvd().values(matrix, 32), SketchedSvd().values(matrix, 32)
    assert (sketch <= exact[:32] * (1 + 1e-12)).all()
    assert sketch[0] > 0.98 * exact[0]


def test_a_shuffle_keeps_the_entries_and_depends_on_the_seed_alone() -> None:
    matrix = np.arange(60.0).reshape(6, 10)
    once, again, other = shuffled(matrix, 1), shuffled(matrix, 1), shuffled(matrix, 2)
    assert np.array_equal(once, again)
    assert not np.array_equal(once, other)
    assert np.array_equal(np.sort(other, axis=None), np.arange(60.0))
    # Places do not depend on the entries.
    assert (shuffled(matrix + 1, 3) - 1 == shuffled(matrix, 3)).all()


def test_each_entry_of_a_shuffle_lands_everywhere_equally_often() -> None:
    landed = np.array([int(np.argmin(shuffled(np.arange(16.0), seed))) for seed in range(3200)])
    counts = np.bincount(landed, minlength=16)
    # χ² with 15 degrees of freedom; 44.3 is exceeded with p = 1e-4.
    assert ((counts - 200) ** 2 / 200).sum() < 44.3


def test_the_subspace_is_a_quarter_of_the_smaller_side_and_at_most_32() -> None:
    assert [subspace_rank(*shape) for shape in ((1, 5), (3, 9), (40, 64), (4096, 1024))] == [1, 1, 10, 32]


def test_the_cost_grows_with_the_cube_until_the_sketch_takes_over() -> None:
    small, large = (spectral_cost(n, n, max_dim=4096, num_draws=3) for n in (512, 1024))
    assert large.flops / small.flops == pytest.approx(8.0)
    sketch = spectral_cost(8192, 8192, max_dim=4096, num_draws=3)
    assert sketch.flops < spectral_cost(8192, 8192, max_dim=8192, num_draws=3).flops / 20
    assert sketch.num_bytes >= 3 * 8 * 8192**2, "base, tuned and Δ in float64 at least"


def test_the_same_question_gives_the_same_record_and_another_seed_other_references() -> None:
    rng = np.random.default_rng(16)
    base = rng.standard_normal((40, 30))
    tuned = base + 0.01 * rng.standard_normal((40, 30))
    first, again, other = (_record(base, tuned, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.observed == other.observed
    assert first.reference_mean != other.reference_mean
