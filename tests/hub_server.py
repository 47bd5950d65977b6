"""A small Hugging Face hub for tests, on 127.0.0.1: repositories are directories, faults are rules.

    with hub(root) as server:  # root/models/owner/name/…, root/datasets/owner/name/…
        server.rules.append((r"GET .*/resolve/", 503, 2))  # two times

It speaks what `huggingface_hub`, `transformers` and `datasets` ask for here: metadata, trees, files by ranges, who a
token belongs to, and commits of small files. One revision a repository: a hash of what is in it.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
import time
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

GOOD_TOKEN = "hf_good"
ROUTE = re.compile(
    r"/(?:api/)?(?P<kind>models/|datasets/)?(?P<name>[\w.-]+/[\w.-]+)"
    r"(?:/(?P<verb>revision|tree|resolve|preupload|commit)/(?P<revision>[^/]+)(?:/(?P<path>.+))?)?"
)


class Hub(ThreadingHTTPServer):
    """The server; `log` has (method, path, Authorization) of every request.

    Rules are [pattern of "METHOD /path", status code or "cut" or "stall" or seconds to wait, times].
    """

    daemon_threads = True

    def __init__(self, root: Path, prefix: str = ""):
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.prefix = root, prefix
        self.rules: list[list[Any]] = []
        self.log: list[tuple[str, str, str | None]] = []
        self.gated: set[str] = set()
        self.url = f"http://127.0.0.1:{self.server_port}{prefix}"

    def revision(self, repository: Path) -> str:
        files = sorted(path for path in repository.rglob("*") if path.is_file())
        content = b"".join(str(path.relative_to(repository)).encode() + path.read_bytes() for path in files)
        return hashlib.sha1(content).hexdigest()

    def handle_error(self, *request: Any) -> None:
        """A client that went away is what some tests are about."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *arguments: Any) -> None:
        pass

    def answer(self, status: int, body: bytes | dict | list = b"", **headers: str) -> None:
        if not isinstance(body, bytes):
            body, headers["Content-Type"] = json.dumps(body).encode(), "application/json"
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault in ("cut", "stall"):
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            if self.fault == "stall":
                time.sleep(30)
            self.close_connection = True
            return
        self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        self.answer(status, {"error": code}, X_Error_Code=code, X_Error_Message=code)

    def do_GET(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        path = urllib.parse.unquote(url.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        token = self.headers.get("Authorization")
        self.server.log.append((self.command, path, token))
        self.fault = None
        for rule in self.server.rules:
            if rule[2] > 0 and re.search(rule[0], f"{self.command} {path}"):
                rule[2] -= 1
                self.fault = rule[1]
                break
        if isinstance(self.fault, float):
            time.sleep(self.fault)
        elif isinstance(self.fault, int):
            retry = {"Retry_After": "0"} if self.fault == 429 else {}
            return self.answer(self.fault, b"<html>busy</html>", **retry)
        if not path.startswith(self.server.prefix):
            return self.refuse(404, "NotFound")
        path = path.removeprefix(self.server.prefix)
        if path in ("", "/"):
            return self.answer(200, b"<html>a hub</html>")
        if token and token != f"Bearer {GOOD_TOKEN}":
            return self.answer(401, {"error": "Invalid credentials in Authorization header"},
                               X_Error_Message="Invalid credentials in Authorization header")  # fmt: skip
        if path == "/api/whoami-v2":
            return self.answer(200, {"name": "tester", "type": "user", "orgs": []}) if token else self.refuse(401, "No")
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted.get('organization') or 'tester'}/{wanted['name']}"
            (self.server.root / "models" / name).mkdir(parents=True, exist_ok=True)
            return self.answer(200, {"url": f"{self.server.url}/{name}", "name": name})
        route = ROUTE.fullmatch(path)
        if not route:
            return self.refuse(404, "NotFound")
        return self.of_repository(route, token, body)

    do_HEAD = do_POST = do_GET

    def of_repository(self, route: re.Match[str], token: str | None, body: bytes) -> None:
        kind, name, verb, rest = (route["kind"] or "models/"), route["name"], route["verb"], route["path"]
        repository = self.server.root / kind / name
        if not repository.is_dir():
            return self.refuse(404 if token else 401, "RepoNotFound")
        sha = self.server.revision(repository)
        files = sorted(path for path in repository.rglob("*") if path.is_file())
        if verb in (None, "revision"):
            names = [{"rfilename": str(path.relative_to(repository))} for path in files]
            return self.answer(200, {"id": name, "sha": sha, "private": False, "siblings": names, "tags": []})
        if verb == "tree":
            below = [
                path
                for path in sorted(repository.rglob("*"))
                if str(path.relative_to(repository)).startswith(rest or "")
            ]
            entries = [
                {"type": "file" if path.is_file() else "directory", "oid": sha, "size": path.stat().st_size,
                 "path": str(path.relative_to(repository))}
                for path in below if str(path.relative_to(repository)) != rest
            ]  # fmt: skip
            return self.answer(200, entries)
        if verb == "preupload":
            wanted = json.loads(body)["files"]
            return self.answer(200, {"files": [{"path": each["path"], "uploadMode": "regular", "shouldIgnore": False}
                                               for each in wanted]})  # fmt: skip
        if verb == "commit":
            for line in filter(None, body.splitlines()):
                entry = json.loads(line)
                if entry["key"] == "file":
                    target = repository / entry["value"]["path"]
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(base64.b64decode(entry["value"]["content"]))
            address = f"{self.server.url}/{name}"
            return self.answer(
                200, {"commitOid": "f" * 40, "commitUrl": f"{address}/commit/{'f' * 40}", "success": True}
            )
        if name in self.server.gated:
            return self.refuse(403, "GatedRepo")
        file = repository / rest
        if not file.is_file():
            return self.answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        content = file.read_bytes()
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        common = {"X_Repo_Commit": sha, "ETag": etag, "Accept_Ranges": "bytes"}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(wanted[1]), min(int(wanted[2] or len(content) - 1), len(content) - 1)
            span = f"bytes {first}-{last}/{len(content)}"
            return self.answer(206, content[first : last + 1], Content_Range=span, **common)
        return self.answer(200, content, **common)


@contextlib.contextmanager
def hub(root: Path, prefix: str = "") -> Iterator[Hub]:
    """Serve the repositories in a directory until the block ends."""
    server = Hub(root, prefix)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
