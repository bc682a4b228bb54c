"""What the tests of inference share."""

import io
from http.server import BaseHTTPRequestHandler

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
