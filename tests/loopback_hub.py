"""A local server that speaks enough of the Hub's API for the real client to upload to it."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


# The only token that the server accepts.
TOKEN = "hf_AbCdEfGhIjKlMnOpQrStUvWxYz0123456789"


class Hub:
    """Local server for the part of the Hub's API that an upload uses. Start it with `serving`.

    Attributes:
        url: the client's HF_ENDPOINT.
        repositories: id -> {"private": bool, "files": {path: bytes}}.
        objects: SHA-256 -> content of uploaded LFS files.
        lfs_files: paths that were committed as LFS files.
        refusals: regular expression for a request's path -> (status, answer) to send instead.
        requests: (method, path, Authorization header) of all requests.
        verified: SHA-256 of the LFS files that the client asked to verify.
    """

    def __init__(self):
        self.repositories, self.objects, self.lfs_files = {}, {}, set()
        self.refusals, self.requests, self.verified = {}, [], []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                path = self.path.partition("?")[0]
                hub.requests.append((self.command, path, self.headers.get("Authorization")))
                status, answer = hub.respond(self.command, path, body, self.headers.get("Authorization"))
                data = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "text/plain" if isinstance(answer, str) else "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_PUT = answer

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def respond(self, method: str, path: str, body: bytes, authorization: str | None) -> tuple[int, dict | str]:
        for where, refusal in self.refusals.items():
            if re.search(where, path):
                return refusal
        if path.startswith("/objects/"):  # the LFS store has signed URLs and must not get the token
            assert authorization is None
            self.objects[path.removeprefix("/objects/")] = body
            return 200, {}
        if authorization != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid username or password."}
        sent = json.loads(body) if body and not path.endswith("/commit/main") else None
        if path == "/api/repos/create":
            name = f"{sent['organization'] or 'someone'}/{sent['name']}"
            status = 409 if name in self.repositories else 200
            self.repositories.setdefault(name, {"private": sent.get("visibility") == "private", "files": {}})
            return status, {"url": f"{self.url}/{name}"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/verify":
            assert len(self.objects[sent["oid"]]) == sent["size"]
            self.verified.append(sent["oid"])
            return 200, {}
        if match := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            assert match[1] in self.repositories
            return 200, {"objects": [self.upload_actions(wanted) for wanted in sent["objects"]]}
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/preupload/main|/commit/main)?", path):
            repository = self.repositories.get(match[1])
            if repository is None:
                return 404, {"error": "Repository not found"}
            if match[2] is None:
                return 200, {"id": match[1], "private": repository["private"], "tags": [], "siblings": []}
            if match[2] == "/preupload/main":
                return 200, {"files": [self.upload_mode(repository, file) for file in sent["files"]]}
            self.commit(repository, [json.loads(line) for line in body.splitlines()])
            return 200, {"commitUrl": f"{self.url}/{match[1]}/commit/{'0' * 40}", "commitOid": "0" * 40}
        return 404, {"error": f"unknown request: {method} {path}"}

    def upload_mode(self, repository: dict, file: dict) -> dict:
        mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
        known = repository["files"].get(file["path"])
        oid = hashlib.sha256(known).hexdigest() if known and mode == "lfs" else None
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def upload_actions(self, wanted: dict) -> dict:
        if wanted["oid"] in self.objects:
            return wanted
        upload = {"href": f"{self.url}/objects/{wanted['oid']}?X-Signature=SIGNED"}
        return wanted | {"actions": {"upload": upload, "verify": {"href": f"{self.url}/verify"}}}

    def commit(self, repository: dict, lines: list[dict]) -> None:
        assert lines[0]["key"] == "header" and lines[0]["value"]["summary"]
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "lfsFile":
                self.lfs_files.add(value["path"])
                repository["files"][value["path"]] = self.objects[value["oid"]]
            else:
                assert (line["key"], value["encoding"]) == ("file", "base64")
                repository["files"][value["path"]] = base64.b64decode(value["content"])


@contextmanager
def serving(hub: Hub) -> Iterator[None]:
    """Runs the server in a thread."""
    thread = threading.Thread(target=hub.server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield
    finally:
        hub.server.shutdown()
        thread.join()
        hub.server.server_close()
