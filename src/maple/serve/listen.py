"""Listen on a socket and run the application until SIGINT or SIGTERM."""

import asyncio
import errno
import logging
import signal
import socket
from collections.abc import Callable
from ipaddress import ip_address
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from maple.errors import ConfigError
from maple.serve.limits import Limits
from maple.serve.middleware import LOOPBACK
from maple.serve.responses import ApiError

MIN_TOKEN = 16


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


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return False


def check_token(token: str | None) -> None:
    """Refuse a token that could be guessed, or that HTTP cannot carry.

    Raises:
        ConfigError: it is short, or contains anything but printable ASCII without spaces.
    """
    if token is None:
        return
    command = 'create one with: python -c "import secrets; print(secrets.token_urlsafe())"'
    if len(token) < MIN_TOKEN:
        raise ConfigError(f"the token has {len(token)} characters; it must have at least {MIN_TOKEN}: {command}")
    if not all("!" <= char <= "~" for char in token):
        raise ConfigError(f"the token contains a space or a character that HTTP cannot carry; {command}")


def require_token(listening: socket.socket, host: str, token: str | None, *, anyone: bool) -> None:
    """Refuse to serve other machines without a token, unless `anyone` may use the server.

    Raises:
        ConfigError: other machines reach the socket, and there is no token.
    """
    if token is None and not anyone and not is_loopback(listening.getsockname()[0]):
        raise ConfigError(
            f"--host {host} lets other machines use this server; set a token in the environment variable MAPLE_TOKEN "
            "(or with --token), or allow anyone with --no-token"
        )


def allowed_hosts(listening: socket.socket, host: str, more: list[str]) -> list[str] | None:
    """The names by which requests may address the server; None for any, if other machines reach it.

    Raises:
        ConfigError: a name of `more` is not a host name.
    """
    for name in more:
        if not name or (any(char in name for char in "/:@*, ") and not is_loopback(name)):
            raise ConfigError(f"--allow-host {name!r} is not a host name; give one such as example.org, without port")
    if not is_loopback(listening.getsockname()[0]) and not more:
        return None
    return [*LOOPBACK, host, *more]


def address_of(listening: socket.socket, host: str) -> str:
    """The server's URL."""
    return f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"


def run(app: ASGIApp, listening: socket.socket, limits: Limits, *, started: Callable[[], None]) -> None:
    """Serve until SIGINT or SIGTERM; open requests are then finished, within the time that a response may take.

    Args:
        started: called once requests are answered.

    Example::

        with bind("127.0.0.1", 0) as listening:
            run(create_app(predictor), listening, Limits(), started=lambda: print(address_of(listening, "127.0.0.1")))
    """
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
    asyncio.run(_Server(config, started).serve(sockets=[listening]))


class _Server(uvicorn.Server):
    """A server that is expected to be stopped by a signal, and so ends with status 0."""

    def __init__(self, config: uvicorn.Config, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_started = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_started()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        del frame
        # As uvicorn does, but without recording the signal: it would raise a recorded one again after the shutdown.
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        self.should_exit = True


class HeadTimeoutProtocol(H11Protocol):
    """HTTP/1.1 with a time limit for the head of each request, and errors in JSON.

    uvicorn only limits the time between requests: a client that sends a head byte by byte would hold its connection
    forever. Bodies are limited by `GuardMiddleware`.
    """

    head_timeout: float
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._restart_timer()

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_timer()

    def on_response_complete(self) -> None:
        # First, because the next request may have arrived already: it starts here, and stops the timer.
        self._restart_timer()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _restart_timer(self) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(self.head_timeout, self.transport.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def send_400_response(self, msg: str) -> None:
        del msg  # uvicorn's is plain text
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            # In the middle of a response, a client could not tell where this one begins.
            self.transport.close()
            return
        body = ApiError("malformed", "this is not HTTP, or its head is too large").response().body
        head = f"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        self.transport.write(head.encode() + b"Connection: close\r\n\r\n" + bytes(body))
        self.transport.close()
