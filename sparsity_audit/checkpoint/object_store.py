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
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sparsity_audit.checkpoint.joining import (
    MAX_JSON_BYTES,
    confirm_index,
    gathered,
    join_contents,
    parse_object,
    weight_map_of,
)
from sparsity_audit.checkpoint.layout import (
    ADAPTER_CONFIG,
    abridged,
    choose_layout,
    is_adapter,
    missing_shards,
    unread_weights,
)
from sparsity_audit.checkpoint.remote import RemoteFile, drop_heads, load_heads, remote_entry
from sparsity_audit.checkpoint.store import Catalogue, FileEntry, Sink
from sparsity_audit.errors import (
    ChangedInputError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    MissingExtraError,
    ObjectStoreError,
)
from sparsity_audit.types import ByteRange

__all__ = ["ObjectFile", "connect", "is_object_reference", "open_objects", "store_error"]

_EXTRAS = {
    "s3": "sparsity-audit[s3]",
    "gs": "sparsity-audit[gcs]",
    "az": "adlfs",
    "abfs": "adlfs",
    "memory": "fsspec",
}
"""Scheme → what to install for it."""

_PIECE_BYTES = 32 << 20
"""Most bytes of one request: the store's library gives a range only whole, so each transfer holds as much."""

_MAX_ATTEMPTS = 5
_FIRST_WAIT_S = 0.5

_STATE_KEYS = ("ETag", "etag", "VersionId", "generation", "LastModified", "last_modified", "mtime", "created")
_CONFIG = "config.json"

_log = logging.getLogger(__name__)


def is_object_reference(text: str) -> bool:
    """Whether a reference names an object store."""
    scheme, mark, _ = text.partition("://")
    return bool(mark) and scheme in _EXTRAS


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
            f"{error.name or 'its library'} is not installed",
            remedy=f"pip install '{_EXTRAS[scheme]}'",
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
    """
    store = _Store(reference)
    listing = store.list()
    layout = choose_layout(listing)
    if layout is None:
        raise CheckpointNotFoundError(
            reference,
            f"holds no checkpoint ({len(listing)} other files)" if listing else "holds nothing",
            expected="*.safetensors or pytorch_model*.bin, with or without an index",
            remedy="name the folder that holds the weights, or one file, and check credentials and region",
        )
    names, weight_map, subject = layout.files, None, f"{reference}/{layout.index}"
    if layout.index is not None:
        weight_map = weight_map_of(store.json(layout.index, listing), subject=subject)
        names = tuple(sorted(set(weight_map.values())))
    missing = () if store.is_file else missing_shards(names)
    if layout.index is not None:
        missing = [name for name in names if name not in listing]
    if missing:
        raise CheckpointNotFoundError(
            reference, f"lacks the shard {missing[0]}", expected=f"all shards; {len(missing)} missing"
        )
    files = tuple(store.entry(name, listing[name]) for name in names)
    load_heads(files)
    contents = join_contents(files, subject=reference)
    drop_heads(files)
    config = store.json(_CONFIG, listing) if _CONFIG in listing else {}
    catalogue = gathered(files, contents, reference=reference, resolved=reference, config=config)
    if weight_map is not None:
        confirm_index(subject, weight_map, catalogue)
    if is_adapter(names) and ADAPTER_CONFIG in listing:
        catalogue = replace(catalogue, adapter=store.json(ADAPTER_CONFIG, listing))
    unread = () if store.is_file else unread_weights(listing, names)
    if unread:
        note = f"{reference}: read {names[0]}{' …' if len(names) > 1 else ''}; ignored {abridged(unread)}"
        catalogue = replace(catalogue, notes=(*catalogue.notes, note))
    return catalogue


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

    def _verify_state(self) -> None:
        try:
            info = self._system.info(self._path)
        except FileNotFoundError as error:
            raise self._changed("was removed during the run") from error
        except PermissionError as error:
            raise store_error(self.place, error) from error
        except Exception as error:
            # Each store's library has exceptions of its own, without a common base.
            raise _PassingError(error) from error
        if int(info["size"]) != self.num_bytes or _state(info) != self.state:
            raise self._changed(f"was replaced during the run ({info['size']} bytes now)")

    def _piece(self, start: int, stop: int) -> bytes:
        try:
            data = self._system.cat_file(self._path, start=start, end=stop)
        except FileNotFoundError as error:
            raise self._changed("was removed during the run") from error
        except PermissionError as error:
            raise store_error(self.place, error) from error
        except Exception as error:
            raise _PassingError(error) from error
        # After the range: an object that is replaced between this and the range is not mixed into it.
        self._verify_state()
        if len(data) != stop - start:
            raise ObjectStoreError(
                self.place,
                f"{len(data)} bytes for a range",
                expected=f"the {stop - start} bytes that were asked for",
                remedy="a proxy may ignore ranges",
            )
        return data

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
    """One folder or file of a store."""

    def __init__(self, reference: str) -> None:
        self._reference = reference.rstrip("/")
        self._system, self._path = connect(reference, doing="reading")
        self.is_file = False

    def list(self) -> dict[str, Mapping[str, Any]]:
        """The files of the folder by name, or the one file."""
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
            raise store_error(self._reference, error) from error
        return {e["name"].rstrip("/").rpartition("/")[2]: e for e in entries if e["type"] == "file"}

    def entry(self, name: str, info: Mapping[str, Any]) -> FileEntry:
        """One of its files."""
        file = self._file(name, info)
        return remote_entry(file, name=name, version=file.state)

    def json(self, name: str, listing: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """A small JSON file of the folder."""
        file = self._file(name, listing[name])
        if file.num_bytes > MAX_JSON_BYTES:
            raise CorruptCheckpointError(
                file.place, f"is longer than {MAX_JSON_BYTES} bytes", expected="an index or a configuration"
            )
        return parse_object(file.read_whole(), subject=file.place)

    def _file(self, name: str, info: Mapping[str, Any]) -> ObjectFile:
        if self.is_file:
            return ObjectFile(self._system, self._path, place=self._reference, info=info)
        place = f"{self._reference}/{name}"
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
