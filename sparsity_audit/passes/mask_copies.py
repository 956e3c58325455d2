"""Write a mask that is computed from others, its tensors mapped over an engine.

Contract: the bytes are those of `masks.encodings.write_mask` with the encoding `packed`. A unit is one
tensor, whose packed bits come back to this process, which alone writes.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np

from sparsity_audit.masks.container import MaskWriter
from sparsity_audit.masks.sources import MaskSource
from sparsity_audit.passes.engine import Workers, map_units

__all__ = ["write_mapped_mask"]


def write_mapped_mask(source: MaskSource, target: str | Path, *, workers: Workers) -> None:
    """Write `source` to the directory `target`, packed.

    Args:
        source: Where the bits come from; picklable where an engine runs it.
        target: New or empty directory.
        workers: Threads must be 1, for sources share their files; or an engine.

    Raises:
        OutputError: The directory is not empty, or cannot be written.
        MaskError: The source contradicts itself; nothing is left behind.
    """

    def read(name: str) -> list[tuple[int, np.ndarray]]:
        return [(block.offset, bits) for block, bits in source.blocks(name)]

    tensors = list(source.tensors.values())
    with MaskWriter(target, tensors, source.metadata) as writer:
        with closing(map_units(read, [tensor.name for tensor in tensors], workers=workers)) as found:
            for name, blocks in found:
                for offset, bits in blocks:
                    writer.write_bits(name, offset, bits)
        writer.finish()
