"""Downloads of images: what is accepted, and what is refused with which message."""

import re
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler

import pytest
from inference_helpers import png, send

from maple.errors import ImageError
from maple.inference import find_images
from maple.inference.sources.image_sources import download_image, is_address

Serve = Callable[[Callable[[BaseHTTPRequestHandler], None]], str]


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")


@pytest.mark.parametrize("kind", ["image/png", "image/jpeg; charset=binary", "application/octet-stream", None])
@pytest.mark.parametrize("length", [-1, None])
def test_fetches(serve: Serve, kind: str | None, length: int | None) -> None:
    content = png() * 3000  # more than one piece
    url = serve(lambda handler: send(handler, content, kind, length))
    assert download_image(f"{url}/picture.png") == content


def test_words_and_spaces_in_addresses(serve: Serve) -> None:
    asked = []

    def answer(handler: BaseHTTPRequestHandler) -> None:
        asked.append(handler.path)
        send(handler, png())

    download_image(serve(answer) + "/über uns/a%20b.png?q=ä&r=1#part")
    assert asked == ["/%C3%BCber%20uns/a%20b.png?q=%C3%A4&r=1"]


def test_follows_redirections_to_http_only(serve: Serve) -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        target = {"/": "/there", "/away": "file:///etc/hostname", "/round": "/round"}.get(handler.path)
        if target is None:
            send(handler, png())
            return
        handler.send_response(302)
        handler.send_header("Location", target)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    url = serve(answer)
    assert download_image(f"{url}/") == png()
    with pytest.raises(ImageError, match=r"/away: the server answers 302 .* not allowed"):
        download_image(f"{url}/away")
    with pytest.raises(ImageError, match=r"/round: the server answers 302 .*infinite loop"):
        download_image(f"{url}/round")


def test_refuses_what_is_no_image(serve: Serve) -> None:
    url = serve(lambda handler: send(handler, b"<html>", "text/html; charset=utf-8"))
    with pytest.raises(ImageError, match=rf"^{re.escape(url)}: .* text/html, not an image; that is a page: give"):
        download_image(url)
    url = serve(lambda handler: send(handler, b"junk", "image/png"))
    (picture,) = find_images([url])
    with pytest.raises(ImageError, match=rf"^{re.escape(url)}: is not an image that Pillow can read"):
        picture.read()


def test_refuses_too_many_bytes(serve: Serve) -> None:
    url = serve(lambda handler: send(handler, bytes(2000)))
    with pytest.raises(ImageError, match="has 2,000 bytes, more than the allowed 1,999"):
        download_image(url, max_bytes=1999)
    url = serve(lambda handler: send(handler, bytes(200_000), length=None))
    with pytest.raises(ImageError, match="sends more than the allowed 1,999 bytes"):
        download_image(url, max_bytes=1999)


def test_tells_a_cut_body(serve: Serve) -> None:
    url = serve(lambda handler: send(handler, bytes(100), length=300))
    with pytest.raises(ImageError, match="was cut short, 100 of 300 bytes arrived"):
        download_image(url)


def test_tells_the_servers_refusal(serve: Serve) -> None:
    url = serve(lambda handler: handler.send_error(404))
    with pytest.raises(ImageError, match="the server answers 404 Not Found; check the address"):
        download_image(url)


def test_silence_and_dripping_end_in_time(serve: Serve) -> None:
    url = serve(lambda _: time.sleep(1))
    with pytest.raises(ImageError, match=r"took longer than 0\.2 seconds"):
        download_image(url, timeout=0.2)

    def drip(handler: BaseHTTPRequestHandler) -> None:
        send(handler, b"", length=100)
        for _ in range(100):
            try:
                handler.wfile.write(b".")
            except OSError:
                return
            time.sleep(0.05)

    url = serve(drip)
    began = time.monotonic()
    with pytest.raises(ImageError, match=r"took longer than 0\.4 seconds"):
        download_image(url, timeout=0.4)
    assert time.monotonic() - began < 3


