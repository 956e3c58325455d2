"""`patch.json`: what a patch is between, and what it holds for every tensor.

Contract: written last, so that a directory with it is a finished patch. Reading treats it as hostile: every
value is checked for type and range, names are text, and files lie inside the directory. A reader refuses
another format or a newer version rather than guess.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from sparsity_audit.errors import CorruptCheckpointError, UnsupportedFormatError
from sparsity_audit.passes.patch_encoding import ENCODINGS, SEGMENT_ENTRIES, Encoding
from sparsity_audit.types import DType

__all__ = [
    "MANIFEST",
    "PATCH_FORMAT",
    "PATCH_VERSION",
    "Codec",
    "PatchFile",
    "PatchManifest",
    "PatchSide",
    "PatchTensor",
    "digest_of",
    "read_manifest",
    "render_manifest",
]

PATCH_FORMAT = "sparsity-audit/patch"
PATCH_VERSION = 1
MANIFEST = "patch.json"

Codec = Literal["none", "zstd"]

_MAX_BYTES = 400_000_000
_HASH = frozenset("0123456789abcdef")


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchTensor:
    """One tensor of the tuned side.

    Args:
        name: Its name.
        dtype: Its dtype.
        shape: Its shape.
        encoding: How the places of changed entries are written; `none` where nothing changed.
        changed: Entries whose codes are stored.
        sizes: Bytes that the places take in each encoding; empty where the base has no such tensor.
        base_sha256: Of the base's stored codes, row-major and little-endian; None where it has no such
            tensor.
        sha256: Of the tuned side's.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    encoding: Encoding
    changed: int
    sizes: Mapping[str, int]
    base_sha256: str | None
    sha256: str

    @property
    def num_entries(self) -> int:
        """Its entries."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of its entries."""
        return self.num_entries * self.dtype.itemsize

    @property
    def num_segments(self) -> int:
        """Segments that are stored."""
        return 0 if self.encoding == "none" else -(-self.num_entries // SEGMENT_ENTRIES)


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchSide:
    """One of the two checkpoints.

    Args:
        reference: What was given, with its revision.
        digest: `digest_of` its tensors.
    """

    reference: str
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchFile:
    """A file beside the weights of the tuned side.

    Args:
        name: Its name.
        num_bytes: Its size.
        sha256: Of its bytes.
        stored: Whether it lies in the patch, under `files/`; otherwise the base has the same.
    """

    name: str
    num_bytes: int
    sha256: str
    stored: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchManifest:
    """What a patch is.

    Args:
        tool: Name and version of the writer.
        base: What it applies to.
        tuned: What it makes.
        codec: How places and values are compressed.
        tensors: The tensors of the tuned side, in name order.
        aliases: Second names of tied tensors → the name that is stored.
        removed: Tensors that only the base has.
        files: Files beside the weights.
    """

    tool: str
    base: PatchSide
    tuned: PatchSide
    codec: Codec
    tensors: tuple[PatchTensor, ...]
    aliases: Mapping[str, str]
    removed: tuple[str, ...]
    files: tuple[PatchFile, ...]


def digest_of(tensors: Iterable[tuple[str, DType, tuple[int, ...], str]]) -> str:
    """One sha256 over names, dtypes, shapes and hashes of all tensors, whatever their order."""
    lines = sorted(f"{name}\0{dtype}\0{list(shape)}\0{sha256}\n" for name, dtype, shape, sha256 in tensors)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def render_manifest(manifest: PatchManifest) -> bytes:
    """`patch.json`: indented UTF-8 with a final newline."""
    record = {
        "format": PATCH_FORMAT,
        "version": PATCH_VERSION,
        "tool": manifest.tool,
        "base": {"reference": manifest.base.reference, "digest": manifest.base.digest},
        "tuned": {"reference": manifest.tuned.reference, "digest": manifest.tuned.digest},
        "codec": manifest.codec,
        "segment_entries": SEGMENT_ENTRIES,
        "tensors": [
            {
                "name": t.name,
                "dtype": t.dtype.value,
                "shape": list(t.shape),
                "encoding": t.encoding,
                "changed": t.changed,
                "sizes": dict(t.sizes),
                "base_sha256": t.base_sha256,
                "sha256": t.sha256,
            }
            for t in manifest.tensors
        ],
        "aliases": dict(manifest.aliases),
        "removed": list(manifest.removed),
        "files": [
            {"name": f.name, "num_bytes": f.num_bytes, "sha256": f.sha256, "stored": f.stored}
            for f in manifest.files
        ],
    }
    return json.dumps(record, indent=1, ensure_ascii=False).encode() + b"\n"


def read_manifest(folder: Path) -> PatchManifest:
    """The manifest of a patch directory.

    Raises:
        UnsupportedFormatError: No patch, or one of a newer version.
        CorruptCheckpointError: A value that has no meaning.
    """
    path = folder / MANIFEST
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise UnsupportedFormatError(
            str(folder),
            f"is no patch: {MANIFEST} cannot be read ({error.strerror})",
            expected="a directory that `patch make` wrote",
        ) from error
    check = _Check(str(path))
    try:
        record = json.loads(raw) if len(raw) <= _MAX_BYTES else None
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        check.fail("is not a JSON object")
    if record.get("format") != PATCH_FORMAT or record.get("version") != PATCH_VERSION:
        raise UnsupportedFormatError(
            str(path),
            f"is of format {str(record.get('format'))[:40]!r}, version {str(record.get('version'))[:20]}",
            expected=f"{PATCH_FORMAT}, version {PATCH_VERSION}",
            remedy="use the version of sparsity-audit that made it",
        )
    if record.get("segment_entries") != SEGMENT_ENTRIES:
        check.fail("has segments of another size")
    return check.manifest(record)


class _Check:
    """Reads values of a record, or fails with the file's name."""

    def __init__(self, subject: str) -> None:
        self.subject = subject

    def fail(self, found: str) -> NoReturn:
        raise CorruptCheckpointError(
            self.subject, found, remedy="the patch is damaged; copy or make it again"
        )

    def manifest(self, record: dict[str, Any]) -> PatchManifest:
        tensors = tuple(self.tensor(item) for item in self.items(record, "tensors"))
        names = {tensor.name for tensor in tensors}
        if len(names) != len(tensors):
            self.fail("names a tensor twice")
        aliases = self.table(record, "aliases")
        if not set(aliases.values()) <= names or names & aliases.keys():
            self.fail("has an alias of no tensor")
        codec = record.get("codec")
        if codec not in ("none", "zstd"):
            self.fail(f"has the codec {str(codec)[:20]!r}")
        return PatchManifest(
            tool=self.text(record.get("tool")),
            base=self.side(record.get("base")),
            tuned=self.side(record.get("tuned")),
            codec=codec,
            tensors=tensors,
            aliases=aliases,
            removed=tuple(self.text(name) for name in self.items(record, "removed")),
            files=tuple(self.file(item) for item in self.items(record, "files")),
        )

    def items(self, record: dict[str, Any], key: str) -> list[Any]:
        value = record.get(key)
        if not isinstance(value, list):
            self.fail(f"has no list of {key}")
        return value

    def table(self, record: dict[str, Any], key: str) -> dict[str, str]:
        value = record.get(key)
        if not isinstance(value, dict):
            self.fail(f"has no table of {key}")
        return {self.text(k): self.text(v) for k, v in value.items()}

    def text(self, value: object) -> str:
        if not isinstance(value, str) or not value.isprintable() or len(value) > 4000:
            self.fail(f"has {str(value)[:60]!r} where text should be")
        return value

    def size(self, value: object) -> int:
        if type(value) is not int or not 0 <= value < 2**62:
            self.fail(f"has {str(value)[:40]!r} where a size should be")
        return value

    def sha256(self, value: object) -> str:
        if not isinstance(value, str) or len(value) != 64 or not set(value) <= _HASH:
            self.fail(f"has {str(value)[:40]!r} where a sha256 should be")
        return value

    def side(self, value: object) -> PatchSide:
        if not isinstance(value, dict):
            self.fail("does not say what it is between")
        return PatchSide(reference=self.text(value.get("reference")), digest=self.sha256(value.get("digest")))

    def file(self, value: object) -> PatchFile:
        if not isinstance(value, dict):
            self.fail("lists a file that is none")
        name = self.text(value.get("name"))
        if Path(name).name != name or name in ("", "..") or not isinstance(value.get("stored"), bool):
            self.fail(f"lists the file {name[:60]!r}")
        return PatchFile(
            name=name,
            num_bytes=self.size(value.get("num_bytes")),
            sha256=self.sha256(value.get("sha256")),
            stored=value["stored"],
        )

    def tensor(self, value: object) -> PatchTensor:
        if not isinstance(value, dict):
            self.fail("lists a tensor that is none")
        name, shape, sizes = self.text(value.get("name")), value.get("shape"), value.get("sizes")
        if not isinstance(shape, list) or len(shape) > 64 or not isinstance(sizes, dict):
            self.fail(f"gives {name[:60]!r} no shape")
        dtype, base = value.get("dtype"), value.get("base_sha256")
        encoding = next((known for known in ENCODINGS if known == value.get("encoding")), None)
        if dtype not in set(DType) or encoding is None:
            self.fail(f"gives {name[:60]!r} an unknown dtype or encoding")
        tensor = PatchTensor(
            name=name,
            dtype=DType(dtype),
            shape=tuple(self.size(n) for n in shape),
            encoding=encoding,
            changed=self.size(value.get("changed")),
            sizes={self.text(key): self.size(n) for key, n in sizes.items()},
            base_sha256=None if base is None else self.sha256(base),
            sha256=self.sha256(value.get("sha256")),
        )
        fits = tensor.changed <= tensor.num_entries and tensor.num_bytes < 2**62
        if not fits or (base is None and encoding != "dense" and tensor.num_entries):
            self.fail(f"contradicts itself about {name[:60]!r}")
        return tensor
