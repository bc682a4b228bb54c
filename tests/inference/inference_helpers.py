"""What the tests of inference share."""

import io
from http.server import BaseHTTPRequestHandler
from typing import Any

import numpy as np
from PIL import Image

COLOURS = {"red": (200, 30, 30), "green": (30, 180, 30), "blue": (30, 30, 200), "grey": (90, 90, 90)}
NAMES = ("red thing", "green_thing", "blue thing", "grey thing", "white thing", "black thing")


def png(colour: tuple[int, int, int] = (200, 30, 30)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(buffer, format="PNG")
    return buffer.getvalue()


def send(
    handler: BaseHTTPRequestHandler, content: bytes, kind: str | None = "image/png", length: int | None = -1
) -> None:
    """Write one answer; `length` -1 is the true one, None is not told."""
    handler.send_response(200)
    if kind is not None:
        handler.send_header("Content-Type", kind)
    if length is not None:
        handler.send_header("Content-Length", str(len(content) if length == -1 else length))
    handler.end_headers()
    handler.wfile.write(content)


TINY: dict[str, Any] = {"backbone": "maple-tiny", "pretrained": "random:1", "device": "cpu"}
QUICK: dict[str, Any] = {**TINY, "epochs": 4, "lr": 0.01, "settings": {"method": {"prompt_depth": 2}}}
WORDS = ("cat", "dog", "owl")


def pixels(count: int = 18) -> tuple[np.ndarray, np.ndarray]:
    """Images [n, 30, 40, 3] of three classes told apart by their colours, and their labels."""
    generator = np.random.default_rng(0)
    kinds = np.arange(count) % 3
    base = np.array([[200, 20, 20], [20, 200, 20], [20, 20, 200]])[kinds]
    noise = generator.integers(0, 50, (count, 30, 40, 3))
    return (noise + base[:, None, None]).astype(np.uint8), np.array(WORDS)[kinds]