_OK = b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n"


@pytest.mark.parametrize(
    ("start", "drop"),
    [
        (b"", b"H"),
        (b"HTTP/1.1 200 OK\r\n", b"X-A: b\r\n"),
        (b"HTTP/1.1 200 OK\r\nX: ", b"a"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (_OK + b"Transfer-Encoding: chunked\r\n\r\n", b"0"),
        (_OK + b"Transfer-Encoding: chunked\r\n\r\n5;", b"a"),
        (_OK + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"X-A: b\r\n"),
        (_OK + b"Content-Length: 1000\r\n\r\n", b"a"),
        (_OK + b"\r\n", b"a"),
        (b"HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 1000\r\n\r\n", b"a"),
        (b"HTTP/1.1 404 Not ", b"F"),
    ],
)
def test_what_arrives_drop_by_drop_ends_in_time(serve: Serve, start: bytes, drop: bytes) -> None:
    left = threading.Event()

    def drip(handler: BaseHTTPRequestHandler) -> None:
        try:
            handler.wfile.write(start)
            for _ in range(200):
                handler.wfile.write(drop)
                time.sleep(0.05)
        except OSError:
            left.set()

    url = serve(drip)
    began = time.monotonic()
    with pytest.raises(ImageError, match=rf"^{re.escape(url)}: took longer than 0\.5 seconds"):
        download_image(url, timeout=0.5)
    assert time.monotonic() - began < 2
    assert left.wait(3)  # the connection is closed, and nothing keeps reading


def test_the_time_limit_is_one_for_all_redirections(serve: Serve) -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        time.sleep(0.3)
        handler.send_response(302)
        handler.send_header("Location", handler.path + "a")
        handler.end_headers()

    began = time.monotonic()
    with pytest.raises(ImageError, match=r"took longer than 0\.5 seconds"):
        download_image(serve(answer), timeout=0.5)
    assert time.monotonic() - began < 2


def test_the_body_of_a_redirection_is_not_read(serve: Serve) -> None:
    sent = []

    def answer(handler: BaseHTTPRequestHandler) -> None:
        if handler.path == "/a":
            return send(handler, png())
        handler.send_response(302)
        handler.send_header("Location", "/a")
        handler.end_headers()
        try:
            for _ in range(2000):
                sent.append(handler.wfile.write(bytes(100_000)))
        except OSError:
            pass

    assert download_image(serve(answer)) == png()
    assert sum(sent) < 50_000_000


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://host/a.png", "only http:// and https://"),
        ("file:///etc/hostname", "only http:// and https://"),
        ("http:///a.png", "names no host"),
        ("http://127.0.0.1:1/a.png", "cannot be downloaded .*refused"),
        ("http://127.0.0.1:no/a.png", "cannot be downloaded"),
        ("http://[::1/a.png", "cannot be downloaded"),
        ("http://no.such.host.invalid/a.png", "cannot be downloaded"),
    ],
)
def test_bad_addresses(url: str, message: str) -> None:
    with pytest.raises(ImageError, match=f"^{re.escape(url)}: .*{message}"):
        download_image(url, timeout=5)


def test_what_is_an_address() -> None:
    assert [is_address(text) for text in ("http://a", "HTTPS://a", "s3://a", "a/b.png", "://a", "C:\\a")] == [
        *(True, True, True, False, False, False)
    ]


def test_a_password_is_neither_sent_nor_shown() -> None:
    with pytest.raises(ImageError, match=r"^http://host/a\.png: a user name and password") as caught:
        download_image("http://me:secret@host/a.png")
    assert "secret" not in str(caught.value)
    with pytest.raises(ImageError, match=r"^ftp://\[::1\]:80/a@b\.png: a user name"):
        download_image("ftp://me:se@cret@[::1]:80/a@b.png")
