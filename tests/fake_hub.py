"""A Hugging Face hub on this machine, as far as an upload needs it: the real huggingface_hub talks to it over HTTP."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import huggingface_hub.constants
import pytest


class FakeHub:
    """`files` by repository and path, `private` by repository, and the number of `commits`. `refuses`: the status of a refusal."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.commits = 0
        self.refuses = 0

    def post(self, path: str, body: bytes) -> tuple[int, dict]:
        path = path.partition("?")[0]
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            given = json.loads(body)
            repository = f"{given.get('organization') or 'me'}/{given['name']}"
            if repository in self.files:
                return 409, {"error": "it is there", "url": f"/{repository}"}
            self.files[repository], self.private[repository] = (
                {},
                given.get("private") or given.get("visibility") == "private",
            )
            return 200, {"url": f"/{repository}"}
        repository, _, action = path.removeprefix("/api/models/").rpartition("/main")[0].rpartition("/")
        if action == "preupload":
            asked = [each["path"] for each in json.loads(body)["files"]]
            return 200, {"files": [self._mode(repository, name) for name in asked]}
        _, *operations = [json.loads(line) for line in body.splitlines()]
        for each in operations:
            self.files[repository][each["value"]["path"]] = base64.b64decode(each["value"]["content"])
        self.commits += 1
        return 200, {"commitUrl": f"/{repository}/commit/{'c' * 40}", "commitOid": "c" * 40}

    def _mode(self, repository: str, name: str) -> dict:
        there = self.files[repository].get(name)
        oid = None if there is None else hashlib.sha1(b"blob %d\0" % len(there) + there).hexdigest()
        return {"path": name, "uploadMode": "regular", "shouldIgnore": False, "oid": oid}


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def answer(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"content-length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_POST(self) -> None:
            length = self.headers.get("content-length")
            body = self.rfile.read(int(length)) if length else b"".join(self.chunks())
            if hub.refuses:
                return self.answer(hub.refuses, b'{"error": "no"}')
            status, found = hub.post(self.path, body)
            if "url" in found:
                found["url"] = f"http://{self.headers['host']}{found['url']}"
            self.answer(status, json.dumps(found).encode(), content_type="application/json")

        def chunks(self) -> Iterator[bytes]:
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()

        def do_GET(self) -> None:
            if hub.refuses:
                return self.answer(hub.refuses, b'{"error": "no"}')
            if self.path.startswith("/api/models/"):
                return self.answer(
                    200, json.dumps({"id": "me/x", "sha": "c" * 40}).encode(), content_type="application/json"
                )
            repository, _, name = self.path[1:].partition("/resolve/main/")
            found = hub.files.get(repository, {}).get(name)
            if found is None:
                return self.answer(404, b"", X_Error_Code="EntryNotFound")
            digest = hashlib.sha1(found).hexdigest()
            return self.answer(200, found, ETag=f'"{digest}"', X_Repo_Commit=digest)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    return Handler


@contextmanager
def fake_hub(monkeypatch: pytest.MonkeyPatch, cache: object) -> Iterator[FakeHub]:
    """A hub that huggingface_hub uploads to while the block runs, with its cache in a folder of the test."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    api = functools.partial(
        huggingface_hub.HfApi, endpoint=f"http://127.0.0.1:{server.server_port}", token="hf_0123456789"
    )
    monkeypatch.setattr(huggingface_hub, "HfApi", api)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    yield hub
    server.shutdown()
    server.server_close()
