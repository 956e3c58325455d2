from __future__ import annotations

import pytest

from sparsity_audit.stats.strata import (
    CROSS,
    IN,
    NAN_PAYLOAD,
    NUM_BUCKETS,
    NUM_COLUMNS,
    OUT,
    SPECIAL,
    ZERO_SIGN,
    bucket_bounds,
    bucket_of,
)


def test_distances_to_eight_have_a_bucket_each():
    assert [bucket_of(d) for d in range(1, 9)] == list(range(8))


@pytest.mark.parametrize(
    ("distance", "bucket"), [(9, 8), (15, 8), (16, 9), (31, 9), (32, 10), (2**64 - 1, 68)]
)
def test_larger_distances_share_a_bucket_by_octave(distance, bucket):
    assert bucket_of(distance) == bucket


def test_buckets_cover_every_distance_once():
    expected = 1
    for bucket in range(NUM_BUCKETS):
        low, high = bucket_bounds(bucket)
        assert low == expected
        assert bucket_of(low) == bucket_of(high) == bucket
        expected = high + 1
    assert expected == 2**64


def test_columns_do_not_overlap():
    sides = [range(start, start + NUM_BUCKETS) for start in (OUT, IN, CROSS)]
    columns = [c for side in sides for c in side] + [ZERO_SIGN, NAN_PAYLOAD, SPECIAL]
    assert columns == list(range(NUM_COLUMNS))
