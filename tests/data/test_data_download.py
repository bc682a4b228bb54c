"""Downloads from a server that disconnects, reports wrong lengths, ignores ranges and serves other files."""

import hashlib
import logging
import random
import shutil
import socket
import threading
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from servers import Site, serving

from maple.data.published.download import ATTEMPTS, check_file, download
from maple.errors import DownloadError

CONTENT = random.Random(0).randbytes(300_000)
SHA = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"
MD5 = f"md5:{hashlib.md5(CONTENT).hexdigest()}"


@pytest.fixture
def site() -> Iterator[Site]:
    with serving(Site(files={"/x.zip": CONTENT}, etag='"one"')) as site:
        yield site


def fetch(site: Site, folder: Path, **options: Any) -> Path:
    waits: list[float] = options.pop("waits", [])
    return download(f"{site.url}/x.zip", folder / "x.zip", timeout=2, wait=waits.append, **options)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("checksum", [SHA, MD5, SHA.upper().replace("SHA256", "sha256"), None])
def test_a_file_is_fetched_once_and_leaves_nothing_else(checksum: str | None, site: Site, tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    target = fetch(site, tmp_path / "new", checksum=checksum, on_bytes=lambda *now: seen.append(now))
    assert target.read_bytes() == CONTENT
    assert names(target.parent) == ["x.zip"]
    assert seen[0] == (0, len(CONTENT))
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    fetch(site, tmp_path / "new", checksum=checksum)
    assert site.requests == [("/x.zip", None)]


def test_a_connection_that_breaks_is_taken_up_where_it_broke(site: Site, tmp_path: Path) -> None:
    site.break_after = 70_000
    waits: list[float] = []
    assert fetch(site, tmp_path, checksum=SHA, waits=waits).read_bytes() == CONTENT
    assert site.ranges_of("/x.zip") == [None, "bytes=70000-", "bytes=140000-", "bytes=210000-", "bytes=280000-"]
    assert waits == [1, 1, 1, 1], "every try brought something"


def test_a_killed_download_goes_on_in_the_next_call(site: Site, tmp_path: Path) -> None:
    class KilledError(BaseException):
        pass

    def kill(done: int, _total: int | None) -> None:
        if done:
            raise KilledError

    site.break_after = 100_000
    with pytest.raises(KilledError):
        fetch(site, tmp_path, checksum=SHA, on_bytes=kill)
    assert names(tmp_path) == ["x.zip.part", "x.zip.part.json"]
    site.break_after = None
    kept = (tmp_path / "x.zip.part").stat().st_size
    assert kept > 0
    assert fetch(site, tmp_path, checksum=SHA).read_bytes() == CONTENT
    assert site.ranges_of("/x.zip") == [None, f"bytes={kept}-"]


def test_a_server_that_ignores_ranges_starts_it_again(site: Site, tmp_path: Path) -> None:
    (tmp_path / "x.zip.part").write_bytes(CONTENT[:1000])
    site.ranges = False
    assert fetch(site, tmp_path, checksum=SHA).read_bytes() == CONTENT
    site.break_after = 1000
    (tmp_path / "x.zip").unlink()
    message = rf"gave up after {ATTEMPTS} attempts \(the connection broke after 1000 of .*; 1000 bytes are kept"
    with pytest.raises(DownloadError, match=message):
        fetch(site, tmp_path, checksum=SHA)


def test_a_file_that_changed_meanwhile_starts_again(site: Site, tmp_path: Path) -> None:
    site.break_after = 100_000
    seen: list[int] = []

    def change(done: int, _total: int | None) -> None:
        seen.append(done)
        if done == 100_000:
            site.files["/x.zip"], site.etag, site.break_after = CONTENT[::-1], '"two"', None

    assert fetch(site, tmp_path, on_bytes=change).read_bytes() == CONTENT[::-1]
    assert site.ranges_of("/x.zip") == [None, "bytes=100000-"]


def test_a_wrong_beginning_is_found_by_the_checksum(
    site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "x.zip.part").write_bytes(b"another file")
    with caplog.at_level(logging.WARNING):
        assert fetch(site, tmp_path, checksum=SHA).read_bytes() == CONTENT
    assert "downloading it from the beginning" in caplog.text
    assert site.ranges_of("/x.zip") == ["bytes=12-", None]


def test_without_checksum_and_tag_nothing_is_resumed(site: Site, tmp_path: Path) -> None:
    site.etag = None
    (tmp_path / "x.zip.part").write_bytes(b"another file")
    assert fetch(site, tmp_path).read_bytes() == CONTENT
    assert site.ranges_of("/x.zip") == [None]


def test_a_part_that_is_whole_already(site: Site, tmp_path: Path) -> None:
    (tmp_path / "x.zip.part").write_bytes(CONTENT)
    assert fetch(site, tmp_path, checksum=SHA).read_bytes() == CONTENT
    (tmp_path / "x.zip").unlink()
    (tmp_path / "x.zip.part").write_bytes(CONTENT + b"more")
    assert fetch(site, tmp_path, checksum=SHA).read_bytes() == CONTENT


def test_another_range_than_asked_for_is_not_taken(site: Site, tmp_path: Path) -> None:
    (tmp_path / "x.zip.part").write_bytes(CONTENT[:1000])
    site.shift = 100
    with pytest.raises(DownloadError, match="sent bytes 900-299999 instead of those from 1000"):
        fetch(site, tmp_path, checksum=SHA)
    assert (tmp_path / "x.zip.part").read_bytes() == CONTENT[:1000]


def test_a_length_that_is_too_large_ends(site: Site, tmp_path: Path) -> None:
    site.lie = 10
    with pytest.raises(DownloadError, match=rf"gave up after {ATTEMPTS} attempts \(the "):
        fetch(site, tmp_path)
    assert not (tmp_path / "x.zip").exists()
    assert len(site.requests) == ATTEMPTS


def test_a_length_that_is_too_small_is_found_by_the_checksum(site: Site, tmp_path: Path) -> None:
    site.lie = -10
    with pytest.raises(DownloadError, match=r"x.zip: has the sha256 .*, the published file .*fetch it again"):
        fetch(site, tmp_path, checksum=SHA)
    assert names(tmp_path) == []


def test_another_size_than_published_is_refused_before_it_is_fetched(site: Site, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="offers 300000 bytes, but the published file has 123"):
        fetch(site, tmp_path, size=123)
    assert names(tmp_path) in ([], ["x.zip.part.json"])


def test_a_wrong_checksum_leaves_nothing(site: Site, tmp_path: Path) -> None:
    site.files["/x.zip"] = CONTENT[::-1]
    with pytest.raises(DownloadError, match="has the md5 "):
        fetch(site, tmp_path, checksum=MD5)
    assert names(tmp_path) == []
    (tmp_path / "x.zip").write_bytes(b"put there by hand")
    with pytest.raises(DownloadError, match=r"x.zip: has the md5 .* remove it and fetch it again"):
        fetch(site, tmp_path, checksum=MD5)
    assert (tmp_path / "x.zip").read_bytes() == b"put there by hand", "a user's file is not removed"


def test_a_web_page_is_not_the_file(site: Site, tmp_path: Path) -> None:
    site.content_type = "text/html; charset=utf-8"
    with pytest.raises(DownloadError, match="responds with a web page instead of the file"):
        fetch(site, tmp_path)
    assert names(tmp_path) == []


def test_a_busy_server_is_asked_again_and_a_refusal_is_final(site: Site, tmp_path: Path) -> None:
    site.answers = [503, 429, 500]
    waits: list[float] = []
    assert fetch(site, tmp_path, waits=waits).read_bytes() == CONTENT
    assert waits == [1, 2, 4]
    with pytest.raises(DownloadError, match="the server responds 404 Not Found"):
        download(f"{site.url}/y.zip", tmp_path / "y.zip", wait=waits.append)
    assert waits == [1, 2, 4]
    site.answers = [503] * 9
    with pytest.raises(DownloadError, match=r"gave up after 5 attempts \(the server responds 503"):
        download(f"{site.url}/y.zip", tmp_path / "y.zip", wait=waits.append)
    assert len(site.answers) == 4


def test_a_server_that_stalls_is_left(site: Site, tmp_path: Path) -> None:
    site.break_after, site.stall = 100_000, threading.Event()
    download(f"{site.url}/x.zip", tmp_path / "x.zip", timeout=0.2, wait=lambda _seconds: None)
    assert site.ranges_of("/x.zip") == [None, "bytes=100000-", "bytes=200000-"]
    site.break_after = 0
    with pytest.raises(DownloadError, match=r"gave up after 5 attempts \(.*timed out"):
        download(f"{site.url}/x.zip", tmp_path / "y.zip", timeout=0.2, wait=lambda _seconds: None)


def test_nobody_answers(tmp_path: Path) -> None:
    with serving(Site()) as site:
        url = site.url
    with pytest.raises(DownloadError, match=r"gave up after 5 attempts \(.*refused"):
        download(f"{url}/x.zip", tmp_path / "x.zip", wait=lambda _seconds: None)


@pytest.mark.parametrize("url", ["file:///etc/hosts", "ftp://127.0.0.1/x", "/etc/hosts"])
def test_other_schemes_are_refused(url: str, site: Site, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="only http and https"):
        download(url, tmp_path / "x")
    site.redirect = url if ":" in url else f"file://{url}"
    with pytest.raises(DownloadError):
        fetch(site, tmp_path)
    assert not (tmp_path / "x.zip").exists()


def test_a_disk_that_is_too_small(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")(1, 1, 1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(DownloadError, match="the disk has 1 MiB left"):
        fetch(site, tmp_path)


def test_check_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(CONTENT)
    check_file(tmp_path / "x", checksum=SHA, size=len(CONTENT))
    check_file(tmp_path / "x", checksum=None, size=None)
    with pytest.raises(DownloadError, match="has 300000 bytes, the published file 5"):
        check_file(tmp_path / "x", checksum=SHA, size=5)


def test_a_server_text_is_shown_without_control_characters(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 404 \x1b[31mgone\x07\r\nContent-Length: 0\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(DownloadError, match=r"the server responds 404 \[31mgone$"):
            download(f"http://127.0.0.1:{listening.getsockname()[1]}/a.zip", tmp_path / "a.zip")
        thread.join()


@pytest.mark.parametrize(
    "head",
    ["HTTP/1.1 200 OK\r\nX-Slow: ", "HTTP/1.1 200 OK\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Length: 300000\r\n\r\n"],
    ids=["head", "body of unknown length", "body"],
)
def test_a_server_that_drips_is_given_up(head: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def drip(connection: socket.socket) -> None:
            with connection:
                connection.sendall(head.encode())
                try:
                    while True:
                        connection.sendall(b"x")
                        time.sleep(0.05)
                except OSError:  # the client has hung up
                    return

        def serve() -> None:
            try:
                while True:
                    threading.Thread(target=drip, args=listening.accept()[:1], daemon=True).start()
            except OSError:  # closed
                return

        threading.Thread(target=serve, daemon=True).start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/x.zip"
        with pytest.raises(
            DownloadError, match=r"gave up after 5 attempts \(less than 1000 bytes arrived per second\)"
        ):
            download(url, tmp_path / "x.zip", timeout=0.25, wait=lambda _: None)
    assert not (tmp_path / "x.zip").exists()
