"""A local HTTP server that can misbehave in the ways real ones do."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Site:
    """What the server holds and how it behaves. `requests` is what it was asked for: (path, Range)."""

    files: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    url: str = ""
    break_after: int | None = None
    """Send this many bytes of each answer, then close the connection."""
    ranges: bool = True
    shift: int = 0
    """Answer a range from another place than asked for."""
    lie: int = 0
    """Announce this many bytes more than there are."""
    etag: str | None = None
    answers: list[int] = field(default_factory=list)
    """Status codes to answer first, instead of the file."""
    redirect: str | None = None
    content_type: str = "application/octet-stream"
    stall: threading.Event | None = None

    def ranges_of(self, path: str) -> list[str | None]:
        return [asked for name, asked in self.requests if name == path]


@contextmanager
def serving(site: Site) -> Iterator[Site]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(site))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    site.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield site
    finally:
        if site.stall is not None:
            site.stall.set()
        server.shutdown()
        thread.join()
        server.server_close()


def _handler(site: Site) -> Callable[..., BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_arguments: object) -> None:
            pass

        def do_GET(self) -> None:
            site.requests.append((self.path, self.headers.get("Range")))
            if site.answers:
                self.send_error(site.answers.pop(0))
            elif site.redirect:
                self.send_response(302)
                self.send_header("Location", site.redirect)
                self.end_headers()
            elif self.path not in site.files:
                self.send_error(404)
            else:
                self._send(site.files[self.path])

        def _send(self, content: bytes) -> None:
            begin = 0
            asked = self.headers.get("Range")
            unchanged = self.headers.get("If-Range") in (None, site.etag)
            if asked and site.ranges and unchanged:
                begin = int(asked.removeprefix("bytes=").removesuffix("-")) - site.shift
                if begin >= len(content):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(content) + site.lie}")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
            self.send_response(206 if begin else 200)
            self.send_header("Content-Type", site.content_type)
            self.send_header("Content-Length", str(len(content) - begin + site.lie))
            if begin:
                total = len(content) + site.lie
                self.send_header("Content-Range", f"bytes {begin}-{total - 1}/{total}")
            if site.etag:
                self.send_header("ETag", site.etag)
            self.end_headers()
            rest = content[begin:]
            with suppress(ConnectionError):  # the other side may have left
                self.wfile.write(rest if site.break_after is None else rest[: site.break_after])
            if site.stall is not None:
                self.wfile.flush()
                site.stall.wait(5)
            self.close_connection = True

    return Handler
