"""Listen on a socket and run the application until SIGINT or SIGTERM."""

import asyncio
import errno
import logging
import signal
import socket
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from maple.errors import ConfigError
from maple.serve.limits import Limits
from maple.serve.responses import ApiError


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to one address of `host`, not yet listening; port 0 is any free one.

    Raises:
        ConfigError: the host cannot be resolved, or the port is out of range, in use or not permitted.
    """
    if not 0 <= port <= 65535:
        raise ConfigError(f"port {port} is not valid; give one from 1 to 65535, or 0 for any free one")
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"host {host!r} cannot be resolved ({error}); give an address of this machine") from error
    family, kind, _, _, address = addresses[0]
    listening = socket.socket(family, kind)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        listening.close()
        reason = {
            errno.EADDRINUSE: "is in use by another program; choose another with --port, or --port 0 for any free one",
            errno.EACCES: "is not permitted for this user; choose one from 1024 to 65535",
        }.get(error.errno or 0, f"cannot be listened on ({error.strerror}); give an address of this machine")
        raise ConfigError(f"port {port} of {host} {reason}") from error
    return listening


def run(app: ASGIApp, listening: socket.socket, limits: Limits) -> None:
    """Serve until SIGINT or SIGTERM; open requests are then finished, within the time that a response may take."""
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # its messages quote request bodies
    config = uvicorn.Config(
        app,
        http=type("Protocol", (HeadTimeoutProtocol,), {"head_timeout": limits.head_timeout}),
        ws="none",
        lifespan="on",
        log_config=None,
        log_level=logging.CRITICAL,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=int(limits.timeout) + 1,
        h11_max_incomplete_event_size=32 * 1024,
    )
    asyncio.run(_Server(config).serve(sockets=[listening]))


class _Server(uvicorn.Server):
    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop as uvicorn does, but without recording the signal, which it would raise again after the shutdown."""
        del frame
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True


class HeadTimeoutProtocol(H11Protocol):
    """HTTP/1.1 with a time limit for the head of each request, and errors in JSON.

    uvicorn only limits the time between requests: a client that sends a head byte by byte would hold its connection
    forever. Bodies are limited by `GuardMiddleware`.
    """

    head_timeout: float

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._limit_head()

    def on_response_complete(self) -> None:
        # First, because the next request may have arrived already, and is then started by uvicorn's method.
        self._limit_head()
        super().on_response_complete()

    def _limit_head(self) -> None:
        """Close the connection unless another request starts in time: uvicorn creates a new `cycle` for each."""
        self.loop.call_later(self.head_timeout, self._close_unless_started, self.cycle)

    def _close_unless_started(self, previous: Any) -> None:
        if self.cycle is previous:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        del msg  # uvicorn's is plain text
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            body = bytes(ApiError("malformed", "this is not HTTP, or its head is too large").response().body)
            head = f"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            self.transport.write(head.encode() + b"Connection: close\r\n\r\n" + body)
        # Else in the middle of a response, where a client could not know where this one begins.
        self.transport.close()
