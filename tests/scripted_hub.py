"""A Hub on 127.0.0.1: repositories that a test writes, in commits, answered as huggingface_hub asks for them."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

# Files that the Hub keeps elsewhere, and answers with a redirection.
_LARGE = (".parquet", ".safetensors", ".bin")
_API = re.compile(
    r"/api/(models|datasets)/([^/]+(?:/[^/]+)?)(?:/(revision|tree|paths-info|preupload|commit)/([^/]+)(?:/(.*))?)?$"
)
_FILE = re.compile(r"/(datasets/)?([^/]+(?:/[^/]+)?)/resolve/([^/]+)/(.+)$")


@dataclass
class Repository:
    """Commits of one repository, the last of them main's; `refused` is the status that its files are answered with."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    main: str = ""
    refused: tuple[int, str] | None = None
    private: bool = False

    def at(self, revision: str) -> str | None:
        commit = self.main if revision == "main" else revision
        return commit if commit in self.commits else None


@dataclass
class Hub:
    """The address, the repositories by kind and name, and every request as "METHOD path"."""

    url: str
    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def commit(self, kind: str, name: str, files: Mapping[str, bytes]) -> str:
        """Make `files` the repository's new main ("models" or "datasets"); its commit hash."""
        repository = self.repositories.setdefault((kind, name), Repository())
        digest = hashlib.sha1(f"{kind} {name} {len(repository.commits)}".encode())
        for path in sorted(files):
            digest.update(path.encode() + files[path])
        repository.main = digest.hexdigest()
        repository.commits[repository.main] = dict(files)
        return repository.main

    def refuse(self, kind: str, name: str, status: int, code: str = "") -> None:
        """Answer requests for this repository's files with an error; 0 answers them again."""
        self.repositories[kind, name].refused = (status, code) if status else None


