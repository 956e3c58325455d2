"""A Hub on loopback that sends at a stated rate: two ports, signed addresses, ranges, connections that break.

    python benchmarks/shaped_hub.py FOLDER... --rate-mb 125 [--cuts 20 --seed 0]

Each FOLDER becomes the model `org/<its name>`. The rate is of all connections together. `--cuts` breaks that
many connections (RST) at random bytes, spread over all bytes of all folders. Prints its address;
`GET /stats` tells what it sent. Not a Hub for anything else: everybody may read, and hashes are made up.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PIECE_BYTES = 128 << 10


class Shape:
    """The one line all connections share, and where it breaks."""

    def __init__(self, rate_bytes: float, cuts: list[int]) -> None:
        self.rate, self.cuts = rate_bytes, sorted(cuts)
        self.sent_bytes, self.requests, self.broken = 0, 0, 0
        self.first_s, self.last_s = 0.0, 0.0
        self._free_s = 0.0
        self._lock = threading.Lock()

    def send(self, num_bytes: int) -> bool:
        """Wait until so many bytes may be sent; True when the line breaks behind them."""
        with self._lock:
            now = time.monotonic()
            start = max(now, self._free_s)
            until = self._free_s = start + num_bytes / self.rate
            self.first_s = self.first_s or now
            self.sent_bytes += num_bytes
            breaks = bool(self.cuts) and self.sent_bytes >= self.cuts[0]
            if breaks:
                self.cuts.pop(0)
                self.broken += 1
        time.sleep(max(until - now, 0))
        self.last_s = time.monotonic()
        return breaks


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    models: dict[str, Path]
    shape: Shape
    storage: str

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        pass

    def reply(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()


class _Hub(_Handler):
    def do_GET(self) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if parts == ["stats"]:
            shape = self.shape
            stats = {"sent_bytes": shape.sent_bytes, "requests": shape.requests, "broken": shape.broken}
            self.reply(200, json.dumps({**stats, "seconds": shape.last_s - shape.first_s}).encode())
        elif parts[:2] == ["api", "models"]:
            self._api("/".join(parts[2:4]), parts[4:])
        elif "/".join(parts[:2]) in self.models:
            self._resolve("/".join(parts[:2]), parts[-1])
        else:
            self.reply(404, b"")

    def _api(self, model: str, rest: list[str]) -> None:
        folder = self.models[model]
        if rest[:1] == ["tree"]:
            files = [self._listed(model, path) for path in sorted(folder.iterdir()) if path.is_file()]
            self.reply(200, json.dumps(files).encode(), Content_Type="application/json")
        else:
            info = {"id": model, "sha": COMMIT, "private": False, "tags": [], "siblings": []}
            self.reply(200, json.dumps(info).encode(), Content_Type="application/json")

    def _listed(self, model: str, path: Path) -> dict[str, Any]:
        size = path.stat().st_size
        entry = {"type": "file", "oid": "0" * 40, "size": size, "path": path.name}
        if path.suffix == ".safetensors":
            entry["lfs"] = {"oid": name_hash(model, path), "size": size, "pointerSize": 134}
        return entry

    def _resolve(self, model: str, name: str) -> None:
        path = self.models[model] / name
        if path.suffix != ".safetensors":
            self.reply(200, path.read_bytes(), X_Repo_Commit=COMMIT, ETag='"0"')
            return
        headers = {"X_Linked_Etag": f'"{name_hash(model, path)}"', "X_Linked_Size": str(path.stat().st_size)}
        place = f"{self.storage}/{model}/{name}?Signature=x"
        self.reply(302, b"", X_Repo_Commit=COMMIT, Location=place, **headers)


class _Storage(_Handler):
    def do_GET(self) -> None:
        org, model, name = unquote(urlsplit(self.path).path).strip("/").split("/")
        path = self.models[f"{org}/{model}"] / name
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "bytes=0-"))
        assert match is not None
        size = path.stat().st_size
        start, stop = int(match[1]), int(match[2] or size - 1) + 1
        self.shape.requests += 1
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        with path.open("rb") as file:
            while start < stop:
                count = min(PIECE_BYTES, stop - start)
                breaks = self.shape.send(count)
                self.connection.sendfile(file, start, count)
                start += count
                if breaks:
                    # A zero linger time makes close() send RST instead of FIN.
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.close_connection = True
                    return


def name_hash(model: str, path: Path) -> str:
    return hashlib.sha256(f"{model}/{path.name}/{path.stat().st_size}".encode()).hexdigest()


def serve(handler: type[_Handler], **shared: Any) -> str:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type(handler.__name__, (handler,), shared))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://{{}}:{server.server_address[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--rate-mb", type=float, required=True)
    parser.add_argument("--cuts", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    models = {f"org/{folder.name}": folder for folder in options.folders}
    total = sum(p.stat().st_size for folder in models.values() for p in folder.glob("*.safetensors"))
    cuts = random.Random(options.seed).sample(range(total), options.cuts)
    shape = Shape(options.rate_mb * 1e6, cuts)
    # Another host name, not only another port: credentials must not go there.
    storage = serve(_Storage, models=models, shape=shape).format("localhost")
    print(serve(_Hub, models=models, shape=shape, storage=storage).format("127.0.0.1"), flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
