"""Results for an object store: made on the disk as always, uploaded when they are finished.

Contract: each reference has one stage below the user's cache directory, held by a lock, in which a killed or
failed run finds what it left. Nothing is uploaded before everything is there; then each object is checked
by its size, and the file that marks a finished result (`report.json`, an index, a record) comes last. What
could not be uploaded stays in the stage with a list of its files, and `finish_upload` goes on with it. A
prefix that holds other objects is refused before any work. No message holds a text of the store's library.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

from sparsity_audit.checkpoint.object_store import connect, is_object_reference, store_error
from sparsity_audit.errors import ObjectStoreError, OutputError, UsageError

__all__ = [
    "ObjectStage",
    "finish_upload",
    "finished_stages",
    "object_output",
    "upload_order",
]

_PENDING, _LOCK, _WORK = "finished.json", "lock", "work"
_MARKERS = ("report.json", "patch.json", "*.safetensors.index.json", "model.safetensors", "*.json")
"""What marks a folder as finished: the first of these patterns that matches anything in it."""

_MAX_ATTEMPTS = 5
_FIRST_WAIT_S = 0.5

_log = logging.getLogger(__name__)


@contextmanager
def object_output(reference: str) -> Iterator[Path]:
    """Give a folder on the disk whose files are uploaded when the block ends without an error.

        with object_output("s3://bucket/run") as folder:
            diff(base, tuned, output=folder)

    Args:
        reference: A prefix that holds nothing: `s3://bucket/run`, `gs://…`, `az://…`.

    Raises:
        UsageError: It names no object store.
        OutputError: The prefix holds objects, another run writes to it, or an earlier result waits there for
            its upload (see `finish_upload`).
        MissingExtraError: The store's library is not installed.
        ObjectStoreError: The store refuses or cannot be reached; the files are kept.
    """
    stage = ObjectStage(reference)
    try:
        folder = stage.begin()
        try:
            yield folder
        except BaseException as error:
            if stage.files():
                error.add_note(f"{reference}: nothing was uploaded; the next run goes on in {stage.folder}")
            raise
        stage.seal()
        stage.upload()
    finally:
        stage.close()


def finish_upload(reference: str) -> None:
    """Upload the finished result of an earlier run whose upload failed; nothing is made again.

    Raises:
        OutputError: No result waits there, or somebody else filled the prefix.
        ObjectStoreError: The store refuses or cannot be reached; the files are kept.
    """
    stage = ObjectStage(reference)
    try:
        stage.upload()
    finally:
        stage.close()


def finished_stages(command: Sequence[str]) -> list[tuple[str, int]]:
    """References whose result this command has finished but not uploaded, each with its exit status."""
    found = []
    for path in sorted(_stages().glob(f"*/{_PENDING}")):
        state = _read_state(path)
        if state["command"] == list(command):
            found.append((state["reference"], state["status"]))
    return found


def upload_order(names: Iterable[str]) -> list[str]:
    """Names in the order of their upload: what marks a folder as finished last, the top folder's at the end.

    A folder is marked by its report or manifest, else its index, else its weights (a checkpoint of one
    file), else its records.
    """
    folders: dict[PurePosixPath, list[str]] = {}
    for name in names:
        folders.setdefault(PurePosixPath(name).parent, []).append(name)
    markers = {name for members in folders.values() for name in _markers(members)}
    everything = [name for members in folders.values() for name in members]
    return sorted(everything, key=lambda name: (name in markers, -name.count("/"), name))


def _markers(names: Sequence[str]) -> list[str]:
    for pattern in _MARKERS:
        found = [name for name in names if fnmatchcase(PurePosixPath(name).name, pattern)]
        if found:
            return found
    return []


class ObjectStage:
    """The stage of one reference, locked until `close`.

    Args:
        reference: A prefix in an object store.

    Raises:
        UsageError: It names no object store.
        OutputError: Another run writes to it, or the cache directory cannot be written.
        MissingExtraError: The store's library is not installed.
    """

    def __init__(self, reference: str) -> None:
        self.reference = reference.rstrip("/")
        if not is_object_reference(reference) or not reference.partition("://")[2].strip("/"):
            raise UsageError(reference, "names no place in an object store", expected="s3://bucket/prefix")
        self._system, self._path = connect(self.reference, doing="writing")
        self._top = _stages() / sha256(self.reference.encode()).hexdigest()[:24]
        self.folder = self._top / _WORK / PurePosixPath(self.reference).name
        try:
            self._top.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(self._top / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise _disk_error(self._top, error) from error
        if not _take_lock(self._lock):
            os.close(self._lock)
            raise OutputError(
                self.reference, "another run is writing here", remedy="wait for it, or choose another output"
            )

    def begin(self) -> Path:
        """The folder for a run, with what an earlier one left unfinished.

        Raises:
            OutputError: The prefix holds objects, or a finished result waits for its upload.
        """
        pending = self._top / _PENDING
        if pending.exists():
            raise OutputError(
                self.reference,
                f"the finished result of an earlier run waits for its upload in {self._top}",
                remedy="run the same command again, or call sparsity_audit.finish_upload("
                f"{self.reference!r}); to drop it, remove that folder",
            )
        self._verify_alone({})
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _disk_error(self.folder, error) from error
        return self.folder

    def files(self) -> dict[str, int]:
        """Name → bytes of each file that the run has written so far."""
        found = (path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in found}

    def seal(self, command: Sequence[str] = (), *, status: int = 0) -> None:
        """Declare the run finished: from now on its files are uploaded and not made again.

        Args:
            command: What made them, for `finished_stages`.
            status: Its exit status.
        """
        state = {"reference": self.reference, "command": list(command), "status": status}
        self._write_state({**state, "begun": False, "sent": [], "files": self.files()})

    def upload(self) -> tuple[int, int]:
        """Upload what is sealed, check it and remove the stage; returns the number of files and bytes.

        Raises:
            OutputError: Nothing is sealed, a file is not what was sealed, or somebody else filled the prefix.
            ObjectStoreError: The store refuses, cannot be reached, or holds something else after an upload.
        """
        if not (self._top / _PENDING).exists():
            raise OutputError(
                self.reference,
                "no finished result waits for its upload",
                remedy="run the command that makes it; it uploads when it has finished",
            )
        state = _read_state(self._top / _PENDING)
        files: dict[str, int] = state["files"]
        self._verify_alone(files if state["begun"] else {})
        self._write_state(state := {**state, "begun": True})
        for name in upload_order(files):
            if name not in state["sent"]:
                self._send(name, files[name])
                self._write_state(state := {**state, "sent": [*state["sent"], name]})
        self._discard()
        return len(files), sum(files.values())

    def close(self) -> None:
        """End the lock; a stage that holds nothing is removed."""
        self._discard_empty()
        os.close(self._lock)

    def _verify_alone(self, own: Mapping[str, int]) -> None:
        try:
            found = self._system.find(self._path)
        except FileNotFoundError:
            return
        except Exception as error:
            # Each store's library has exceptions of its own, without a common base.
            raise store_error(self.reference, error) from error
        names = [str(name).removeprefix(self._path).lstrip("/") for name in found]
        others = sorted(set(names) - set(own))
        if others:
            raise OutputError(
                self.reference,
                f"holds {len(others)} objects already ({others[0] or 'an object of this name'})",
                expected="a prefix that holds nothing; --overwrite is for directories alone",
                remedy="choose another prefix, or remove them with the store's own tools",
            )

    def _send(self, name: str, num_bytes: int) -> None:
        source, place, path = self.folder / name, f"{self.reference}/{name}", f"{self._path}/{name}"
        if not source.is_file() or source.stat().st_size != num_bytes:
            raise OutputError(str(source), "is not the file that the run had finished", remedy="run it again")
        found = self._put(source, path, place=place)
        if found != num_bytes:
            with suppress(Exception):  # a marker of a wrong size must not stay; the error below tells all
                self._system.rm_file(path)
            raise ObjectStoreError(
                place, f"{found} bytes after the upload", expected=f"{num_bytes}", remedy="run again"
            )

    def _put(self, source: Path, path: str, *, place: str) -> int:
        """Upload a file, again after failures that may pass; returns the bytes that the store then tells."""
        attempt = 1
        while True:
            try:
                self._system.put_file(str(source), path)
                return int(self._system.info(path)["size"])
            except Exception as error:
                # As above; a refusal does not pass, and a bucket that is not there does not appear.
                if attempt == _MAX_ATTEMPTS or isinstance(error, (PermissionError, FileNotFoundError)):
                    raise store_error(place, error, done="written") from error
                wait_s = _FIRST_WAIT_S * 2 ** (attempt - 1)
                _log.warning("%s: %s; trying again in %g s", place, type(error).__name__, wait_s)
                time.sleep(wait_s)
                attempt += 1

    def _write_state(self, state: Mapping[str, Any]) -> None:
        partial = self._top / f"{_PENDING}.partial"
        try:
            with partial.open("w", encoding="utf-8") as file:
                json.dump(state, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self._top / _PENDING)
        except OSError as error:
            raise _disk_error(partial, error) from error

    def _discard(self) -> None:
        # The list goes after the files: a removal that is cut short is one upload of nothing more.
        shutil.rmtree(self._top / _WORK, ignore_errors=True)
        (self._top / _PENDING).unlink(missing_ok=True)

    def _discard_empty(self) -> None:
        """Remove the stage unless it holds files; the lock's last holder removes it as well."""
        if (self._top / _PENDING).exists() or any(p.is_file() for p in (self._top / _WORK).rglob("*")):
            return
        shutil.rmtree(self._top, ignore_errors=True)


def _stages() -> Path:
    """Where all stages lie."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).resolve() / "sparsity-audit" / "outputs"


def _read_state(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OutputError(str(path), "cannot be read", remedy="remove its folder and run again") from error


def _take_lock(fd: int) -> bool:
    """Hold the stage until it is closed. File systems without locks are left unguarded."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return os.fstat(fd).st_nlink > 0  # else the run that held it ended just now, and removed it


def _disk_error(path: Path, error: OSError) -> OutputError:
    return OutputError(
        str(path),
        error.strerror or "cannot be written",
        expected="a folder for results before their upload",
        remedy="set XDG_CACHE_HOME to a disk with room for them",
    )
