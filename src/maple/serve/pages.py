"""The page: three files of the package, and nothing from elsewhere."""

from collections.abc import Awaitable, Callable
from importlib import resources

from fastapi import FastAPI, Response

_FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}


def add_page(app: FastAPI) -> None:
    """Serve the page under / and its parts beside it."""
    folder = resources.files("maple.serve") / "page"
    for path, (name, kind) in _FILES.items():
        content = (folder / name).read_bytes()
        app.add_api_route(path, _sending(content, f"{kind}; charset=utf-8"), include_in_schema=False)


def _sending(content: bytes, kind: str) -> Callable[[], Awaitable[Response]]:
    async def send() -> Response:
        return Response(content, headers={"Content-Type": kind})

    return send
