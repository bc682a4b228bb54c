"""Bytes on a socket that bend the rules of HTTP/1.1: each is refused, and never taken for a second request."""

import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from serve_helpers import Process, everything, process

pytestmark = pytest.mark.slow

TOKEN = b"0123456789abcdef"
HOST = b"Host: 127.0.0.1\r\n"
CLOSE = b"Connection: close\r\n"
SECRET = b"Authorization: Bearer " + TOKEN + b"\r\n"
POST = b"POST /v1/predict HTTP/1.1\r\nContent-Type: application/json\r\n" + HOST + SECRET
CHUNKED = POST + CLOSE + b"Transfer-Encoding: chunked\r\n\r\n"
HEALTH = b"GET /healthz HTTP/1.1\r\n" + HOST
MODEL = b"GET /v1/model HTTP/1.1\r\n" + HOST + SECRET + CLOSE + b"\r\n"
LAST = b"0\r\n\r\n"


def get(target: bytes, headers: bytes = b"") -> bytes:
    return b"GET " + target + b" HTTP/1.1\r\n" + HOST + CLOSE + headers + b"\r\n"


def chunk(size: bytes) -> bytes:
    return CHUNKED + size + b"\r\n{}\r\n" + LAST


# The bytes, and the statuses of the answers; 422 is the answer to the body {}.
PROBES: dict[str, tuple[bytes, list[int]]] = {
    "extension": (chunk(b'2;a="b;c"'), [422]),
    "extension of 100 kB": (chunk(b"2;a=" + b"b" * 100_000), [400]),
    "extension of 5 MB": (chunk(b"2;a=" + b"b" * 5_000_000), [400]),
    "many extensions": (CHUNKED + (b"1;a=" + b"b" * 20_000 + b"\r\n{\r\n") * 20 + LAST, [400]),
    "extension with a line feed": (chunk(b"2;\nxx") + MODEL, [400]),
    "size in 17 digits": (chunk(b"0" * 16 + b"2"), [422]),
    "size in 21 digits": (chunk(b"0" * 20 + b"2"), [400]),
    "size in 4000 digits": (chunk(b"f" * 4000), [400]),
    **{f"size {size!r}": (chunk(size), [400]) for size in (b"0x2", b"-1", b"+2", b" 2", b"1_0", b"", b"g")},
    "no line end after a chunk": (CHUNKED + b"2\r\n{}xx" + LAST, [400]),
    "last chunk first": (CHUNKED + LAST + b"2\r\n{}\r\n" + LAST, [400]),
    "last chunk 000": (CHUNKED + b"2\r\n{}\r\n000\r\n\r\n", [422]),
    "a megabyte of single bytes": (CHUNKED + b"1\r\n \r\n" * 170_000 + LAST, [400]),
    "trailers": (CHUNKED + b"2\r\n{}\r\n0\r\nX: y\r\nAuthorization: Bearer z\r\n\r\n", [422]),
    "a long trailer": (CHUNKED + b"2\r\n{}\r\n0\r\nX: " + b"y" * 100_000 + b"\r\n\r\n", [400]),
    "many trailers": (CHUNKED + b"2\r\n{}\r\n0\r\n" + b"X: y\r\n" * 30_000 + b"\r\n", [400]),
    "a request as a trailer": (CHUNKED + b"2\r\n{}\r\n0\r\n" + MODEL, [400]),
    "length and chunks": (POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n" + LAST + MODEL, [400]),
    "chunks and length": (POST + b"Transfer-Encoding: chunked\r\nContent-Length: 300\r\n\r\n" + LAST + MODEL, [400]),
    "two lengths": (POST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{} ", [400]),
    "a length twice": (POST + CLOSE + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}", [422]),
    **{
        f"length {length!r}": (POST + b"Content-Length: " + length + b"\r\n\r\n{}", [400])
        for length in (b"2, 3", b"+2", b"-1", b"0x2", b"", b"2 2", b"9" * 25, b"9" * 5000, b"\xd9\xa2")
    },
    "length of 19 digits": (POST + b"Content-Length: " + b"9" * 19 + b"\r\n\r\n{}", [413]),
    **{
        f"encoding {name!r}": (POST + b"Transfer-Encoding: " + name + b"\r\n\r\n2\r\n{}\r\n" + LAST + MODEL, [400])
        for name in (
            b"gzip, chunked",
            b"chunked, gzip",
            b"gzip",
            b"identity",
            b"xchunked",
            b"\x0bchunked",
            b"chunked\0",
        )
    },
    "encoding twice": (POST + b"Transfer-Encoding: chunked\r\n" * 2 + b"\r\n2\r\n{}\r\n" + LAST, [400]),
    "space before a colon": (POST + b"Transfer-Encoding : chunked\r\n\r\n2\r\n{}\r\n" + LAST, [400]),
    "HTTP/1.0 with chunks": (CHUNKED.replace(b"1.1", b"1.0").replace(b"close", b"keep-alive") + LAST + MODEL, [400]),
    "a request as the body of another": (HEALTH + CLOSE + b"Content-Length: %d\r\n\r\n" % len(MODEL) + MODEL, [200]),
    "a request as a refused body": (
        POST.replace(SECRET, b"") + b"Content-Length: %d\r\n\r\n" % len(MODEL) + MODEL + get(b"/healthz"),
        [401, 200],
    ),
    "10 at once": ((HEALTH + b"\r\n") * 9 + get(b"/healthz"), [200] * 10),
    "1000 at once": ((HEALTH + b"\r\n") * 999 + get(b"/healthz"), [200] * 1000),
    "HTTP/0.9": (b"GET /\r\n\r\n", [400]),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0", [421, 400]),
    "HTTP/1.10": (b"GET /healthz HTTP/1.10\r\n" + HOST + b"\r\n", [400]),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500), [400]),
    **{
        f"head {line!r}": (HEALTH + line + b"\r\n" + CLOSE + b"\r\n", [400])
        for line in (b"X: a\0b", b"X\0: a", b"X: a\rb", b"X: a\r", b"X", b": a", b"X Y: a", b"Host: example.org")
    },
    "NUL in the address": (get(b"/he\0althz"), [400]),
    "bare line feeds": (get(b"/healthz").replace(b"\r\n", b"\n"), [200]),
    "bare carriage returns": (get(b"/healthz").replace(b"\r\n", b"\r") + b"\r\n\r\n", [400]),
    "empty lines first": (b"\r\n" * 50_000 + get(b"/healthz"), [400]),
    "folded line": (get(b"/healthz", b"X: a\r\n b\r\n"), [200]),
    "folded line first": (b"GET /healthz HTTP/1.1\r\n X: a\r\n" + HOST + b"\r\n", [400]),
    "folded token": (get(b"/v1/model", b"X: a\r\n " + SECRET), [401]),
    "two tokens": (get(b"/v1/model", b"Authorization: Bearer x\r\n" + SECRET), [401]),
    "expectation without a body": (POST + CLOSE + b"Expect: 100-continue\r\n\r\n", [100, 400]),
    "expectation of a body that never comes": (
        POST + CLOSE + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n",
        [100, 408],
    ),
    "lower-case method": (b"get" + get(b"/healthz")[3:], [405]),
    "long method": (b"A" * 20_000 + get(b"/healthz"), [405]),
    "OPTIONS *": (b"OPTIONS" + get(b"*", SECRET)[3:], [404]),
    "CONNECT": (b"CONNECT" + get(b"127.0.0.1:80", SECRET)[3:], [404]),
    **{
        # What is nowhere is not there with the token either.
        f"address {target!r}": (get(target, SECRET if status == 404 else b""), [status])
        for target, status in (
            (b"http://127.0.0.1/v1/model", 404),
            (b"http://example.org/healthz", 404),
            (b"//v1/model", 404),
            (b"//metrics", 401),
            (b"/metrics%0A", 400),
            (b"/%76%31/model", 401),
            (b"/v1/../v1/model", 401),
            (b"/page.css/../v1/model", 404),
            (b"/page.css%00", 400),
            (b"/%00", 400),
            (b"/../../etc/passwd", 404),
            (b"/%2e%2e/%2e%2e/etc/passwd", 404),
            (b"/page.css/..%2f..%2fapi.py", 404),
            (b"/%zz%ff", 404),
            (b"/\xc3\xbc", 400),
        )
    },
    **{
        f"example {number[:9]!r}": (get(b"/v1/examples/" + number, SECRET), [404])
        for number in (b"-1", b"9" * 9, b"9" * 5000, b"%D9%A2", b"1.0", b"1e3", b"0x1")
    },
    **{
        f"range {value[:9]!r}": (get(b"/page.css", b"Range: " + value + b"\r\n"), [200])
        for value in (b"bytes=a-b", b"bytes=" + b"9" * 6000 + b"-", b"bytes=" + b"0-0," * 4000 + b"1-1", b"bytes=9-1")
    },
}


