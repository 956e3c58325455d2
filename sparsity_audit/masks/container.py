"""Write a mask directory in place, while a pair is compared.

Contract: `MaskWriter` may be called from several threads and in any order; the bytes on disk depend only
on tensors, metadata and bits, and appear under their final names when `finish` has them all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from sparsity_audit.masks.bitmask import packed_shape
from sparsity_audit.masks.metadata import (
    FINGERPRINTS_KEY,
    Fingerprints,
    MaskMetadata,
    MaskTensor,
    render_metadata,
)
from sparsity_audit.masks.shards import MASK_NAMING, MAX_SHARD_BYTES, ShardWriter, StoredTensor
from sparsity_audit.types import DType

__all__ = ["MaskWriter", "shifted_bits"]


class MaskWriter:
    """Writes a packed mask directory in place; thread-safe.

    Used as a context manager it deletes what is unfinished when the block ends, unless `close` was called.

    Args:
        target: Directory to fill.
        tensors: Every tensor of the mask; their fingerprints may still be 0.
        metadata: What holds for all of them.
        max_shard_bytes: Size after which a new file begins.
        resume: Keep the bits an interrupted writer of the same mask left here.

    Raises:
        OutputError: The directory is not empty, or cannot be written.
    """

    def __init__(
        self,
        target: str | Path,
        tensors: Sequence[MaskTensor],
        metadata: MaskMetadata,
        *,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        resume: bool = False,
    ) -> None:
        self._tensors = {tensor.name: tensor for tensor in tensors}
        self._metadata = metadata
        assert len(self._tensors) == len(tensors), "tensor names must be unique"
        self._shards = ShardWriter(
            Path(target),
            [StoredTensor(name=t.name, dtype=DType.U8, shape=packed_shape(t.shape)) for t in tensors],
            naming=MASK_NAMING,
            # The same text whether or not the caller knows fingerprints already, so that resuming finds it.
            metadata_of=lambda names: self._render(names, dict.fromkeys(names, (0, 0))),
            late_key=FINGERPRINTS_KEY,
            max_shard_bytes=max_shard_bytes,
            resume=resume,
        )

    @property
    def reused(self) -> bool:
        """Whether bits of an interrupted writer were kept; otherwise every bit is still 0."""
        return self._shards.reused

    def write_bits(self, name: str, byte_offset: int, data: bytes | memoryview | np.ndarray) -> None:
        """Write packed bytes at `byte_offset` of a tensor. Raises OutputError."""
        self._shards.write(name, byte_offset, _as_bytes(data))

    def write_entries(self, name: str, first_entry: int, bits: np.ndarray, num_entries: int) -> None:
        """Set `num_entries` packed bits of a 1-D tensor, whose first need not start a byte.

        Bits that are 0 leave what is there, so that neighbours which share a byte may come in any order.
        """
        assert len(self._tensors[name].shape) <= 1, name
        if num_entries:
            self._shards.merge(name, first_entry // 8, shifted_bits(bits, num_entries, first_entry % 8))

    def merge_bits(self, name: str, byte_offset: int, data: bytes | memoryview) -> None:
        """Set the bits of packed bytes at `byte_offset`, keeping those that are set. Raises OutputError."""
        self._shards.merge(name, byte_offset, bytes(data))

    def finish(self, fingerprints: Mapping[str, Fingerprints] | None = None) -> None:
        """Write the fingerprints, flush, and give the files their names; the index comes last.

        Args:
            fingerprints: Base and tuned fingerprint by tensor; tensors left out keep what they came with.
        """
        known = {name: tensor.fingerprints for name, tensor in self._tensors.items()} | dict(
            fingerprints or {}
        )
        assert known.keys() == self._tensors.keys(), "fingerprints of unknown tensors"
        self._shards.finish(lambda names: self._render(names, known))

    def close(self) -> None:
        """Stop and leave the unfinished files for `resume`; `abort` is then left to the caller."""
        self._shards.close()

    def abort(self) -> None:
        """Delete what is unfinished; does nothing after `finish`."""
        self._shards.abort()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._shards.closed:
            self.abort()

    def _render(self, names: Sequence[str], fingerprints: Mapping[str, Fingerprints]) -> dict[str, str]:
        held = [replace(self._tensors[name], fingerprints=fingerprints[name]) for name in names]
        return render_metadata(self._metadata, held, encoding="packed")


def shifted_bits(bits: np.ndarray, num_entries: int, shift: int) -> bytes:
    """Packed bits behind `shift` zero bits, as bytes."""
    selected = np.unpackbits(np.ascontiguousarray(bits).reshape(-1), count=num_entries, bitorder="little")
    return np.packbits(
        np.concatenate([np.zeros(shift, dtype=np.uint8), selected]), bitorder="little"
    ).tobytes()


def _as_bytes(data: bytes | memoryview | np.ndarray) -> memoryview:
    if isinstance(data, np.ndarray):
        assert data.dtype == np.uint8
        return np.ascontiguousarray(data).reshape(-1).data
    return memoryview(data)
