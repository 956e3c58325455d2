"""Put the mask bits of a pass into a mask file, in base coordinates.

Contract: a pair's bits land in the rows of its base tensor, so that the parts of a fused tensor fill one
entry of the mask. Rows start on byte borders; parts of a vector may not, and are merged bit by bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from sparsity_audit.align.records import Alignment, Pair
from sparsity_audit.checkpoint.store import Catalogue
from sparsity_audit.masks.container import MaskWriter
from sparsity_audit.masks.metadata import Fingerprints, MaskMetadata, MaskTensor, SourceReference
from sparsity_audit.stats.tally import Tally
from sparsity_audit.types import Criterion, View

__all__ = ["MaskSink", "mask_fingerprints", "mask_metadata", "mask_tensors"]


class MaskSink:
    """The `BitSink` over a `MaskWriter`; as thread-safe as the writer.

    Args:
        writer: The open writer of the mask that `mask_tensors` describes.
    """

    def __init__(self, writer: MaskWriter) -> None:
        self._writer = writer

    def write(self, pair: Pair, *, first_row: int, first_col: int, bits: np.ndarray) -> None:
        """Take the packed bits of whole rows, or of a part of one row, of a pair."""
        if bits.size == 0:
            return
        name, cols = pair.base.spec.name, pair.base.rows_cols[1]
        if len(pair.base.spec.shape) <= 1:
            first = pair.base.start_entry + first_col
            if pair.base.is_whole:
                self._writer.write_bits(name, first // 8, bits)
            else:
                count = min(8 * bits.size, cols - first_col)
                self._writer.write_entries(name, first, bits, count)
            return
        row = pair.base.start_entry // cols + first_row
        self._writer.write_bits(name, row * -(-cols // 8) + first_col // 8, bits)


def mask_tensors(base: Catalogue, alignment: Alignment) -> list[MaskTensor]:
    """Every stored base tensor, with the ranges of its first axis that are compared."""
    compared: dict[str, list[tuple[int, int]]] = {name: [] for name in base.tensors}
    for pair in alignment.pairs:
        shape = pair.base.spec.shape
        inner = pair.base.spec.num_entries // shape[0] if shape and shape[0] else 1
        start = pair.base.start_entry // max(inner, 1)
        stop = start + (pair.base.shape[0] if shape else 1)
        if stop > start:
            compared[pair.base.spec.name].append((start, stop))
    return [
        MaskTensor(name=name, shape=spec.shape, compared=tuple(sorted(compared[name])))
        for name, spec in base.tensors.items()
    ]


def mask_metadata(base: Catalogue, tuned: Catalogue, *, criterion: Criterion, view: View) -> MaskMetadata:
    """What the mask says about its origin."""
    sides = [SourceReference(reference=c.reference, resolved=c.resolved_label) for c in (base, tuned)]
    return MaskMetadata(
        criterion=criterion.key, view=view.value, base=sides[0], tuned=sides[1], aliases=dict(base.aliases)
    )


def mask_fingerprints(pairs: Sequence[Pair], tallies: Sequence[Tally]) -> Mapping[str, Fingerprints]:
    """Base and tuned fingerprint of each tensor: the sum over its compared slices."""
    sums: dict[str, Fingerprints] = {}
    for pair, tally in zip(pairs, tallies, strict=True):
        base, tuned = sums.get(pair.base.spec.name, (0, 0))
        sums[pair.base.spec.name] = (
            (base + tally.base_fingerprint) % 2**64,
            (tuned + tally.tuned_fingerprint) % 2**64,
        )
    return sums
