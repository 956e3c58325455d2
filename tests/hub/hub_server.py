"""A small Hub on loopback, for tests: model info, tree, resolve with redirects to a storage host, and faults.

Speaks what the Hub library asks for models (https://huggingface.co/docs/hub/api): large files are answered
with a redirect to a second port, which stands for the storage host that must never see a token.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import parse_qs, quote, unquote, urlsplit

LARGE = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx")


@dataclass
class Repo:
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    token: str | None = None
    gated: bool = False
    id: str = ""

    def commit_of(self, revision: str) -> str | None:
        commit = self.branches.get(revision, revision)
        return commit if commit in self.commits else None


@dataclass
class Fault:
    """Something that goes wrong with requests whose `METHOD path` matches `pattern`, `times` times."""

    pattern: str
    times: int = 10**9
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    cut_after: int | None = None
    how: Literal["close", "reset"] = "close"


@dataclass(frozen=True)
class Request:
    host: Literal["hub", "storage"]
    method: str
    path: str
    headers: Mapping[str, str]


class HubServer:
    """Two threaded HTTP servers on 127.0.0.1; every request is recorded."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.listed_sizes: dict[str, int] = {}
        self.on_request: Any = None
        self.blobs: dict[str, bytes] = {}
        self.ignores_range = False
        self.serves_files = False
        self.cuts: list[int] = []
        self.num_cuts = 0
        self.sent_bytes = 0
        self.expired: set[str] = set()
        self.signed: list[str] = []
        self._lock = threading.Lock()
        self._servers = [_serve(self, _HubHandler), _serve(self, _StorageHandler)]
        # Another host name, not only another port: some versions of the library compare names alone.
        hosts = ("127.0.0.1", "localhost")
        self.url, self.storage_url = (
            f"http://{host}:{server.server_address[1]}"
            for host, server in zip(hosts, self._servers, strict=True)
        )

    def close(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def add(
        self,
        repo_id: str,
        files: Mapping[str, bytes],
        *,
        branch: str = "main",
        token: str | None = None,
        gated: bool = False,
    ) -> str:
        """Commit `files` on `branch` and return the commit."""
        repo = self.repos.setdefault(repo_id, Repo(token=token, gated=gated, id=repo_id))
        text = repr((repo_id, branch, len(repo.commits), sorted(files)))
        commit = hashlib.sha1(text.encode()).hexdigest()
        repo.commits[commit] = dict(files)
        repo.branches[branch] = commit
        for data in files.values():
            self.blobs[hashlib.sha256(data).hexdigest()] = data
        return commit

    def count_sent(self, num_bytes: int) -> None:
        with self._lock:
            self.sent_bytes += num_bytes

    def path_of(self, data: bytes) -> str:
        """What the storage path of a content begins with."""
        return hashlib.sha256(data).hexdigest()

    def take_cut(self) -> int:
        """After how many bytes the next ranged answer breaks off."""
        with self._lock:
            self.num_cuts += 1
            return self.cuts.pop(0) if self.cuts else 10**12

    def sign(self) -> str:
        """A new signature; it is good until it is put into `expired`."""
        with self._lock:
            self.signed.append(f"secret-signature-{len(self.signed)}")
            return self.signed[-1]

    def fail(self, pattern: str, **fault: Any) -> Fault:
        self.faults.append(Fault(pattern, **fault))
        return self.faults[-1]

    def asked(self, pattern: str) -> list[str]:
        """`METHOD path` of the recorded requests that match."""
        lines = [f"{r.method} {r.path}" for r in self.requests]
        return [line for line in lines if re.search(pattern, line)]

    def take_fault(self, line: str) -> Fault | None:
        with self._lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, line):
                    fault.times -= 1
                    return fault
        return None


