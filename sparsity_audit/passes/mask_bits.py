"""The bits of a mask, which is in base coordinates, for a block of a pair.

Contract: the inverse of `mask_sink`: parts of a fused tensor, rows that alternate and parts of a vector find
their bits where the sink puts them.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from sparsity_audit.align.records import TensorSlice
from sparsity_audit.masks.bitmask import Block as MaskBlock
from sparsity_audit.masks.reader import MaskReader
from sparsity_audit.passes.plan import Block

__all__ = ["block_bits", "runs_within"]


def runs_within(part: TensorSlice, first: int, count: int) -> Iterator[tuple[int, int, int]]:
    """Entries first … first + count of a part: start and stop in the tensor, and how many came before."""
    done = 0
    while done < count:
        run, within = divmod(first + done, part.run_entries)
        length = min(part.run_entries - within, count - done)
        start = part.start_entry + run * part.step + within
        yield start, start + length, done
        done += length


def block_bits(part: TensorSlice, block: Block, reader: MaskReader | None) -> np.ndarray:
    """The mask's bits of a block of a pair, bool; all False without a mask."""
    shape = block.num_rows, block.num_cols
    found = np.zeros(shape[0] * shape[1], dtype=np.bool_)
    if reader is None:
        return found.reshape(shape)
    name, cols = part.spec.name, part.spec.rows_cols[1]
    for start, stop, done in runs_within(part, block.row * part.rows_cols[1] + block.col, found.size):
        row, col = divmod(start, cols)
        if col == 0 and stop % cols == 0:
            bits = reader.read_packed(name, row, stop // cols)
            wide = np.unpackbits(bits, axis=-1, count=cols, bitorder="little").reshape(-1)
        else:
            end = col + stop - start
            piece = MaskBlock(
                row_start=row, row_stop=row + 1, byte_start=col // 8, byte_stop=-(-end // 8), cols=cols
            )
            bits = np.unpackbits(reader.read_block(name, piece), bitorder="little")
            wide = bits[col % 8 : col % 8 + stop - start]
        found[done : done + stop - start] = wide.view(np.bool_)
    return found.reshape(shape)
