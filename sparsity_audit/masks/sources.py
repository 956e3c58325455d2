"""Masks in any encoding, read as blocks of packed bits: our own directories, and masks others wrote.

Contract: a `MaskSource` yields every block of every tensor in row-major order with bounded memory. What
is not a mask is refused by name: a value that is neither 0 nor 1, positions out of order or out of
range, a dtype that is no bool. Polarity is recorded in our own files; for foreign ones the caller says.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np

from sparsity_audit.checkpoint.opening import open_checkpoint
from sparsity_audit.checkpoint.reading import read_entries
from sparsity_audit.checkpoint.safetensors_io import MAX_HEADER_BYTES
from sparsity_audit.checkpoint.store import ByteSource, Catalogue
from sparsity_audit.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    MaskError,
    UnsupportedFormatError,
)
from sparsity_audit.masks.bitmask import BLOCK_BYTES, Block, blocks_of, compared_bits
from sparsity_audit.masks.metadata import UNSPECIFIED, Encoding, MaskMetadata, MaskTensor, parse_metadata
from sparsity_audit.masks.reader import MaskCatalogue, MaskReader, open_encoded
from sparsity_audit.masks.shards import INDEX_NAME
from sparsity_audit.types import DType

__all__ = ["PT_METADATA_NAME", "PT_NAME", "MaskSource", "StoredMask", "open_source"]

PT_NAME: Final = "mask.pt"
PT_METADATA_NAME: Final = "mask.json"
_INDEX_CHUNK = 1 << 17


class MaskSource(Protocol):
    """Where the bits of a mask come from."""

    @property
    def metadata(self) -> MaskMetadata:
        """What holds for all tensors."""
        ...

    @property
    def tensors(self) -> Mapping[str, MaskTensor]:
        """Tensors by name, in name order."""
        ...

    def blocks(self, name: str, *, max_bytes: int = BLOCK_BYTES) -> Iterator[tuple[Block, np.ndarray]]:
        """All bits of a tensor, block by block in row-major order. Raises MaskError."""
        ...

    def close(self) -> None:
        """Close the files."""
        ...


class StoredMask(MaskSource, Protocol):
    """A mask that lies in files."""

    @property
    def encoding(self) -> Encoding:
        """How it is stored; `bool` or `pt` for masks of other tools."""
        ...


def open_source(path: str | Path, *, inverted: bool = False) -> StoredMask:
    """A mask in any encoding.

    Args:
        path: A mask directory of ours, or a `.pt` or safetensors file (or directory) of bool or 0/1 tensors.
        inverted: The foreign mask has 1 where an entry was *not* updated.

    Raises:
        MaskError: It is no mask, or `inverted` is asked of a file that records its polarity.
    """
    folder = Path(path).expanduser()
    own = (folder / INDEX_NAME).is_file() or (folder / PT_METADATA_NAME).is_file()
    if own and inverted:
        raise MaskError(
            str(path),
            "records its polarity already (1 = updated)",
            remedy="leave out --inverted, or use `mask ops not`",
        )
    if (folder / INDEX_NAME).is_file():
        catalogue = open_encoded(folder)
        if catalogue.encoding == "packed":
            return MaskReader(catalogue)
        kind = _IndexSource if catalogue.encoding == "indices" else _BoolSource
        return kind(catalogue)
    if own:
        return _open_pt(folder)
    if folder.is_dir() and any(folder.glob("mask-*.safetensors*")):
        open_encoded(folder)  # raises: shards without an index are an unfinished mask
    return _open_foreign(path, inverted=inverted)


class _FileSource:
    """Common to sources that read one stored tensor a mask tensor."""

    def __init__(self, catalogue: MaskCatalogue) -> None:
        self.encoding: Encoding = catalogue.encoding
        self.metadata = catalogue.metadata
        self.tensors = catalogue.tensors
        self._catalogue = catalogue
        self._files, self._specs = catalogue.files, catalogue.specs
        self._open: dict[int, ByteSource] = {}

    def _read(self, name: str, first: int, count: int) -> np.ndarray:
        """`count` stored entries from `first` on, in the stored dtype."""
        spec = self._specs[name]
        if spec.file not in self._open:
            self._open[spec.file] = self._files[spec.file].open()
        values = np.empty(count, dtype=f"<{'i' if spec.dtype.kind == 'int' else 'u'}{spec.dtype.itemsize}")
        if count:
            read_entries(self._open[spec.file], spec, first, values.view(np.uint8).data)
            self._files[spec.file].verify_unchanged()
        return values

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process the files are opened again."""
        return type(self), (self._catalogue,)

    def _subject(self, name: str) -> str:
        return f"{self._files[self._specs[name].file].path}: tensor {name!r}"

    def close(self) -> None:
        """Close the files."""
        while self._open:
            self._open.popitem()[1].close()


