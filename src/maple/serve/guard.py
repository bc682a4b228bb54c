"""The door: who may ask, how much they may send, and what every answer carries. Around the application, in ASGI."""

import asyncio
import hashlib
import hmac
import logging
import re
from collections.abc import Iterable
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from maple.serve.capacity import Capacity, Lease
from maple.serve.limits import Limits
from maple.serve.problems import Problem, busy

logger = logging.getLogger(__name__)

API = "/v1/"
LEASE = "maple.lease"
"""Where in a request's scope its share of the uploads lies."""
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})

_PAGE_POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob: data:",
        "connect-src 'self'",
        *(f"{what} 'none'" for what in ("base-uri", "form-action", "frame-ancestors")),
    ]
)
_HEADERS = {
    "Content-Security-Policy": _PAGE_POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cache-Control": "no-store",
}
_HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[^\s:@/\[\]]+)(:[0-9]*)?")
_SMALL = 64 * 1024
_DRAIN_SECONDS = 5.0


class Guard:
    """Passes on what may pass, with its body already whole, and answers the rest in words.

    Args:
        token: what `/v1/...` may only be asked with; None for no such thing.
        hosts: the names that requests may address this server by (DNS rebinding brings others); None for any.
    """

    def __init__(
        self, app: ASGIApp, limits: Limits, *, token: str | None = None, hosts: Iterable[str] | None = None
    ) -> None:
        self._app = app
        self._limits = limits
        self._token = None if token is None else _digest(token.encode())
        self._hosts = None if hosts is None else frozenset(host.lower() for host in hosts)
        self._uploads = Capacity(limits.uploads_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or hand on the events of the server's life."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        visit = _Visit(scope, receive, send)
        lease = self._uploads.lease()
        try:
            await self._visit(visit, lease)
        except _GoneError:
            return
        except Problem as problem:
            await visit.refuse(problem)
        except Exception as error:
            logger.error("%s %s failed", scope["method"], scope["path"], exc_info=error)
            if not visit.answered:
                await visit.refuse(Problem("internal", "the server failed; its log says why"))
        finally:
            if not lease.handed_on:
                lease.release()

    async def _visit(self, visit: "_Visit", lease: Lease) -> None:
        scope = visit.scope
        try:
            self._admit(scope)
        except Problem:
            await visit.drain(2 * self._limits.upload_bytes)
            raise
        if scope["path"].startswith(API):
            body = await self._upload(visit, lease)
        else:
            await visit.drain(_SMALL)
            body = b""
        # HEAD is GET without the body, which the server leaves out.
        inner = {**scope, "method": "GET" if scope["method"] == "HEAD" else scope["method"], LEASE: lease}
        await self._app(inner, visit.replay(body), visit.send)

    def _admit(self, scope: Scope) -> None:
        """Raise a Problem where this request may not be made here."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self._hosts is not None and _host_name(host) not in self._hosts:
            raise Problem(
                "wrong_host",
                f"this server is not addressed as {host[:100]!r}, but as {', '.join(sorted(self._hosts))}; "
                "start it with --allow-host to add a name",
            )
        origin = headers.get("origin")
        if origin is not None and not self._same_origin(origin, host):
            raise Problem("cross_origin", f"pages of {origin[:100]!r} may not ask this server")
        if self._token is not None and scope["path"].startswith(API):
            kind, _, given = headers.get("authorization", "").partition(" ")
            given_digest = _digest(given.strip().encode("latin-1", "replace"))
            if not hmac.compare_digest(given_digest, self._token) or kind.lower() != "bearer":
                raise Problem(
                    "unauthorized",
                    "a token is needed: send the header 'Authorization: Bearer TOKEN' with the server's token",
                    headers={"WWW-Authenticate": "Bearer"},
                )

    def _same_origin(self, origin: str, host: str) -> bool:
        try:
            asking = urlsplit(origin).netloc.lower()
        except ValueError:
            return False
        if asking == host.lower():
            return True
        named = (self._hosts or frozenset()) - LOOPBACK
        return _host_name(asking) in named

    async def _upload(self, visit: "_Visit", lease: Lease) -> bytes:
        """The whole body, counted while it comes.

        Raises:
            Problem: it is too large, too slow, or more than there is room for.
        """
        limit = self._limits.upload_bytes
        too_large = Problem(
            "too_large", f"the request is larger than the allowed {limit:,} bytes; send fewer or smaller pictures"
        )
        if visit.declared > limit:
            await visit.drain(2 * limit)
            raise too_large
        full = busy(f"uploads of {self._limits.uploads_bytes:,} bytes are held already")
        body = bytearray()
        try:
            async with asyncio.timeout(self._limits.upload_timeout):
                while not visit.whole:
                    chunk = await visit.read()
                    if len(body) + len(chunk) > limit:
                        raise too_large
                    lease.take(len(chunk), full)
                    body += chunk
        except TimeoutError:
            raise Problem(
                "upload_timeout", f"the request did not arrive within {self._limits.upload_timeout:g} seconds"
            ) from None
        except Problem:
            body.clear()
            lease.release()
            await visit.drain(2 * limit)
            raise
        return bytes(body)


class _GoneError(Exception):
    """The client has closed the connection."""


class _Visit:
    """One request while its body is read, and the answer with what every answer carries."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        self._receive = receive
        self._send = send
        self.answered = False
        headers = Headers(scope=scope)
        length = headers.get("content-length", "")
        self.declared = int(length) if length.isascii() and length.isdecimal() else 0
        self.whole = not self.declared and "transfer-encoding" not in headers
        self._expects = "expect" in headers

    async def read(self) -> bytes:
        """The next part of the body."""
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise _GoneError
        self.whole = not message.get("more_body", False)
        return bytes(message.get("body", b""))

    async def drain(self, limit: int) -> None:
        """Read and forget what else is sent, so that the client, which may still be writing, can read the answer.

        Only up to a limit, and not where it is certain to be passed or where the client waits to be asked.
        """
        if self._expects or self.declared > limit:
            return
        count = 0
        try:
            async with asyncio.timeout(_DRAIN_SECONDS):
                while not self.whole and count <= limit:
                    count += len(await self.read())
        except TimeoutError:
            return

    async def send(self, message: Message) -> None:
        """Send on, with the headers of every answer."""
        if message["type"] == "http.response.start":
            self.answered = True
            headers = MutableHeaders(scope=message)
            for name, value in _HEADERS.items():
                headers.setdefault(name, value)
            if not self.whole:
                headers["Connection"] = "close"
        await self._send(message)

    async def refuse(self, problem: Problem) -> None:
        """Answer with a problem."""
        response = JSONResponse(problem.answer(), problem.status, problem.all_headers())
        await response(self.scope, self._receive, self.send)

    def replay(self, body: bytes) -> Receive:
        """The body in one message, then what comes after it."""
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            return messages.pop() if messages else await self._receive()

        return receive


def host_of(address: str) -> str:
    """A host as URLs write it: IPv6 addresses in brackets."""
    return f"[{address}]" if ":" in address else address


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return False


def _host_name(host: str) -> str:
    """The name in a Host header, without port and brackets; empty where it is none."""
    found = _HOST.fullmatch(host.lower())
    return "" if found is None else found["name"].strip("[]").removesuffix(".")


def _digest(value: bytes) -> bytes:
    # Compared in place of the tokens, whose lengths would otherwise tell.
    return hashlib.sha256(value).digest()
