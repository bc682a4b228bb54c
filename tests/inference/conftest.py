"""A prompts file on a tiny random CLIP, pictures for it, and a server that sends them."""

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from inference_helpers import COLOURS, NAMES, png

from maple import build_method, load_clip, save_prompts
from maple.clip import Backbone


@pytest.fixture(scope="session")
def tiny() -> Backbone:
    return load_clip("maple-tiny", "random:1")


@pytest.fixture(scope="session")
def prompts(tiny: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MaPLe as it starts, with a data set in its story."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.safetensors"
    generator = torch.Generator().manual_seed(3)
    method = build_method({"name": "maple", "prompt_depth": 2}, tiny, NAMES, generator=generator)
    save_prompts(path, method, {"dataset": "eurosat", "data": {"dataset": "eurosat"}})
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Four pictures, the third in a folder of its own, one broken file and one that is no image."""
    folder = tmp_path / "pictures"
    (folder / "c").mkdir(parents=True)
    for place, colour in zip(("a.png", "b10.png", "c/x.png", "b9.png"), COLOURS.values(), strict=True):
        (folder / place).write_bytes(png(colour))
    (folder / "d.png").write_bytes(png()[:50])
    (folder / "notes.txt").write_text("no picture")
    (folder / ".hidden.png").write_bytes(png())
    return folder


Answer = Callable[[BaseHTTPRequestHandler], None]


@pytest.fixture
def serve() -> Iterator[Callable[[Answer], str]]:
    """Start a server whose every answer the given function writes; return its address."""
    servers = []

    def start(answer: Answer) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                answer(self)

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()
