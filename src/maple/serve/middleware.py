"""ASGI middleware: host, origin and token checks, request size limits, security headers."""

import asyncio
import hashlib
import hmac
import logging
import re
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from itertools import chain
from urllib.parse import urlsplit

from fastapi.security import HTTPBearer
from starlette._utils import get_route_path
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from maple.serve.limits import Limits
from maple.serve.monitoring import Metrics
from maple.serve.responses import ApiError

logger = logging.getLogger(__name__)

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
BEARER = HTTPBearer(scheme_name="token", auto_error=False)
"""Reads the token of a request; as a dependency of the routes, it describes the token in OpenAPI."""

_SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cache-Control": "no-store",
}
_HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[^\s:@/\[\]]+)(:[0-9]*)?")
_DRAIN_SECONDS = 5.0
_STALLED_SECONDS, _STALLED_BYTES = 1.0, 32 * 1024
"""A body of which fewer bytes arrive in this time makes room for others when all uploads are at their limit."""


class Capacity:
    """A bounded total of bytes or images. For the event loop's thread only.

    Args:
        full: the message for requests that would exceed the total, with the fields `used` and `total`.
    """

    def __init__(self, total: int, full: str) -> None:
        self.total = total
        self.full = full
        self.used = 0

    def take(self, count: int) -> None:
        """Take `count` more, or raise the ApiError `busy` if that would exceed the total."""
        if self.used + count > self.total:
            reason = self.full.format(used=self.used, total=self.total)
            raise ApiError("busy", f"the server is busy: {reason}; retry in a moment")
        self.used += count

    def release(self, count: int) -> None:
        self.used -= count


