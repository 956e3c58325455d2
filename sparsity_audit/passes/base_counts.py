"""One pass over the base for what a phantom or a walk needs: kinds of rooms, and distinct magnitudes.

Contract: exact counts over the compared entries, the same for any number of workers; memory a worker is one
block and the counters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from sparsity_audit.compare.numpy_kernel import to_float64
from sparsity_audit.masks.bitmask import Block, blocks_of
from sparsity_audit.masks.metadata import MaskTensor
from sparsity_audit.masks.sampling import OUTSIDE
from sparsity_audit.passes.base_strata import MagnitudeGrouping, StrataGrouping
from sparsity_audit.passes.engine import Workers, map_units
from sparsity_audit.stats.rooms import NUM_ROOM_KEYS, Rooms, room_keys, rooms_of_keys

__all__ = ["count_magnitudes", "count_rooms"]


def count_rooms(
    tensors: Sequence[MaskTensor], grouping: StrataGrouping, *, workers: Workers = 1
) -> Mapping[str, Rooms]:
    """Rooms of each tensor of a base that is wider than bf16, in the bf16 cells it rounds to."""

    def keys(tensor: MaskTensor, block: Block) -> np.ndarray:
        compared = grouping.groups(tensor.name, block) != OUTSIDE
        codes = grouping.stored_codes(tensor.name, block)[compared]
        with np.errstate(over="ignore"):
            numbers = to_float64(codes, grouping.stored_dtype(tensor.name)).astype(np.float32)
        return room_keys(numbers)

    counts = _count(tensors, keys, NUM_ROOM_KEYS, workers=workers)
    return {name: rooms_of_keys(found) for name, found in counts.items()}


def count_magnitudes(
    tensors: Sequence[MaskTensor], grouping: MagnitudeGrouping, *, workers: Workers = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Distinct |w| of 16-bit tensors together, float64 ascending, and how often each occurs, int64."""
    totals: dict[float, int] = {}

    def groups(tensor: MaskTensor, block: Block) -> np.ndarray:
        found = grouping.groups(tensor.name, block)
        return found[found != OUTSIDE]

    sizes = max((grouping.num_groups(tensor.name) for tensor in tensors), default=1)
    for name, found in _count(tensors, groups, sizes, workers=workers).items():
        there = np.flatnonzero(found)
        magnitudes = grouping.magnitudes(name, there)
        for magnitude, entries in zip(magnitudes.tolist(), found[there].tolist(), strict=True):
            if np.isfinite(magnitude):
                totals[magnitude] = totals.get(magnitude, 0) + entries
    ordered = sorted(totals)
    return np.array(ordered, dtype=np.float64), np.array([totals[m] for m in ordered], dtype=np.int64)


def _count(
    tensors: Sequence[MaskTensor],
    numbers: Callable[[MaskTensor, Block], np.ndarray],
    size: int,
    *,
    workers: Workers,
) -> dict[str, np.ndarray]:
    def work(tensor: MaskTensor) -> np.ndarray:
        total = np.zeros(size, dtype=np.int64)
        for block in blocks_of(tensor.shape):
            total += np.bincount(numbers(tensor, block), minlength=size)
        return total

    found = {tensor.name: total for tensor, total in map_units(work, tensors, workers=workers)}
    return {tensor.name: found[tensor.name] for tensor in tensors}
