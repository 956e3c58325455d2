"""One file of a Hub repository, read by ranges from where the Hub says it is stored.

Contract: the Hub is asked once for the file's address, which it signs for a limited time; ranges are asked
from that address alone. A transfer that breaks goes on at the first byte not received. An address that
expires (401, 403 from the storage host) is asked for anew. 408, 429, 5xx and broken connections are tried
again, at most `MAX_ATTEMPTS` in a row without a byte, after the time the server asks for. The commit is part
of the question, and length and hash of every answer must be those that the Hub listed. The access token goes
to the Hub's own origin and nowhere else; neither it nor a signed address enters a message.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from sparsity_audit.checkpoint.http_range import (
    BROKEN,
    CHUNK_BYTES,
    Read,
    StatusError,
    WrongAnswerError,
    is_transient_status,
    open_range,
    open_whole,
    origin_of,
)
from sparsity_audit.checkpoint.hub_calls import MAX_WAIT_S, ListedFile, with_retries
from sparsity_audit.checkpoint.hub_errors import translate
from sparsity_audit.checkpoint.hub_reference import HubReference
from sparsity_audit.checkpoint.remote import BufferSink, RemoteFile
from sparsity_audit.checkpoint.store import Sink
from sparsity_audit.errors import ChangedInputError, HubError
from sparsity_audit.types import ByteRange

if TYPE_CHECKING:
    from huggingface_hub import HfApi

__all__ = ["MAX_ATTEMPTS", "Address", "HubFile"]

MAX_ATTEMPTS = 6
"""In a row without a byte; with the waits below that is about half a minute of a network that is away."""

FIRST_WAIT_S = 0.5
"""Seconds before the second attempt; each further wait is twice as long."""

_MAX_RENEWALS = 2
"""Addresses asked for in a row without a byte from any of them."""

_EXPIRED = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
_USER_AGENT = "sparsity-audit"
_IN_BETWEEN = "a proxy, firewall or mirror may be in between; without --stream whole files are fetched"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Address:
    """Where a file can be read for a while.

    Args:
        url: Signed; never shown.
        headers: What goes with it: the access token only where it is the Hub itself that serves the file.
        is_hub: Whether it is.
    """

    url: str
    headers: Mapping[str, str]
    is_hub: bool


class HubFile(RemoteFile):
    """A file at a pinned commit.

    Args:
        api: The Hub library's client.
        pinned: Repository and commit.
        path: Path in the repository.
        listed: Its length and hash, as the Hub lists them.
    """

    def __init__(self, api: HfApi, pinned: HubReference, path: str, listed: ListedFile) -> None:
        super().__init__(f"{pinned.uri.partition('@')[0]}@{pinned.revision}, file {path}", listed.num_bytes)
        self._api, self._pinned, self._path, self._listed = api, pinned, path, listed
        self._address: Address | None = None
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process it asks for its own address, with the token that is found there."""
        return _elsewhere, (type(self), self._api.endpoint, self._pinned, self._path, self._listed)

    def fetch(self, extent: ByteRange, sink: Sink) -> None:
        """Put exactly the bytes of `extent` into `sink`, in order, however often the transfer is cut.

        Raises:
            HubError: The Hub or the storage host refuses, answers with something else, or stays away.
        """
        self._transfer(_Transfer(self, extent, sink))

    def read_whole(self) -> bytes:
        """A small file, asked for without a range: the Hub serves those itself. Raises HubError."""
        extent = ByteRange(start=0, stop=self.num_bytes)
        buffer = bytearray(self.num_bytes)
        if buffer:
            self._transfer(_WholeTransfer(self, extent, BufferSink(memoryview(buffer))))
        return bytes(buffer)

    def _transfer(self, transfer: _Transfer) -> None:
        while not transfer.is_done:
            address = self.address()
            try:
                transfer.run(address)
            except StatusError as error:
                transfer.refused(error, address)
            except WrongAnswerError as error:
                raise HubError(self.place, error.found, expected=error.expected, remedy=_IN_BETWEEN) from None
            except BROKEN as error:
                transfer.broken(error)

    def address(self, stale: Address | None = None) -> Address:
        """Where to read it now; `stale` is one that does not work any more. Raises HubError."""
        with self._lock:
            if self._address is None or self._address is stale:
                self._address = self._resolve()
            return self._address

    def _resolve(self) -> Address:
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.errors import OfflineModeIsEnabled
        from huggingface_hub.utils import build_hf_headers

        reference = self._pinned
        url = hf_hub_url(
            reference.repo_id, self._path, revision=reference.revision, endpoint=self._api.endpoint
        )
        try:
            found = with_retries(
                lambda: self._api.get_hf_file_metadata(url=url, timeout=constants.HF_HUB_ETAG_TIMEOUT),
                reference,
                file=self._path,
            )
        except OfflineModeIsEnabled as error:
            raise translate(error, reference, file=self._path) from error
        self._verify(found.size, found.etag, found.commit_hash)
        is_hub = origin_of(found.location) == origin_of(url)
        headers = build_hf_headers(library_name=_USER_AGENT) if is_hub else {"User-Agent": _USER_AGENT}
        return Address(url=found.location, headers=headers, is_hub=is_hub)

    def _verify(self, size: int | None, etag: str | None, commit: str | None) -> None:
        """Raise ChangedInputError unless the Hub speaks of the file that was listed."""
        sha256 = self._listed.digest.removeprefix("sha256:")
        for what, found, expected in (
            ("bytes", size, self.num_bytes),
            ("hash", etag, sha256 if self._listed.digest.startswith("sha256:") else None),
            ("commit", commit, self._pinned.revision),
        ):
            if found is not None and expected is not None and found != expected:
                raise ChangedInputError(
                    self.place,
                    f"the Hub now gives it another {what}",
                    expected=f"{what} {expected}, as listed at the start",
                    remedy="run again; a mirror may be out of step (HF_ENDPOINT)",
                )


