"""Read safetensors headers, treating them as hostile.

Contract: lengths and the number of tensors are bounded before anything is built from them; every tensor's
range lies in the file, has the size its dtype and shape demand, and the ranges cover the data exactly,
without overlaps, holes or trailing bytes, as the reference implementation demands. Duplicate keys, unknown
dtypes and names that are not text are errors that name file and tensor.

Source: the safetensors format description: 8-byte little-endian header length, JSON header, data
(https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import json
import math
import sys
from contextlib import closing
from typing import Any

from sparsity_audit.checkpoint.contents import has_absurd_empty_shape
from sparsity_audit.checkpoint.store import FileEntry
from sparsity_audit.errors import CorruptCheckpointError, UnsupportedFormatError
from sparsity_audit.types import ByteRange, DType, TensorSpec

__all__ = ["MAX_HEADER_BYTES", "MAX_TENSORS", "read_header"]

MAX_HEADER_BYTES = 100_000_000
"""The bound that the reference implementation uses as well."""

MAX_TENSORS = 400_000
"""Per file; the largest mixtures of experts hold some 100,000 over all their shards."""

_MAX_DIMENSIONS = 64
_PACKED_DTYPES = {"F4", "F6_E2M3", "F6_E3M2"}


def read_header(entry: FileEntry, *, file: int) -> tuple[dict[str, TensorSpec], dict[str, str]]:
    """The tensors of one safetensors file, by name, and its `__metadata__`.

    Args:
        entry: The file.
        file: The file's index in the catalogue, stored in the specs.

    Raises:
        CorruptCheckpointError: The header contradicts itself or the file.
        UnsupportedFormatError: A dtype this tool does not know.
    """
    raw, data_start = _header_bytes(entry)
    header = _parse_json(entry, raw)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _corrupt(entry, "`__metadata__` is not a map of strings")
    # Names come back in the index and on the other side, a model has few shapes, and where a tensor ends the
    # next one starts. One object each.
    shared: dict[Any, Any] = {}
    tensors = {}
    for name in map(sys.intern, list(header)):
        tensors[name] = _spec(
            entry, name=name, record=header.pop(name), data_start=data_start, file=file, shared=shared
        )
    _check_cover(entry, tensors, data_start=data_start)
    return tensors, metadata


def _header_bytes(entry: FileEntry) -> tuple[bytes, int]:
    with closing(entry.open()) as source:
        if entry.num_bytes < 8:
            raise _corrupt(entry, f"{entry.num_bytes} bytes long", expected="at least 8 bytes")
        prefix = bytearray(8)
        source.read_into(memoryview(prefix), 0)
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER_BYTES:
            raise _corrupt(
                entry,
                f"header claims {length} bytes",
                expected=f"at most {MAX_HEADER_BYTES}",
                remedy="this is probably not a safetensors file; check how it was made or downloaded",
            )
        if 8 + length > entry.num_bytes:
            raise _corrupt(
                entry,
                f"header claims {length} bytes in a file of {entry.num_bytes}",
                remedy="the file is truncated; download or copy it again",
            )
        raw = bytearray(length)
        source.read_into(memoryview(raw), 8)
    return bytes(raw), 8 + length


def _parse_json(entry: FileEntry, raw: bytes) -> dict[str, Any]:
    # Counted before parsing: parsed, three bytes of header can take a hundred of memory.
    if raw.count(b"{") > 2 * MAX_TENSORS or max(raw.count(b"["), raw.count(b",")) > 12 * MAX_TENSORS:
        raise _corrupt(entry, "header holds too many tensors", expected=f"at most {MAX_TENSORS}")

    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                raise _corrupt(entry, f"header names {key[:200]!r} twice")
            seen[key] = value
        return seen

    def no_constant(text: str) -> None:
        raise ValueError(text)

    try:
        header = json.loads(
            raw.decode("utf-8"), object_pairs_hook=without_duplicates, parse_constant=no_constant
        )
    except CorruptCheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise _corrupt(
            entry,
            f"header is not JSON ({type(error).__name__})",
            remedy="this is probably not a safetensors file, or it is damaged; download or copy it again",
        ) from error
    if not isinstance(header, dict):
        raise _corrupt(entry, "header is not a JSON object")
    return header


def _spec(
    entry: FileEntry,
    *,
    name: str,
    record: Any,
    data_start: int,
    file: int,
    shared: dict[Any, Any],
) -> TensorSpec:
    if not name.isprintable():
        # Lone surrogates cannot be written anywhere; escape sequences would reach a terminal.
        raise _corrupt(entry, f"a tensor is named {name[:80]!r}", expected="text without control characters")
    if not isinstance(record, dict) or not {"dtype", "shape", "data_offsets"} <= record.keys():
        raise _corrupt(entry, f"tensor {name!r} lacks dtype, shape or data_offsets")
    dtype = _dtype(entry, name, record["dtype"])
    shape, offsets = record["shape"], record["data_offsets"]
    if not _is_size_list(shape) or len(shape) > _MAX_DIMENSIONS:
        raise _corrupt(entry, f"tensor {name!r} has shape {_shown(shape)}", expected="a list of sizes")
    if not _is_size_list(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _corrupt(
            entry,
            f"tensor {name!r} has data_offsets {_shown(offsets)}",
            expected="[begin, end] with begin ≤ end",
        )
    if has_absurd_empty_shape(shape):
        raise _corrupt(entry, f"tensor {name!r} has shape {_shown(shape)}: no entries, yet large sizes")
    needed = math.prod(shape) * dtype.itemsize
    if needed >= 2**63:
        raise _corrupt(entry, f"tensor {name!r} has shape {_shown(shape)}, more than 2^63 bytes")
    if offsets[1] - offsets[0] != needed:
        raise _corrupt(
            entry,
            f"tensor {name!r} spans {offsets[1] - offsets[0]} bytes",
            expected=f"{needed} bytes for {dtype} of shape {_shown(shape)}",
        )
    if data_start + offsets[1] > entry.num_bytes:
        raise _corrupt(
            entry,
            f"tensor {name!r} ends at byte {data_start + offsets[1]} of a file of {entry.num_bytes}",
            remedy="the file is truncated; download or copy it again",
        )
    start, stop, shape = (
        shared.setdefault(value, value)
        for value in (data_start + offsets[0], data_start + offsets[1], tuple(shape))
    )
    return TensorSpec(
        name=name, dtype=dtype, shape=shape, file=file, extent=ByteRange(start=start, stop=stop)
    )


def _dtype(entry: FileEntry, name: str, text: object) -> DType:
    if not isinstance(text, str):
        raise _corrupt(entry, f"tensor {name!r} has dtype {_shown(text)}", expected="a name such as BF16")
    try:
        return DType(text)
    except ValueError as error:
        if text in _PACKED_DTYPES:
            raise UnsupportedFormatError(
                f"{entry.place}: tensor {name!r}",
                f"stored as {text}, several entries to a byte",
                remedy="de-quantise the checkpoint to bf16 or fp32 first",
            ) from error
        raise _corrupt(
            entry, f"tensor {name!r} has dtype {text[:40]!r}", expected=", ".join(d.value for d in DType)
        ) from error


def _is_size_list(value: object) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**63 for v in value)


def _shown(value: object) -> str:
    """A hostile value for a message: short, and without walking deep structures."""
    if isinstance(value, list):
        inner = ", ".join(
            repr(v)[:30] if isinstance(v, int | float | str) else type(v).__name__ for v in value[:8]
        )
        return f"[{inner}{', …' if len(value) > 8 else ''}]"
    return repr(value)[:80] if isinstance(value, int | float | str) else f"a {type(value).__name__}"


def _check_cover(entry: FileEntry, tensors: dict[str, TensorSpec], *, data_start: int) -> None:
    end, previous = data_start, None
    for name, spec in sorted(tensors.items(), key=lambda item: (item[1].extent.start, item[1].extent.stop)):
        if spec.extent.start < end:
            raise _corrupt(entry, f"tensors {previous!r} and {name!r} overlap")
        if spec.extent.start > end:
            raise _corrupt(
                entry, f"{spec.extent.start - end} bytes before tensor {name!r} belong to no tensor"
            )
        end, previous = spec.extent.stop, name
    if end != entry.num_bytes:
        raise _corrupt(
            entry,
            f"{entry.num_bytes - end} bytes after the last tensor ({previous!r}) belong to no tensor",
            remedy="the file was damaged or two files were joined; download or copy it again",
        )


def _corrupt(
    entry: FileEntry, found: str, *, expected: str | None = None, remedy: str | None = None
) -> CorruptCheckpointError:
    return CorruptCheckpointError(entry.place, found, expected=expected, remedy=remedy)
