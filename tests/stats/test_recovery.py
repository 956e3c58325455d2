"""Agreement of a retrained model with the full run, by hand and against the slow reference."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sparsity_audit.stats.recovery import CRITERIA, PARTS, RecoverySums, part_recovery, reference_sums

BASE = np.array([1.0, 1.0, 1.0, 1.0, 2.0, 0.0])
FULL = np.array([2.0, 0.5, 1.0, 1.5, 2.0, 1.0])
RUN = np.array([3.0, 0.5, 1.0, 0.5, 2.0, 1.0 + 5e-5])
INSIDE = np.array([True, True, False, True, False, True])


def _sums() -> RecoverySums:
    entries = [
        (*(int(np.float64(v).view(np.uint64)) for v in values), bool(i))
        for *values, i in zip(BASE, FULL, RUN, INSIDE, strict=True)
    ]
    slow = reference_sums(entries, lambda code: float(np.uint64(code).view(np.float64)))
    return RecoverySums(**{name: np.array(value) for name, value in slow.items()})


def test_shares_signs_cosine_and_distance_by_hand() -> None:
    inside = part_recovery(_sums(), "inside")
    assert inside.entries == 4
    assert inside.equal == {"bitwise": 1, "value": 1, "atol:1e-5": 1, "atol:1e-4": 2, "rel:1e-3": 2}
    assert inside.shares["atol:1e-4"] == 0.5
    # Δ_full = 1, −.5, .5, 1; Δ_run = 2, −.5, −.5, 1.00005.
    assert (inside.moving, inside.sign_agreement) == (4, 0.75)
    assert inside.independent_signs == pytest.approx(0.75 * 0.5 + 0.25 * 0.5, abs=1e-15)
    length = math.sqrt(2.5)
    assert inside.cosine == pytest.approx((2 + 1.00005) / (length * math.sqrt(4.5 + 1.00005**2)), abs=1e-12)
    assert inside.relative_l2 == pytest.approx(math.sqrt(1 + 1 + 25e-10) / length, abs=1e-12)
    outside = part_recovery(_sums(), "outside")
    assert (outside.entries, outside.shares["bitwise"], outside.cosine, outside.relative_l2) == (
        2,
        1.0,
        None,
        None,
    )
    overall = part_recovery(_sums(), "overall")
    assert overall.equal == {key: inside.equal[key] + outside.equal[key] for key in inside.equal}


def test_the_full_run_recovers_all_and_the_base_none() -> None:
    nothing = np.zeros((2, len(CRITERIA)), dtype=np.int64)
    delta = FULL - BASE
    itself = part_recovery(
        RecoverySums.from_values(delta, delta, 0 * delta, INSIDE, unequal=nothing), "overall"
    )
    assert (itself.relative_l2, itself.cosine, itself.sign_agreement) == (0.0, pytest.approx(1.0), 1.0)
    base = part_recovery(
        RecoverySums.from_values(delta, 0 * delta, -delta, INSIDE, unequal=nothing), "overall"
    )
    assert (base.relative_l2, base.cosine, base.sign_agreement) == (1.0, None, None)


def test_nothing_compared_gives_nothing() -> None:
    empty = RecoverySums.of_blocks([])
    for part in PARTS:
        found = part_recovery(empty, part)
        assert found.entries == 0
        assert set(found.shares.values()) == {None}
        assert (found.cosine, found.relative_l2, found.sign_agreement) == (None, None, None)


def test_what_has_no_finite_square_is_left_out_of_sums_and_counted() -> None:
    full, run = np.array([1.0, np.nan, np.inf, 1e200, 2.0]), np.array([1.0, 1.0, 1.0, 1.0, -2.0])
    with np.errstate(invalid="ignore"):
        apart = run - full
    unequal = np.zeros((2, len(CRITERIA)), dtype=np.int64)
    sums = RecoverySums.from_values(full, run, apart, np.ones(5, dtype=bool), unequal=unequal)
    found = part_recovery(sums, "inside")
    assert (found.not_finite, found.moving, found.sign_agreement, found.cosine) == (
        3,
        2,
        0.5,
        pytest.approx(-0.6),
    )
