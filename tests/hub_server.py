"""A hub on this machine: as much of the real one's HTTP API as `huggingface_hub` needs to list and fetch a model."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "c0ffee" + "0" * 34


@dataclass
class Repo:
    """What one repository holds, and how it misbehaves.

    Attributes:
        files: name -> content; `.safetensors`, `.bin` and `.pt` are large files, with a published SHA-256.
        sent: name -> content that is sent instead.
        sizes: name -> bytes that are said instead.
        gated: whether only somebody with a token gets the files.
    """

    files: dict[str, bytes]
    sent: dict[str, bytes] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    gated: bool = False


class Hub(ThreadingHTTPServer):
    """Serves `repos`; if `cut` is set, the next download of more bytes breaks off there, and all after it at once."""

    daemon_threads = True

    def __init__(self, repos: dict[str, Repo]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos, self.cut, self.ranges, self.fetched = repos, None, [], []
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        listed = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision/[^/]+|tree/[^/]+|auth-check))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        name = (listed or file).group(1) if listed or file else ""
        repo = self.server.repos.get(name)
        if repo is None:
            return self._answer(404, {"X-Error-Code": "RepoNotFound"})
        barred = repo.gated and "Authorization" not in self.headers
        if barred and (file or path.endswith("/auth-check")):
            return self._answer(403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "restricted"})
        if listed:
            content = _tree(repo) if (listed.group(2) or "").startswith("tree/") else _listing(name, repo)
            return self._answer(200, {"Content-Type": "application/json"}, json.dumps(content).encode())
        if file.group(3) not in repo.files:
            return self._answer(404, {"X-Error-Code": "EntryNotFound"})
        return self._file(repo, file.group(3))

    def _file(self, repo: Repo, name: str) -> None:
        content = repo.sent.get(name, repo.files[name])
        described = _described(name, repo)
        etag = described["lfs"]["sha256"] if "lfs" in described else described["blobId"]
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"', "X-Linked-Size": str(len(content))}
        headers |= {"X-Linked-Etag": f'"{etag}"', "Accept-Ranges": "bytes"}
        start = int(re.match(r"bytes=(\d+)", self.headers.get("Range", "bytes=0")).group(1))
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self.server.ranges.append(start)
        if self.command == "GET":
            self.server.fetched.append(name)
        self._answer(206 if start else 200, headers, content[start:])

    def _answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.server.cut is None or len(body) <= self.server.cut or self.path.startswith("/api/"):
            self.wfile.write(body)
        else:
            self.wfile.write(body[: self.server.cut])
            self.server.cut, self.close_connection = 0, True


def _described(name: str, repo: Repo) -> dict:
    content = repo.files[name]
    size = repo.sizes.get(name, len(content))
    row = {"rfilename": name, "size": size, "blobId": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()}
    if name.endswith((".safetensors", ".bin", ".pt")):
        row["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": size, "pointerSize": 134}
    return row


def _listing(name: str, repo: Repo) -> dict:
    siblings = [_described(file, repo) for file in repo.files]
    card = {"license": "apache-2.0"}
    listing = {"id": name, "modelId": name, "sha": COMMIT, "private": False, "tags": [], "downloads": 0, "likes": 0}
    return {**listing, "gated": repo.gated and "auto", "cardData": card, "siblings": siblings}


def _tree(repo: Repo) -> list[dict]:
    rows = []
    for row in (_described(file, repo) for file in repo.files):
        large = {"lfs": {"oid": row["lfs"]["sha256"], **row["lfs"]}} if "lfs" in row else {}
        rows.append({"type": "file", "path": row["rfilename"], "size": row["size"], "oid": row["blobId"], **large})
    return rows
