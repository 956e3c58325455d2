"""What a mask says about itself: records, and their strings in `__metadata__`.

Contract: the strings are deterministic (JSON with sorted keys) and of a length that does not depend on
the fingerprints, which are only known when the last byte was compared. Parsing treats every string as
hostile and refuses with a `MaskError` that names file and tensor. See docs/mask-format.md.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from sparsity_audit.errors import MaskError

__all__ = [
    "FINGERPRINTS_KEY",
    "FORMAT",
    "POLARITY",
    "UNSPECIFIED",
    "VERSION",
    "Encoding",
    "Fingerprints",
    "MaskMetadata",
    "MaskTensor",
    "SourceReference",
    "describe_reference",
    "parse_metadata",
    "render_metadata",
    "tool_name",
]

Encoding = Literal["packed", "bool", "indices", "pt"]
Fingerprints = tuple[int, int]
"""Of the base and the tuned tensor, as `compare` computes them; 0 where not known."""

FORMAT: Final = "sparsity-audit-mask"
VERSION: Final = "1"
POLARITY: Final = "1=updated"
UNSPECIFIED: Final = "unspecified"
"""Criterion and view of a mask that somebody else made, or that joins several."""

FINGERPRINTS_KEY: Final = "fingerprints"
_MAX_DIMENSIONS = 64


def tool_name() -> str:
    """Name and version of this package."""
    try:
        return f"sparsity-audit {importlib.metadata.version('sparsity-audit')}"
    except importlib.metadata.PackageNotFoundError:
        return "sparsity-audit (not installed)"


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceReference:
    """A checkpoint the mask was made from.

    Args:
        reference: What the user typed.
        resolved: What it led to, with the revision where there is one.
    """

    reference: str
    resolved: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskTensor:
    """One tensor of a mask, in base coordinates.

    Args:
        name: The base tensor's name.
        shape: Its unpacked shape.
        compared: Half-open, sorted, disjoint ranges of the *first axis* (of the single entry for 0-d)
            whose bits mean something, one for each compared slice; elsewhere bits are 0 and say nothing.
        fingerprints: Base and tuned fingerprint: the sum mod 2⁶⁴ of the compared slices' fingerprints;
            0 where not known.
    """

    name: str
    shape: tuple[int, ...]
    compared: tuple[tuple[int, int], ...]
    fingerprints: Fingerprints = (0, 0)

    @classmethod
    def whole(cls, name: str, shape: tuple[int, ...], *, fingerprints: Fingerprints = (0, 0)) -> MaskTensor:
        """A tensor all of whose entries are compared."""
        length = shape[0] if shape else 1
        compared = ((0, length),) if length else ()
        return cls(name=name, shape=shape, compared=compared, fingerprints=fingerprints)

    @property
    def num_entries(self) -> int:
        """Entries of the tensor."""
        return math.prod(self.shape)

    @property
    def entry_ranges(self) -> tuple[tuple[int, int], ...]:
        """The compared ranges as row-major entry positions."""
        inner = math.prod(self.shape[1:])
        return tuple((start * inner, stop * inner) for start, stop in self.compared)

    @property
    def num_compared(self) -> int:
        """Entries in the compared ranges."""
        return sum(stop - start for start, stop in self.entry_ranges)


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskMetadata:
    """What holds for all tensors of a mask.

    Args:
        criterion: Key of the criterion that decided the bits, or `unspecified`.
        view: `native`, `served` or `unspecified`.
        base: The base checkpoint, where known.
        tuned: The tuned checkpoint, where known.
        aliases: Second and further names of tied tensors → the name that holds the bits; those whose
            tensor is not in the mask are not written.
        origin: How the mask came about: `{"operation": "diff"}`, or an operation with its inputs.
        tool: Name and version of the writer.
    """

    criterion: str
    view: str
    base: SourceReference | None = None
    tuned: SourceReference | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)
    origin: Mapping[str, Any] = field(default_factory=lambda: {"operation": "diff"})
    tool: str = field(default_factory=tool_name)


def render_metadata(
    metadata: MaskMetadata, tensors: Iterable[MaskTensor], *, encoding: Encoding
) -> dict[str, str]:
    """The `__metadata__` of one file that holds `tensors`."""
    held = sorted(tensors, key=lambda tensor: tensor.name)
    names = {tensor.name for tensor in held}
    return {
        "aliases": _json({a: n for a, n in metadata.aliases.items() if n in names}),
        "compared_rows": _json({t.name: t.compared for t in held}),
        "criterion": metadata.criterion,
        "encoding": encoding,
        FINGERPRINTS_KEY: _json({t.name: [f"{value:016x}" for value in t.fingerprints] for t in held}),
        "format": FORMAT,
        "format_version": VERSION,
        "origin": _json(metadata.origin),
        "polarity": POLARITY,
        "references": _json(
            {"base": describe_reference(metadata.base), "tuned": describe_reference(metadata.tuned)}
        ),
        "shapes": _json({t.name: t.shape for t in held}),
        "tool": metadata.tool,
        "view": metadata.view,
    }


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def describe_reference(source: SourceReference | None) -> dict[str, str] | None:
    """A reference as JSON."""
    return None if source is None else {"reference": source.reference, "resolved": source.resolved}


def parse_metadata(
    path: Path, strings: Mapping[str, str]
) -> tuple[MaskMetadata, dict[str, MaskTensor], Encoding]:
    """What one file's `__metadata__` says.

    Raises:
        MaskError: It is not a mask, of another version or polarity, or contradicts itself.
    """
    _check_kind(path, strings)
    required = {"aliases", "compared_rows", "criterion", "encoding", FINGERPRINTS_KEY}
    missing = (required | {"origin", "references", "shapes", "tool", "view"}) - strings.keys()
    if missing:
        raise MaskError(
            str(path), f"metadata lacks {', '.join(sorted(missing))}", expected="see docs/mask-format.md"
        )
    encoding = strings["encoding"]
    if encoding not in ("packed", "bool", "indices", "pt"):
        raise MaskError(str(path), f"encoding {encoding!r:.40}", expected="packed, bool, indices or pt")
    tensors = _parse_tensors(path, strings)
    references = _parse_map(path, strings, "references")
    metadata = MaskMetadata(
        criterion=strings["criterion"],
        view=strings["view"],
        base=_parse_reference(path, references.get("base")),
        tuned=_parse_reference(path, references.get("tuned")),
        aliases=_parse_aliases(path, strings, tensors),
        origin=_parse_map(path, strings, "origin"),
        tool=strings["tool"],
    )
    return metadata, tensors, encoding


def _parse_tensors(path: Path, strings: Mapping[str, str]) -> dict[str, MaskTensor]:
    shapes, ranges = _parse_map(path, strings, "shapes"), _parse_map(path, strings, "compared_rows")
    prints = _parse_map(path, strings, FINGERPRINTS_KEY)
    if shapes.keys() != ranges.keys() or shapes.keys() != prints.keys():
        odd = sorted((shapes.keys() ^ ranges.keys()) | (shapes.keys() ^ prints.keys()))[0]
        raise MaskError(
            f"{path}: tensor {odd!r}",
            "missing in shapes, compared_rows or fingerprints",
            expected="an entry in each",
        )
    return {name: _tensor(path, name, shapes[name], ranges[name], prints[name]) for name in sorted(shapes)}


def _parse_aliases(
    path: Path, strings: Mapping[str, str], tensors: Mapping[str, MaskTensor]
) -> dict[str, str]:
    aliases = _parse_map(path, strings, "aliases")
    for alias, name in aliases.items():
        if not isinstance(name, str) or name not in tensors:
            raise MaskError(
                f"{path}: alias {alias!r}", f"stands for {name!r:.80}", expected="a tensor of this file"
            )
        if not alias.isprintable():
            raise MaskError(
                f"{path}: alias {alias[:80]!r}", "is no name", expected="text without control characters"
            )
    return dict(sorted(aliases.items()))


def _check_kind(path: Path, strings: Mapping[str, str]) -> None:
    if strings.get("format") != FORMAT:
        raise MaskError(
            str(path),
            "not a mask of this tool"
            + (f" (format {strings['format']!r:.40})" if "format" in strings else ""),
            expected=f"`format` = {FORMAT!r} in the file's metadata",
            remedy="import masks of other tools with `sparsity-audit mask convert`",
        )
    if strings.get("format_version") != VERSION:
        raise MaskError(
            str(path),
            f"mask format version {strings.get('format_version')!r:.40}",
            expected=f"version {VERSION}",
            remedy="read it with the version of sparsity-audit that wrote it, or a newer one",
        )
    if strings.get("polarity") != POLARITY:
        raise MaskError(
            str(path),
            f"polarity {strings.get('polarity')!r:.40}",
            expected=f"{POLARITY!r}: a set bit is an entry that was updated",
            remedy="export it as bool tensors and import them with `mask convert --inverted`",
        )


def _parse_map(path: Path, strings: Mapping[str, str], key: str) -> dict[str, Any]:
    try:
        value = json.loads(strings[key])
    except (ValueError, RecursionError) as error:
        raise MaskError(str(path), f"metadata {key!r} is not JSON") from error
    if not isinstance(value, dict):
        raise MaskError(str(path), f"metadata {key!r} is not a JSON object")
    return value


def _parse_reference(path: Path, value: object) -> SourceReference | None:
    if value is None:
        return None
    if isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("reference", "resolved")):
        return SourceReference(reference=value["reference"], resolved=value["resolved"])
    raise MaskError(
        str(path), "metadata 'references' is malformed", expected="reference and resolved, or null"
    )


def _tensor(path: Path, name: str, shape: object, ranges: object, prints: object) -> MaskTensor:
    subject = f"{path}: tensor {name!r}"
    if not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS or not all(_is_size(n) for n in shape):
        raise MaskError(subject, f"shape {shape!r:.80}", expected="a list of sizes")
    length = shape[0] if shape else 1
    end = 0
    for pair in ranges if isinstance(ranges, list) else [None]:
        if not isinstance(pair, list) or len(pair) != 2 or not all(_is_size(n) for n in pair):
            raise MaskError(subject, f"compared rows {ranges!r:.80}", expected="a list of [start, stop]")
        if not end <= pair[0] < pair[1] <= length:
            raise MaskError(
                subject,
                f"compared rows {ranges!r:.80}",
                expected=f"sorted, disjoint, not empty, within [0, {length}]",
            )
        end = pair[1]
    if not isinstance(prints, list) or len(prints) != 2 or not all(_is_print(text) for text in prints):
        raise MaskError(subject, f"fingerprints {prints!r:.80}", expected="two strings of 16 hex digits")
    assert isinstance(ranges, list)
    return MaskTensor(
        name=name,
        shape=tuple(shape),
        compared=tuple((start, stop) for start, stop in ranges),
        fingerprints=(int(prints[0], 16), int(prints[1], 16)),
    )


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_print(text: object) -> bool:
    return isinstance(text, str) and len(text) == 16 and not set(text) - set("0123456789abcdef")
