"""Where the members of a zip archive lie in the file, treating the archive as hostile.

Contract: a member's bytes are found through its *local* header, whose extra fields may be longer than the
central directory says (torch pads them so that data start on 64 bytes). Both headers must agree, members
must not overlap each other, and names are unique. Only stored members have a byte range. The directory is
bounded before it is read. Zip64 is read wherever a 32-bit field is saturated.

Source: APPNOTE.TXT 6.3.10, sections 4.3 and 4.5
(https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

from sparsity_audit.checkpoint.store import ByteSource
from sparsity_audit.errors import CorruptCheckpointError, UnsupportedFormatError
from sparsity_audit.types import ByteRange

__all__ = ["MAX_DIRECTORY_BYTES", "Member", "locate_members", "read_directory"]

MAX_DIRECTORY_BYTES = 32_000_000
"""About 300,000 members; the names of torch's members take about 100 bytes each."""

_END = struct.Struct("<4s4H2IH")
_LOCATOR_64 = struct.Struct("<4sIQI")
_END_64 = struct.Struct("<4sQ2H2I4Q")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")
_EXTRA = struct.Struct("<2H")
_FULL_32, _FULL_16 = 0xFFFFFFFF, 0xFFFF
_MAX_COMMENT_BYTES = 0xFFFF
_ENCRYPTED = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One entry of the central directory.

    Args:
        name: Path inside the archive.
        method: Compression method; 0 is stored.
        num_bytes: Size of the contents.
        packed_bytes: Size in the file.
        header_start: Where the local header starts.
    """

    name: str
    method: int
    num_bytes: int
    packed_bytes: int
    header_start: int


@dataclass(frozen=True, slots=True)
class _Directory:
    start: int
    num_bytes: int
    count: int


def read_directory(source: ByteSource) -> dict[str, Member]:
    """The members of an archive by name.

    Raises:
        CorruptCheckpointError: No directory (the file is truncated), or one that contradicts itself.
        UnsupportedFormatError: Encrypted, or split over several files.
    """
    directory = _find_directory(source)
    raw = _read(source, directory.start, directory.num_bytes)
    members: dict[str, Member] = {}
    position = 0
    while position < len(raw):
        member, position = _central_entry(source, raw, position)
        if member.name in members:
            raise _corrupt(source, f"zip directory lists {member.name[:80]!r} twice")
        if member.header_start + _LOCAL.size + member.packed_bytes > directory.start:
            raise _corrupt(
                source, f"zip member {member.name[:80]!r} reaches into the directory or past the end"
            )
        members[member.name] = member
    if len(members) != directory.count:
        raise _corrupt(
            source, f"zip directory lists {len(members)} members", expected=f"{directory.count}, as it claims"
        )
    return members


def locate_members(source: ByteSource, members: Iterable[Member]) -> dict[str, ByteRange]:
    """Bytes of the file that hold the contents of each stored member.

    Raises:
        CorruptCheckpointError: A local header differs from the directory, or members overlap.
        UnsupportedFormatError: A member is compressed.
    """
    ranges: dict[str, ByteRange] = {}
    end, previous = 0, ""
    for member in sorted(members, key=lambda m: (m.header_start, m.name)):
        if member.header_start < end:
            raise _corrupt(source, f"zip members {previous[:80]!r} and {member.name[:80]!r} overlap")
        ranges[member.name] = _locate(source, member)
        end, previous = ranges[member.name].stop, member.name
    return ranges


def _find_directory(source: ByteSource) -> _Directory:
    size = source.entry.num_bytes
    tail_bytes = min(size, _END.size + _MAX_COMMENT_BYTES)
    tail = _read(source, size - tail_bytes, tail_bytes)
    position = tail.rfind(b"PK\x05\x06")
    while position >= 0:
        if position + _END.size <= tail_bytes:
            fields = _END.unpack_from(tail, position)
            if position + _END.size + fields[7] == tail_bytes:
                return _directory(source, fields, size - tail_bytes + position)
        position = tail.rfind(b"PK\x05\x06", 0, position)
    raise _corrupt(
        source, "zip archive without an end record", remedy="the file is truncated; download or copy it again"
    )


def _directory(source: ByteSource, fields: tuple[int, ...], end_start: int) -> _Directory:
    disk, first_disk, _, count, num_bytes, start = fields[1:7]
    wide = _zip64_end(source, end_start)
    if wide is not None:
        # torch writes the zip64 records always, whether or not a field is saturated.
        end_start, (disk, first_disk, _, count, num_bytes, start) = wide
    elif _FULL_16 in (disk, first_disk, count) or _FULL_32 in (num_bytes, start):
        raise _corrupt(source, "zip64 archive without a zip64 end record")
    if disk or first_disk:
        raise UnsupportedFormatError(
            source.entry.place, "zip archive split over several files", remedy="join the parts first"
        )
    if num_bytes > MAX_DIRECTORY_BYTES:
        raise _corrupt(
            source, f"zip directory claims {num_bytes} bytes", expected=f"at most {MAX_DIRECTORY_BYTES}"
        )
    if start + num_bytes != end_start:
        raise _corrupt(
            source,
            f"zip directory claims bytes {start} to {start + num_bytes}, but ends at {end_start}",
            remedy="the file is damaged, or something was put in front of the archive",
        )
    return _Directory(start, num_bytes, count)


def _zip64_end(source: ByteSource, end_start: int) -> tuple[int, tuple[int, ...]] | None:
    """Start and fields of the zip64 end record, if a locator stands before the end record."""
    locator_start = end_start - _LOCATOR_64.size
    if locator_start < 0:
        return None
    signature, _, start, _ = _LOCATOR_64.unpack(_read(source, locator_start, _LOCATOR_64.size))
    if signature != b"PK\x06\x07":
        return None
    if start + _END_64.size > locator_start:
        raise _corrupt(source, f"zip64 end record claims byte {start}, behind its locator")
    fields = _END_64.unpack(_read(source, start, _END_64.size))
    if fields[0] != b"PK\x06\x06":
        raise _corrupt(source, f"no zip64 end record at byte {start}")
    return start, fields[4:10]


def _central_entry(source: ByteSource, raw: bytes, position: int) -> tuple[Member, int]:
    if position + _CENTRAL.size > len(raw):
        raise _corrupt(source, "zip directory is cut off")
    fields = _CENTRAL.unpack_from(raw, position)
    name_bytes, extra_bytes, comment_bytes = fields[10:13]
    name_start = position + _CENTRAL.size
    extra_start = name_start + name_bytes
    stop = extra_start + extra_bytes + comment_bytes
    if fields[0] != b"PK\x01\x02" or stop > len(raw):
        raise _corrupt(source, "zip directory is damaged")
    name = _decode(source, raw[name_start:extra_start])
    if fields[3] & _ENCRYPTED:
        raise UnsupportedFormatError(
            source.entry.place,
            f"zip member {name[:80]!r} is encrypted",
            remedy="decrypt the archive first",
        )
    sizes = {"packed": fields[8], "contents": fields[9], "header": fields[16]}
    wanted = [key for key in ("contents", "packed", "header") if sizes[key] == _FULL_32]
    if wanted:
        wide = _zip64_extra(raw[extra_start : extra_start + extra_bytes])
        if len(wide) < 8 * len(wanted):
            raise _corrupt(source, f"zip member {name[:80]!r} lacks its zip64 sizes")
        for i, key in enumerate(wanted):
            sizes[key] = int.from_bytes(wide[8 * i : 8 * i + 8], "little")
    member = Member(
        name=name,
        method=fields[4],
        num_bytes=sizes["contents"],
        packed_bytes=sizes["packed"],
        header_start=sizes["header"],
    )
    return member, stop


def _zip64_extra(extra: bytes) -> bytes:
    position = 0
    while position + _EXTRA.size <= len(extra):
        kind, size = _EXTRA.unpack_from(extra, position)
        position += _EXTRA.size
        if kind == 1:
            return extra[position : position + size]
        position += size
    return b""


def _locate(source: ByteSource, member: Member) -> ByteRange:
    path, shown = source.entry.place, repr(member.name[:80])
    fields = _LOCAL.unpack(_read(source, member.header_start, _LOCAL.size))
    name_bytes, extra_bytes = fields[9:11]
    name_start = member.header_start + _LOCAL.size
    if fields[0] != b"PK\x03\x04" or _read(source, name_start, name_bytes) != member.name.encode("utf-8"):
        raise _corrupt(
            source, f"zip member {shown} has no local header of that name at {member.header_start}"
        )
    if fields[3] != member.method:
        raise _corrupt(source, f"zip member {shown} has two compression methods")
    if member.method != 0:
        raise UnsupportedFormatError(
            path,
            f"zip member {shown} is compressed (method {member.method})",
            expected="stored members, as torch.save writes them",
            remedy="unzip it and `zip -0 -r` the folder, or torch.load it and torch.save it again",
        )
    if member.packed_bytes != member.num_bytes:
        raise _corrupt(source, f"zip member {shown} is stored but has two sizes")
    start = name_start + name_bytes + extra_bytes
    if start + member.num_bytes > source.entry.num_bytes:
        raise _corrupt(
            source,
            f"zip member {shown} ends at {start + member.num_bytes}, the file at {source.entry.num_bytes}",
            remedy="the file is truncated; download or copy it again",
        )
    return ByteRange(start=start, stop=start + member.num_bytes)


def _read(source: ByteSource, start: int, count: int) -> bytes:
    if start < 0 or start + count > source.entry.num_bytes:
        raise _corrupt(
            source,
            f"zip structure at bytes {start} to {start + count} of a file of {source.entry.num_bytes}",
            remedy="the file is truncated; download or copy it again",
        )
    raw = bytearray(count)
    source.read_into(memoryview(raw), start)
    return bytes(raw)


def _decode(source: ByteSource, name: bytes) -> str:
    try:
        return name.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _corrupt(source, f"zip member name {name[:40]!r} is not UTF-8") from error


def _corrupt(
    source: ByteSource, found: str, *, expected: str | None = None, remedy: str | None = None
) -> CorruptCheckpointError:
    return CorruptCheckpointError(source.entry.place, found, expected=expected, remedy=remedy)
