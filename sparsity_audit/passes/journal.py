"""The record of finished units, so that a killed run goes on where it stopped.

Contract: one JSON line a unit, written after the unit's mask bits. A line that was cut by a kill, or
whose checksum is wrong, and everything behind it, is ignored. While a run goes on its journal is locked, so
that a second run cannot take over its units or its mask; the lock ends with the process, however it ends.
A killed process needs no fsync (the page cache survives it); the file is synced at most every 5 s.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
import zlib
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sparsity_audit.errors import OutputError
from sparsity_audit.stats.tally import Tally

__all__ = ["Journal", "read_identity"]

_VERSION = 1
_SYNC_EVERY_S = 5.0
_MAX_IDENTITY_BYTES = 1 << 20


class Journal:
    """Finished units of one plan.

    Args:
        path: The journal file; created when it is not there.
        plan_key: The plan it belongs to.
        facts: What else must be the same for a run to go on with it; plain JSON.
        restart: Drop what another run left in it, whatever its plan.

    Raises:
        OutputError: The file belongs to another plan or to a run that goes on, or cannot be written.
    """

    def __init__(
        self, path: Path, *, plan_key: str, facts: Mapping[str, Any] | None = None, restart: bool = False
    ) -> None:
        self.path = path
        self._identity = {"version": _VERSION, "tool": version("sparsity-audit"), "plan": plan_key}
        self._identity |= facts or {}
        self._done: dict[str, Tally] = {}
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise OutputError(str(path), error.strerror or "cannot be written") from error
        try:
            _lock(self._fd, path)
            end = 0 if restart else self._load()
            os.ftruncate(self._fd, end)
            os.lseek(self._fd, end, os.SEEK_SET)
            if end == 0:
                self._write(self._identity)
        except OutputError:
            self.close()
            raise
        except OSError as error:
            self.close()
            raise OutputError(str(path), error.strerror or "cannot be written") from error
        self._synced = time.monotonic()

    @property
    def done(self) -> Mapping[str, Tally]:
        """Unit key → its tally, as found when the journal was opened."""
        return self._done

    def restart(self) -> None:
        """Forget all units. Raises OutputError."""
        self._done.clear()
        try:
            os.ftruncate(self._fd, 0)
            os.lseek(self._fd, 0, os.SEEK_SET)
            self._write(self._identity)
        except OSError as error:
            raise OutputError(str(self.path), error.strerror or "cannot be written") from error

    def append(self, unit_key: str, tally: Tally) -> None:
        """Record a finished unit."""
        try:
            self._write({"unit": unit_key, "tally": tally.to_json()})
            if time.monotonic() - self._synced > _SYNC_EVERY_S:
                os.fsync(self._fd)
                self._synced = time.monotonic()
        except OSError as error:
            raise OutputError(str(self.path), error.strerror or "cannot be written") from error

    def sync(self) -> None:
        """Put all units on the disk. Raises OutputError."""
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise OutputError(str(self.path), error.strerror or "cannot be written") from error

    def close(self) -> None:
        """Close the file, which ends the lock; the file stays for the next run."""
        os.close(self._fd)

    def _write(self, record: dict[str, object]) -> None:
        body = json.dumps(record, separators=(",", ":")).encode()
        line = b"%08x %s\n" % (zlib.crc32(body), body)
        while line:
            line = line[os.write(self._fd, line) :]

    def _load(self) -> int:
        """Read the valid lines; returns where the first invalid byte stands."""
        end = 0
        with open(self._fd, "rb", closefd=False) as lines:
            for number, line in enumerate(lines):
                record = _parse(line)
                if record is None:
                    break
                if number == 0 and record != self._identity:
                    raise OutputError(
                        str(self.path),
                        "is the journal of an unfinished run with other inputs or options, or of another "
                        "version of the tool",
                        remedy="finish that run, choose another output, or start over with --overwrite",
                    )
                if number > 0:
                    self._done[record["unit"]] = Tally.from_json(record["tally"])
                end += len(line)
        return end


def read_identity(path: Path) -> Mapping[str, Any]:
    """The first line of a journal: version, tool, plan and facts. Raises OutputError."""
    try:
        with path.open("rb") as lines:
            record = _parse(lines.readline(_MAX_IDENTITY_BYTES))
    except OSError as error:
        raise OutputError(str(path), error.strerror or "cannot be read") from error
    if record is None or not {"version", "tool", "plan"} <= record.keys():
        raise OutputError(str(path), "is no journal, or its first line is damaged")
    return record


def _lock(fd: int, path: Path) -> None:
    """Hold the file until it is closed. File systems without locks are left unguarded."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        in_use = True
    except OSError:
        return
    else:
        in_use = os.fstat(fd).st_nlink == 0  # the run that held it ended just now, and removed it
    if in_use:
        raise OutputError(
            str(path), "another run is writing here", remedy="wait for it, or choose another output"
        )


def _parse(line: bytes) -> dict | None:
    checksum, _, body = line.rstrip(b"\n").partition(b" ")
    if not line.endswith(b"\n") or len(checksum) != 8:
        return None
    try:
        if int(checksum, 16) != zlib.crc32(body):
            return None
    except ValueError:
        return None
    return json.loads(body)
