"""A stand-in for the Hugging Face hub: the few HTTP answers that loading a data set asks for, from a local folder."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit


@contextmanager
def hub_of(repo: str, revisions: dict[str, Path]) -> Iterator[tuple[str, list[str]]]:
    """The address of a hub that has one data set, and the list of what it is asked.

    revisions  folder of each branch or tag; a revision's commit is a hash of its name
    """
    asked: list[str] = []
    commits = {hashlib.sha1(name.encode()).hexdigest(): folder for name, folder in revisions.items()}
    names = {name: hashlib.sha1(name.encode()).hexdigest() for name in revisions}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            self._answer()

        def do_HEAD(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
            self._answer(body)

        def _answer(self, body: str = "") -> None:
            path = unquote(urlsplit(self.path).path)
            asked.append(f"{self.command} {path}")
            api, files = f"/api/datasets/{repo}", f"/datasets/{repo}/resolve/"
            if path.startswith(files):
                revision, _, name = path.removeprefix(files).partition("/")
                self._file(names.get(revision, revision), name)
                return
            if not path.startswith(api):
                self._json({"error": "Repository not found"}, 404, "RepoNotFound")
                return
            kind, _, rest = path.removeprefix(api).strip("/").partition("/")
            revision, _, below = rest.partition("/")
            commit = names.get(revision or "main", revision)
            if commit not in commits:
                self._json({"error": f"Invalid rev id: {revision}"}, 404, "RevisionNotFound")
            elif kind in ("", "revision"):
                siblings = [{"rfilename": each} for each in self._names(commit)]
                self._json({"id": repo, "sha": commit, "private": False, "siblings": siblings, "tags": []})
            elif kind == "tree":
                self._json(self._tree(commit, below))
            elif kind == "paths-info":
                form = json.loads(body) if body.startswith("{") else parse_qs(body)
                self._json([info for each in form["paths"] if (info := self._info(commit, each))])
            else:
                self._json({"error": "not found"}, 404, "EntryNotFound")

        def _names(self, commit: str) -> list[str]:
            folder = commits[commit]
            return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())

        def _tree(self, commit: str, below: str) -> list[dict[str, object]]:
            prefix = f"{below}/" if below else ""
            recursive = "recursive=true" in self.path.lower()
            found = {}
            for name in self._names(commit):
                if name.startswith(prefix):
                    first = name if recursive else prefix + name.removeprefix(prefix).partition("/")[0]
                    found[first] = self._info(commit, first)
            return [info for info in found.values() if info]

        def _info(self, commit: str, name: str) -> dict[str, object] | None:
            path = commits[commit] / name
            if path.is_file():
                return {"type": "file", "path": name, "size": path.stat().st_size, "oid": _oid(path)}
            return {"type": "directory", "path": name, "oid": "0" * 40} if path.is_dir() else None

        def _file(self, commit: str, name: str) -> None:
            path = commits[commit] / name if commit in commits else Path("/nowhere")
            if not path.is_file():
                self._json({"error": "Entry not found"}, 404, "EntryNotFound", commit)
                return
            content = path.read_bytes()
            total, wanted = len(content), self.headers.get("Range")
            if wanted:
                start, _, stop = wanted.removeprefix("bytes=").partition("-")
                content = content[int(start) : int(stop) + 1 if stop else total]
            self.send_response(206 if wanted else 200)
            if wanted:
                self.send_header("Content-Range", f"bytes {start}-{int(start) + len(content) - 1}/{total}")
            self.send_header("ETag", f'"{_oid(path)}"')
            self.send_header("X-Repo-Commit", commit)
            self.send_header("Accept-Ranges", "bytes")
            self._body(content)

        def _json(self, content: object, status: int = 200, error: str = "", commit: str = "") -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            if error:
                self.send_header("X-Error-Code", error)
            if commit:
                self.send_header("X-Repo-Commit", commit)
            self._body(json.dumps(content).encode())

        def _body(self, content: bytes) -> None:
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _oid(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
