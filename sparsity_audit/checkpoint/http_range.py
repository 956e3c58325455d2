"""Ask an HTTP server for bytes start ≤ i < stop of a file, and take nothing else for them.

Contract: an answer counts only with status 206, the very `Content-Range` that was asked for, no content
encoding and no other length; a server or proxy that ignores `Range` is a `WrongAnswerError`, because its
bytes would silently be those of another place. Cookies are not kept; an `Authorization` header follows no
redirect. Proxies are those of the environment (`HTTPS_PROXY`, `NO_PROXY`), certificates the system's or those
of `SSL_CERT_FILE`, `REQUESTS_CA_BUNDLE`, `CURL_CA_BUNDLE`. Nothing here knows of the Hub.

Why the standard library: the Hub library's transport is another one in each of its major versions, and
its pure-Python reading takes a core at some 0.4 GB/s (see docs/design/hub-streaming.md).
"""

from __future__ import annotations

import http.client
import os
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from http import HTTPStatus
from pathlib import Path
from typing import Any, Protocol, overload
from urllib.parse import urlsplit

from sparsity_audit.types import ByteRange

__all__ = [
    "BROKEN",
    "CHUNK_BYTES",
    "Read",
    "StatusError",
    "WrongAnswerError",
    "is_transient_status",
    "open_range",
    "open_whole",
    "origin_of",
    "retry_after_s",
]

CHUNK_BYTES = 256 << 10
"""Most bytes taken from a connection at once."""

BROKEN = (OSError, http.client.HTTPException)
"""What a connection that fails raises; `StatusError` and `WrongAnswerError` are neither."""

_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})")
_CREDENTIALS = ("Authorization", "Cookie")
_MAX_REDIRECTS = 5


class Headers(Protocol):
    """Headers of any transport: names in any case."""

    @overload
    def get(self, name: str, /) -> str | None: ...
    @overload
    def get(self, name: str, failobj: str, /) -> str: ...


Read = Callable[[int], bytes]
"""Called with a number of bytes, gives at most so many of those that come next; b"" when none come."""


class StatusError(Exception):
    """A status that is no success.

    Args:
        status: The status.
        retry_after_s: Seconds that the server asks to wait, if it does.
    """

    def __init__(self, status: int, retry_after_s: float | None) -> None:
        super().__init__(status)
        self.status, self.retry_after_s = status, retry_after_s


class WrongAnswerError(Exception):
    """An answer that is not the range that was asked for.

    Args:
        found: What came.
        expected: What should have come.
    """

    def __init__(self, found: str, expected: str) -> None:
        super().__init__(found)
        self.found, self.expected = found, expected


def is_transient_status(status: int) -> bool:
    """Whether asking again may help."""
    return status >= HTTPStatus.INTERNAL_SERVER_ERROR or status in (408, 425, 429)


def origin_of(url: str) -> tuple[str, str, int | None]:
    """Scheme, host and port: credentials belong to one of these and to no other."""
    parts = urlsplit(url)
    port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    return parts.scheme, (parts.hostname or "").lower(), port


@contextmanager
def open_range(
    url: str, *, headers: Mapping[str, str], extent: ByteRange, total: int, timeout_s: float
) -> Iterator[Read]:
    """A reader of bytes `extent` of a file of `total` bytes; b"" before the end is a broken connection.

    Raises:
        StatusError: The server refuses.
        WrongAnswerError: It answers with something else.
        OSError, http.client.HTTPException: The connection failed.
    """
    asked = {**headers, "Range": f"bytes={extent.start}-{extent.stop - 1}", "Accept-Encoding": "identity"}
    with _open(url, asked, timeout_s) as response:
        _verify(response.status, response.headers, extent, total)
        yield _exactly(response, extent.num_bytes)


