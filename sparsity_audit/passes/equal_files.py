"""Which pairs are known to be equal before a byte is read: the same place in files of one content.

Contract: pure. A hash that the store lists for both whole files decides; without one nothing is known.
"""

from __future__ import annotations

from collections.abc import Iterator

from sparsity_audit.align.records import Pair, TensorSlice
from sparsity_audit.checkpoint.store import Catalogue

__all__ = ["is_known_equal"]


def is_known_equal(pair: Pair, base: Catalogue, tuned: Catalogue) -> bool:
    """Whether both sides of a pair are the same bytes of files whose hashes are equal."""
    return pair.base.spec.dtype is pair.tuned.spec.dtype and all(
        _is_same_place(ours, theirs, base, tuned) for ours, theirs in _stored(pair)
    )


def _stored(pair: Pair) -> Iterator[tuple[TensorSlice | None, TensorSlice | None]]:
    """The slices on both sides, and those of their scales."""
    yield pair.base, pair.tuned
    if pair.is_scaled:
        ours, theirs = pair.base.scale, pair.tuned.scale
        yield (
            None if ours is None else TensorSlice.whole(ours.spec),
            None if theirs is None else TensorSlice.whole(theirs.spec),
        )


def _is_same_place(
    ours: TensorSlice | None, theirs: TensorSlice | None, base: Catalogue, tuned: Catalogue
) -> bool:
    if ours is None or theirs is None:
        return False
    digests = base.files[ours.spec.file].digest, tuned.files[theirs.spec.file].digest
    return bool(digests[0]) and digests[0] == digests[1] and _place(ours) == _place(theirs)


def _place(part: TensorSlice) -> tuple[object, ...]:
    spec = part.spec
    layout = spec.dtype, spec.extent, spec.strides, spec.big_endian, spec.shape
    return (*layout, part.start_entry, part.num_runs, part.step)
