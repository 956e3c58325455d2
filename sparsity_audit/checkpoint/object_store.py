"""Read checkpoints in object stores by ranges: `s3://`, `gs://`, `az://`, `memory://`.

Contract: fsspec and its file systems (extras `s3`, `gcs`; `adlfs` for Azure) are imported here alone;
`object_output`, which writes, connects and translates errors through this module. Each
range is one request of exactly the bytes asked for, without read-ahead. The state of an object (ETag,
generation, time: whatever its store tells) is taken when the checkpoint is opened and compared again after
every range, so that no byte of another state is used; an object that was replaced or removed is a
`ChangedInputError`. Failures that may pass are tried again. Credentials and endpoints are those of the
store's own library (`AWS_PROFILE`, `AWS_ENDPOINT_URL`, `GOOGLE_APPLICATION_CREDENTIALS`, …); no message
holds them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from sparsity_audit.checkpoint.joining import parse_object, verify_json_size
from sparsity_audit.checkpoint.layout import choose_layout
from sparsity_audit.checkpoint.remote import RemoteFile, remote_entry
from sparsity_audit.checkpoint.remote_folder import open_folder
from sparsity_audit.checkpoint.store import Catalogue, FileEntry, Sink
from sparsity_audit.errors import (
    ChangedInputError,
    CheckpointNotFoundError,
    MissingExtraError,
    ObjectStoreError,
    UsageError,
)
from sparsity_audit.types import ByteRange

__all__ = ["ObjectFile", "connect", "is_object_reference", "open_objects", "store_error"]

T = TypeVar("T")

_LIBRARIES = {
    "s3": ("s3fs", "sparsity-audit[s3]"),
    "gs": ("gcsfs", "sparsity-audit[gcs]"),
    "az": ("adlfs", "adlfs"),
    "abfs": ("adlfs", "adlfs"),
    "memory": ("fsspec", "fsspec"),
}
"""Scheme → the library that reads it, and what to install for it."""

_PIECE_BYTES = 32 << 20
"""Most bytes of one request: the store's library gives a range only whole, so each transfer holds as much."""

_MAX_ATTEMPTS = 5
_FIRST_WAIT_S = 0.5

_STATE_KEYS = ("ETag", "etag", "VersionId", "generation", "LastModified", "last_modified", "mtime", "created")

_log = logging.getLogger(__name__)


def is_object_reference(text: str) -> bool:
    """Whether a reference names an object store."""
    scheme, mark, _ = text.partition("://")
    return bool(mark) and scheme in _LIBRARIES


def connect(reference: str, *, doing: str) -> tuple[Any, str]:
    """The fsspec file system of a reference and the path there, without a listing cache.

    Raises:
        MissingExtraError: The store's library is not installed.
        ObjectStoreError: It refuses the reference.
    """
    scheme = reference.partition("://")[0]
    try:
        from fsspec.core import url_to_fs

        system, path = url_to_fs(reference, use_listings_cache=False, skip_instance_cache=True)
    except ImportError as error:
        raise MissingExtraError(
            f"{doing} {scheme}://",
            f"{error.name or _LIBRARIES[scheme][0]} is not installed",
            remedy=f"pip install '{_LIBRARIES[scheme][1]}'",
        ) from error
    except Exception as error:
        # Each store's library has exceptions of its own, without a common base.
        raise store_error(reference, error) from error
    return system, str(path).rstrip("/")


def open_objects(reference: str) -> Catalogue:
    """The catalogue of a checkpoint in an object store: a prefix that holds its files, or one file.

    Raises:
        CheckpointNotFoundError: Nothing is there, or a shard is missing.
        MissingExtraError: The store's library is not installed.
        ObjectStoreError: The store refuses or cannot be reached.
        CorruptCheckpointError: A header or the index contradicts the files.
        UsageError: It names no bucket.
    """
    if not reference.partition("://")[2].strip("/"):
        raise UsageError(reference, "names no bucket", expected="s3://bucket/prefix or s3://bucket/file")
    store = _Store(reference)
    layout = choose_layout(store.names)
    if layout is None:
        count = len(store.names)
        raise CheckpointNotFoundError(
            reference,
            f"holds no checkpoint ({count} other files)" if count else "holds nothing",
            expected="*.safetensors or pytorch_model*.bin, with or without an index",
            remedy="name the folder that holds the weights, or one file, and check credentials and region",
        )
    return open_folder(store, layout, resolved=reference)


