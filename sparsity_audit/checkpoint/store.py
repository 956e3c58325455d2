"""A checkpoint's catalogue and the files behind it.

Contract: a `Catalogue` holds names, dtypes, shapes and byte ranges, never data. `LocalFile.read_into` fills
the whole buffer or raises. Files are identified by size, mtime and inode when the catalogue is made; a file
that differs later is a `ChangedInputError`, never a silent mix of two checkpoints. What readers take for one
file may be gathered from several, or computed (`Content`), or lie behind a network (`Remote`): they open it
with `FileEntry.open` and never know.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from sparsity_audit.errors import ChangedInputError, CheckpointNotFoundError, UsageError
from sparsity_audit.types import ByteRange, TensorSpec

__all__ = ["ByteSource", "Catalogue", "Content", "FileEntry", "LocalFile", "Remote", "Sink"]


class ByteSource(Protocol):
    """Bytes that are read by position; safe to share between threads."""

    @property
    def entry(self) -> FileEntry:
        """The catalogued file."""
        ...

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` with the bytes at `offset`."""
        ...

    def close(self) -> None:
        """Let go of what is open."""
        ...


class Content(Protocol):
    """What stands behind a file that does not lie on the disk as one."""

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """The files that it is made of."""
        ...

    def open(self, entry: FileEntry) -> ByteSource:
        """Its bytes."""
        ...

    def files_of(self, spec: TensorSpec) -> frozenset[int]:
        """Indexes in `files` of those that hold entries of a tensor."""
        ...


class Sink(Protocol):
    """Where the bytes of one range go, in order."""

    def put(self, data: bytes) -> None:
        """Take the next bytes; may wait for room, and raises to end the transfer."""
        ...

    def pause(self, wait_s: float) -> None:
        """Wait before the next attempt; raises to end the transfer."""
        ...


