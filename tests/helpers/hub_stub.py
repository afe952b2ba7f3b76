"""A hub on this machine: the endpoints that huggingface_hub asks to download, and to upload in one commit."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_stub"


class HubStub:
    """Repositories as dicts of files, and what was asked."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}  # repository -> path -> content
        self.objects: dict[str, bytes] = {}  # LFS: sha256 -> content
        self.requests: list[str] = []
        self.cut_after: int | None = None  # bytes of a download's body, after which the connection is closed
        self.lfs_bytes = 1 << 20  # larger files are uploaded as LFS objects
        self.url = ""

    @contextmanager
    def serving(self) -> Iterator[HubStub]:
        """Answer on a free port of the loopback interface."""
        stub = self

        class Handler(_Handler):
            hub = stub

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: HubStub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr."""

    def do_HEAD(self) -> None:
        self._download(body=False)

    def do_GET(self) -> None:
        parts = unquote(self.path).split("?")[0].strip("/").split("/")
        if parts == ["api", "whoami-v2"]:
            known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            self._json(*(({"name": "me", "type": "user"}, 200) if known else ({"error": "unknown token"}, 401)))
        elif parts[:2] == ["api", "models"]:
            repo = "/".join(parts[2:4])
            if repo not in self.hub.files:
                self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            elif "tree" in parts:
                entries = self.hub.files[repo].items()
                self._json([{"type": "file", "path": p, "size": len(c), "oid": _git_id(c)} for p, c in entries])
            else:
                files = [{"rfilename": path} for path in self.hub.files[repo]]
                self._json({"id": repo, "sha": COMMIT, "siblings": files, "private": False, "tags": [], "downloads": 0})
        else:
            self._download(body=True)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(self.path).strip("/")
        self.hub.requests.append(f"POST {path}")
        if path == "api/repos/create":
            data = json.loads(body)
            repo = f"{data.get('organization') or 'me'}/{data['name']}"
            self.hub.files.setdefault(repo, {})
            self._json({"url": f"{self.hub.url}/{repo}"})
        elif path == "api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            sizes = {f["path"]: f["size"] for f in json.loads(body)["files"]}
            modes = [
                {"path": path, "uploadMode": "lfs" if size > self.hub.lfs_bytes else "regular", "shouldIgnore": False}
                for path, size in sizes.items()
            ]
            self._json({"files": modes})
        elif path.endswith("info/lfs/objects/batch"):
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            self._json({"transfer": "basic", "objects": objects}, kind="application/vnd.git-lfs+json")
        elif "/commit/" in path:
            self._commit("/".join(path.split("/")[2:4]), body)
        else:
            self._json({"error": f"the stub has no {path}"}, 404)

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.objects[hashlib.sha256(content).hexdigest()] = content
        self._json({})

    def _commit(self, repo: str, body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.hub.files[repo][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.hub.files[repo][value["path"]] = self.hub.objects[value["oid"]]
        url = f"{self.hub.url}/{repo}/commit/{COMMIT}"
        self._json({"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""})

    def _download(self, *, body: bool) -> None:
        parts = [
            unquote(p) for p in self.path.split("?")[0].strip("/").split("/")
        ]  # owner, name, "resolve", revision, ..
        owner, name, path = parts[0], "".join(parts[1:2]), parts[4:]  # between them: "resolve", revision
        self.hub.requests.append(f"{self.command} {'/'.join(path)}")
        content = self.hub.files.get(f"{owner}/{name}", {}).get("/".join(path))
        if content is None:
            known = f"{owner}/{name}" in self.hub.files
            self._json({"error": "not found"}, 404, {"X-Error-Code": "EntryNotFound" if known else "RepoNotFound"})
            return
        start = 0
        if (asked := self.headers.get("Range", "")).startswith("bytes="):
            start = int(asked.removeprefix("bytes=").split("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{_git_id(content)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if body:
            end = len(content) if self.hub.cut_after is None else start + self.hub.cut_after
            self.wfile.write(content[start:end])
            self.close_connection = end < len(content)

    def _json(
        self, data: Any, status: int = 200, headers: dict[str, str] | None = None, kind: str = "application/json"
    ) -> None:
        text = json.dumps(data).encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(text)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text)


def _git_id(content: bytes) -> str:
    """Git's id of a blob."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
