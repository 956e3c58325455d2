"""Read a checkpoint on the Hub one file at a time: download, read, remove.

Contract: a pass that announces at least half of a file gets it from the Hub library's cache, downloaded when
its first byte is read and removed when its last announced byte was; everything else (headers, samples) is
fetched by ranges, as with `--stream`. A file that was cached before is read there and stays. Disk: the files
that are being read at the moment, about two a side where both sides are stored in one order. A file that two
checkpoints share is removed when neither needs it. Another process that reads the same cache is not seen.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from pathlib import Path

from sparsity_audit.checkpoint.hub import download_file
from sparsity_audit.checkpoint.hub_file import HubFile
from sparsity_audit.checkpoint.store import ByteSource, FileEntry, LocalFile

__all__ = ["HubShard", "ShardSource"]

_log = logging.getLogger(__name__)

_users: Counter[Path] = Counter()
_users_lock = threading.Lock()


class HubShard(HubFile):
    """A `HubFile` that can be had whole for as long as it is read."""

    def open_planned(self, entry: FileEntry, planned_bytes: int) -> ByteSource | None:
        """A source that downloads the file; None where a pass reads so little that ranges do."""
        return ShardSource(entry, self, planned_bytes) if 2 * planned_bytes >= self.num_bytes else None

    def download(self) -> tuple[Path, bool]:
        """Where the file lies now, and whether this call put its content there. Raises HubError."""
        blob = self._blob()
        with _users_lock:
            is_ours = blob is not None and (_users[blob] > 0 or not blob.exists())
            if blob is not None:
                _users[blob] += is_ours
        try:
            path = download_file(self._api, self._pinned, self._path, num_bytes=self.num_bytes)
        except BaseException:
            self._forget(blob, is_ours=is_ours)
            raise
        return path, is_ours

    def remove(self, path: Path) -> None:
        """Take a downloaded file out of the cache, unless another checkpoint still reads its content."""
        blob = path.resolve()
        with _users_lock:
            _users[blob] -= 1
            if _users[blob] > 0:
                return
            del _users[blob]
            for place in dict.fromkeys((path, blob)):
                place.unlink(missing_ok=True)
        _log.info("%s: removed from the cache, %d bytes", self.place, self.num_bytes)

    def _blob(self) -> Path | None:
        """Where the library keeps this content (docs: Manage the cache); None where its name is not known."""
        from huggingface_hub import constants

        sha256 = self._listed.digest.removeprefix("sha256:")
        if len(sha256) != 64:
            return None
        repository = "models--" + self._pinned.repo_id.replace("/", "--")
        return (Path(constants.HF_HUB_CACHE) / repository / "blobs" / sha256).resolve()

    @staticmethod
    def _forget(blob: Path | None, *, is_ours: bool) -> None:
        if blob is None or not is_ours:
            return
        with _users_lock:
            _users[blob] -= 1
            if _users[blob] <= 0:
                del _users[blob]


class ShardSource:
    """A file of the cache, downloaded at the first read and removed after the last planned one.

    What is read beyond the plan is fetched by ranges.

    Args:
        entry: The catalogued file.
        shard: What downloads it.
        planned_bytes: How much of it will be read.
    """

    def __init__(self, entry: FileEntry, shard: HubShard, planned_bytes: int) -> None:
        self._entry, self._shard, self._left = entry, shard, planned_bytes
        self._lock = threading.Lock()
        self._file: LocalFile | None = None
        self._direct = shard.open(entry)
        self._path: Path | None = None
        self._ours, self._readers = False, 0

    @property
    def entry(self) -> FileEntry:
        """The catalogued file."""
        return self._entry

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` with the bytes at `offset`. Raises HubError or ChangedInputError."""
        with self._lock:
            file = self._file
            if self._left <= 0 and file is None:
                file = self._direct
            elif file is None:
                self._path, self._ours = self._shard.download()
                file = self._file = LocalFile(FileEntry.from_path(self._path))
            self._readers += 1
        try:
            file.read_into(buffer, offset)
        finally:
            with self._lock:
                self._readers -= 1
                self._left -= len(buffer)
                if self._left <= 0 and not self._readers:
                    self._release()

    def close(self) -> None:
        """Close the file, and remove it: a run that ended early leaves nothing behind either."""
        with self._lock:
            self._release()

    def _release(self) -> None:
        if self._file is None or self._path is None:
            return
        self._file.close()
        if self._ours:
            self._shard.remove(self._path)
        self._file, self._path = None, None
