"""Places of changed entries survive every encoding; hostile bytes give places or an error."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsity_audit.passes.patch_encoding import (
    candidate_bytes,
    cheapest,
    decode_positions,
    encode_positions,
)

SPARSE = ("indices", "mask", "gap8", "gap16")


@st.composite
def places(draw):
    """Entries of a segment and the changed ones among them, some of them far apart."""
    entries = draw(st.sampled_from([1, 7, 8, 255, 256, 257, 1000, 70_000, 140_000]))
    some = draw(st.lists(st.integers(0, entries - 1), max_size=30, unique=True))
    edges = draw(st.lists(st.sampled_from([0, 254, 255, 256, 510, 65534, 65535, 65536]), unique=True))
    return entries, np.array(sorted({p for p in (*some, *edges) if p < entries}), dtype=np.int64)


@given(places(), st.sampled_from(SPARSE), st.integers(0, 3))
def test_places_come_back_and_take_the_bytes_that_were_counted(case, encoding, segment):
    entries, wanted = case
    about = {"first": segment << 20, "entries": entries, "num_entries": 4 << 20}
    data = encode_positions(wanted, encoding, **about)
    assert np.array_equal(decode_positions(data, encoding, **about), wanted)
    sizes = candidate_bytes(wanted, entries=entries, num_entries=4 << 20)
    assert len(data) == sizes[encoding]


def test_positions_past_31_bits_take_eight_bytes():
    about = {"first": 1 << 31, "entries": 10, "num_entries": (1 << 31) + 10}
    data = encode_positions(np.array([3]), "indices", **about)
    assert data == ((1 << 31) + 3).to_bytes(8, "little")
    assert decode_positions(data, "indices", **about).tolist() == [3]


@given(st.binary(max_size=60), st.sampled_from(SPARSE), st.integers(1, 500))
def test_hostile_bytes_give_ascending_places_of_the_segment_or_an_error(data, encoding, entries):
    try:
        found = decode_positions(data, encoding, first=0, entries=entries, num_entries=entries)
    except ValueError:
        return
    assert (np.diff(found) > 0).all()
    assert not len(found) or (found[0] >= 0 and found[-1] < entries)


def test_the_cheapest_encoding_follows_the_density():
    draw = np.random.default_rng(0)
    found = []
    for density in (0.0, 1e-5, 1e-3, 0.05, 0.3, 1.0):
        changed = np.flatnonzero(draw.random(1 << 20) < density)
        sizes = candidate_bytes(changed, entries=1 << 20, num_entries=1 << 20)
        found.append(cheapest(sizes, changed=len(changed), num_entries=1 << 20, itemsize=2))
    assert found == ["none", "indices", "gap16", "gap8", "mask", "dense"]


def test_a_gap_that_has_no_end_is_refused():
    with pytest.raises(ValueError, match="end in the middle"):
        decode_positions(b"\x01\xff", "gap8", first=0, entries=999, num_entries=999)
