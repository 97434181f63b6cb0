"""A Hub on the loopback interface: the endpoints that the real client speaks for upload and download, and faults on demand."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


@dataclass
class Fault:
    """Answers the next `times` requests whose `METHOD path` matches with a status, or with a closed connection (`drop`)."""

    pattern: str
    status: int | str
    times: int = 1
    echo_token: bool = False  # as a careless server does: the Authorization header in its message


@dataclass
class Repo:
    private: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, ref: str, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(f"{len(self.commits)}{ref}{sorted(files)}".encode()).hexdigest()
        self.commits[sha], self.refs[ref] = files, sha
        return sha

    def files(self, ref: str) -> dict[str, bytes]:
        return self.commits[self.refs.get(ref, ref)]


class Hub:
    """`with Hub() as hub:` runs it; `hub.url` is for HF_ENDPOINT."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.collections: dict[str, list[str]] = {}
        self.blobs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.tokens: set[str] = set()

    def add(self, repo: str, files: dict[str, bytes]) -> str:
        return self.repos.setdefault(repo, Repo()).commit("main", files)

    def __enter__(self) -> Hub:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: ClassVar[Hub]
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def _answer(self) -> None:
        url = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(url.query).items()}
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = self._chunks()
        asked = f"{self.command} {unquote(url.path)}"
        self.hub.requests.append(asked)
        self.hub.tokens.add(self.headers.get("Authorization", ""))
        for fault in self.hub.faults:
            if fault.times and re.search(fault.pattern, asked):
                fault.times -= 1
                return self._fail(fault)
        for pattern, action in _ROUTES:
            match = re.fullmatch(pattern, asked)
            if match:
                return action(self, *match.groups())
        return self._json({"error": f"no such endpoint: {asked}"}, 404)

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _fail(self, fault: Fault) -> None:
        if fault.status == "drop":
            self.close_connection = True
            self.connection.shutdown(2)
            return
        message = f"sorry: {self.headers.get('Authorization')}" if fault.echo_token else "sorry"
        self._json({"error": message}, int(fault.status))

    def _json(self, value: Any, status: int = 200) -> None:
        self._bytes(json.dumps(value).encode(), {"Content-Type": "application/json"}, status)

    def _bytes(self, content: bytes, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound" if "/resolve/" in self.path else "RepoNotFound")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _whoami(self) -> None:
        self._json({"name": "tester", "type": "user"} if self.headers.get("Authorization") else {}, 200)

    def _create(self) -> None:
        wanted = json.loads(self.body)
        name = f"{wanted['organization']}/{wanted['name']}" if wanted.get("organization") else f"tester/{wanted['name']}"
        url = {"url": f"{self.hub.url}/{name}"}
        if name in self.hub.repos:
            return self._json({"error": "exists", **url}, 409)
        self.hub.repos[name] = Repo(private=bool(wanted.get("private") or wanted.get("visibility") == "private"))
        self.hub.repos[name].commit("main", {})
        return self._json(url)

    def _validate_yaml(self) -> None:
        metadata = yaml.safe_load(json.loads(self.body)["content"].split("---\n")[1])
        errors = [] if isinstance(metadata, dict) else [{"message": "no metadata"}]
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def _branch(self, repo: str, branch: str) -> None:
        refs = self.hub.repos[repo].refs
        if branch in refs:
            return self._json({"error": "exists"}, 409)
        refs[branch] = refs["main"]
        return self._json({})

    def _preupload(self, repo: str, ref: str) -> None:
        present = self.hub.repos[repo].files(ref)
        rows = []
        for file in json.loads(self.body)["files"]:
            lfs = file["path"].endswith(".safetensors")
            content = present.get(file["path"])
            oid = None if content is None else hashlib.sha256(content).hexdigest() if lfs else _git_oid(content)
            rows.append({"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid})
        self._json({"files": rows})

    def _lfs_batch(self, repo: str) -> None:
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            actions = {
                "upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}", "header": {}},
                "verify": {"href": f"{self.hub.url}/lfs-verify", "header": {}},
            }
            objects.append({**wanted} if wanted["oid"] in self.hub.blobs else {**wanted, "actions": actions})
        self._json({"transfer": "basic", "objects": objects})

    def _lfs_put(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.hub.blobs[oid] = self.body
        self._json({})

    def _lfs_verify(self) -> None:
        wanted = json.loads(self.body)
        found = len(self.hub.blobs.get(wanted["oid"], b"")) == wanted["size"]
        self._json({}, 200 if found else 404)

    def _commit(self, repo: str, ref: str) -> None:
        held = self.hub.repos[repo]
        files = dict(held.files(ref))
        for line in self.body.decode().splitlines():
            item = json.loads(line)
            if item["key"] == "file":
                files[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
            elif item["key"] == "lfsFile":
                files[item["value"]["path"]] = self.hub.blobs[item["value"]["oid"]]
        wanted_pr = "create_pr" in self.query
        ref = f"refs/pr/{len(held.commits)}" if wanted_pr else ref
        sha = held.commit(ref, files)
        url = {"pullRequestUrl": f"{self.hub.url}/{repo}/discussions/1"} if wanted_pr else {}
        self._json({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo}/commit/{sha}", **url})

    def _revision(self, repo: str, ref: str | None = None) -> None:
        held = self.hub.repos.get(repo)
        if held is None or (ref or "main") not in {*held.refs, *held.commits}:
            return self._json({"error": "Repository Not Found"}, 404)
        sha = held.refs.get(ref or "main", ref)
        return self._json({"id": repo, "sha": sha, "siblings": [{"rfilename": name} for name in held.files(str(sha))]})

    def _tree(self, repo: str, ref: str) -> None:
        files = self.hub.repos[repo].files(ref)
        self._json([{"type": "file", "path": name, "size": len(c), "oid": _git_oid(c)} for name, c in files.items()])

    def _resolve(self, repo: str, ref: str, name: str) -> None:
        held = self.hub.repos.get(repo)
        if held is None or name not in held.files(ref):
            return self._json({"error": "Entry not found"}, 404)
        content, commit = held.files(ref)[name], held.refs.get(ref, ref)
        return self._bytes(content, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit})

    def _collection(self, slug: str) -> None:
        items = [
            {"_id": str(n), "id": repo, "type": "model", "position": n, "author": "x", "downloads": 0, "likes": 0}
            for n, repo in enumerate(self.hub.collections[slug])
        ]
        owner = {"_id": "1", "fullname": "x", "name": "x", "type": "user", "isPro": False, "avatarUrl": ""}
        about = {"slug": slug, "title": slug, "owner": owner, "items": items, "lastUpdated": "2026-01-01T00:00:00.000Z"}
        self._json(about | {"position": 0, "private": False, "theme": "blue", "upvotes": 0, "description": ""})


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


_ID = r"([^/]+/[^/]+)"
_ROUTES = [
    (r"GET /api/whoami-v2", _Handler._whoami),
    (r"POST /api/repos/create", _Handler._create),
    (r"POST /api/validate-yaml", _Handler._validate_yaml),
    (rf"POST /api/models/{_ID}/branch/(.+)", _Handler._branch),
    (rf"POST /api/models/{_ID}/preupload/(.+)", _Handler._preupload),
    (rf"POST /{_ID}\.git/info/lfs/objects/batch", _Handler._lfs_batch),
    (r"PUT /lfs/(\w+)", _Handler._lfs_put),
    (r"POST /lfs-verify", _Handler._lfs_verify),
    (rf"POST /api/models/{_ID}/commit/(.+)", _Handler._commit),
    (rf"GET /api/models/{_ID}/revision/(.+)", _Handler._revision),
    (rf"GET /api/models/{_ID}", _Handler._revision),
    (rf"GET /api/models/{_ID}/tree/([^/]+)", _Handler._tree),
    (rf"(?:GET|HEAD) /{_ID}/resolve/([^/]+)/(.+)", _Handler._resolve),
    (r"GET /api/collections/(.+)", _Handler._collection),
]
