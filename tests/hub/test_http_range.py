"""An answer counts only when it is the range that was asked for."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from sparsity_audit.checkpoint.http_range import (
    BROKEN,
    StatusError,
    WrongAnswerError,
    open_range,
    origin_of,
    retry_after_s,
)
from sparsity_audit.types import ByteRange

DATA = bytes(range(100))
EXTENT = ByteRange(start=10, stop=30)
GOOD = {"Content-Range": "bytes 10-29/100", "Content-Length": "20"}


class ScriptedServer:
    """Answers each connection with the next of its raw answers."""

    def __init__(self) -> None:
        self.answers: list[bytes] = []
        self.heads: list[str] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/file"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                head = b""
                while b"\r\n\r\n" not in head:
                    head += connection.recv(4096)
                self.heads.append(head.decode())
                connection.sendall(self.answers.pop(0))

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    made = ScriptedServer()
    yield made
    made.close()


@pytest.fixture
def ask(server: ScriptedServer) -> Callable[..., bytes]:
    def call(status: int, headers: dict[str, str], body: bytes, **sent: str) -> bytes:
        lines = [f"HTTP/1.1 {status} Status", *(f"{k}: {v}" for k, v in headers.items()), "Connection: close"]
        server.answers.append("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        parts = []
        with open_range(server.url, headers=sent, extent=EXTENT, total=100, timeout_s=5) as read:
            while part := read(7):
                parts.append(part)
        return b"".join(parts)

    return call


def test_the_asked_range_is_read_and_asked_for_without_compression(server, ask):
    assert ask(206, GOOD, DATA[10:30]) == DATA[10:30]
    assert "range: bytes=10-29" in server.heads[0].lower()
    assert "accept-encoding: identity" in server.heads[0].lower()


def test_a_server_that_ignores_range_is_an_error_even_when_the_length_would_fit(ask):
    with pytest.raises(WrongAnswerError, match="status 200: the server or a proxy ignored Range"):
        ask(200, {"Content-Length": "20"}, DATA[:20])


@pytest.mark.parametrize(
    "found",
    [
        *("bytes 9-28/100", "bytes 10-28/100", "bytes 10-30/100", "bytes 10-29/99", "bytes 10-29/*"),
        *("bytes */100", "", "items 10-29/100", "bytes 10-29/100, bytes 40-49/100"),
    ],
)
def test_another_content_range_is_an_error(ask, found):
    with pytest.raises(WrongAnswerError, match="Content-Range") as caught:
        ask(206, {**GOOD, "Content-Range": found}, DATA[10:30])
    assert caught.value.expected == "bytes 10-29/100"


@pytest.mark.parametrize(
    ("headers", "found"),
    [
        ({"Content-Length": "19"}, "Content-Length: 19"),
        ({"Content-Length": "200"}, "Content-Length: 200"),
        ({"Content-Encoding": "gzip"}, "an encoded body"),
    ],
)
def test_another_length_or_an_encoding_is_an_error(ask, headers, found):
    with pytest.raises(WrongAnswerError, match=found):
        ask(206, {**GOOD, **headers}, DATA[10:30])


def test_a_body_without_a_length_must_end_where_the_range_does(ask):
    headers = {"Content-Range": GOOD["Content-Range"], "Transfer-Encoding": "chunked"}
    assert ask(206, headers, b"14\r\n" + DATA[10:30] + b"\r\n0\r\n\r\n") == DATA[10:30]
    with pytest.raises(WrongAnswerError, match="more than 20 bytes"):
        ask(206, headers, b"15\r\n" + DATA[10:31] + b"\r\n0\r\n\r\n")


def test_a_body_that_ends_early_gives_what_came(ask):
    assert ask(206, GOOD, DATA[10:17]) == DATA[10:17]


def test_a_status_is_an_error_with_the_wait_it_asks_for(ask):
    with pytest.raises(StatusError) as caught:
        ask(429, {"Retry-After": "7", "Content-Length": "0"}, b"")
    assert (caught.value.status, caught.value.retry_after_s) == (429, 7.0)


def test_credentials_stay_behind_when_a_server_redirects(server, ask):
    other = ScriptedServer()
    good = "".join(f"{k}: {v}\r\n" for k, v in GOOD.items())
    other.answers.append(f"HTTP/1.1 206 Partial\r\n{good}Connection: close\r\n\r\n".encode() + DATA[10:30])
    found = ask(302, {"Location": other.url, "Content-Length": "0"}, b"", Authorization="Bearer hf_secret")
    other.close()
    assert found == DATA[10:30]
    assert "hf_secret" in server.heads[0]
    assert "hf_secret" not in other.heads[0]
    assert "range: bytes=10-29" in other.heads[0].lower()


def test_only_http_is_spoken(server, ask, tmp_path):
    (tmp_path / "secret").write_bytes(DATA)
    for url in ((tmp_path / "secret").as_uri(), "ftp://127.0.0.1/x", "data:,x"):
        with (
            pytest.raises(BROKEN),
            open_range(url, headers={}, extent=EXTENT, total=100, timeout_s=5) as read,
        ):
            read(1)
        with pytest.raises((*BROKEN, StatusError)):
            ask(302, {"Location": url, "Content-Length": "0"}, b"")


def test_origins_tell_schemes_hosts_and_ports_apart():
    assert origin_of("https://Hub.example/a") == origin_of("https://hub.example:443/b?x")
    assert len({origin_of(u) for u in ("http://h/a", "https://h/a", "http://h:81/a", "http://g/a")}) == 4


@pytest.mark.parametrize(
    ("text", "seconds"), [("12", 12.0), ("", None), ("soon", None), ("-3", None), ("1.5", None)]
)
def test_a_retry_after_is_seconds_or_nothing(text, seconds):
    assert retry_after_s({"Retry-After": text}) == seconds


def test_a_retry_after_may_be_a_date():
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    past = format_datetime(datetime.now(UTC) - timedelta(seconds=60), usegmt=True)
    found = retry_after_s({"Retry-After": soon})
    assert found is not None
    assert 50 < found <= 60
    assert retry_after_s({"Retry-After": past}) == 0
