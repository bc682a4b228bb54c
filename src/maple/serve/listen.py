"""From an application to a process that listens, and stops when it is told to."""

import asyncio
import contextlib
import errno
import json
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from maple.errors import ConfigError
from maple.serve.guard import LOOPBACK, Guard, host_of, is_loopback
from maple.serve.limits import Limits
from maple.serve.problems import Problem

MIN_TOKEN = 16


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to one address of `host`, not yet listening; port 0 is any free one.

    Raises:
        ConfigError: no such host, a port that is taken or may not be used.
    """
    if not 0 <= port <= 65535:
        raise ConfigError(f"port {port} is none; give one from 1 to 65535, or 0 for any free one")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
            0
        ]
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"host {host!r} cannot be resolved ({error}); give an address of this machine") from error
    listening = socket.socket(family, kind)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        listening.close()
        where = f"port {port} of {host}"
        if error.errno == errno.EADDRINUSE:
            advice = "choose another with --port, or --port 0 for any free one"
            raise ConfigError(f"{where} is in use by another program; {advice}") from error
        if error.errno == errno.EACCES:
            raise ConfigError(f"{where} may not be used by this user; choose one from 1024 to 65535") from error
        raise ConfigError(
            f"{where} cannot be listened on ({error.strerror}); give an address of this machine"
        ) from error
    return listening


def check_token(token: str | None) -> None:
    """Refuse a token that could be guessed, or that HTTP cannot carry.

    Raises:
        ConfigError: it is short, or holds something else than printable ASCII without spaces.
    """
    if token is None:
        return
    make = 'make one with: python -c "import secrets; print(secrets.token_urlsafe())"'
    if len(token) < MIN_TOKEN:
        raise ConfigError(f"the token has {len(token)} characters; it must have at least {MIN_TOKEN}: {make}")
    if not all("!" <= char <= "~" for char in token):
        raise ConfigError(f"the token holds a space or a character that HTTP cannot carry; {make}")


def allowed_hosts(listening: socket.socket, host: str, more: list[str]) -> list[str] | None:
    """The names that requests may address the server by; None for any, where others than this machine reach it.

    Raises:
        ConfigError: a name is none.
    """
    for name in more:
        if not name or (any(char in name for char in "/:@*, ") and not is_loopback(name)):
            raise ConfigError(f"--allow-host {name!r} is no host name; give one as in example.org, without port")
    if not is_loopback(listening.getsockname()[0]) and not more:
        return None
    return [*LOOPBACK, host, *more]


def require_token(listening: socket.socket, host: str, token: str | None, *, anyone: bool) -> None:
    """Refuse to serve other machines without a token, unless `anyone` may ask.

    Raises:
        ConfigError: as said.
    """
    if token is None and not anyone and not is_loopback(listening.getsockname()[0]):
        raise ConfigError(
            f"--host {host} lets other machines ask this one; set a token in the environment variable MAPLE_TOKEN "
            "(or with --token), or let anybody ask with --no-token"
        )


def address_of(listening: socket.socket, host: str) -> str:
    """The server's URL."""
    return f"http://{host_of(host)}:{listening.getsockname()[1]}"


def run(app: Guard, listening: socket.socket, limits: Limits, *, started: Callable[[], None]) -> None:
    """Serve until SIGINT or SIGTERM; what is under way is then finished, in at most the time an answer may take.

    Args:
        started: called once requests are answered.
    """
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # it tells of parts of bodies
    config = uvicorn.Config(
        app,
        http=_protocol(limits),
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
    server = _Server(config, started)
    asyncio.run(server.serve(sockets=[listening]))


class _Server(uvicorn.Server):
    """A server for which a signal to stop is its regular end, not an error."""

    def __init__(self, config: uvicorn.Config, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._tell = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._tell()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _protocol(limits: Limits) -> type[H11Protocol]:
    class Patient(H11Protocol):
        """Waits only so long for the head of a request, and says in JSON what is no HTTP."""

        _deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._wait_for_head()

        def handle_events(self) -> None:
            super().handle_events()
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop_waiting()

        def on_response_complete(self) -> None:
            # Before the next request, if it has come already, is begun there.
            self._wait_for_head()
            super().on_response_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)

        def _wait_for_head(self) -> None:
            self._stop_waiting()
            self._deadline = self.loop.call_later(limits.head_timeout, self.transport.close)

        def _stop_waiting(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def send_400_response(self, msg: str) -> None:
            del msg
            if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
                # An answer is under way: nobody knows where another would begin.
                self.transport.close()
                return
            problem = Problem("malformed", "this is not HTTP, or its head is too large")
            body = json.dumps(problem.answer()).encode()
            head = f"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            self.transport.write(head.encode() + b"Connection: close\r\n\r\n" + body)
            self.transport.close()

    return Patient
