"""A Hugging Face hub of one dataset, on this machine: the real client talks to it over HTTP."""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class _Handler(BaseHTTPRequestHandler):
    name = ""
    commit = ""
    files: Mapping[str, bytes] = {}

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        api, files = f"/api/datasets/{self.name}", f"/datasets/{self.name}/resolve/{self.commit}/"
        if path in (api, f"{api}/revision/{self.commit}"):
            siblings = [{"rfilename": p} for p in self.files]
            self._json({"id": self.name, "sha": self.commit, "private": False, "tags": [], "siblings": siblings})
        elif path.startswith(f"{api}/tree/{self.commit}"):
            self._json(self._children(path.removeprefix(f"{api}/tree/{self.commit}").strip("/")))
        elif path.startswith(files) and path.removeprefix(files) in self.files:
            self._file(self.files[path.removeprefix(files)], with_body=with_body)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def _children(self, folder: str) -> list[dict[str, object]]:
        prefix = f"{folder}/" if folder else ""
        below = {path.removeprefix(prefix): content for path, content in self.files.items() if path.startswith(prefix)}
        files = [
            {"type": "file", "path": prefix + name, "size": len(content), "oid": _etag(content)}
            for name, content in below.items()
            if "/" not in name
        ]
        folders = sorted({name.split("/")[0] for name in below if "/" in name})
        return [*files, *({"type": "directory", "path": prefix + name, "oid": "0" * 40} for name in folders)]

    def _json(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _file(self, content: bytes, *, with_body: bool) -> None:
        begin, end = 0, len(content)
        wanted = self.headers.get("Range", "")
        if wanted.startswith("bytes="):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            begin, end = int(first), min(int(last) + 1, end) if last else end
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("ETag", f'"{_etag(content)}"')
        self.send_header("X-Repo-Commit", self.commit)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(end - begin))
        self.end_headers()
        if with_body:
            self.wfile.write(content[begin:end])

    def log_message(self, format: str, *arguments: object) -> None:
        return


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextmanager
def hub(name: str, commit: str, files: Mapping[str, bytes]) -> Iterator[str]:
    """Serve the files of one commit of a dataset; gives the address to set HF_ENDPOINT to."""
    handler = type("Handler", (_Handler,), {"name": name, "commit": commit, "files": files})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