def _serve(hub: HubServer, handler: type[_Handler]) -> ThreadingHTTPServer:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type(handler.__name__, (handler,), {"hub": hub}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    return server


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    host: Literal["hub", "storage"]
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        pass

    def do_HEAD(self) -> None:
        self._handle()

    def do_GET(self) -> None:
        self._handle()

    def _handle(self) -> None:
        request = Request(self.host, self.command, self.path, dict(self.headers.items()))
        self.hub.requests.append(request)
        if self.hub.on_request is not None:
            self.hub.on_request(request)
        self._fault = self.hub.take_fault(f"{self.command} {self.path}")
        if self._fault is not None and self._fault.status is not None:
            self.send(self._fault.status, self._fault.body, self._fault.headers)
        else:
            self.answer()

    def answer(self) -> None:
        raise NotImplementedError

    def send(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self._fault.cut_after if self._fault is not None else None
        if self.host == "storage":
            self.hub.count_sent(len(body[:cut]))
        if cut is None:
            self.wfile.write(body)
            return
        self.wfile.write(body[:cut])
        self.wfile.flush()
        if self._fault is not None and self._fault.how == "reset":
            # A zero linger time makes close() send RST instead of FIN.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        else:
            self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def send_json(self, value: Any, **headers: str) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json", **headers})

    def refuse(self, status: int, code: str, message: str) -> None:
        self.send(status, b"", {"X-Error-Code": code, "X-Error-Message": message})


class _HubHandler(_Handler):
    host = "hub"

    def answer(self) -> None:
        url = urlsplit(self.path)
        segments = [unquote(s) for s in url.path.strip("/").split("/")]
        if segments[:2] == ["api", "models"] and len(segments) >= 4:
            self._api("/".join(segments[2:4]), segments[4:], parse_qs(url.query))
        elif len(segments) >= 5 and segments[2] == "resolve":
            self._resolve("/".join(segments[:2]), segments[3], "/".join(segments[4:]))
        else:
            self.send(404, b"")

    def _repo(self, repo_id: str) -> Repo | None:
        repo = self.hub.repos.get(repo_id)
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if repo is None or (repo.token and not repo.gated and given != repo.token):
            # Without a token the Hub does not tell a missing model from a private one.
            self.refuse(401 if not given else 404, "RepoNotFound", "Repository not found")
            return None
        return repo

    def _is_gated(self, repo: Repo) -> bool:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if repo.gated and given != repo.token:
            self.refuse(403 if given else 401, "GatedRepo", f"Access to model is restricted for {given}")
            return True
        return False

    def _api(self, repo_id: str, rest: list[str], query: Mapping[str, list[str]]) -> None:
        repo = self._repo(repo_id)
        if repo is None:
            return
        revision = rest[1] if len(rest) > 1 else "main"
        commit = repo.commit_of(revision)
        if commit is None:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif rest[:1] in ([], ["revision"]):
            siblings = [{"rfilename": path} for path in sorted(repo.commits[commit])]
            private = repo.token is not None and not repo.gated
            self.send_json(
                {"id": repo.id, "sha": commit, "private": private, "tags": [], "siblings": siblings}
            )
        elif rest[0] == "tree":
            self._tree(repo.commits[commit], "/".join(rest[2:]), recursive="recursive" in query)
        else:
            self.send(404, b"")

    def _tree(self, files: Mapping[str, bytes], folder: str, *, recursive: bool) -> None:
        prefix = f"{folder}/" if folder else ""
        below = [path for path in files if path.startswith(prefix)]
        if not below:
            self.refuse(404, "EntryNotFound", f"{folder} does not exist")
            return
        entries = [self._file_entry(path, files[path]) for path in below if "/" not in path[len(prefix) :]]
        folders = {path[len(prefix) :].split("/")[0] for path in below if "/" in path[len(prefix) :]}
        entries += [{"type": "directory", "oid": "0" * 40, "size": 0, "path": prefix + f} for f in folders]
        self.send_json(entries)

    def _file_entry(self, path: str, data: bytes) -> dict[str, Any]:
        size = self.hub.listed_sizes.get(path, len(data))
        entry: dict[str, Any] = {"type": "file", "oid": _oid(data), "size": size, "path": path}
        if path.endswith(LARGE):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": size, "pointerSize": 134}
        return entry

    def _resolve(self, repo_id: str, revision: str, path: str) -> None:
        repo = self._repo(repo_id)
        if repo is None or self._is_gated(repo):
            return
        commit = repo.commit_of(revision)
        if commit is None:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        data = repo.commits[commit].get(path)
        if data is None:
            self.refuse(404, "EntryNotFound", "Entry not found")
        elif path.endswith(LARGE) and self.hub.serves_files:
            headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
            match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if match is None:
                self.send(200, data, headers)
                return
            body = data[int(match[1]) : int(match[2]) + 1]
            headers["Content-Range"] = f"bytes {match[1]}-{match[2]}/{len(data)}"
            self.send(206, body, headers)
        elif path.endswith(LARGE):
            sha256 = hashlib.sha256(data).hexdigest()
            headers = {
                "X-Repo-Commit": commit,
                "X-Linked-Etag": f'"{sha256}"',
                "X-Linked-Size": str(len(data)),
                "ETag": f'"{_oid(data)}"',
                "Location": f"{self.hub.storage_url}/{sha256}/{quote(path)}?Signature={self.hub.sign()}",
            }
            self.send(302, b"", headers)
        else:
            self.send(200, data, {"X-Repo-Commit": commit, "ETag": f'"{_oid(data)}"'})


class _StorageHandler(_Handler):
    host = "storage"

    def answer(self) -> None:
        if self._fault is None and self.hub.cuts and "Range" in self.headers:
            self._fault = Fault("", cut_after=self.hub.take_cut())
        data = self.hub.blobs.get(self.path.split("/")[1])
        if data is None or "Authorization" in self.headers:
            self.send(403, b"")
            return
        signed = parse_qs(urlsplit(self.path).query).get("Signature", [""])[0]
        if signed in self.hub.expired:
            self.send(403, b"<Error><Code>AccessDenied</Code></Error>")
            return
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match is None or self.hub.ignores_range:
            self.send(200, data, {"Accept-Ranges": "bytes"})
            return
        start, last = int(match[1]), int(match[2] or len(data) - 1)
        body = data[start : last + 1]
        self.send(206, body, {"Content-Range": f"bytes {start}-{start + len(body) - 1}/{len(data)}"})


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def safetensors_bytes(tensors: Mapping[str, Iterable[float]]) -> bytes:
    """A safetensors file of 1-d fp32 tensors."""
    header: dict[str, Any] = {}
    data = b""
    for name, values in tensors.items():
        packed = b"".join(struct.pack("<f", value) for value in values)
        offsets = [len(data), len(data) + len(packed)]
        header[name] = {"dtype": "F32", "shape": [len(packed) // 4], "data_offsets": offsets}
        data += packed
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def sharded_files(shards: int = 2) -> dict[str, bytes]:
    """config.json, an index and `shards` shards of one tensor each."""
    names = [f"model-{i:05}-of-{shards:05}.safetensors" for i in range(1, shards + 1)]
    files = {name: safetensors_bytes({f"layer.{i}": [float(i)] * 100}) for i, name in enumerate(names)}
    weight_map = {f"layer.{i}": name for i, name in enumerate(names)}
    files["model.safetensors.index.json"] = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    files["config.json"] = b'{"model_type": "tiny"}'
    return files
