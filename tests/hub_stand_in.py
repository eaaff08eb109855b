"""A stand-in for the Hugging Face hub on this machine: the HTTP interface that huggingface_hub really calls.

The client is the real one; only its HF_ENDPOINT points here. What the stand-in answers follows the client's source:
repo info, tree, resolve with its ETag, X-Repo-Commit and redirects for large files, whoami, create, pre-upload, LFS and
commit. Xet is not spoken (HF_HUB_DISABLE_XET=1).
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import quote, unquote, urlsplit

LARGE = (".safetensors", ".parquet")
"""Suffixes of files that the stand-in keeps as large ones, behind a redirect and named by their sha256."""


@dataclass
class StandInRepository:
    """Commits as files by path, and where branches stand."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False

    def commit(self, files: Mapping[str, bytes], branch: str = "main") -> str:
        """Let a branch stand at new files; returns the commit."""
        content = json.dumps([len(self.commits), branch, sorted(files)])
        name = hashlib.sha1(content.encode()).hexdigest()
        self.commits[name] = dict(files)
        self.branches[branch] = name
        return name

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)


class StandInHub:
    """The hub's state, what it does wrong on purpose, and what was asked of it."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], StandInRepository] = {}
        self.accounts: dict[str, dict[str, Any]] = {}
        """Answer of whoami by token."""
        self.down = 0
        """Status that every request gets; 0 answers properly."""
        self.fails: dict[str, list[int]] = {}
        """Statuses that the next requests get, by a part of their paths."""
        self.silent = ""
        """A part of the paths that get no answer until the hub is closed."""
        self.closed = threading.Event()
        self.spoilt: set[str] = set()
        """Paths whose content is sent with other bytes of the same number."""
        self.cut: set[str] = set()
        """Paths whose content ends early."""
        self.refuses_commits = False
        self.requests: list[str] = []
        self.uploads: dict[str, bytes] = {}
        self.created: list[dict[str, Any]] = []
        self.endpoint = ""

    def repository(self, name: str, kind: str = "model") -> StandInRepository:
        return self.repositories.setdefault((kind, name), StandInRepository())

    def downloads(self) -> list[str]:
        """Contents that were fetched."""
        return [
            line
            for line in self.requests
            if line.startswith("GET") and any(part in line for part in ("/resolve/", "/resolve-cache/", "/cdn/"))
        ]


@contextmanager
def serve(hub: StandInHub) -> Iterator[StandInHub]:
    """Answer for a hub until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.closed.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: StandInHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._answer()

    do_GET = do_HEAD  # noqa: N815
    do_POST = do_HEAD  # noqa: N815
    do_PUT = do_HEAD  # noqa: N815

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(f"{self.command} {path}")
        if self.hub.silent and self.hub.silent in path:
            self.hub.closed.wait()
            self.close_connection = True
            return
        failing = next((left for part, left in self.hub.fails.items() if left and part in path), None)
        if failing is not None:
            self._send(failing.pop(0), b"not now")
        elif self.hub.down:
            self._send(self.hub.down, b"down")
        elif path == "/api/whoami-v2":
            account = self.hub.accounts.get(self._token())
            self._json(account) if account else self._error(401, "", "Invalid credentials in Authorization header")
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path.startswith("/cdn/"):
            self._large(path.removeprefix("/cdn/"))
        elif path.startswith("/lfs/"):
            self.hub.uploads[path.removeprefix("/lfs/")] = body
            self._send(200, b"")
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._batch(json.loads(body))
        elif path.startswith("/api/resolve-cache/"):
            kind, owner, name, rest = path.removeprefix("/api/resolve-cache/").split("/", 3)
            self._resolve(f"/{'datasets/' * (kind == 'datasets')}{owner}/{name}/resolve/{rest}", is_cache=True)
        elif path.startswith("/api/"):
            self._api(path, body)
        else:
            self._resolve(path)

    def _api(self, path: str, body: bytes) -> None:
        kind, owner, name, *rest = (*path.removeprefix("/api/").split("/"), "", "")
        rest = [part for part in rest if part]
        repository = self._readable(kind.removesuffix("s"), f"{owner}/{name}")
        if repository is None:
            return
        if rest[:1] == ["preupload"]:
            files = json.loads(body)["files"]
            self._json(
                {
                    "files": [
                        {
                            "path": file["path"],
                            "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                            "shouldIgnore": False,
                        }
                        for file in files
                    ]
                }
            )
        elif rest[:1] == ["commit"]:
            self._commit(repository, f"{owner}/{name}", body)
        elif rest[:1] in ([], ["revision"]):
            if commit := self._commit_of(repository, "/".join(rest[1:]) or "main"):
                siblings = [{"rfilename": file} for file in repository.commits[commit]]
                of = {"id": f"{owner}/{name}", "private": repository.private, "tags": []}
                self._json({**of, "sha": commit, "siblings": siblings})
        elif rest[:1] == ["tree"]:
            if commit := self._commit_of(repository, "/".join(rest[1:])):
                self._json([_entry(*item) for item in repository.commits[commit].items()])
        else:
            self._error(404, "", "no such endpoint")

    def _resolve(self, path: str, is_cache: bool = False) -> None:
        kind = "dataset" if path.startswith("/datasets/") else "model"
        name, _, rest = path.removeprefix("/datasets").strip("/").partition("/resolve/")
        repository = self._readable(kind, name)
        if repository is None:
            return
        known = [*repository.branches, *repository.commits]
        revision = next((one for one in known if rest.startswith(f"{one}/")), rest.split("/")[0])
        commit = self._commit_of(repository, revision)
        if commit is None:
            return
        file = rest[len(revision) + 1 :]
        content = repository.commits[commit].get(file)
        if content is None:
            self._error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        elif file.endswith(LARGE):
            entry = _entry(file, content)["lfs"]
            headers = {
                "X-Repo-Commit": commit,
                "X-Linked-Etag": f'"{entry["oid"]}"',
                "X-Linked-Size": str(len(content)),
            }
            # Another host, as the real one's: the client follows redirects within the hub itself.
            elsewhere = self.hub.endpoint.replace("127.0.0.1", "localhost")
            self._send(302, b"", {**headers, "Location": f"{elsewhere}/cdn/{entry['oid']}"})
        elif content and not (is_cache or repository.private):
            # The real one serves small files of public repositories from a place that names the commit.
            place = f"/api/resolve-cache/{kind}s/{name}/{commit}/{quote(file)}"
            self._send(307, b"", {"X-Repo-Commit": commit, "Location": place})
        else:
            headers = {"X-Repo-Commit": commit, "ETag": f'"{_entry(file, content)["oid"]}"'}
            self._content(file, content, headers)

    def _large(self, oid: str) -> None:
        for repository in self.hub.repositories.values():
            for files in repository.commits.values():
                for file, content in files.items():
                    if file.endswith(LARGE) and hashlib.sha256(content).hexdigest() == oid:
                        self._content(file, content, {"ETag": f'"{oid}"'})
                        return
        self._error(404, "", "not found")

    def _content(self, file: str, content: bytes, headers: dict[str, str]) -> None:
        if file in self.hub.spoilt:
            content = content[:-1] + bytes([content[-1] ^ 1])
        if file in self.hub.cut and self.command == "GET":
            content = content[: len(content) // 2]
        self._send(200, content, headers)

    def _create(self, request: dict[str, Any]) -> None:
        name = f"{request.get('organization') or self.hub.accounts[self._token()]['name']}/{request['name']}"
        self.hub.created.append(request)
        if ("model", name) not in self.hub.repositories:
            self.hub.repository(name).private = request.get("visibility") == "private"
        self._json({"url": f"{self.hub.endpoint}/{name}", "id": name})

    def _batch(self, request: dict[str, Any]) -> None:
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.hub.endpoint}/lfs/{one['oid']}"}}}
            for one in request["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def _commit(self, repository: StandInRepository, name: str, body: bytes) -> None:
        if self.hub.refuses_commits:
            self._error(500, "", "the disk of the hub is full")
            return
        files: dict[str, bytes] = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.uploads[value["oid"]]
        commit = repository.commit(files)
        self._json({"commitUrl": f"{self.hub.endpoint}/{name}/commit/{commit}", "commitOid": commit, "success": True})

    def _readable(self, kind: str, name: str) -> StandInRepository | None:
        repository = self.hub.repositories.get((kind, name))
        is_known = self._token() in self.hub.accounts
        if repository is None or (repository.private and not is_known):
            # As the real one: without a token it does not say whether there is none.
            self._error(404 if is_known else 401, "RepoNotFound", "Repository not found")
            return None
        if repository.gated:
            self._error(403 if is_known else 401, "GatedRepo", "Access to this repository is restricted")
            return None
        return repository

    def _commit_of(self, repository: StandInRepository, revision: str) -> str | None:
        commit = repository.resolve(revision)
        if commit is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def _token(self) -> str:
        return str(self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def _error(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        more = {"X-Error-Code": code} if code else {}
        self._send(status, b"", {**more, "X-Error-Message": message, **(headers or {})})

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _entry(path: str, content: bytes) -> dict[str, Any]:
    """A file as the tree lists it."""
    oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": oid}
    if path.endswith(LARGE):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return entry