class GuardMiddleware:
    """Refuses requests that may not be made here, bounds their bodies, and adds security headers to every response.

    These checks are made here because Starlette's `TrustedHostMiddleware` and body limit and uvicorn's
    `limit_concurrency` answer in plain text, with other statuses than the API documents.

    Args:
        token: required for every path that is not one of `public`; None for no token.
        hosts: names by which requests may address this server, against DNS rebinding; None for any.
        url_prefix: path under which a proxy offers the server, "/maple". Requests are accepted with and without it.
    """

    def __init__(
        self,
        app: ASGIApp,
        limits: Limits,
        metrics: Metrics,
        *,
        public: Collection[str],
        token: str | None = None,
        hosts: Iterable[str] | None = None,
        url_prefix: str = "",
    ) -> None:
        self._app = app
        self._limits = limits
        self._metrics = metrics
        self._public = public
        self._url_prefix = url_prefix
        self._token = None if token is None else _digest(token)
        self._hosts = None if hosts is None else frozenset(host.lower() for host in hosts)
        self._uploads = Capacity(limits.uploads_bytes, "uploads hold {used:,} of {total:,} bytes")
        self._arriving: set[Exchange] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        exchange = Exchange(scope, receive, send, self._limits, self._uploads, self._arriving)
        # The path that is routed is the one that is checked and counted: without what another application mounts this
        # one under, and without the prefix.
        path, mounted, app = get_route_path(scope), scope.get("root_path", ""), self._app
        if self._url_prefix and path == self._url_prefix:
            # The page's links are relative to its folder.
            query = f"?{scope['query_string'].decode('latin-1')}" if scope["query_string"] else ""
            path, app = "/", RedirectResponse(f"{mounted}{self._url_prefix}/{query}", 308)
        elif self._url_prefix and path.startswith(f"{self._url_prefix}/"):
            path = path.removeprefix(self._url_prefix)
            scope = {**scope, "path": mounted + path}
        # HEAD is answered as GET; uvicorn leaves out the body.
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        # Ranges are ignored, as a server may: Starlette would answer invalid ones itself, in plain text.
        lines = [line for line in scope["headers"] if line[0] != b"range"]
        inner = {**scope, "headers": lines, "method": method, "state": {**scope.get("state", {}), "exchange": exchange}}
        try:
            await self._check(scope, path)
            await app(inner, exchange.receive, exchange.send)
        except ApiError as error:
            await error.response()(scope, receive, exchange.send)
        except Exception as error:
            logger.error("%s %s failed", scope["method"], scope["path"], exc_info=error)
            if exchange.status is None:
                response = ApiError("internal", "the server failed; see its log").response()
                await response(scope, receive, exchange.send)
        finally:
            self._arriving.discard(exchange)
            self._uploads.release(exchange.held)
            if exchange.status is not None:
                self._metrics.record(path, exchange.status, time.monotonic() - started)

    async def _check(self, scope: Scope, path: str) -> None:
        """Check size, path, host, origin and token, before anything of the body is read.

        A dependency of a FastAPI route could check the token only after the body has been read.
        """
        headers = Headers(scope=scope)
        # Servers may leave out the raw path.
        if len(scope.get("raw_path") or scope["path"]) + len(scope["query_string"]) > self._limits.url_bytes:
            raise url_too_long(self._limits)
        if not path.isprintable():
            # Patterns of routes would ignore a line feed at the end.
            raise ApiError("malformed", "the path contains a character that cannot be printed; leave it out")
        lines = scope["headers"]
        if len(lines) > self._limits.headers or sum(map(len, chain(*lines))) > self._limits.head_bytes:
            raise head_too_large(self._limits)
        if "transfer-encoding" in headers and "content-length" in headers:
            # A proxy that believes the other one of them would take the rest of this body for a request.
            raise ApiError(
                "malformed",
                "the request has both Content-Length and Transfer-Encoding; send one of them",
                headers={"Connection": "close"},
            )
        host = headers.get("host", "")
        if self._hosts is not None and _host_name(host) not in self._hosts:
            raise ApiError(
                "wrong_host",
                f"this server is not addressed as {host[:100]!r}, but as {', '.join(sorted(self._hosts))}; "
                "start it with --allow-host to add a name",
            )
        origin = headers.get("origin")
        if origin is not None and not self._is_same_origin(origin, host):
            raise ApiError("cross_origin", f"pages of {origin[:100]!r} may not use this server")
        if self._token is not None and path not in self._public:
            credentials = await BEARER(HTTPConnection(scope))
            if credentials is None or not hmac.compare_digest(_digest(credentials.credentials.strip()), self._token):
                raise ApiError(
                    "unauthorized",
                    "a token is required: send the header 'Authorization: Bearer TOKEN' with the server's token",
                    headers={"WWW-Authenticate": "Bearer"},
                )

    def _is_same_origin(self, origin: str, host: str) -> bool:
        try:
            netloc = urlsplit(origin).netloc.lower()
        except ValueError:
            return False
        # Behind a proxy, the page's origin is a name of --allow-host, whatever port the proxy passes on.
        return netloc == host.lower() or _host_name(netloc) in (self._hosts or frozenset()) - LOOPBACK


