"""A hub on this machine: the few addresses of the Hugging Face hub that downloads of models and datasets ask for."""

import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

SHA = "a" * 40
API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?")
FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@contextmanager
def serve(repositories, gated=()):
    """Serve {"models/owner/name": {path: bytes}}; yields the address and the list of what was asked for."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802
            self.answer()

        do_HEAD = do_POST = do_GET  # noqa: N815

        def log_message(self, *arguments):
            pass

        def answer(self):
            path = unquote(urlsplit(self.path).path)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            asked.append(path)
            if match := API.fullmatch(path):
                kind, name, what, revision, _ = match.groups()
                self.api(repositories.get(f"{kind}/{name}"), name, what, revision, body)
            elif match := FILE.fullmatch(path):
                kind, name, revision, file = match.groups()
                files = repositories.get(f"{'datasets' if kind else 'models'}/{name}")
                if name in gated:
                    self.fail(403, "GatedRepo")
                elif files is None or file not in files:
                    self.fail(404, "RepoNotFound" if files is None else "EntryNotFound")
                else:
                    self.send(files[file], "application/octet-stream")
            else:
                self.fail(404, "EntryNotFound")

        def api(self, files, name, what, revision, body):
            if files is None:
                self.fail(401, "RepoNotFound")
            elif revision not in (None, "main", SHA):
                self.fail(404, "RevisionNotFound")
            elif what == "tree":
                self.send(json.dumps([entry(path, data) for path, data in files.items()]).encode())
            elif what == "paths-info":
                paths = re.findall(r"[\w./-]+", unquote(body.decode()))
                self.send(json.dumps([entry(path, files[path]) for path in files if path in paths]).encode())
            else:
                siblings = [{"rfilename": path} for path in files]
                information = {"id": name, "sha": SHA, "siblings": siblings, "tags": [], "private": False}
                self.send(json.dumps(information | {"downloads": 0, "likes": 0, "gated": name in gated}).encode())

        def send(self, data, kind="application/json"):
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", SHA)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def fail(self, status, code):
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def entry(path, data):
    return {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
