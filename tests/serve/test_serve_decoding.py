"""Images that take long to decode: each ends in time, and holds up nobody else."""

import io
import json
import os
import re
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from serve_helpers import Process, Start, png, process

from maple.data import EvalView, read_image
from maple.errors import ImageError
from maple.inference.predictor import Floats
from maple.serve.decoding import Decoder

VIEW = (16, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bicubic")


def jpeg_of_many_scans() -> bytes:
    """Half a megabyte, four million pixels, and a decoder that is busy for a minute."""
    buffer = io.BytesIO()
    Image.new("L", (2000, 2000), 128).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    last = data.rfind(b"\xff\xc4", 0, data.rfind(b"\xff\xda"))
    return data[:-2] + data[last:-2] * 20_000 + data[-2:]


def jpeg_of_fill_bytes() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    data = buffer.getvalue()
    return data[:2] + b"\xff" * 20_000_000 + data[2:]


class Stuck(EvalView):
    """Never ends, and never gives up Python's lock, for an image that is one pixel wide."""

    def __call__(self, image: Image.Image) -> Floats:
        if image.width == 1:
            re.match("(a+)+$", "a" * 64 + "b")
        if image.width == 2:
            os.abort()
        return super().__call__(image)


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    started = Decoder(Stuck(*VIEW), 4_000_000, 2.0)
    yield started
    started.close()


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_images_are_read_as_in_this_process(decoder: Decoder) -> None:
    for size in ((40, 30), (16, 16), (300, 900)):
        content = png((200, 30, 30), size)
        assert np.array_equal(decoder.decode(content), EvalView(*VIEW)(read_image(content)))
    for content in (b"", b"hello", png()[:60], png(size=(3000, 2000))):
        with pytest.raises(ImageError) as here:
            read_image(content, max_pixels=4_000_000)
        with pytest.raises(ImageError, match=f"^{re.escape(str(here.value).removeprefix('<bytes>: '))}$"):
            decoder.decode(content)


def test_drafts_are_those_of_this_process() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (150, 200, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    content, view = buffer.getvalue(), EvalView(*VIEW)
    drafting = Decoder(view, 4_000_000, 10.0, draft=True)
    try:
        decoded = drafting.decode(content)
    finally:
        drafting.close()
    assert np.array_equal(decoded, view(read_image(content, least_side=view.least_side)))
    assert not np.array_equal(decoded, view(read_image(content)))


@pytest.mark.parametrize("make", [jpeg_of_many_scans, jpeg_of_fill_bytes, lambda: png(size=(1, 5))])
def test_a_slow_image_ends_in_time(decoder: Decoder, make: Callable[[], bytes]) -> None:
    content = make()
    decoder.decode(png())
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"takes more than 2 seconds to decode; save it again, or scale it down"):
        decoder.decode(content)
    assert time.monotonic() - began < 8
    assert decoder.decode(png()).shape == (3, 16, 16)


def test_a_crash_of_a_decoder_costs_one_image(decoder: Decoder) -> None:
    with pytest.raises(ImageError, match=r"its decoder failed \(exit status -6\)"):
        decoder.decode(png(size=(2, 5)))
    assert decoder.decode(png()).shape == (3, 16, 16)
    decoder.kill()  # while it is idle, as the kernel does that needs memory
    until(lambda: decoder._process is None or decoder._process.poll() is not None)
    assert decoder.decode(png()).shape == (3, 16, 16)


def send(server: Process, *images: bytes) -> tuple[int, Any]:
    """The status and the content of an answer."""
    files = [b'--x\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\n' + one for one in images]
    body = b"\r\n".join([*files, b"--x--\r\n"])
    request = urllib.request.Request(
        f"{server.url}/v1/predict", body, {"Content-Type": "multipart/form-data; boundary=x"}
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)["error"]


def children(server: Process) -> list[Path]:
    """The folders in /proc of the decoders of a server."""
    lists = Path(f"/proc/{server.running.pid}/task").glob("*/children")
    return [Path(f"/proc/{number}") for path in lists for number in path.read_text().split()]


@pytest.mark.slow
def test_slow_images_do_not_hold_up_other_requests() -> None:
    slow = jpeg_of_many_scans()
    with process(decode_timeout=1.5) as server, ThreadPoolExecutor(4) as pool:
        assert send(server, png())[0] == 200
        attacks = [pool.submit(send, server, png(), *[slow] * 4) for _ in range(3)]
        time.sleep(0.5)
        began = time.monotonic()
        assert send(server, png())[0] == 200
        assert time.monotonic() - began < 12
        for attack in attacks:
            status, error = attack.result()
            assert (status, error["code"]) == (422, "unreadable_image")
            assert "a: takes more than 1.5 seconds to decode" in error["message"]
            # The decoders that were at it have ended, and the rest of the request has not been tried.
            assert {detail["where"] for detail in error["details"]} <= {f"images[{index}]" for index in range(1, 5)}
            assert 1 <= len(error["details"]) <= 2
        assert time.monotonic() - began < 15
        assert send(server, png())[0] == 200
        assert server.stop() == (0, "")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")
@pytest.mark.parametrize("busy", [False, True])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_decoders_end_with_their_server(busy: bool, number: int) -> None:
    with process(decode_timeout=3, timeout=0.3) as server:
        until(lambda: send(server, png())[0] == 200)
        if busy:
            assert send(server, jpeg_of_many_scans())[0] == 504
        decoders = children(server)
        assert decoders
        began = time.monotonic()
        status, errors = server.stop(number)
        assert (status, errors) == (0 if number == signal.SIGTERM else -signal.SIGKILL, "")
        if number == signal.SIGTERM:
            assert time.monotonic() - began < 2.5
        until(lambda: not any(decoder.exists() for decoder in decoders), 10)


def test_the_limit_is_in_the_answer(start: Start) -> None:
    client = start(decode_timeout=0.5)
    answer = client.post("/v1/predict", files=[("images", ("x.jpg", jpeg_of_many_scans()))])
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "unreadable_image")
    assert answer.json()["error"]["message"].startswith("x.jpg: takes more than 0.5 seconds to decode; ")