class Exchange:
    """One request and its response: bounds the body while it is read, drains the rest of it, adds the headers.

    Attributes:
        status: of the response, once that has started.
        held: bytes taken from `uploads`, given back when the request ends unless `take_over` is called.
    """

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        limits: Limits,
        uploads: Capacity,
        arriving: "set[Exchange]",
    ) -> None:
        self._receive, self._send, self._limits = receive, send, limits
        self._uploads, self._arriving = uploads, arriving
        self._advanced = asyncio.get_running_loop().time()  # when the body last proved not to be stalled
        self._advanced_bytes = 0
        self._deadline = self._advanced + limits.upload_timeout
        self._timeout = asyncio.timeout_at(self._deadline)
        self._given_up = False
        self.status: int | None = None
        self.held = 0
        headers = Headers(scope=scope)
        length = headers.get("content-length", "")
        self._declared = int(length) if length.isascii() and length.isdecimal() else 0
        self._received = 0
        self._complete = not self._declared and "transfer-encoding" not in headers
        self._expects_continue = "expect" in headers

    async def receive(self) -> Message:
        """The next part of the body; after the body, wait for the client to disconnect."""
        if self._complete:
            return await self._receive()
        limit = self._limits.upload_bytes
        too_large = ApiError("too_large", f"the request exceeds {limit:,} bytes; send fewer or smaller images")
        if self._declared > limit:
            raise too_large
        self._arriving.add(self)
        try:
            async with asyncio.timeout_at(self._deadline) as self._timeout:
                message = await self._next_part()
        except TimeoutError:
            if not self._given_up:
                seconds = self._limits.upload_timeout
                raise ApiError("upload_timeout", f"the request did not arrive within {seconds:g} seconds") from None
        if self._complete:
            self._arriving.discard(self)
        if self._given_up:
            raise ApiError("busy", "the server is busy, and the request stopped arriving; retry in a moment")
        if message["type"] == "http.disconnect":
            raise ApiError("malformed", "the client disconnected before the request was complete")
        if self._received > limit:
            raise too_large
        count = len(message.get("body", b""))
        now = asyncio.get_running_loop().time()
        if self._received - self._advanced_bytes >= _STALLED_BYTES:
            self._advanced, self._advanced_bytes = now, self._received
        if self._uploads.used + count > self._uploads.total:
            self._make_room(count, now)
        self._uploads.take(count)
        self.held += count
        return message

    def _make_room(self, count: int, now: float) -> None:
        """Give up bodies that have stalled, the largest first, until `count` bytes more can be held."""
        stalled = [other for other in self._arriving - {self} if now - other._advanced > _STALLED_SECONDS]
        for other in sorted(stalled, key=lambda other: other.held, reverse=True):
            if self._uploads.used + count <= self._uploads.total:
                break
            other._given_up = True
            self._uploads.release(other.held)
            other.held = 0
            if not other._timeout.expired():
                with suppress(RuntimeError):  # between two parts; the next then finds that it is given up
                    other._timeout.reschedule(now)

    def take_over(self) -> Callable[[], None]:
        """Keep what is held until the returned function is called, for work that may outlive the request."""
        held, self.held = self.held, 0
        return lambda: self._uploads.release(held)

    async def send(self, message: Message) -> None:
        """Send a part of the response; before the first, drain the request and add the security headers."""
        if message["type"] == "http.response.start":
            await self._drain()
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            for name, value in _SECURITY_HEADERS.items():
                headers.setdefault(name, value)
            del headers["Accept-Ranges"]  # of StaticFiles
            if not self._complete:
                headers["Connection"] = "close"
        await self._send(message)

    async def _drain(self) -> None:
        """Read and discard the rest of a refused body: a client that is still writing would not read the response.

        Only a bounded amount, and not if the client waits for "100 Continue", or announces more than that.
        """
        limit = 2 * self._limits.upload_bytes
        if self._given_up or self._expects_continue or self._declared > limit:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(_DRAIN_SECONDS):
                while not self._complete and self._received <= limit:
                    await self._next_part()

    async def _next_part(self) -> Message:
        message = await self._receive()
        self._received += len(message.get("body", b""))
        self._complete = not message.get("more_body", False)
        return message


def url_too_long(limits: Limits) -> ApiError:
    return ApiError(
        "url_too_long", f"the address exceeds {limits.url_bytes:,} bytes; send names and images in the body"
    )


def head_too_large(limits: Limits) -> ApiError:
    allowed = f"{limits.headers} headers of {limits.head_bytes:,} bytes together"
    return ApiError("head_too_large", f"the head of the request exceeds {allowed}; send fewer or shorter headers")


def _host_name(host: str) -> str:
    """The name in a Host header, without port and brackets; empty if it is malformed."""
    match = _HOST.fullmatch(host.lower())
    return "" if match is None else match["name"].strip("[]").removesuffix(".")


def _digest(token: str) -> bytes:
    # Digests are compared, not the tokens: the time of that would reveal the token's length.
    return hashlib.sha256(token.encode("latin-1", "replace")).digest()
