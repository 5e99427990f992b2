"""A hub on this machine: the part of its HTTP interface that huggingface_hub calls to upload and
download small files. Repositories live in memory; only the branch main exists.
"""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

SHA = "0" * 40


class Handler(BaseHTTPRequestHandler):
    """Answers for `server.repositories`: files by path, by repository id."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        kind, *rest = self.path.partition("?")[0].removeprefix("/api/").split("/")
        if kind == "repos":
            fields = json.loads(body)
            name = f"{fields['organization']}/{fields['name']}"
            self.server.repositories.setdefault(name, {})
            self.reply({"url": f"{self.server.url}/{name}"})
        elif kind == "validate-yaml":
            self.reply({"errors": [], "warnings": []})
        elif rest[2] == "preupload":
            paths = [file["path"] for file in json.loads(body)["files"]]
            regular = {"uploadMode": "regular", "shouldIgnore": False}
            self.reply({"files": [{"path": path, **regular} for path in paths]})
        elif rest[2] == "commit":
            files = self.server.repositories["/".join(rest[:2])]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            name = "/".join(rest[:2])
            self.reply({"commitUrl": f"{self.server.url}/{name}/commit/{SHA}", "commitOid": SHA})
        else:
            self.reply({"error": self.path}, 501)

    def do_GET(self):
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            name = "/".join(parts[2:4])
            files = self.server.repositories.get(name)
            if files is None:
                return self.missing("RepoNotFound")
            if parts[4] == "tree":
                entries = [
                    {"type": "file", "path": path, "size": len(content), "oid": SHA}
                    for path, content in files.items()
                ]
                return self.reply(entries)
            siblings = [{"rfilename": path, "size": len(files[path])} for path in files]
            return self.reply({"id": name, "sha": SHA, "siblings": siblings})
        files = self.server.repositories.get("/".join(parts[:2]))
        if files is None:
            return self.missing("RepoNotFound")
        content = files.get("/".join(parts[4:]))
        if content is None:
            return self.missing("EntryNotFound")
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        return self.send(200, content, {"ETag": etag, "X-Repo-Commit": SHA})

    do_HEAD = do_GET

    def missing(self, code):
        self.send(404, b"", {"X-Error-Code": code})

    def reply(self, value, status=200):
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send(self, status, content, headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": len(content)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_):
        """Prints nothing."""


@contextmanager
def local_hub() -> Iterator[ThreadingHTTPServer]:
    """A running hub with `url` and `repositories`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.repositories = {}
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