class _BoolSource(_FileSource):
    """One byte an entry, 0 or 1."""

    inverted = False

    def blocks(self, name: str, *, max_bytes: int = BLOCK_BYTES) -> Iterator[tuple[Block, np.ndarray]]:
        """Pack the stored bytes."""
        tensor = self.tensors[name]
        partial = tensor.num_compared < tensor.num_entries
        for block in blocks_of(tensor.shape, max_bytes=max_bytes):
            values = self._read(name, block.first_entry, block.num_entries)
            wrong = np.flatnonzero(values > 1)
            if len(wrong):
                raise MaskError(
                    self._subject(name),
                    f"holds the value {values[wrong[0]]} at entry {block.first_entry + int(wrong[0])}",
                    expected="0 or 1, one byte an entry",
                    remedy="save the mask as bool tensors; packed bits need this tool's metadata",
                )
            if self.inverted:
                values ^= 1
            bits = np.packbits(values.reshape(-1, block.num_cols), axis=-1, bitorder="little")
            if partial and (bits & ~compared_bits(block, tensor.entry_ranges)).any():
                raise _outside(self._subject(name), tensor)
            yield block, bits


class _InvertedSource(_BoolSource):
    inverted = True


class _IndexSource(_FileSource):
    """Sorted row-major positions of the set entries."""

    def blocks(self, name: str, *, max_bytes: int = BLOCK_BYTES) -> Iterator[tuple[Block, np.ndarray]]:
        """Scatter the positions, which come in the order of the blocks."""
        tensor = self.tensors[name]
        partial = tensor.num_compared < tensor.num_entries
        positions = self._positions(name)
        held = np.empty(0, dtype=np.int64)
        for block in blocks_of(tensor.shape, max_bytes=max_bytes):
            stop = block.first_entry + block.num_entries
            selected = np.zeros(block.num_entries, dtype=np.bool_)
            while True:
                inside = int(np.searchsorted(held, stop))
                selected[held[:inside] - block.first_entry] = True
                held = held[inside:]
                if len(held) or (chunk := next(positions, None)) is None:
                    break
                held = chunk
            bits = np.packbits(selected.reshape(-1, block.num_cols), axis=-1, bitorder="little")
            if partial and (bits & ~compared_bits(block, tensor.entry_ranges)).any():
                raise _outside(self._subject(name), tensor)
            yield block, bits

    def _positions(self, name: str) -> Iterator[np.ndarray]:
        count, limit, last = self._specs[name].num_entries, self.tensors[name].num_entries, -1
        for first in range(0, count, _INDEX_CHUNK):
            chunk = self._read(name, first, min(_INDEX_CHUNK, count - first)).astype(np.int64)
            if chunk[0] <= last or (np.diff(chunk) <= 0).any() or chunk[-1] >= limit:
                raise MaskError(
                    self._subject(name),
                    f"positions {first} … {first + len(chunk) - 1} are out of order or out of range",
                    expected=f"strictly increasing, 0 … {limit - 1}",
                    remedy="the file is damaged; make the mask again",
                )
            last = int(chunk[-1])
            yield chunk