class Remote(Protocol):
    """A file that is read over a network; safe to share between threads."""

    @property
    def place(self) -> str:
        """Where it lies, for messages."""
        ...

    def open(self, entry: FileEntry) -> ByteSource:
        """Its bytes, by position."""
        ...

    def fetch(self, extent: ByteRange, sink: Sink) -> None:
        """Put exactly the bytes of `extent` into `sink`, in order, however often the transfer is cut."""
        ...

    def open_planned(self, entry: FileEntry, planned_bytes: int) -> ByteSource | None:
        """A source of its own for a pass that reads so much of it; None where windows are fetched ahead."""
        ...

    def verify_unchanged(self) -> None:
        """Raise ChangedInputError when the file is not the one that was catalogued."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """One file of a checkpoint, as it was when the catalogue was made.

    Args:
        path: Where it lies now.
        name: Name inside the checkpoint (what reports print).
        num_bytes: Its size.
        mtime_ns: Its modification time.
        inode: Its inode number.
        content: What makes its bytes where it is no file of its own; then `path` is the file that stands for
            them, and there is neither time nor inode (0).
        remote: What reads it where it lies behind a network; then `path` is made up, and absolute.
        digest: A cryptographic hash of the whole file, with the hash's name, where it is known without
            reading; "" where it is not.
        version: What the store calls this state of the file; "" where names never change their content.
    """

    path: Path
    name: str
    num_bytes: int
    mtime_ns: int
    inode: int
    content: Content | None = None
    remote: Remote | None = None
    digest: str = ""
    version: str = ""

    @property
    def place(self) -> str:
        """Where it lies, for messages."""
        return str(self.path) if self.remote is None else self.remote.place

    @classmethod
    def from_path(cls, path: Path, *, name: str | None = None) -> FileEntry:
        """The entry of an existing file. Raises CheckpointNotFoundError."""
        try:
            status = path.stat()
        except OSError as error:
            raise CheckpointNotFoundError(
                str(path), error.strerror or "cannot be read", expected="a readable file"
            ) from error
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointNotFoundError(str(path), "is not a file", expected="a readable file")
        return cls(
            path=path,
            name=name or path.name,
            num_bytes=status.st_size,
            mtime_ns=status.st_mtime_ns,
            inode=status.st_ino,
        )

    def open(self) -> ByteSource:
        """Its bytes. Raises CheckpointNotFoundError."""
        if self.remote is not None:
            return self.remote.open(self)
        return LocalFile(self) if self.content is None else self.content.open(self)

    def verify_unchanged(self) -> None:
        """Raise ChangedInputError when the file is not the one that was catalogued."""
        if self.content is not None:
            for file in self.content.files:
                file.verify_unchanged()
            return
        if self.remote is not None:
            self.remote.verify_unchanged()
            return
        try:
            now = self.path.stat()
        except OSError as error:
            raise ChangedInputError(
                str(self.path), "disappeared during the run", remedy="run again on a finished checkpoint"
            ) from error
        if (now.st_size, now.st_mtime_ns, now.st_ino) != (self.num_bytes, self.mtime_ns, self.inode):
            raise ChangedInputError(
                str(self.path),
                f"changed during the run ({now.st_size} bytes now)",
                expected=f"the {self.num_bytes} bytes that were there at the start",
                remedy="wait until the checkpoint is completely written, then run again",
            )


class LocalFile:
    """An open file that is read by position; safe to share between threads.

    Args:
        entry: The catalogued file.
    """

    def __init__(self, entry: FileEntry) -> None:
        self.entry = entry
        try:
            self._fd = os.open(entry.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise CheckpointNotFoundError(
                str(entry.path), error.strerror or "cannot be opened", expected="a readable file"
            ) from error

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` with the bytes at `offset`. Raises ChangedInputError when the file ends early."""
        filled = 0
        while filled < len(buffer):
            count = os.preadv(self._fd, [buffer[filled:]], offset + filled)
            if count == 0:
                raise ChangedInputError(
                    str(self.entry.path),
                    f"ends at byte {offset + filled} while being read",
                    expected=f"{self.entry.num_bytes} bytes as at the start",
                    remedy="wait until the checkpoint is completely written, then run again",
                )
            filled += count

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalogue:
    """What a checkpoint contains, without its data.

    Args:
        reference: What the user typed.
        resolved: What it led to: an absolute path, or `hf://org/model@<commit>`.
        files: The files that hold tensors.
        tensors: Specs by name, in name order; tied names stand in `aliases` instead.
        aliases: Second and further names of a tensor that shares its storage → the name in `tensors`.
        config: `config.json` next to the files, parsed; empty when there is none.
        notes: Things the user should be told (a local path that shadows a Hub name, for instance).
        adapter: `adapter_config.json`, parsed, where the tensors are those of a PEFT adapter.
    """

    reference: str
    resolved: str
    files: tuple[FileEntry, ...]
    tensors: Mapping[str, TensorSpec]
    aliases: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    adapter: Mapping[str, Any] | None = None

    @property
    def resolved_label(self) -> str:
        """What reports and masks store: `hf://…@<commit>`, or a local path as it was typed.

        An absolute path would make the same audit give other bytes on another machine.
        """
        return self.resolved if self.resolved.startswith("hf://") else self.reference

    @property
    def stored_files(self) -> tuple[FileEntry, ...]:
        """The files that lie on the disk, without those that stand for several or for a computation."""
        return tuple(entry for entry in self.files if entry.content is None)

    @property
    def folder(self) -> Path:
        """The directory that holds the files, for what lies beside them. Raises UsageError when streamed."""
        first = self.files[0]
        if first.remote is not None:
            raise UsageError(
                self.reference,
                "is read without downloading, so that what lies beside its weights is not here",
                expected="a checkpoint on this disk",
                remedy="leave --stream out, or copy the checkpoint here first",
            )
        return first.path.parent

    @property
    def num_entries(self) -> int:
        """Scalars in storage; tied names are counted once."""
        return sum(spec.num_entries for spec in self.tensors.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of those scalars."""
        return sum(spec.num_bytes for spec in self.tensors.values())

    def verify_unchanged(self) -> None:
        """Raise ChangedInputError when any file differs from the one that was catalogued."""
        for entry in self.files:
            entry.verify_unchanged()
