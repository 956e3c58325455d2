"""Put the mask bits of a pass into a mask file, in base coordinates.

Contract: a pair's bits land in the rows of its base tensor, so that the parts of a fused tensor fill one
entry of the mask. Rows start on byte borders; parts of a vector may not, and are merged bit by bit. Where
slices are not runs of whole first-axis rows (pieces of stacked experts, alternating rows), the compared
ranges are their union and the fingerprints are not known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Protocol

import numpy as np

from sparsity_audit.align.records import Alignment, Pair, TensorSlice
from sparsity_audit.checkpoint.store import Catalogue
from sparsity_audit.masks.metadata import Fingerprints, MaskMetadata, MaskTensor, SourceReference
from sparsity_audit.stats.tally import Tally
from sparsity_audit.types import Criterion, TensorSpec, View

__all__ = ["MaskSink", "PackedWriter", "mask_fingerprints", "mask_metadata", "mask_tensors"]


class PackedWriter(Protocol):
    """What holds packed bits in base coordinates: a mask that is made, or a share's part of it."""

    def write_bits(self, name: str, byte_offset: int, data: np.ndarray) -> None:
        """Write packed bytes at `byte_offset` of a tensor."""
        ...

    def write_entries(self, name: str, first_entry: int, bits: np.ndarray, num_entries: int) -> None:
        """Set packed bits of a 1-D tensor, whose first need not start a byte."""
        ...


class MaskSink:
    """The `BitSink` over a writer of packed bits; as thread-safe as the writer.

    Args:
        writer: The open writer of the mask that `mask_tensors` describes, or of a part of it.
    """

    def __init__(self, writer: PackedWriter) -> None:
        self._writer = writer

    def write(self, pair: Pair, *, first_row: int, first_col: int, bits: np.ndarray) -> None:
        """Take the packed bits of whole rows, or of a part of one row, of a pair."""
        if bits.size == 0:
            return
        part, cols = pair.base, pair.base.rows_cols[1]
        if len(part.spec.shape) <= 1:
            self._write_vector(part, first_col, bits)
            return
        run_rows, done = part.run_entries // cols, 0
        while done < len(bits):
            run, within = divmod(first_row + done, run_rows)
            count = min(run_rows - within, len(bits) - done)
            row = (part.start_entry + run * part.step) // cols + within
            offset = row * -(-cols // 8) + first_col // 8
            self._writer.write_bits(part.spec.name, offset, bits[done : done + count])
            done += count

    def _write_vector(self, part: TensorSlice, first: int, bits: np.ndarray) -> None:
        name, done = part.spec.name, 0
        if part.is_whole:
            self._writer.write_bits(name, first // 8, bits)
            return
        count = min(8 * bits.size, part.num_entries - first)
        flags = np.unpackbits(bits.reshape(-1), count=count, bitorder="little")
        while done < count:
            run, within = divmod(first + done, part.run_entries)
            taken = flags[done : done + part.run_entries - within]
            entry = part.start_entry + run * part.step + within
            self._writer.write_entries(name, entry, np.packbits(taken, bitorder="little"), len(taken))
            done += len(taken)


def mask_tensors(base: Catalogue, alignment: Alignment) -> list[MaskTensor]:
    """Every stored base tensor, with the ranges of its first axis that are compared."""
    runs: dict[str, list[tuple[int, int]]] = {name: [] for name in base.tensors}
    split: set[str] = set()
    for pair in alignment.pairs:
        runs[pair.base.spec.name] += [run for run in pair.base.runs if run[0] < run[1]]
        if not _is_whole_rows(pair.base):
            split.add(pair.base.spec.name)
    tensors = []
    for name, spec in base.tensors.items():
        found = sorted(runs[name])
        inner = _inner(spec)
        if name in split:
            found = _joined(found)
        compared = tuple((start // inner, stop // inner) for start, stop in found)
        assert all(start % inner == stop % inner == 0 for start, stop in found), (name, found)
        tensors.append(MaskTensor(name=name, shape=spec.shape, compared=compared))
    return tensors


def _inner(spec: TensorSpec) -> int:
    """Entries of one first-axis row, at least 1."""
    return max(prod(spec.shape[1:]), 1)


def _is_whole_rows(part: TensorSlice) -> bool:
    """Whether the part is one run of whole first-axis rows."""
    inner = _inner(part.spec)
    return part.num_runs == 1 and part.start_entry % inner == part.num_entries % inner == 0


def _joined(runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sorted runs, with those that touch made one."""
    joined: list[tuple[int, int]] = []
    for start, stop in runs:
        if joined and joined[-1][1] == start:
            start = joined.pop()[0]
        joined.append((start, stop))
    return joined


def mask_metadata(base: Catalogue, tuned: Catalogue, *, criterion: Criterion, view: View) -> MaskMetadata:
    """What the mask says about its origin."""
    sides = [SourceReference(reference=c.reference, resolved=c.resolved_label) for c in (base, tuned)]
    return MaskMetadata(
        criterion=criterion.key, view=view.value, base=sides[0], tuned=sides[1], aliases=dict(base.aliases)
    )


def mask_fingerprints(pairs: Sequence[Pair], tallies: Sequence[Tally]) -> Mapping[str, Fingerprints]:
    """Base and tuned fingerprint of each tensor: the sum over its compared slices; 0 where not known."""
    sums: dict[str, Fingerprints] = {}
    unknown = {pair.base.spec.name for pair in pairs if not _is_whole_rows(pair.base)}
    for pair, tally in zip(pairs, tallies, strict=True):
        base, tuned = sums.get(pair.base.spec.name, (0, 0))
        sums[pair.base.spec.name] = (
            (base + tally.base_fingerprint) % 2**64,
            (tuned + tally.tuned_fingerprint) % 2**64,
        )
    return sums | dict.fromkeys(unknown, (0, 0))