def _outside(subject: str, tensor: MaskTensor) -> MaskError:
    return MaskError(
        subject,
        "entries selected outside the compared rows",
        expected=f"none outside {[list(pair) for pair in tensor.compared]!r:.80}",
        remedy="the file is damaged; make the mask again",
    )


def _open_pt(folder: Path) -> StoredMask:
    path = folder / PT_METADATA_NAME
    if path.stat().st_size > MAX_HEADER_BYTES:
        raise MaskError(
            str(path), f"{path.stat().st_size} bytes long", expected=f"at most {MAX_HEADER_BYTES}"
        )
    try:
        strings = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise MaskError(str(path), "is not JSON", remedy="make the mask again") from error
    if not isinstance(strings, dict) or not all(isinstance(value, str) for value in strings.values()):
        raise MaskError(str(path), "is not a map of strings", remedy="make the mask again")
    metadata, tensors, _ = parse_metadata(path, strings)
    stored = _open_stored(folder / PT_NAME)
    specs = {name: stored.tensors[held] for name, held in _all_names(stored).items()}
    if specs.keys() != tensors.keys():
        odd = sorted(specs.keys() ^ tensors.keys())[0]
        raise MaskError(
            f"{folder / PT_NAME}: tensor {odd!r}", f"not in both {PT_NAME} and {PT_METADATA_NAME}"
        )
    for name, spec in specs.items():
        if spec.dtype is not DType.BOOL or spec.shape != tensors[name].shape:
            raise MaskError(
                f"{folder / PT_NAME}: tensor {name!r}",
                f"{spec.dtype} of shape {list(spec.shape)}",
                expected=f"BOOL of shape {list(tensors[name].shape)}",
            )
    return _BoolSource(
        MaskCatalogue(
            path=folder, encoding="pt", metadata=metadata, tensors=tensors, files=stored.files, specs=specs
        )
    )


def _all_names(stored: Catalogue) -> dict[str, str]:
    """Every name → the name that holds its entries (torch lets empty tensors share a storage)."""
    return {name: name for name in stored.tensors} | dict(stored.aliases)


def _open_stored(path: str | Path) -> Catalogue:
    try:
        return open_checkpoint(Path(path))  # a Path is never taken for a Hub reference
    except (CheckpointNotFoundError, CorruptCheckpointError, UnsupportedFormatError) as error:
        raise MaskError(error.subject, error.found, expected=error.expected, remedy=error.remedy) from error


def _open_foreign(path: str | Path, *, inverted: bool) -> StoredMask:
    stored = _open_stored(path)
    for name, spec in stored.tensors.items():
        if spec.dtype not in (DType.BOOL, DType.U8):
            raise MaskError(
                f"{stored.files[spec.file].path}: tensor {name!r}",
                f"{spec.dtype} of shape {list(spec.shape)}",
                expected="a mask: BOOL, or U8 with values 0 and 1",
                remedy="masks are made from two checkpoints with `sparsity-audit mask export`",
            )
    kind = _InvertedSource if inverted else _BoolSource
    is_torch = stored.files[0].name.endswith((".pt", ".pth", ".bin"))
    return kind(
        MaskCatalogue(
            path=Path(path),
            encoding="pt" if is_torch else "bool",
            metadata=_foreign_metadata(stored, inverted=inverted),
            tensors={
                name: MaskTensor.whole(name, stored.tensors[name].shape) for name in sorted(stored.tensors)
            },
            files=stored.files,
            specs=stored.tensors,
        )
    )


def _foreign_metadata(stored: Catalogue, *, inverted: bool) -> MaskMetadata:
    return MaskMetadata(
        criterion=UNSPECIFIED,
        view=UNSPECIFIED,
        aliases=dict(sorted(stored.aliases.items())),
        origin={
            "inverted": inverted,
            "operation": "import",
            "source": {"reference": stored.reference, "resolved": stored.resolved},
        },
    )
