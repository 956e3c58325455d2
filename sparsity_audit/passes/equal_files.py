"""Which pairs are known to be equal before a byte is read: the same place in files of one content.

Contract: pure. A hash that the store lists for both whole files decides; without one nothing is known.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from sparsity_audit.align.records import Pair, TensorSlice
from sparsity_audit.checkpoint.store import Catalogue
from sparsity_audit.compare.pair import PairSpec

__all__ = ["completed"]


def completed(spec: PairSpec, pair: Pair, base: Catalogue, tuned: Catalogue, *, skip_equal: bool) -> PairSpec:
    """The spec, with what the pair and the hashes of its files say.

    Args:
        spec: What is asked.
        pair: Of which tensors.
        base: The base checkpoint.
        tuned: The tuned checkpoint.
        skip_equal: Whether neither side of an equal pair needs reading where counts are all that is asked.
    """
    is_equal = pair.base.spec.dtype is pair.tuned.spec.dtype and all(
        _is_same_place(ours, theirs, base, tuned) for ours, theirs in _stored(pair)
    )
    unread = is_equal and skip_equal and spec.level == "counts"
    if (spec.scaled, spec.known_equal, spec.unread) == (pair.is_scaled, is_equal, unread):
        return spec  # ninety thousand pairs share a few specs
    return replace(spec, scaled=pair.is_scaled, known_equal=is_equal, unread=unread)


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