def _elsewhere(
    kind: type[HubFile], endpoint: str, pinned: HubReference, path: str, listed: ListedFile
) -> HubFile:
    from huggingface_hub import HfApi

    return kind(HfApi(endpoint=endpoint, library_name=_USER_AGENT), pinned, path, listed)


class _Transfer:
    """One range on its way into a sink, over as many connections as it takes."""

    def __init__(self, file: HubFile, extent: ByteRange, sink: Sink) -> None:
        self._file, self._extent, self._sink = file, extent, sink
        self._position, self._failures, self._renewals = extent.start, 0, 0

    @property
    def is_done(self) -> bool:
        return self._position == self._extent.stop

    def run(self, address: Address) -> None:
        """One connection. Raises what `open_range` raises."""
        from huggingface_hub import constants

        with self._open(address, float(constants.HF_HUB_DOWNLOAD_TIMEOUT)) as read:
            while not self.is_done:
                data = read(CHUNK_BYTES)
                if not data:
                    raise ConnectionError("ended early")
                self._sink.put(data)
                self._position += len(data)
                self._arrived()

    def _arrived(self) -> None:
        """Bytes that stay: attempts are counted anew."""
        self._failures = self._renewals = 0

    def _open(self, address: Address, timeout_s: float) -> AbstractContextManager[Read]:
        rest = ByteRange(start=self._position, stop=self._extent.stop)
        total = self._file.num_bytes
        return open_range(address.url, headers=address.headers, extent=rest, total=total, timeout_s=timeout_s)

    def refused(self, error: StatusError, address: Address) -> None:
        """Prepare the next attempt after a status, or raise HubError."""
        status = error.status
        if status in _EXPIRED and not address.is_hub and self._renewals < _MAX_RENEWALS:
            self._renewals += 1
            self._file.address(stale=address)
        elif is_transient_status(status) and (error.retry_after_s or 0.0) <= MAX_WAIT_S:
            self._retry(f"status {status}", error.retry_after_s or 0.0)
        else:
            raise self._refusal(status, address, error.retry_after_s)

    def broken(self, error: BaseException) -> None:
        """Prepare the next attempt after a broken connection, or raise HubError."""
        reason = getattr(error, "reason", error)
        text = getattr(reason, "strerror", None) or type(reason).__name__
        self._retry(text if isinstance(text, str) else type(reason).__name__, 0.0)

    def _retry(self, reason: str, asked_s: float) -> None:
        self._failures += 1
        if self._failures >= MAX_ATTEMPTS:
            raise HubError(
                self._file.place,
                f"{reason}, {self._failures} times in a row, at byte {self._position}",
                remedy="check network and proxies, then run again: with -o or --mask it goes on where it was",
            )
        wait_s = max(FIRST_WAIT_S * 2 ** (self._failures - 1), asked_s)
        _log.warning("%s: %s at byte %d; going on in %g s", self._file.place, reason, self._position, wait_s)
        self._sink.pause(wait_s)

    def _refusal(self, status: int, address: Address, retry_after_s: float | None) -> HubError:
        place = self._file.place
        if status in _EXPIRED and not address.is_hub:
            return HubError(
                place,
                f"the storage host refuses the address that the Hub has just signed ({status})",
                remedy="check this machine's clock, proxies and firewalls",
            )
        if status in _EXPIRED:
            return HubError(
                place,
                f"the Hub refuses access ({status})",
                remedy="run `hf auth login` or set HF_TOKEN anew",
            )
        if is_transient_status(status):
            return HubError(
                place,
                f"status {status}, and a wait of {retry_after_s:.0f} s is asked for",
                expected=f"at most {MAX_WAIT_S:.0f} s",
                remedy="run again later: with -o or --mask it goes on where it was",
            )
        return HubError(
            place, f"status {status} for bytes of it", remedy="check proxies, firewalls and HF_ENDPOINT"
        )


class _WholeTransfer(_Transfer):
    """A small file as a whole: each attempt begins at its start, so that bytes of a cut one do not count."""

    def _arrived(self) -> None:
        pass

    def _open(self, address: Address, timeout_s: float) -> AbstractContextManager[Read]:
        assert isinstance(self._sink, BufferSink)
        self._position = self._sink.filled = 0
        total = self._file.num_bytes
        return open_whole(address.url, headers=address.headers, total=total, timeout_s=timeout_s)