@contextmanager
def open_whole(url: str, *, headers: Mapping[str, str], total: int, timeout_s: float) -> Iterator[Read]:
    """A reader of a small file as a whole: not every server has ranges for those. Errors as `open_range`."""
    with _open(url, {**headers, "Accept-Encoding": "identity"}, timeout_s) as response:
        if response.status != HTTPStatus.OK:
            raise WrongAnswerError(f"status {response.status}", "200")
        _verify_body(response.headers, total)
        yield _exactly(response, total)


def _open(url: str, headers: Mapping[str, str], timeout_s: float) -> http.client.HTTPResponse:
    request = urllib.request.Request(url)  # noqa: S310 - the scheme is checked by `_opener`
    for name, value in headers.items():
        if name.title() in _CREDENTIALS:
            request.add_unredirected_header(name, value)
        else:
            request.add_header(name, value)
    try:
        return _opener().open(request, timeout=timeout_s)
    except urllib.error.HTTPError as error:
        with error:
            raise StatusError(error.code, retry_after_s(error.headers)) from error


def _verify(status: int, headers: Headers, extent: ByteRange, total: int) -> None:
    """Raise WrongAnswerError unless the answer is the range."""
    wanted = f"bytes {extent.start}-{extent.stop - 1}/{total}"
    if status != HTTPStatus.PARTIAL_CONTENT:
        raise WrongAnswerError(f"status {status}: the server or a proxy ignored Range", f"206 with {wanted}")
    found = headers.get("Content-Range", "")
    match = _CONTENT_RANGE.fullmatch(found)
    if match is None or tuple(map(int, match.groups())) != (extent.start, extent.stop - 1, total):
        shown = match[0] if match else "none that is understood"
        raise WrongAnswerError(f"Content-Range: {shown}", wanted)
    _verify_body(headers, extent.num_bytes)


def _verify_body(headers: Headers, num_bytes: int) -> None:
    if headers.get("Content-Encoding", "identity").lower() != "identity":
        raise WrongAnswerError("an encoded body", "the file's own bytes")
    length = headers.get("Content-Length")
    if length is not None and length.strip() != str(num_bytes):
        shown = length.strip() if length.strip().isdigit() else "none that is understood"
        raise WrongAnswerError(f"Content-Length: {shown}", str(num_bytes))


def _exactly(response: http.client.HTTPResponse, num_bytes: int) -> Read:
    """Read `num_bytes` and not one more: a body without a stated length might go on."""
    left = num_bytes

    def read(count: int) -> bytes:
        nonlocal left
        data = response.read1(min(count, CHUNK_BYTES, left)) if left else b""
        left -= len(data)
        if not left and data and response.length is None and response.read1(1):
            raise WrongAnswerError(f"more than {num_bytes} bytes", str(num_bytes))
        return data

    return read


def retry_after_s(headers: Headers) -> float | None:
    """Seconds that a `Retry-After` header asks to wait, as a number or a date; None without a usable one."""
    text = (headers.get("Retry-After") or "").strip()
    if text.isdigit():
        return float(text)
    try:
        moment = parsedate_to_datetime(text)
    except ValueError:
        return None
    moment = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
    return max((moment - datetime.now(UTC)).total_seconds(), 0.0)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follow few redirects, none from https to http; credentials stay behind (`add_unredirected_header`)."""

    max_redirections = _MAX_REDIRECTS

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        if urlsplit(req.full_url).scheme == "https" and urlsplit(newurl).scheme != "https":
            raise WrongAnswerError("a redirect from https to an open connection", "https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


@cache
def _opener() -> urllib.request.OpenerDirector:
    """Speaks http and https alone: an address that a server names must not open a local file."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(context=_certificates()),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _Redirects(),
    ):
        opener.add_handler(handler)
    return opener


def _certificates() -> ssl.SSLContext:
    named = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE")
    if not named:
        return ssl.create_default_context()
    is_folder = Path(named).is_dir()
    return ssl.create_default_context(
        cafile=None if is_folder else named, capath=named if is_folder else None
    )
