"""A stand-in for the Hugging Face hub: serves one folder as the files of data-set and model repositories over local HTTP.

It answers what huggingface_hub and datasets ask for when they load a Parquet-backed data set: the repository's description,
its file tree, information on paths, and the files themselves (whole or by range).
"""

from __future__ import annotations

import hashlib
import json
import re
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """Routes below `root`/<owner>/<name>/; a request for anything else is 404, with the hub's error code."""

    protocol_version = "HTTP/1.1"
    root: Path
    cut_downloads_at: int | None = None  # bytes after which a file's transfer breaks off
    knows_ranges: bool = True
    busy: int = 0  # how many requests are turned away at first

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        if path.startswith("/api/datasets") and self.server.turned_away < self.busy:
            self.server.turned_away += 1
            return self.send(b"{}", 503, {"Content-Type": "application/json"})
        if match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/revision/[^/]+)?", path):
            return self.describe(match[1])
        if match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/tree/[^/]+(?:/(.*))?", path):
            return self.tree(match[1], match[2] or "")
        if match := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            return self.file(self.root / match[1] / match[2])
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):  # a model's repository
            return self.file(self.root / match[1] / match[2])
        return self.missing("EntryNotFound")

    do_HEAD = do_GET

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        path = unquote(urlsplit(self.path).path)
        match = re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/paths-info/[^/]+", path)
        if not match:
            return self.missing("EntryNotFound")
        repository = self.root / match[1]
        form = self.headers.get("Content-Type", "")
        paths = json.loads(body)["paths"] if "json" in form else re.findall(r"paths=([^&]*)", body)
        paths = [unquote(path) for path in ([paths] if isinstance(paths, str) else paths)]
        return self.json(
            [entry(repository / path, repository) for path in paths if (repository / path).exists()]
        )

    def describe(self, name: str):
        repository = self.root / name
        if not repository.is_dir():
            return self.missing("RepoNotFound")
        files = sorted(str(path.relative_to(repository)) for path in repository.rglob("*") if path.is_file())
        facts = {"_id": "1", "id": name, "sha": COMMIT, "private": False, "gated": False, "disabled": False}
        return self.json(
            facts | {"tags": [], "downloads": 0, "likes": 0, "siblings": [{"rfilename": f} for f in files]}
        )

    def tree(self, name: str, folder: str):
        place = self.root / name / folder
        if not place.is_dir():
            return self.missing("EntryNotFound")
        recursive = "recursive=true" in self.path.lower() or "recursive=1" in self.path
        return self.json(
            [entry(p, self.root / name) for p in sorted(place.rglob("*") if recursive else place.iterdir())]
        )

    def file(self, path: Path):
        if not path.is_file():
            return self.missing("EntryNotFound")
        data, status, headers = path.read_bytes(), 200, {}
        etag = hashlib.sha256(data).hexdigest()
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "") * self.knows_ranges):
            begin, end = int(match[1]), min(int(match[2] or len(data) - 1), len(data) - 1)
            headers["Content-Range"] = f"bytes {begin}-{end}/{len(data)}"
            data, status = data[begin : end + 1], 206
        headers |= {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        return self.send(data, status, headers)

    def json(self, answer):
        return self.send(json.dumps(answer).encode(), 200, {"Content-Type": "application/json"})

    def missing(self, code: str):
        return self.send(
            b"{}", 404, {"X-Error-Code": code, "X-Repo-Commit": COMMIT, "Content-Type": "application/json"}
        )

    def send(self, data: bytes, status: int, headers: dict[str, str]):
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            cut = self.cut_downloads_at if "ETag" in headers else None
            self.wfile.write(data[:cut])
            self.close_connection = cut is not None and len(data) > cut

    def log_message(self, format, *args):
        wanted = self.headers.get("Range", "")
        self.server.requests.append(f"{self.command} {self.path} {wanted}".rstrip())


def entry(path: Path, repository: Path) -> dict:
    relative = str(path.relative_to(repository))
    if path.is_dir():
        return {"type": "directory", "path": relative, "oid": "0" * 40, "size": 0}
    return {
        "type": "file",
        "path": relative,
        "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
        "size": path.stat().st_size,
    }


@contextmanager
def serve_hub(root: Path, **behaviour):
    """Serve `root` as a hub while the context lasts; gives the server (`.url`, `.requests`)."""
    handler = type("RootedHub", (Hub,), {"root": root} | behaviour)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.requests, server.turned_away, server.url = [], 0, f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