def asking(hub: Hub | str, home: Path, **more: str) -> dict[str, str]:
    """The environment of a process that has this Hub for its own, an empty home, and no token."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    url = hub if isinstance(hub, str) else hub.url
    own = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
    return {**kept, **own, **more}


@contextmanager
def scripted_hub() -> Iterator[Hub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.hub = hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 5

    def do_GET(self) -> None:
        self._hub.asked.append(f"{self.command} {self.path}")
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        path = unquote(urlsplit(self.path).path)
        if path == "/api/repos/create":
            self._create(json.loads(sent))
        elif path == "/api/validate-yaml":
            card = yaml.safe_load(json.loads(sent)["content"].split("---")[1])
            self._send_json({"errors": [] if isinstance(card, dict) else [{"message": "no card"}], "warnings": []})
        elif found := _API.fullmatch(path):
            kind, name, what, revision, inside = found.groups()
            self._answer_api(kind, name, what or "revision", revision or "main", inside or "", sent)
        elif found := _FILE.fullmatch(path):
            self._answer_file("datasets" if found[1] else "models", found[2], found[3], found[4])
        elif path.startswith("/large/"):
            contents = (
                c for r in self._hub.repositories.values() for files in r.commits.values() for c in files.values()
            )
            self._send(next(c for c in contents if _sha256(c) == path.removeprefix("/large/")))
        else:
            self._fail(404, "")

    do_HEAD = do_POST = do_GET

    @property
    def _hub(self) -> Hub:
        return self.server.hub  # type: ignore[attr-defined]

    def _answer_api(self, kind: str, name: str, what: str, revision: str, inside: str, sent: str) -> None:
        repository = self._hub.repositories.get((kind, name))
        if repository is None:
            return self._fail(401, "RepoNotFound")
        if repository.refused is not None and repository.refused[1] != "GatedRepo":
            return self._fail(*repository.refused)
        if (commit := repository.at(revision)) is None:
            return self._fail(404, "RevisionNotFound")
        files = repository.commits[commit]
        if what == "preupload":
            asked = json.loads(sent)["files"]
            return self._send_json({"files": [f | {"uploadMode": "regular", "shouldIgnore": False} for f in asked]})
        if what == "commit":
            return self._commit(kind, name, sent)
        if what == "revision":
            siblings = [{"rfilename": path} for path in files]
            return self._send_json(
                {"id": name, "sha": commit, "private": repository.private, "siblings": siblings, "tags": []}
            )
        if what == "tree":
            inner = [path for path in files if not inside or path.startswith(f"{inside}/")]
            recursive = "recursive=true" in urlsplit(self.path).query.lower()
            entries = _entries(inner, inside, files, recursive=recursive)
            return self._send_json(entries) if entries else self._fail(404, "EntryNotFound")
        asked = {unquote(part.partition("=")[2]) for part in sent.split("&") if part.startswith("paths=")}
        return self._send_json([e for e in _entries(list(files), "", files, recursive=True) if e["path"] in asked])

    def _create(self, asked: dict[str, object]) -> None:
        kind = "datasets" if asked.get("type") == "dataset" else "models"
        name = "/".join(str(asked[key]) for key in ("organization", "name") if asked.get(key))
        if (kind, name) in self._hub.repositories:
            return self._send_json({"url": f"{self._hub.url}/{kind}/{name}"}, status=409)
        self._hub.commit(kind, name, {".gitattributes": b""})
        private = asked.get("private") or asked.get("visibility") == "private"
        self._hub.repositories[kind, name].private = bool(private)
        self._send_json({"url": f"{self._hub.url}/{kind}/{name}"})

    def _commit(self, kind: str, name: str, sent: str) -> None:
        """Files in base64, one a line, as the client sends those that its preupload was told are regular."""
        repository = self._hub.repositories[kind, name]
        files = dict(repository.commits[repository.main])
        for line in map(json.loads, sent.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                del files[line["value"]["path"]]
        commit = self._hub.commit(kind, name, files)
        self._send_json({"commitUrl": f"{self._hub.url}/{kind}/{name}/commit/{commit}", "commitOid": commit})

    def _answer_file(self, kind: str, name: str, revision: str, path: str) -> None:
        repository = self._hub.repositories.get((kind, name))
        if repository is None:
            return self._fail(401, "RepoNotFound")
        if repository.refused is not None:
            return self._fail(*repository.refused)
        if (commit := repository.at(revision)) is None:
            return self._fail(404, "RevisionNotFound")
        if (content := repository.commits[commit].get(path)) is None:
            return self._fail(404, "EntryNotFound", {"X-Repo-Commit": commit})
        if not path.endswith(_LARGE):
            return self._send(content, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'})
        digest = _sha256(content)
        linked = {"X-Linked-ETag": f'"{digest}"', "X-Linked-Size": str(len(content))}
        elsewhere = self._hub.url.replace("127.0.0.1", "localhost")  # another host, as the real one's store is
        where = {"Location": f"{elsewhere}/large/{digest}", "X-Repo-Commit": commit}
        return self._send(b"", {**linked, **where}, status=302)

    def _send(self, content: bytes, headers: Mapping[str, str] = {}, *, status: int = 200) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted and status == 200:
            first, last = int(wanted[1]), min(int(wanted[2] or len(content) - 1), len(content) - 1)
            headers = {**headers, "Content-Range": f"bytes {first}-{last}/{len(content)}"}
            content, status = content[first : last + 1], 206
        self.send_response(status)
        for name, value in {"Accept-Ranges": "bytes", "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _send_json(self, value: object, *, status: int = 200) -> None:
        self._send(json.dumps(value).encode(), {"Content-Type": "application/json"}, status=status)

    def _fail(self, status: int, code: str, headers: Mapping[str, str] = {}) -> None:
        body = json.dumps({"error": code or "failed"}).encode()
        self._send(body, {"X-Error-Code": code, **headers} if code else dict(headers), status=status)

    def log_message(self, *_: object) -> None:
        pass


def _entries(paths: list[str], inside: str, files: Mapping[str, bytes], *, recursive: bool) -> list[dict[str, object]]:
    """Files and folders below `inside`, as the tree of a repository lists them."""
    found: dict[str, dict[str, object]] = {}
    start = len(inside) + 1 if inside else 0
    for path in paths:
        parts = path[start:].split("/")
        for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
            folder = path[:start] + "/".join(parts[:depth])
            found[folder] = {"type": "directory", "path": folder, "oid": _sha1(folder.encode()), "size": 0}
        if recursive or len(parts) == 1:
            found[path] = _file_entry(path, files[path])
    return list(found.values())


def _file_entry(path: str, content: bytes) -> dict[str, object]:
    entry = {"type": "file", "path": path, "oid": _sha1(content), "size": len(content)}
    if path.endswith(_LARGE):
        entry["lfs"] = {"oid": _sha256(content), "size": len(content), "pointerSize": 130}
    return entry


def _sha1(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
