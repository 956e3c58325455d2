"""What a sparse patch costs, as a versioned record and as a table on a terminal.

Contract: exact counts and bytes. The rows that are not this patch say what its positions and values would
take in the encoding of a weight-sync engine, without headers and before any compression of theirs.

*Source*: indices and values: TRL's delta weight sync, SparseRL-Sync (2605.07330); gaps in 8 or 16 bits and
values: PULSE (2602.03839), which then runs zstd over them; a bit mask is compressed-tensors'
`sparse-bitmask`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = [
    "PATCH_INFO_FORMAT",
    "PatchEncodings",
    "PatchInfo",
    "PatchSizes",
    "patch_info_to_json",
    "print_patch_info",
]

PATCH_INFO_FORMAT = "sparsity-audit/patch-info"
PATCH_INFO_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchSizes:
    """Bytes for the same update.

    Args:
        dense: The tuned checkpoint's tensors.
        indices: 32-bit positions (64 past 2³¹ entries) and values.
        mask: A bit an entry, and values, for tensors that changed.
        gaps: Gaps in 8 or 16 bits, whichever is shorter for a tensor, and values.
        best: For each tensor the encoding that the patch chose, and values, before compression.
        stored: The patch directory.
    """

    dense: int
    indices: int
    mask: int
    gaps: int
    best: int
    stored: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchEncodings:
    """Tensors that are written one way.

    Args:
        encoding: How.
        num_tensors: How many.
        changed: Entries of theirs that are stored.
    """

    encoding: str
    num_tensors: int
    changed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchInfo:
    """A patch.

    Args:
        format: `sparsity-audit/patch-info`.
        version: Version of this record.
        path: The directory.
        tool: Writer of the patch.
        base: What it applies to.
        base_digest: One sha256 over the base's tensors.
        tuned: What it makes.
        tuned_digest: One sha256 over its tensors.
        codec: How the payload is compressed.
        num_tensors: Tensors of the tuned checkpoint.
        num_whole: Of these, tensors without a counterpart of name, dtype and shape, stored whole.
        num_entries: Entries of the tuned checkpoint.
        changed: Entries whose codes are stored.
        update_density: changed ÷ num_entries; None without entries.
        sizes: Bytes.
        encodings: Tensors by encoding.
        files: Files beside the weights that lie in the patch.
        removed: Tensors that only the base has.
    """

    format: str = PATCH_INFO_FORMAT
    version: int = PATCH_INFO_VERSION
    path: str
    tool: str
    base: str
    base_digest: str
    tuned: str
    tuned_digest: str
    codec: str
    num_tensors: int
    num_whole: int
    num_entries: int
    changed: int
    update_density: float | None
    sizes: PatchSizes
    encodings: tuple[PatchEncodings, ...]
    files: tuple[str, ...]
    removed: tuple[str, ...]


def patch_info_to_json(infos: PatchInfo | Sequence[PatchInfo]) -> bytes:
    """One record, or a list of them: indented UTF-8 with a final newline."""
    from pydantic import TypeAdapter

    kind: Any = PatchInfo if isinstance(infos, PatchInfo) else tuple[PatchInfo, ...]
    return TypeAdapter(kind).dump_json(infos, indent=1) + b"\n"


def patch_info_json_schema() -> dict[str, Any]:
    """The JSON Schema of such a record."""
    from pydantic import TypeAdapter

    schema = TypeAdapter(PatchInfo).json_schema(mode="serialization")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"{PATCH_INFO_FORMAT} {PATCH_INFO_VERSION}",
        **schema,
    }


def print_patch_info(info: PatchInfo) -> None:
    """Print a patch's sides, its sizes beside others, and what it holds, to stdout."""
    from sparsity_audit.report.overlap_terminal import new_console, print_table, say

    console = new_console()
    say(console, info.path)
    say(console, f"{info.base} → {info.tuned}, {info.num_tensors} tensors")
    density = "–" if info.update_density is None else f"{100 * info.update_density:.4g} %"
    say(console, f"{info.changed:,} of {info.num_entries:,} entries stored ({density})")
    rows = [[what, f"{size:,}", _ratio(size, info.sizes.dense)] for what, size in _rows(info)]
    print_table(console, ["", "bytes", "of dense"], rows)
    ways = ", ".join(f"{e.num_tensors} {e.encoding}" for e in info.encodings)
    say(console, f"tensors by encoding: {ways}")
    if info.num_whole:
        say(console, f"{info.num_whole} tensors without counterpart (name, dtype, shape) are stored whole")
    if info.removed:
        say(console, f"{len(info.removed)} tensors of the base are not in the tuned checkpoint")
    if info.files:
        say(console, f"files that differ from the base's: {', '.join(info.files)}")


def _rows(info: PatchInfo) -> list[tuple[str, int]]:
    sizes = info.sizes
    packed = "" if info.codec == "none" else f", {info.codec}"
    return [
        ("dense checkpoint", sizes.dense),
        ("32-bit indices + values (TRL, SparseRL-Sync)", sizes.indices),
        ("bit mask + values", sizes.mask),
        ("8/16-bit gaps + values (PULSE before zstd)", sizes.gaps),
        ("best for each tensor + values", sizes.best),
        (f"this patch, all files{packed}", sizes.stored),
    ]


def _ratio(size: int, dense: int) -> str:
    return f"{100 * size / dense:.3g} %" if dense else "–"
