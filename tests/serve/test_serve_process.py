"""A server in a process of its own, and clients that break the rules."""

import asyncio
import json
import signal
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from serve_helpers import Process, everything, expected, png, process, status_and_code

from maple.cli.serve import allowed_hosts, check_token, require_token
from maple.errors import ConfigError
from maple.serve import listen

HEAD = b"POST /v1/predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server() -> Iterator[Process]:
    limits = {"upload_bytes": 300_000, "uploads_bytes": 400_000, "upload_timeout": 1.0, "head_timeout": 1.0}
    with process(**limits) as started:
        yield started


@pytest.fixture(autouse=True)
def alive_and_empty(server: Process) -> Iterator[None]:
    """After every test the server answers, and holds nothing of what was sent."""
    yield
    assert server.running.poll() is None
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        body = b'{"images": ["' + b"A" * 299_000 + b'"]}'
        connection.sendall(HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        assert status_and_code(everything(connection)) == (422, "unreadable_image")


def form(content: bytes) -> tuple[bytes, bytes]:
    body = b'--x\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\n' + content + b"\r\n--x--\r\n"
    return b"multipart/form-data; boundary=x", body


def predict(server: Process, content: bytes) -> Any:
    kind, body = form(content)
    request = urllib.request.Request(f"{server.url}/v1/predict", body, {"Content-Type": kind.decode()})
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.load(answer)


def test_a_plain_client_is_answered(server: Process) -> None:
    (one,) = predict(server, png((200, 30, 30)))["predictions"]
    right = expected((200, 30, 30), [rank["class"] for rank in one["best"]])
    assert sum(right.values()) == pytest.approx(1)
    assert one["best"][0]["class"] == max(right, key=right.__getitem__)


def test_a_body_shorter_than_it_says_times_out(server: Process) -> None:
    answer = server.raw(HEAD + b"Content-Length: 1000\r\n\r\n" + b'{"images": []}')
    assert status_and_code(answer) == (408, "upload_timeout")
    with server.connect() as connection:
        connection.sendall(HEAD + b"Content-Length: 1000\r\n\r\n{")
        connection.shutdown(socket.SHUT_WR)
        assert everything(connection) == b""


def test_a_body_longer_than_it_says_is_not_a_second_request(server: Process) -> None:
    answer = server.raw(HEAD + b"Content-Length: 2\r\n\r\n{}" + b"x" * 1000 + b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 422 ")
    assert answer.count(b"HTTP/1.1 200") == 0


def test_large_bodies_are_refused_whether_announced_or_not(server: Process) -> None:
    announced = server.raw(HEAD + b"Content-Length: 9000000000\r\n\r\n" + b"x" * 1000)
    assert status_and_code(announced) == (413, "too_large")
    sent = server.raw(HEAD + b"Connection: close\r\nContent-Length: 500000\r\n\r\n", b"x" * 500_000)
    assert status_and_code(sent) == (413, "too_large")
    chunk = b"%x\r\n" % 100_000 + b"x" * 100_000 + b"\r\n"
    chunked = HEAD + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    assert status_and_code(server.raw(chunked, *[chunk] * 5, b"0\r\n\r\n")) == (413, "too_large")
    expecting = server.raw(HEAD + b"Expect: 100-continue\r\nContent-Length: 500000\r\n\r\n")
    assert status_and_code(expecting) == (413, "too_large")


def test_an_endless_body_ends(server: Process) -> None:
    with server.connect() as connection:
        connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        chunk = b"%x\r\n" % 60_000 + b"x" * 60_000 + b"\r\n"
        sent = 0
        try:
            while sent < 100_000_000:
                sent += connection.send(chunk)
        except (BrokenPipeError, ConnectionResetError):
            pass
        assert sent < 20_000_000


@pytest.mark.parametrize(
    "head",
    [
        b"Content-Length: -5\r\n\r\n",
        b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcde",
        b"Content-Length: abc\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\nzz\r\nhello\r\n",
        b"Transfer-Encoding: gzip\r\n\r\nhello",
    ],
)
def test_invalid_lengths(server: Process, head: bytes) -> None:
    assert status_and_code(server.raw(HEAD + head))[0] in (400, 501)


def test_invalid_http_is_reported_in_json(server: Process) -> None:
    for garbage in (b"hello\r\n\r\n", b"\x16\x03\x01\x02\x00" * 10 + b"\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n"):
        assert status_and_code(server.raw(garbage)) == (400, "malformed")


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize(
    ("start", "headers", "answer"),
    [
        (b"GET /", b"X-A: " + b"a" * 2_000_000 + b"\r\n", (431, "head_too_large")),
        (b"GET /", b"X-A: " + b"a" * 40_000 + b"\r\n", (431, "head_too_large")),
        (b"GET /", b"X: y\r\n" * 10_000, (431, "head_too_large")),
        (b"GET /", b"X: y\r\n" * 101, (431, "head_too_large")),
        (b"GET /" + b"a" * 9000, b"", (414, "url_too_long")),
        (b"GET /?" + b"a" * 2_000_000, b"", (414, "url_too_long")),
        (b"GET http://localhost/" + b"a" * 100_000, b"", (414, "url_too_long")),
        (b"GET /healthz?" + b"a" * 8000, b"X: y\r\n" * 90 + b"X: " + b"a" * 20_000 + b"\r\n", (200, None)),
    ],
)
def test_heads_and_addresses_are_bounded(
    server: Process, start: bytes, headers: bytes, answer: tuple[int, str | None], pieces: int
) -> None:
    head = start + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n" + headers + b"\r\n"
    size = -(-len(head) // pieces)
    sent = server.raw(*(head[at : at + size] for at in range(0, len(head), size)), pause=0.02)
    assert status_and_code(sent) == answer


def test_slow_heads_time_out(server: Process) -> None:
    """Neither on a new connection, nor drop by drop, nor after an answer."""

    def drip(first: bytes) -> float:
        began = time.monotonic()
        with server.connect() as connection:
            connection.sendall(first)
            try:
                while time.monotonic() - began < 20:
                    connection.sendall(b"X")
                    time.sleep(0.05)
            except (BrokenPipeError, ConnectionResetError):
                pass
        return time.monotonic() - began

    waits: list[float] = []
    whole = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    threads = [
        threading.Thread(target=lambda first=first: waits.append(drip(first)))
        for first in (b"GET /healthz HTTP/1.1\r\n", whole + b"GET /")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(waits) == 2
    assert max(waits) < 15


def test_slow_bodies_do_not_hold_up_others(server: Process) -> None:
    slow = [server.connect() for _ in range(30)]
    for connection in slow:
        connection.sendall(HEAD + b"Content-Length: 5000\r\n\r\n" + b'{"images": ["' + b"A" * 1000)
    assert predict(server, png())["class_count"] == 6
    for connection in slow:
        assert status_and_code(everything(connection)) == (408, "upload_timeout")
        connection.close()


def test_all_uploads_together_are_bounded(server: Process) -> None:
    one, other = server.connect(), server.connect()
    part = HEAD + b"Content-Length: 299999\r\n\r\n" + b"x" * 250_000
    one.sendall(part)
    time.sleep(0.2)
    other.sendall(part)
    other.sendall(b"x" * 49_999)
    answer = other.recv(65536)
    assert b" 503 " in answer
    assert b"retry-after: 1" in answer.lower()
    for connection in (one, other):
        connection.close()


def test_stalled_uploads_make_room_for_others() -> None:
    with process(upload_bytes=300_000, uploads_bytes=400_000) as server:
        stalled = server.connect()
        stalled.sendall(HEAD + b"Content-Length: 299999\r\n\r\n" + b"x" * 250_000)
        time.sleep(1.5)
        stalled.sendall(b"x")  # a byte now and then is stalled too
        time.sleep(0.2)
        body = b'{"images": ["' + b"A" * 299_000 + b'"]}'
        answer = server.raw(HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        assert status_and_code(answer) == (422, "unreadable_image")
        assert status_and_code(everything(stalled)) == (503, "busy")
        stalled.close()


def test_clients_that_leave(server: Process) -> None:
    kind, body = form(png(size=(800, 800)))
    head = HEAD.replace(b"application/json", kind) + b"Content-Length: %d\r\n\r\n" % len(body)
    for cut in (len(head) // 2, len(head) + 20, len(head) + len(body)):
        for _ in range(10):
            with server.connect() as connection:
                connection.sendall((head + body)[:cut])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_open_requests_finish_after_a_signal(number: int) -> None:
    with process(seconds=0.4, batch=1) as server:
        kind, body = form(png())
        request = HEAD.replace(b"application/json", kind) + b"Content-Length: %d\r\n\r\n" % len(body) + body
        connections = [server.connect() for _ in range(2)]
        for connection in connections:
            connection.sendall(request)
        time.sleep(0.25)
        server.running.send_signal(number)
        for connection in connections:
            assert everything(connection).startswith(b"HTTP/1.1 200 ")
            connection.close()
        _, errors = server.running.communicate(timeout=20)
        assert (server.running.returncode, errors) == (0, "")
        with pytest.raises(ConnectionRefusedError):
            server.connect()


@pytest.mark.parametrize("rest", [b"POST /v1/pre", HEAD + b"Content-Length: 1000\r\n\r\n{", b""])
def test_requests_that_never_complete_do_not_hold_up_the_end(rest: bytes) -> None:
    with process() as server:
        predict(server, png())  # it runs
        connections = [server.connect() for _ in range(5)]
        for connection in connections:
            connection.sendall(rest)
        time.sleep(0.3)
        began = time.monotonic()
        assert server.stop() == (0, "")
        assert time.monotonic() - began < 5
        for connection in connections:
            connection.close()


def unread(server: Process, requests: int = 400) -> socket.socket:
    """A client that asks for more than the kernel holds, and reads nothing."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", server.port))
    connection.settimeout(0.5)
    with suppress(TimeoutError, OSError):
        connection.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * requests)
    return connection


def test_clients_that_never_read_are_disconnected_and_do_not_hold_up_the_end() -> None:
    with process(read_timeout=1.0) as server:
        connection = unread(server)
        time.sleep(3)
        connection.settimeout(20)
        assert everything(connection).count(b"HTTP/1.1 200") < 400  # and it ends
        connection.close()
    with process() as server:
        predict(server, png())
        connection = unread(server)
        began = time.monotonic()
        assert server.stop() == (0, "")
        assert time.monotonic() - began < 6
        connection.close()


def test_connections_are_bounded_and_silent_ones_make_room() -> None:
    with process(connections=4, seconds=1.5, batch=1) as server:
        silent = [server.connect() for _ in range(20)]
        stalled = [server.connect() for _ in range(20)]
        for connection in stalled:
            connection.sendall(HEAD + b"Content-Length: 1000\r\n\r\n{")
        assert predict(server, png())["class_count"] == 6
        open_files = len(list(Path(f"/proc/{server.running.pid}/fd").iterdir()))
        assert open_files < 40
        kind, body = form(png())
        request = HEAD.replace(b"application/json", kind) + b"Content-Length: %d\r\n\r\n" % len(body) + body
        working = [server.connect() for _ in range(4)]
        for connection in working:
            connection.sendall(request)
        time.sleep(0.5)
        assert status_and_code(server.raw(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")) == (503, "busy")
        for connection in working:
            assert b" 200 OK" in connection.recv(65536)
        for connection in (*silent, *stalled, *working):
            connection.close()


def test_answers_are_not_delayed() -> None:
    """An answer that follows another on one connection does not wait for the client's delayed acknowledgement."""

    async def accepted_socket() -> int:
        accepted: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def connected(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            accepted.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        with listen.bind("127.0.0.1", 0) as listening:
            async with await asyncio.start_server(connected, sock=listening):
                _, writer = await asyncio.open_connection(*listening.getsockname())
                writer.close()
                return await accepted

    assert asyncio.run(accepted_socket())


def test_addresses_that_cannot_be_used_are_named(server: Process) -> None:
    with pytest.raises(ConfigError, match=f"port {server.port} of 127.0.0.1 is in use by another program"):
        listen.bind("127.0.0.1", server.port)
    for port in (-1, 65536):
        with pytest.raises(ConfigError, match=f"port {port} is not valid"):
            listen.bind("127.0.0.1", port)
    with pytest.raises(ConfigError, match="cannot be listened on"):
        listen.bind("192.0.2.1", 0)
    with pytest.raises(ConfigError, match="cannot be resolved"):
        listen.bind("no such host", 0)


def test_other_machines_need_a_token() -> None:
    for host in ("0.0.0.0", "::"):
        with listen.bind(host, 0) as listening:
            bound_to = listening.getsockname()[0]
            with pytest.raises(ConfigError, match="MAPLE_TOKEN"):
                require_token(bound_to, host, None, anyone=False)
            require_token(bound_to, host, "0123456789abcdef", anyone=False)
            require_token(bound_to, host, None, anyone=True)
            assert allowed_hosts(bound_to, host, []) is None
            assert "example.org" in (allowed_hosts(bound_to, host, ["example.org"]) or [])
    with listen.bind("localhost", 0) as listening:
        bound_to = listening.getsockname()[0]
        require_token(bound_to, "localhost", None, anyone=False)
        assert "localhost" in (allowed_hosts(bound_to, "localhost", []) or [])
    for token in ("", "short", "with a space in it", "ümlaut-ümlaut-ümlaut"):
        with pytest.raises(ConfigError, match="token"):
            check_token(token)
    for name in ("", "a b", "http://example.org", "example.org:80", "*"):
        with pytest.raises(ConfigError, match="--allow-host"):
            allowed_hosts("127.0.0.1", "127.0.0.1", [name])