class ObjectFile(RemoteFile):
    """One object.

    Args:
        system: The fsspec file system.
        path: Its path there.
        place: Its address, for messages.
        info: What the store said of it when it was catalogued.
    """

    def __init__(self, system: Any, path: str, *, place: str, info: Mapping[str, Any]) -> None:
        super().__init__(place, int(info["size"]))
        self._system, self._path, self.state = system, path, _state(info)

    def fetch(self, extent: ByteRange, sink: Sink) -> None:
        """Put exactly the bytes of `extent` into `sink`, in order.

        Raises:
            ChangedInputError: The object was replaced or removed.
            ObjectStoreError: The store refuses, or stays away.
        """
        position, failures = extent.start, 0
        while position < extent.stop:
            stop = min(position + _PIECE_BYTES, extent.stop)
            try:
                data = self._piece(position, stop)
            except _PassingError as error:
                failures += 1
                if failures >= _MAX_ATTEMPTS:
                    raise store_error(self.place, error.cause) from error.cause
                wait_s = _FIRST_WAIT_S * 2 ** (failures - 1)
                name = type(error.cause).__name__
                _log.warning("%s: %s at byte %d; going on in %g s", self.place, name, position, wait_s)
                sink.pause(wait_s)
                continue
            sink.put(data)
            position, failures = stop, 0

    def _piece(self, start: int, stop: int) -> bytes:
        data = self._ask(lambda: self._system.cat_file(self._path, start=start, end=stop))
        # After the range: an object that is replaced between this and the range is not mixed into it.
        info = self._ask(lambda: self._system.info(self._path))
        if int(info["size"]) != self.num_bytes or _state(info) != self.state:
            raise self._changed(f"was replaced during the run ({info['size']} bytes now)")
        if len(data) != stop - start:
            raise ObjectStoreError(
                self.place,
                f"{len(data)} bytes for a range",
                expected=f"the {stop - start} bytes that were asked for",
                remedy="a proxy may ignore ranges",
            )
        return data

    def _ask(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except FileNotFoundError as error:
            raise self._changed("was removed during the run") from error
        except PermissionError as error:
            raise store_error(self.place, error) from error
        except Exception as error:
            # Each store's library has exceptions of its own, without a common base.
            raise _PassingError(error) from error

    def _changed(self, found: str) -> ChangedInputError:
        return ChangedInputError(
            self.place,
            found,
            expected=f"the {self.num_bytes} bytes that were there at the start",
            remedy="wait until the checkpoint is completely written, then run again",
        )


class _PassingError(Exception):
    def __init__(self, cause: Exception) -> None:
        super().__init__()
        self.cause = cause


class _Store:
    """One folder or file of a store: what `open_folder` reads."""

    missing_remedy = "copy the missing shards there, or name the folder that holds all of them"

    def __init__(self, reference: str) -> None:
        self.reference = reference.rstrip("/")
        self._system, self._path = connect(reference, doing="reading")
        self.is_file = False
        self._listing = self._list()

    @property
    def names(self) -> Collection[str]:
        """Names of the files, or of the one file."""
        return self._listing.keys()

    def entry(self, name: str) -> FileEntry:
        """One of its files."""
        file = self._file(name)
        return remote_entry(file, name=name, version=file.state)

    def json(self, name: str) -> dict[str, Any]:
        """A small JSON file of the folder."""
        file = self._file(name)
        verify_json_size(file.num_bytes, subject=file.place)
        return parse_object(file.read_whole(), subject=file.place)

    def _list(self) -> dict[str, Mapping[str, Any]]:
        try:
            info = self._system.info(self._path)
            if info["type"] == "file":
                self.is_file = True
                return {self._path.rpartition("/")[2]: info}
            entries = self._system.ls(self._path, detail=True)
        except FileNotFoundError:
            return {}
        except Exception as error:
            # Each store's library has exceptions of its own, without a common base.
            raise store_error(self.reference, error) from error
        return {e["name"].rstrip("/").rpartition("/")[2]: e for e in entries if e["type"] == "file"}

    def _file(self, name: str) -> ObjectFile:
        if self.is_file:
            return ObjectFile(self._system, self._path, place=self.reference, info=self._listing[name])
        place = f"{self.reference}/{name}"
        # A listing may tell less of an object than the object itself does.
        path = f"{self._path}/{name}"
        try:
            info = self._system.info(path)
        except Exception as error:
            raise store_error(place, error) from error
        return ObjectFile(self._system, path, place=place, info=info)


def _state(info: Mapping[str, Any]) -> str:
    """What tells one state of an object from the next."""
    known = {key: info[key] for key in _STATE_KEYS if info.get(key) is not None}
    return " ".join(f"{key}={value}" for key, value in known.items())


def store_error(place: str, error: BaseException, *, done: str = "read") -> ObjectStoreError:
    """The error to show; no text of a library enters it, because it may hold credentials or addresses."""
    if isinstance(error, PermissionError):
        act = "read it" if done == "read" else "write there"
        return ObjectStoreError(
            place, f"the store forbids to {act}", remedy="check the credentials that its library finds"
        )
    if isinstance(error, FileNotFoundError) and done == "written":
        return ObjectStoreError(place, "the bucket is not there", remedy="make it, then run again")
    name = type(error).__name__
    remedy = "check credentials, region, endpoint and network, then run again"
    return ObjectStoreError(place, f"cannot be {done}: {name}", remedy=remedy)
