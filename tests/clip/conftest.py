"""Fixtures: the small CLIP's weights, and a hub on this machine."""

import hashlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import clip_files
import huggingface_hub
import open_clip
import pytest
from huggingface_hub import constants


@pytest.fixture(scope="session")
def state() -> clip_files.State:
    """Weights of the small CLIP, in OpenAI's layout; not to be changed."""
    return clip_files.random_state()


@pytest.fixture
def registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that makes an architecture known to open_clip for the length of one test."""
    import json

    factory = open_clip.factory
    monkeypatch.setattr(factory, "_MODEL_CONFIGS", dict(factory._MODEL_CONFIGS))
    monkeypatch.setattr(factory, "_MODEL_CONFIG_PATHS", list(factory._MODEL_CONFIG_PATHS))

    def register(name: str, config: dict[str, Any]) -> str:
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(config))
        open_clip.add_model_config(path)
        return name

    return register


class Hub:
    """Serves folders under `root` as `owner/name` repositories, and counts what it is asked."""

    def __init__(self, root: Path, port: int) -> None:
        self.root, self.port = root, port
        self.asked: list[str] = []


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, *, body: bool) -> None:
            hub.asked.append(f"{self.command} {self.path}")
            owner, name, _, _, *rest = self.path.strip("/").split("/")
            file = hub.root.joinpath(owner, name, *rest)
            known = (hub.root / owner / name).is_dir()
            if not file.is_file():
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
                content = b""
            else:
                self.send_response(200)
                content = file.read_bytes()
                self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", "c" * 40)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    return Handler


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty hub at a free port, with a cache of its own; `hub.root / owner / name` is a repository."""
    served = Hub(tmp_path / "hub", 0)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(served))
    served.port = server.server_port
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    point_hub_to(monkeypatch, served.port, tmp_path / "cache")
    yield served
    server.shutdown()
    server.server_close()
    thread.join()
    huggingface_hub.close_session()


def point_hub_to(monkeypatch: pytest.MonkeyPatch, port: int, cache: Path) -> None:
    """huggingface_hub reads its address once, at import; change what it read."""
    for proxy in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(proxy, raising=False)
    address = f"http://127.0.0.1:{port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    huggingface_hub.close_session()
