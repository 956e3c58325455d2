"""The mask directory: written in place while a pair is compared, read back block by block.

Contract: `MaskWriter` may be called from several threads and in any order; the bytes on disk depend only
on tensors, metadata and bits, and appear under their final names when `finish` has them all. `open_mask`
trusts nothing: format, version, polarity, dtypes, shapes, index and shards must agree, tail bits and bits
outside the compared rows must be zero where they are read; every refusal is a `MaskError`.
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
    has_stray_tail,
    packed_shape,
    rows_columns,
)
from sparsity_audit.masks.metadata import (
    FINGERPRINTS_KEY,
    Encoding,
    Fingerprints,
    MaskMetadata,
    MaskTensor,
    parse_metadata,
    render_metadata,
)
from sparsity_audit.masks.shards import INDEX_NAME, MAX_SHARD_BYTES, ShardWriter, StoredTensor
from sparsity_audit.types import DType, TensorSpec

__all__ = ["MaskCatalogue", "MaskReader", "MaskWriter", "open_encoded", "open_mask"]

MAX_INDEX_BYTES: Final = 1 << 30


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
        if num_entries == 0:
            return
        shift = first_entry % 8
        selected = np.unpackbits(np.ascontiguousarray(bits).reshape(-1), count=num_entries, bitorder="little")
        shifted = np.packbits(np.concatenate([np.zeros(shift, dtype=np.uint8), selected]), bitorder="little")
        self._shards.merge(name, first_entry // 8, shifted.tobytes())

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


def _as_bytes(data: bytes | memoryview | np.ndarray) -> memoryview:
    if isinstance(data, np.ndarray):
        assert data.dtype == np.uint8
        return np.ascontiguousarray(data).reshape(-1).data
    return memoryview(data)


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
    try:
        files = tuple(FileEntry.from_path(folder / shard) for shard in shards)
        parts = [(entry, *read_header(entry, file=number)) for number, entry in enumerate(files)]
    except SparsityAuditError as error:
        raise MaskError(error.subject, error.found, expected=error.expected, remedy=error.remedy) from error
    tensors: dict[str, MaskTensor] = {}
    specs: dict[str, TensorSpec] = {}
    aliases: dict[str, str] = {}
    first: tuple[MaskMetadata, Encoding] | None = None
    for entry, stored, strings in parts:
        metadata, described, encoding = parse_metadata(entry.path, strings)
        common = replace(metadata, aliases={}), encoding
        if first is not None and common != first:
            raise MaskError(str(entry.path), f"belongs to another mask than {files[0].name}", remedy=_REMAKE)
        first = common
        _check_stored(entry, stored, described, encoding)
        for name in stored:
            if weight_map.get(name) != entry.name:
                raise MaskError(
                    f"{entry.path}: tensor {name!r}",
                    f"the index places it in {weight_map.get(name)!r}",
                    expected=f"{entry.name!r}",
                    remedy=_REMAKE,
                )
        tensors |= described
        specs |= stored
        aliases |= metadata.aliases
    lost = sorted(weight_map.keys() - specs.keys())
    if lost:
        raise MaskError(
            f"{folder / INDEX_NAME}: tensor {lost[0]!r}",
            f"not in {weight_map[lost[0]]!r}, where the index places it",
            remedy=_REMAKE,
        )
    assert first is not None
    return MaskCatalogue(
        path=folder,
        encoding=first[1],
        metadata=replace(first[0], aliases=dict(sorted(aliases.items()))),
        tensors={name: tensors[name] for name in sorted(tensors)},
        files=files,
        specs=specs,
    )


_REMAKE = "the directory mixes files of several masks or was cut short; make the mask again"


def _read_index(folder: Path) -> tuple[dict[str, str], list[str]]:
    path = folder / INDEX_NAME
    if not path.is_file():
        raise _no_index(folder)
    if path.stat().st_size > MAX_INDEX_BYTES:
        raise MaskError(str(path), f"{path.stat().st_size} bytes long", expected=f"at most {MAX_INDEX_BYTES}")
    try:
        index: Any = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise MaskError(str(path), "is not JSON", remedy=_REMAKE) from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    summary = index.get("metadata") if isinstance(index, dict) else None
    shards = summary.get("shards") if isinstance(summary, dict) else None
    if not isinstance(weight_map, dict) or not isinstance(shards, list) or not shards:
        raise MaskError(str(path), "lacks weight_map or metadata.shards", remedy=_REMAKE)
    for shard in [*shards, *weight_map.values()]:
        if not isinstance(shard, str) or Path(shard).name != shard or shard not in shards:
            raise MaskError(
                str(path),
                f"names the shard {shard!r:.80}",
                expected="a file of the directory, listed in metadata.shards",
            )
    if len(set(shards)) != len(shards):
        raise MaskError(str(path), "lists a shard twice", remedy=_REMAKE)
    return weight_map, shards


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
            remedy="run the command that makes it again; with --resume it goes on where it stopped",
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


class MaskReader:
    """Reads the bits of a packed mask; a context manager.

    Args:
        catalogue: From `open_mask`.
    """

    def __init__(self, catalogue: MaskCatalogue) -> None:
        assert catalogue.encoding == "packed", catalogue.encoding
        self.catalogue = catalogue
        self._files: dict[int, LocalFile] = {}

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
        spec, tensor = self.catalogue.specs[name], self.tensors[name]
        if spec.file not in self._files:
            self._files[spec.file] = LocalFile(self.catalogue.files[spec.file])
        bits = np.empty(block.shape, dtype=np.uint8)
        self._files[spec.file].read_into(bits.reshape(-1).data, spec.extent.start + block.offset)
        self.catalogue.files[spec.file].verify_unchanged()
        subject = f"{self.catalogue.files[spec.file].path}: tensor {name!r}"
        if has_stray_tail(bits, block):
            raise MaskError(
                subject,
                f"bits set beyond the last column in rows {block.row_start}–{block.row_stop - 1}",
                expected=f"zero bits after column {block.cols}",
                remedy="the file is damaged or was packed with another bit order; make the mask again",
            )
        if (
            tensor.num_compared < tensor.num_entries
            and (bits & ~compared_bits(block, tensor.entry_ranges)).any()
        ):
            raise MaskError(
                subject,
                "bits set outside the compared rows",
                expected=f"zero bits outside {[list(pair) for pair in tensor.compared]!r:.80}",
                remedy="the file is damaged; make the mask again",
            )
        return bits

    def blocks(self, name: str, *, max_bytes: int = BLOCK_BYTES) -> Iterator[tuple[Block, np.ndarray]]:
        """All bits of a tensor, block by block in row-major order. Raises as `read_packed`."""
        for block in blocks_of(self.tensors[name].shape, max_bytes=max_bytes):
            yield block, self.read_block(name, block)

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
