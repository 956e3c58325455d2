"""Open a mask directory and read its bits, block by block.

Contract: nothing is trusted. Format, version, polarity, dtypes, shapes, index and shards must agree; tail
bits and bits outside the compared rows must be zero where they are read. Every refusal is a `MaskError`
that names file, tensor, what was found, what was expected and what to do.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np

from sparsity_audit.checkpoint.safetensors_io import read_header
from sparsity_audit.checkpoint.store import FileEntry, LocalFile
from sparsity_audit.errors import MaskError, SparsityAuditError
from sparsity_audit.masks.bitmask import (
    BLOCK_BYTES,
    Block,
    blocks_of,
    compared_bits,
    compared_spans,
    has_stray_tail,
    packed_shape,
    rows_columns,
)
from sparsity_audit.masks.metadata import Encoding, MaskMetadata, MaskTensor, parse_metadata
from sparsity_audit.masks.shards import INDEX_NAME
from sparsity_audit.types import DType, TensorSpec

__all__ = ["MaskCatalogue", "MaskReader", "open_encoded", "open_mask"]

_MAX_INDEX_BYTES: Final = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskCatalogue:
    """What a mask directory holds, without its bits.

    Args:
        path: The directory.
        encoding: How the entries are stored.
        metadata: What holds for all tensors.
        tensors: Tensors by name, in name order.
        files: The shards.
        specs: Where each tensor lies.
    """

    path: Path
    encoding: Encoding
    metadata: MaskMetadata
    tensors: Mapping[str, MaskTensor]
    files: tuple[FileEntry, ...]
    specs: Mapping[str, TensorSpec]


def open_mask(path: str | Path) -> MaskCatalogue:
    """The catalogue of a packed mask directory; reads headers only.

    Raises:
        MaskError: There is no finished mask, or it contradicts itself.
    """
    catalogue = open_encoded(path)
    if catalogue.encoding != "packed":
        raise MaskError(
            str(path),
            f"a mask in the encoding {catalogue.encoding!r}",
            expected="packed bits",
            remedy=f"sparsity-audit mask convert {path} -o PACKED --format packed",
        )
    return catalogue


def open_encoded(path: str | Path) -> MaskCatalogue:
    """The catalogue of a mask directory in the encoding `packed`, `bool` or `indices`. Raises MaskError."""
    folder = Path(path).expanduser()
    weight_map, shards = _read_index(folder)
    files, parts = _read_shards(folder, shards)
    first_metadata, _, encoding = parts[0].described
    tensors: dict[str, MaskTensor] = {}
    specs: dict[str, TensorSpec] = {}
    aliases: dict[str, str] = {}
    for part in parts:
        metadata, described, its_encoding = part.described
        if (replace(metadata, aliases={}), its_encoding) != (replace(first_metadata, aliases={}), encoding):
            raise MaskError(
                str(part.entry.path), f"belongs to another mask than {files[0].name}", remedy=_REMAKE
            )
        _check_stored(part.entry, part.stored, described, encoding)
        _check_places(part, weight_map)
        tensors |= described
        specs |= part.stored
        aliases |= metadata.aliases
    lost = sorted(weight_map.keys() - specs.keys())
    if lost:
        raise MaskError(
            f"{folder / INDEX_NAME}: tensor {lost[0]!r}",
            f"not in {weight_map[lost[0]]!r}, where the index places it",
            remedy=_REMAKE,
        )
    return MaskCatalogue(
        path=folder,
        encoding=encoding,
        metadata=replace(first_metadata, aliases=dict(sorted(aliases.items()))),
        tensors={name: tensors[name] for name in sorted(tensors)},
        files=files,
        specs=specs,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """One shard: what is stored, and what its metadata says."""

    entry: FileEntry
    stored: Mapping[str, TensorSpec]
    described: tuple[MaskMetadata, dict[str, MaskTensor], Encoding]


def _read_shards(folder: Path, shards: Sequence[str]) -> tuple[tuple[FileEntry, ...], list[_Part]]:
    parts = []
    try:
        for number, shard in enumerate(shards):
            entry = FileEntry.from_path(folder / shard)
            stored, strings = read_header(entry, file=number)
            parts.append(_Part(entry=entry, stored=stored, described=parse_metadata(entry.path, strings)))
    except MaskError:
        raise
    except SparsityAuditError as error:
        raise MaskError(error.subject, error.found, expected=error.expected, remedy=error.remedy) from error
    return tuple(part.entry for part in parts), parts


def _check_places(part: _Part, weight_map: Mapping[str, str]) -> None:
    for name in part.stored:
        if weight_map.get(name) != part.entry.name:
            raise MaskError(
                f"{part.entry.path}: tensor {name!r}",
                f"the index places it in {weight_map.get(name)!r}",
                expected=f"{part.entry.name!r}",
                remedy=_REMAKE,
            )


_REMAKE = "the directory mixes files of several masks or was cut short; make the mask again"


def _read_index(folder: Path) -> tuple[dict[str, str], list[str]]:
    path = folder / INDEX_NAME
    if not path.is_file():
        raise _no_index(folder)
    if path.stat().st_size > _MAX_INDEX_BYTES:
        raise MaskError(
            str(path), f"{path.stat().st_size} bytes long", expected=f"at most {_MAX_INDEX_BYTES}"
        )
    try:
        index: Any = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise MaskError(str(path), "is not JSON", remedy=_REMAKE) from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    summary = index.get("metadata") if isinstance(index, dict) else None
    shards = summary.get("shards") if isinstance(summary, dict) else None
    if not isinstance(weight_map, dict) or not isinstance(shards, list) or not shards:
        raise MaskError(str(path), "lacks weight_map or metadata.shards", remedy=_REMAKE)
    names = {shard for shard in shards if isinstance(shard, str) and _is_file_name(shard)}
    for shard in [*shards, *weight_map.values()]:
        if not isinstance(shard, str) or shard not in names:
            raise MaskError(
                str(path),
                f"names the shard {shard!r:.80}",
                expected="a file of the directory, listed in metadata.shards",
            )
    if len(names) != len(shards):
        raise MaskError(str(path), "lists a shard twice", remedy=_REMAKE)
    return weight_map, shards


def _is_file_name(text: str) -> bool:
    return text not in ("", "..") and text.isprintable() and Path(text).name == text


def _no_index(folder: Path) -> MaskError:
    if not folder.exists():
        return MaskError(str(folder), "does not exist", expected="a mask directory")
    if folder.is_file():
        return MaskError(
            str(folder),
            "is a file",
            expected="a mask directory",
            remedy=f"give the directory of the file, or import a foreign mask: mask convert {folder} -o OUT",
        )
    if any(folder.glob("mask-*.safetensors*")):
        return MaskError(
            str(folder),
            "holds an unfinished mask (shards without an index)",
            remedy="run the command that makes it again: it goes on where it stopped",
        )
    if (folder / "model.safetensors.index.json").exists() or (folder / "config.json").exists():
        return MaskError(
            str(folder), "is a checkpoint, not a mask", remedy="make a mask with `sparsity-audit mask export`"
        )
    return MaskError(
        str(folder),
        f"holds no {INDEX_NAME}",
        expected="a mask directory",
        remedy=f"import masks of other tools: mask convert {folder} -o OUT",
    )


def _check_stored(
    entry: FileEntry,
    stored: Mapping[str, TensorSpec],
    described: Mapping[str, MaskTensor],
    encoding: Encoding,
) -> None:
    odd = sorted(stored.keys() ^ described.keys())
    if odd:
        where = "stored but not described in the metadata" if odd[0] in stored else "described but not stored"
        raise MaskError(f"{entry.path}: tensor {odd[0]!r}", where, remedy=_REMAKE)
    for name, spec in stored.items():
        tensor = described[name]
        found = f"{spec.dtype} of shape {list(spec.shape)}"
        if encoding == "indices":
            fits = spec.dtype in (DType.I32, DType.I64) and len(spec.shape) == 1
            fits = fits and spec.shape[0] <= tensor.num_entries
            expected = f"I32 or I64, at most {tensor.num_entries} sorted positions"
        else:
            dtype, shape = (
                (DType.U8, packed_shape(tensor.shape)) if encoding == "packed" else (DType.BOOL, tensor.shape)
            )
            fits = (spec.dtype, spec.shape) == (dtype, shape)
            expected = f"{dtype} of shape {list(shape)} for the mask of shape {list(tensor.shape)}"
        if not fits:
            raise MaskError(f"{entry.path}: tensor {name!r}", found, expected=expected)


def _is_unbounded(tensor: MaskTensor) -> bool:
    """Whether every stored bit may be set: all rows are compared, and end on a byte."""
    length = tensor.shape[0] if tensor.shape else 1
    return rows_columns(tensor.shape)[1] % 8 == 0 and tensor.compared == ((0, length),)


class MaskReader:
    """Reads the bits of a packed mask; a context manager.

    Args:
        catalogue: From `open_mask`.
    """

    def __init__(self, catalogue: MaskCatalogue) -> None:
        assert catalogue.encoding == "packed", catalogue.encoding
        self.catalogue = catalogue
        self._files: dict[int, LocalFile] = {}
        self._unbounded = frozenset(
            name for name, tensor in catalogue.tensors.items() if _is_unbounded(tensor)
        )

    @property
    def encoding(self) -> Encoding:
        """`packed`."""
        return self.catalogue.encoding

    @property
    def metadata(self) -> MaskMetadata:
        """What holds for all tensors."""
        return self.catalogue.metadata

    @property
    def tensors(self) -> Mapping[str, MaskTensor]:
        """Tensors by name."""
        return self.catalogue.tensors

    def read_packed(self, name: str, row_start: int = 0, row_stop: int | None = None) -> np.ndarray:
        """Packed bytes of some rows (all leading axes × the last), uint8[rows, row bytes].

        Raises:
            MaskError: Bits are set in the tail or outside the compared rows.
            ChangedInputError: The file is not the one that was opened.
        """
        rows, cols = rows_columns(self.tensors[name].shape)
        stop = rows if row_stop is None else row_stop
        assert 0 <= row_start <= stop <= rows, (name, row_start, stop, rows)
        width = -(-cols // 8)
        if stop == row_start or width == 0:
            return np.zeros((stop - row_start, width), dtype=np.uint8)
        return self.read_block(
            name, Block(row_start=row_start, row_stop=stop, byte_start=0, byte_stop=width, cols=cols)
        )

    def read_block(self, name: str, block: Block) -> np.ndarray:
        """Packed bytes of one block, uint8 of the block's shape. Raises as `read_packed`."""
        bits = np.empty(block.shape, dtype=np.uint8)
        self.read_into(name, block, bits.reshape(-1))
        self.verify_unchanged(name)
        return bits

    def read_into(self, name: str, block: Block, bits: np.ndarray) -> None:
        """`read_block` into contiguous bytes, block.num_bytes of them; ask `verify_unchanged` afterwards.

        Many blocks can share that question. Until it is answered the bits may be another file's.

        Raises:
            MaskError: Bits are set in the tail or outside the compared rows.
            ChangedInputError: The file ends early, or such bits are not those of the file that was opened.
        """
        spec = self.catalogue.specs[name]
        if spec.file not in self._files:
            self._files[spec.file] = LocalFile(self.catalogue.files[spec.file])
        self._files[spec.file].read_into(bits.data, spec.extent.start + block.offset)
        if name not in self._unbounded:
            try:
                self._verify_bits(name, block, bits.reshape(block.shape))
            except MaskError:
                self.verify_unchanged(name)
                raise

    def verify_unchanged(self, name: str) -> None:
        """Raise ChangedInputError unless the tensor's file is still the one that was opened."""
        self.catalogue.files[self.catalogue.specs[name].file].verify_unchanged()

    def _verify_bits(self, name: str, block: Block, bits: np.ndarray) -> None:
        tensor = self.tensors[name]
        subject = f"{self.catalogue.files[self.catalogue.specs[name].file].path}: tensor {name!r}"
        if has_stray_tail(bits, block):
            raise MaskError(
                subject,
                f"bits set beyond the last column in rows {block.row_start}–{block.row_stop - 1}",
                expected=f"zero bits after column {block.cols}",
                remedy="the file is damaged or was packed with another bit order; make the mask again",
            )
        is_whole = compared_spans(block, tensor.entry_ranges) == [(0, block.num_entries)]
        if not is_whole and (bits & ~compared_bits(block, tensor.entry_ranges)).any():
            raise MaskError(
                subject,
                "bits set outside the compared rows",
                expected=f"zero bits outside {[list(pair) for pair in tensor.compared]!r:.80}",
                remedy="the file is damaged; make the mask again",
            )

    def blocks(self, name: str, *, max_bytes: int = BLOCK_BYTES) -> Iterator[tuple[Block, np.ndarray]]:
        """All bits of a tensor, block by block in row-major order. Raises as `read_packed`."""
        for block in blocks_of(self.tensors[name].shape, max_bytes=max_bytes):
            yield block, self.read_block(name, block)

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process the files are opened again."""
        return MaskReader, (self.catalogue,)

    def close(self) -> None:
        """Close the files."""
        while self._files:
            self._files.popitem()[1].close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
