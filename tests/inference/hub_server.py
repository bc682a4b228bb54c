"""A hub of its own: the part of the Hugging Face hub's protocol that uploads, downloads and creates repositories."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_of_the_tests"


class Hub(ThreadingHTTPServer):
    """Repositories by name, each a dictionary of revisions, and these of files; and large objects by their SHA-256."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def running_hub() -> Iterator[Hub]:
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Nothing is printed."""

    def _answer(self, content: Any, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_POST(self) -> None:
        body = self._body()
        self.server.requests.append(f"POST {self.path}")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer({"error": "Invalid username or password."}, 401)
        elif self.path == "/api/repos/create":
            name = json.loads(body)["name"]
            name = name if "/" in name else f"me/{name}"
            organization = json.loads(body).get("organization")
            name = f"{organization}/{name.split('/')[-1]}" if organization else name
            self.server.repositories.setdefault(name, {"main": {}})
            self._answer({"url": f"{self.server.url}/{name}", "name": name})
        elif matched := re.fullmatch(r"/api/models/([\w./-]+)/branch/([\w.-]+)", self.path):
            self.server.repositories[matched[1]].setdefault(matched[2], {})
            self._answer({})
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif matched := re.fullmatch(r"/api/models/([\w./-]+)/preupload/([\w.-]+)", self.path):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in json.loads(body)["files"]
            ]
            self._answer({"files": files})
        elif self.path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {
                    "oid": each["oid"],
                    "size": each["size"],
                    "actions": {"upload": {"href": f"{self.server.url}/objects/{each['oid']}"}},
                }
                for each in json.loads(body)["objects"]
            ]
            self._answer({"transfer": "basic", "objects": objects}, Content_Type="application/vnd.git-lfs+json")
        elif matched := re.fullmatch(r"/api/models/([\w./-]+)/commit/([\w.-]+)", self.path):
            files = self.server.repositories[matched[1]].setdefault(matched[2], {})
            for line in body.decode().splitlines():
                each = json.loads(line)
                value = each["value"]
                if each["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif each["key"] == "lfsFile":
                    files[value["path"]] = self.server.objects[value["oid"]]
            url = f"{self.server.url}/{matched[1]}/commit/{_revision(files)}"
            self._answer({"success": True, "commitOid": _revision(files), "commitUrl": url})
        else:
            self._answer({"error": f"not part of this hub: {self.path}"}, 404)

    def do_PUT(self) -> None:
        body = self._body()
        digest = self.path.rpartition("/")[2]
        if hashlib.sha256(body).hexdigest() != digest:
            self._answer({"error": "other content"}, 400)
            return
        self.server.objects[digest] = body
        self._answer({})

    def do_GET(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        matched = re.fullmatch(r"/([\w./-]+)/resolve/([\w.-]+)/([\w./-]+)", self.path)
        repository = self.server.repositories.get(matched[1]) if matched else None
        if matched is None or repository is None:
            self._answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            return
        revisions = {**repository, **{_revision(files): files for files in repository.values()}}
        files = revisions.get(matched[2])
        if files is None:
            self._answer({"error": "Invalid rev id"}, 404, X_Error_Code="RevisionNotFound")
        elif matched[3] not in files:
            self._answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
        else:
            content = files[matched[3]]
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            self._answer(content, ETag=etag, X_Repo_Commit=_revision(files))

    def do_HEAD(self) -> None:
        self.do_GET()


def _revision(files: dict[str, bytes]) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
