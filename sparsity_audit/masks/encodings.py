"""Write a mask in one of its encodings, tensor by tensor.

Contract: every encoding holds the same bits and the same metadata, so that converting there and back
gives the first file again, byte for byte. Memory is a few blocks, but for `pt`, whose entries lie in a
temporary file that torch maps.

| encoding | on disk | per entry |
|---|---|---|
| `packed` | U8, bits little-endian along the last axis | 1 bit |
| `bool` | BOOL tensors of the original shape | 8 bits |
| `indices` | sorted row-major positions, I32, or I64 past 2³¹ − 1 | 32 (64) bits a set entry |
| `pt` | `mask.pt`, name → torch.bool, beside `mask.json` | 8 bits |
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparsity_audit.errors import MissingExtraError
from sparsity_audit.masks.bitmask import popcount
from sparsity_audit.masks.container import MaskWriter
from sparsity_audit.masks.metadata import FINGERPRINTS_KEY, Encoding, MaskTensor, render_metadata
from sparsity_audit.masks.shards import (
    MASK_NAMING,
    MAX_SHARD_BYTES,
    ShardWriter,
    StoredTensor,
    claim_directory,
    output_error,
)
from sparsity_audit.masks.sources import PT_METADATA_NAME, PT_NAME, MaskSource
from sparsity_audit.types import DType

__all__ = ["indices_bytes", "position_dtype", "write_mask"]


def position_dtype(num_entries: int) -> DType:
    """Dtype of the positions in a tensor of that many entries."""
    return DType.I32 if num_entries <= 2**31 else DType.I64


def indices_bytes(num_entries: int, num_selected: int) -> int:
    """Bytes of the encoding `indices` for one tensor; less than packed below about 3 % density."""
    return num_selected * position_dtype(num_entries).itemsize


def write_mask(
    source: MaskSource, target: str | Path, encoding: Encoding, *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write `source` to the directory `target`.

    Raises:
        OutputError: The directory is not empty, or cannot be written.
        MaskError: The source contradicts itself; nothing is left behind.
    """
    tensors = list(source.tensors.values())
    if encoding == "packed":
        with MaskWriter(target, tensors, source.metadata, max_shard_bytes=max_shard_bytes) as writer:
            for tensor in tensors:
                for block, bits in source.blocks(tensor.name):
                    writer.write_bits(tensor.name, block.offset, bits)
            writer.finish()
    elif encoding == "pt":
        _write_pt(source, Path(target))
    else:
        _write_shards(source, Path(target), encoding, max_shard_bytes=max_shard_bytes)


def _write_shards(source: MaskSource, target: Path, encoding: Encoding, *, max_shard_bytes: int) -> None:
    tensors = source.tensors
    if encoding == "bool":
        stored = [StoredTensor(name=t.name, dtype=DType.BOOL, shape=t.shape) for t in tensors.values()]
    else:
        stored = [
            StoredTensor(name=t.name, dtype=position_dtype(t.num_entries), shape=(_num_selected(source, t),))
            for t in tensors.values()
        ]

    def metadata_of(names: Sequence[str]) -> dict[str, str]:
        return render_metadata(source.metadata, [tensors[name] for name in names], encoding=encoding)

    shards = ShardWriter(
        target,
        stored,
        naming=MASK_NAMING,
        metadata_of=metadata_of,
        late_key=FINGERPRINTS_KEY,
        max_shard_bytes=max_shard_bytes,
    )
    try:
        for tensor in stored:
            offset = 0
            for chunk in _encoded(source, tensor, encoding):
                shards.write(tensor.name, offset, chunk.data.cast("B"))
                offset += chunk.nbytes
        shards.finish(metadata_of)
    finally:
        shards.abort()


def _num_selected(source: MaskSource, tensor: MaskTensor) -> int:
    return sum(popcount(bits) for _, bits in source.blocks(tensor.name))


def _encoded(source: MaskSource, tensor: StoredTensor, encoding: Encoding) -> Iterator[np.ndarray]:
    for block, bits in source.blocks(tensor.name):
        entries = np.unpackbits(bits, axis=-1, count=block.num_cols, bitorder="little").reshape(-1)
        if encoding == "bool":
            chunk = entries
        else:
            positions = np.flatnonzero(entries) + block.first_entry
            chunk = positions.astype("<i4" if tensor.dtype is DType.I32 else "<i8")
        if chunk.size:
            yield chunk


def _write_pt(source: MaskSource, target: Path) -> None:
    torch = _torch()
    created = claim_directory(target, allow_content=False)
    partial, final, about = target / f"{PT_NAME}.partial", target / PT_NAME, target / PT_METADATA_NAME
    try:
        # Entries go to a file that torch maps, because `torch.save` wants all tensors at once.
        with tempfile.TemporaryFile(dir=target) as raw:
            for name in source.tensors:
                stored = StoredTensor(name=name, dtype=DType.BOOL, shape=source.tensors[name].shape)
                for chunk in _encoded(source, stored, "bool"):
                    raw.write(chunk.data)
            raw.flush()
            total = raw.tell()
            mapped = (
                np.memmap(raw, dtype=np.bool_, mode="r+", shape=(total,)) if total else np.empty(0, np.bool_)
            )
            state, start = {}, 0
            for name, tensor in source.tensors.items():
                part = mapped[start : start + tensor.num_entries]
                state[name] = torch.from_numpy(part).reshape(tensor.shape)
                start += tensor.num_entries
            with partial.open("wb") as file:
                torch.save(state, file)
        strings = render_metadata(source.metadata, source.tensors.values(), encoding="pt")
        partial.replace(final)
        text = json.dumps(strings, sort_keys=True, indent=2) + "\n"
        partial.write_text(text, encoding="utf-8")
        partial.replace(about)
    except BaseException as error:
        for path in (partial, final, about):
            path.unlink(missing_ok=True)
        if created:
            target.rmdir()
        if isinstance(error, OSError):
            raise output_error(target, error) from error
        raise


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise MissingExtraError(
            "encoding 'pt'", "torch is not installed", remedy="pip install torch, or choose another encoding"
        ) from error
    return torch
