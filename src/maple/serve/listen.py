"""Listen on a socket and run the application until SIGINT or SIGTERM."""

import asyncio
import errno
import logging
import signal
import socket
import sys
from http import HTTPStatus
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from maple.errors import ConfigError
from maple.serve.limits import Limits
from maple.serve.middleware import head_too_large, url_too_long
from maple.serve.responses import ApiError

_STOP_SECONDS = 2.0
_LINGER_SECONDS = 1.0
_READ_BYTES = 32 * 1024
"""What is parsed at once, while other clients wait: 256 KiB of tiny chunks, as asyncio reads, take seconds."""


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
    family, kind, protocol, _, address = addresses[0]
    # Accepted sockets inherit the protocol, and asyncio sets TCP_NODELAY only where it is given: else an answer that
    # follows another on its connection waits for the client's delayed acknowledgement (40 ms).
    listening = socket.socket(family, kind, protocol)
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
        http=type("Protocol", (BoundedProtocol,), {"limits": limits}),
        ws="none",
        lifespan="on",
        log_config=None,
        log_level=logging.CRITICAL,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=int(limits.timeout) + 1,
        h11_max_incomplete_event_size=limits.head_bytes,
    )
    asyncio.run(_Server(config).serve(sockets=[listening]))


class _Server(uvicorn.Server):
    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop as uvicorn does, but without recording the signal, which it would raise again after the shutdown."""
        del frame
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True


class BoundedProtocol(H11Protocol):
    """HTTP/1.1 that waits for no client without limit, and refuses in JSON.

    uvicorn limits the time between requests, and the size of a head that arrives in pieces. It waits without limit for
    the rest of a head and for a client to read, accepts any number of connections (its `limit_concurrency` counts only
    those that have sent a request), and waits for half a request when it stops. Complete heads, and bodies, are limited
    by `GuardMiddleware`.
    """

    limits: Limits
    heard = 0.0  # when the client last sent anything
    refused = False
    framing = 0  # bytes of chunk sizes, extensions and trailers of the request, beyond those of its body
    unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        transport.max_size = _READ_BYTES
        transport.set_write_buffer_limits(0)  # `pause_writing` and `resume_writing` then report every unread byte
        self.heard = self.loop.time()
        self._limit_head()
        if len(self.connections) > self.limits.connections:
            others = [other for other in self.connections if isinstance(other, BoundedProtocol) and other is not self]
            if waiting := [other for other in others if other.waits_for_client]:
                silent = min(waiting, key=lambda other: other.heard)
                silent.transport.abort()
                self.connections.discard(silent)  # as uvicorn does a little later
            else:
                self._refuse(ApiError("busy", f"the server is busy: {len(others)} connections are open; retry later"))

    @property
    def waits_for_client(self) -> bool:
        """Whether nothing happens here until the client sends or reads something."""
        cycle = self.cycle
        return cycle is None or cycle.response_complete or cycle.more_body or self.flow.write_paused

    def data_received(self, data: bytes) -> None:
        self.heard = self.loop.time()
        if self.refused:
            return
        cycle, before = self.cycle, 0 if self.cycle is None else len(self.cycle.body)
        super().data_received(data)
        if cycle is not None and cycle is self.cycle and cycle.more_body and not cycle.response_complete:
            body = len(cycle.body) - before
            self.framing = max(0, self.framing + len(data) - 2 * body)
            if self.framing > self.limits.head_bytes and not self.refused:
                self._refuse(_framing_too_large(self.limits))

    def on_response_complete(self) -> None:
        # First, because the next request may have arrived already, and is then started by uvicorn's method.
        self._limit_head()
        self.framing = 0
        super().on_response_complete()

    def _limit_head(self) -> None:
        """Close the connection unless another request starts in time: uvicorn creates a new `cycle` for each."""
        self.loop.call_later(self.limits.head_timeout, self._close_unless_started, self.cycle)

    def _close_unless_started(self, previous: Any) -> None:
        if self.cycle is previous:
            self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.unread = self.loop.call_later(self.limits.read_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._forget_unread()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_unread()
        super().connection_lost(exc)

    def _forget_unread(self) -> None:
        if self.unread is not None:
            self.unread.cancel()
            self.unread = None

    def shutdown(self) -> None:
        """Finish the request in progress, but do not wait for a client to send the rest of one or to read."""
        if self.refused:
            self.transport.close()
        else:
            super().shutdown()
        self.loop.call_later(_STOP_SECONDS, self._stop_waiting)

    def _stop_waiting(self) -> None:
        if self not in self.connections:
            return
        if self.waits_for_client:
            self.transport.abort()
        else:
            self.loop.call_later(_STOP_SECONDS, self._stop_waiting)

    def send_400_response(self, msg: str) -> None:
        del msg  # uvicorn's is plain text
        # uvicorn calls this while it handles the error of h11, which knows whether the head was too large.
        if getattr(sys.exception(), "error_status_hint", 400) != 431:
            self._refuse(ApiError("malformed", "this is not HTTP"))
        elif self.cycle is not None and self.cycle.more_body:
            self._refuse(_framing_too_large(self.limits))
        elif b"\n" in self.conn.trailing_data[0]:
            self._refuse(head_too_large(self.limits))
        else:
            self._refuse(url_too_long(self.limits))

    def _refuse(self, error: ApiError) -> None:
        """Send an error, and close the connection when the client has had time to read it."""
        self.refused = True
        # Not in the middle of a response, where a client could not know where this one begins.
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            response = error.response()
            headers = {**response.headers, "connection": "close"}
            lines = [f"HTTP/1.1 {response.status_code} {HTTPStatus(response.status_code).phrase}"]
            lines += [f"{name}: {value}" for name, value in headers.items()]
            self.transport.write("\r\n".join(lines).encode() + b"\r\n\r\n" + bytes(response.body))
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        # A socket that is closed while the client still writes is reset, and the client may lose the response.
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.transport.resume_reading()
        self.loop.call_later(_LINGER_SECONDS, self.transport.close)


def _framing_too_large(limits: Limits) -> ApiError:
    allowed = f"{limits.head_bytes:,} bytes more than the body"
    return ApiError("malformed", f"the chunk sizes and trailers of the body exceed {allowed}; send larger chunks")
