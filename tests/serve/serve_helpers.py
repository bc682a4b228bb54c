"""A predictor that needs no model, images for it, and a server of it in a process of its own."""

import hashlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from starlette.testclient import TestClient

from maple.data import EvalView
from maple.errors import BackboneError
from maple.inference.predictor import EncodedClasses, Floats, Predictor

NAMES = ("red thing", "green thing", "blue thing", "grey_thing", "white thing", "black thing")
HERE = Path(__file__).parent
Start = Callable[..., TestClient]


def png(colour: Sequence[int] = (200, 30, 30), size: tuple[int, int] = (40, 30)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, tuple(colour)).save(buffer, format="PNG")
    return buffer.getvalue()


def direction(name: str) -> Floats:
    """A vector [3] of its own for each name."""
    seed = int.from_bytes(hashlib.sha256(name.encode(errors="surrogatepass")).digest()[:4], "big")
    return np.random.default_rng(seed).normal(size=3).astype(np.float32)


def softmax(logits: Floats) -> Floats:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


class Colours(Predictor):
    """Predicts from the mean colour of an image and a hash of each class name, so results can be computed by hand.

    Args:
        seconds: what a batch takes.
        gate: where given, a batch waits for it.
        fails: on images that are all white or all black, in two ways.
    """

    def __init__(
        self,
        *,
        seconds: float = 0.0,
        gate: threading.Event | None = None,
        zero_shot: bool = True,
        fails: bool = True,
    ) -> None:
        about = {"method": "colours", "title": "Colours", "backbone": "none", "dataset": "/somewhere/paint"}
        view = EvalView(16, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bicubic")
        super().__init__(NAMES, preprocess=view, has_zero_shot=zero_shot, about=about, name_features=None)
        self.seconds = seconds
        self.gate = gate
        self.fails = fails
        self.batches: list[int] = []

    def encode_images(self, views: Floats) -> list[Any]:
        self.batches.append(len(views))
        if self.gate is not None:
            self.gate.wait(20)
        time.sleep(self.seconds)
        colours = views.mean(axis=(2, 3))
        if self.fails and (colours > 0.999).all(axis=1).any():
            raise BackboneError("white is too bright")
        if self.fails and (colours < 0.001).all(axis=1).any():
            raise RuntimeError("black is secret")
        return list(colours)

    def probabilities(self, seen: Sequence[Any], spoken: EncodedClasses) -> tuple[Floats, Floats | None]:
        colours = np.stack(seen)
        logits = 5 * colours @ spoken.trained.T
        if self.fails and "nan" in spoken.names:
            logits = logits * np.nan
        return softmax(logits), softmax(-logits) if self.has_zero_shot else None

    def _encode_class_names(self, names: tuple[str, ...], note: str | None) -> EncodedClasses:
        return EncodedClasses(names, note, np.stack([direction(name) for name in names]), None)


def expected(colour: Sequence[int], names: Sequence[str]) -> dict[str, float]:
    """The prediction for an image of one colour, computed by hand."""
    logits = 5 * np.array(colour, np.float32)[None] / 255 @ np.stack([direction(name) for name in names]).T
    return dict(zip(names, softmax(logits)[0].tolist(), strict=True))


class Process:
    """A server in a process of its own, and requests that no client library allows."""

    def __init__(self, running: "subprocess.Popen[str]", port: int) -> None:
        self.running = running
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    def connect(self, seconds: float = 20) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=seconds)

    def raw(self, *parts: bytes, pause: float = 0.0) -> bytes:
        """Send parts, and read until the server closes the connection."""
        with self.connect() as connection:
            for part in parts:
                connection.sendall(part)
                time.sleep(pause)
            return everything(connection)

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """The exit status and what was written on the standard error."""
        self.running.send_signal(number)
        _, errors = self.running.communicate(timeout=30)
        return self.running.returncode, errors


def everything(connection: socket.socket) -> bytes:
    found = b""
    while True:
        try:
            part = connection.recv(65536)
        except ConnectionResetError:
            return found
        if not part:
            return found
        found += part


def status_and_code(answer: bytes) -> tuple[int, str | None]:
    head, _, body = answer.partition(b"\r\n\r\n")
    error = json.loads(body).get("error") if body else None
    return int(head.split()[1]), error and error["code"]


@contextmanager
def process(**limits: Any) -> Iterator[Process]:
    """Start a server of `Colours` with these limits; `seconds` is what a batch takes, `token` its token."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(["src", str(HERE)])}
    command = [sys.executable, str(HERE / "colour_server.py"), json.dumps(limits)]
    running = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=HERE.parent.parent
    )
    assert running.stdout is not None
    line = running.stdout.readline()
    try:
        yield Process(running, int(line))
    finally:
        if running.poll() is None:
            running.kill()
        running.communicate(timeout=10)