@pytest.fixture(scope="module")
def server() -> Iterator[Process]:
    """A server that, at the end, has written nothing of all this into its log, and is no larger than before."""
    limits = {"upload_bytes": 1_300_000, "uploads_bytes": 2_000_000, "upload_timeout": 1.0, "head_timeout": 1.0}
    with process(token=TOKEN.decode(), **limits) as started:
        started.raw(get(b"/healthz"))
        before = _peak(started)
        yield started
        assert started.running.poll() is None
        assert _peak(started) - before < 100_000
        assert started.stop() == (0, "")


def _peak(server: Process) -> int:
    """The largest memory so far, in KiB."""
    status = Path(f"/proc/{server.running.pid}/status")
    return int(re.findall(r"VmHWM:\s+(\d+)", status.read_text())[0]) if status.exists() else 0


@pytest.mark.parametrize("probe", PROBES)
def test_probe(server: Process, probe: str) -> None:
    sent, statuses = PROBES[probe]
    with server.connect() as connection:
        with suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(sent)
        answer = everything(connection)
    assert [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+) ", answer)] == statuses
    assert answer.count(b'{"error":{"code":"') == sum(status >= 400 for status in statuses)
    assert b'"class_names"' not in answer  # of the model
    assert b" 200 " in server.raw(get(b"/healthz"))


def test_tiny_chunks_do_not_hold_up_other_clients(server: Process) -> None:
    with server.connect() as attack:
        attack.setblocking(False)
        with suppress(BlockingIOError, ConnectionError):
            attack.sendall(CHUNKED + b"1\r\n \r\n" * 300_000)
        began = time.monotonic()
        assert b" 200 " in server.raw(get(b"/healthz"))
        assert time.monotonic() - began < 2
