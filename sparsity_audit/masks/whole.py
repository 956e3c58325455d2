"""Masks that select whole tensors: one layer alone, as a control of masked training.

Contract: tensors, shapes and compared rows are those of another mask; a tensor's compared entries are all
selected or none is. A `MaskSource`, so that it can be written in any encoding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import replace

import numpy as np

from sparsity_audit.masks.bitmask import BLOCK_BYTES, Block, blocks_of, compared_bits
from sparsity_audit.masks.metadata import MaskMetadata, MaskTensor

__all__ = ["WholeTensorsSource"]


class WholeTensorsSource:
    """All compared entries of some tensors, none of the others.

    Args:
        tensors: Of the mask that gives shapes and base; its tuned fingerprints are dropped.
        metadata: Of the result.
        chosen: Names of the tensors whose entries are selected.
    """

    def __init__(
        self, tensors: Mapping[str, MaskTensor], metadata: MaskMetadata, chosen: AbstractSet[str]
    ) -> None:
        # What is selected owes nothing to a tuned checkpoint.
        self.tensors = {n: replace(t, fingerprints=(t.fingerprints[0], 0)) for n, t in tensors.items()}
        self.metadata = metadata
        self._chosen = chosen

    def blocks(self, name: str, *, max_bytes: int = BLOCK_BYTES) -> Iterator[tuple[Block, np.ndarray]]:
        """The tensor's bits."""
        tensor = self.tensors[name]
        for block in blocks_of(tensor.shape, max_bytes=max_bytes):
            if name in self._chosen:
                yield block, compared_bits(block, tensor.entry_ranges)
            else:
                yield block, np.zeros(block.shape, dtype=np.uint8)

    def close(self) -> None:
        """It holds no file."""
