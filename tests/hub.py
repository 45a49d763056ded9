"""A stand-in for the Hub's HTTP interface, as far as an upload needs it; keeps what arrives, and fails when told to."""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_secret_of_the_test"
PART = 1000
"""Bytes of a part, of blobs that go in parts."""
Fault = int | str | tuple[int, dict[str, str]]
"""A status (with headers); `cut`: the connection ends in the middle of the request; `lost`: it ends when all is done,
before the answer; `hang`: nothing is done and no answer comes."""


@dataclass
class Repo:
    """A repository: its files now, and how many commits there were after the first, which the Hub makes itself."""

    private: bool = False
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b"*.safetensors filter=lfs\n"})
    commits: int = 0

    @property
    def head(self) -> str:
        return f"{self.commits + 1:040x}"


@dataclass
class Hub:
    """What the server has. faults: by endpoint, those of its next requests; in_parts: blobs go up in parts; outwaited:
    someone waited on for an answer that does not come."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    parts: dict[tuple[str, int], bytes] = field(default_factory=dict)
    arrived: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    faults: dict[str, Iterator[Fault]] = field(default_factory=dict)
    in_parts: bool = False
    outwaited: bool = False
    over: threading.Event = field(default_factory=threading.Event)

    def fail(self, endpoint: str, faults: Iterable[Fault]) -> None:
        self.faults[endpoint] = iter(faults)

    @property
    def commits(self) -> int:
        return sum(repo.commits for repo in self.repos.values())


def endpoint_of(method: str, path: str) -> str:
    """The name of an endpoint: that of a fault."""
    first = path.strip("/").split("/")[0]
    if first in ("blob", "part", "complete", "verify"):
        return first
    names = ("whoami", "validate-yaml", "repos/create", "preupload", "objects/batch", "/commit/", "/resolve/")
    found = next((name.strip("/").rpartition("/")[2] for name in names if name in path), None)
    return found or ("info" if method == "GET" and path.startswith("/api/models/") else path)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _cut(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _serve(self) -> None:
        path = self.path.partition("?")[0]
        endpoint = endpoint_of(self.command, path)
        self.hub.asked.append(endpoint)
        fault = next(self.hub.faults.get(endpoint, iter(())), None)
        if fault == "cut":
            self.rfile.read(min(500, int(self.headers.get("Content-Length") or 0)))
            self._cut()
            return
        if fault == "hang":
            self.hub.outwaited = not self.hub.over.wait(20)
            self._cut()
            return
        body = self._body()
        if isinstance(fault, int | tuple):
            status, headers = fault if isinstance(fault, tuple) else (fault, {})
            self._send(status, {"error": f"no, {self.headers.get('Authorization')}"}, headers)
            return
        signed = endpoint in ("blob", "part", "complete")  # addresses that carry their own right
        if not signed and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._send(401, {"error": "Invalid credentials"}, {})
            return
        answer = self._answer(endpoint, path, body)
        if fault == "lost":
            self._cut()
            return
        self._send(*answer)

    do_GET = do_PUT = do_POST = _serve

    def _send(self, status: int, content: Any, headers: dict[str, str]) -> None:
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(raw)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(raw)

    def _answer(self, endpoint: str, path: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        hub = self.hub
        if endpoint == "whoami":
            return 200, {"name": "tester", "type": "user"}, {}
        if endpoint == "validate-yaml":
            return 200, {"errors": [], "warnings": []}, {}
        if endpoint == "create":
            wanted = json.loads(body)
            name = f"{wanted.get('organization') or 'tester'}/{wanted['name']}"
            new = name not in hub.repos
            private = bool(wanted.get("private") or wanted.get("visibility") == "private")
            hub.repos.setdefault(name, Repo(private))
            return 200 if new else 409, {"url": f"{hub.url}/{name}", "name": name}, {}
        if endpoint in ("blob", "part", "complete", "verify"):
            return self._blob(endpoint, path, body)
        parts = path.removesuffix(".git/info/lfs/objects/batch").removeprefix("/api/models").strip("/").split("/")
        repo = hub.repos.get("/".join(parts[:2]))
        if repo is None:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        if endpoint == "info":
            siblings = list(map(_sibling, repo.files.items()))
            about = {"id": "/".join(parts[:2]), "sha": repo.head, "private": repo.private}
            return 200, {**about, "siblings": siblings}, {}
        if endpoint == "resolve":
            return 200, repo.files["/".join(parts[4:])], {}
        if endpoint == "preupload":
            return 200, {"files": [self._mode(repo, file["path"]) for file in json.loads(body)["files"]]}, {}
        if endpoint == "batch":
            return 200, {"transfer": "basic", "objects": list(map(self._where, json.loads(body)["objects"]))}, {}
        assert endpoint == "commit", path
        return self._commit(repo, [json.loads(line) for line in body.splitlines()])

    def _blob(self, endpoint: str, path: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        hub, (oid, *number) = self.hub, path.strip("/").split("/")[1:]
        if endpoint == "blob":
            assert hashlib.sha256(body).hexdigest() == oid
            hub.blobs[oid] = body
            hub.arrived.append(oid)
        elif endpoint == "part":
            hub.parts[oid, int(number[0])] = body
            return 200, {}, {"ETag": hashlib.md5(body).hexdigest()}
        elif endpoint == "complete":
            sent = json.loads(body)["parts"]
            content = b"".join(hub.parts[oid, part["partNumber"]] for part in sent)
            assert [part["etag"] for part in sent] == [
                hashlib.md5(hub.parts[oid, part["partNumber"]]).hexdigest() for part in sent
            ]
            assert hashlib.sha256(content).hexdigest() == oid
            hub.blobs[oid] = content
            hub.arrived.append(oid)
        else:
            return 200 if len(hub.blobs[oid]) == json.loads(body)["size"] else 422, {}, {}
        return 200, {}, {}

    def _mode(self, repo: Repo, path: str) -> dict[str, Any]:
        large = path.endswith("safetensors")
        found = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        if path in repo.files:
            sibling = _sibling((path, repo.files[path]))
            found["oid"] = sibling["lfs"]["sha256"] if large else sibling["blobId"]
        return found

    def _where(self, wanted: dict[str, Any]) -> dict[str, Any]:
        oid, size, hub = wanted["oid"], wanted["size"], self.hub
        if oid in hub.blobs:
            return wanted
        upload: dict[str, Any] = {"href": f"{hub.url}/blob/{oid}?signature=secret"}
        if hub.in_parts:
            numbers = range(1, -(-size // PART) + 1)
            urls = {str(number): f"{hub.url}/part/{oid}/{number}?signature=secret" for number in numbers}
            upload = {"href": f"{hub.url}/complete/{oid}", "header": {"chunk_size": str(PART), **urls}}
        return {**wanted, "actions": {"upload": upload, "verify": {"href": f"{hub.url}/verify/{oid}"}}}

    def _commit(self, repo: Repo, entries: list[dict[str, Any]]) -> tuple[int, Any, dict[str, str]]:
        """All of it or nothing, on top of the commit that the client has seen."""
        files = dict(repo.files)
        for entry in entries:
            value = entry["value"]
            if entry["key"] == "header" and value.get("parentCommit") not in (None, repo.head):
                return 412, {"error": "the branch has moved"}, {}
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        repo.files, repo.commits = files, repo.commits + 1
        return (
            200,
            {
                "commitUrl": f"{self.hub.url}/any/repo/commit/{repo.head}",
                "commitOid": repo.head,
                "pullRequestUrl": None,
            },
            {},
        )


def _sibling(file: tuple[str, bytes]) -> dict[str, Any]:
    path, content = file
    oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    found: dict[str, Any] = {"rfilename": path, "size": len(content), "blobId": oid}
    if path.endswith("safetensors"):
        found["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return found


@contextmanager
def serve() -> Iterator[Hub]:
    """A hub on a free port of this machine."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield hub
    finally:
        hub.over.set()
        server.shutdown()
        server.server_close()
