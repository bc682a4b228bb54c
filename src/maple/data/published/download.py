"""Download a published file: resumed after an interruption, verified, and put in place only when complete.

With urllib, since no dependency of this package resumes a download from any server (pooch does not either).
"""

import hashlib
import http.client
import logging
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request

from maple import files
from maple.errors import DownloadError, visible
from maple.files import web_opener

logger = logging.getLogger(__name__)

CHUNK = 1 << 20
ATTEMPTS = 5
"""Consecutive failures without much new, after which a download is given up."""
_SLOWEST = 1000
"""Bytes per second, over twice the time-out, below which a connection is given up."""
_PROGRESS = 1 << 16
"""New bytes after which failures are counted from the beginning."""
_TEMPORARY = {408, 425, 429}
"""Client errors after which another attempt may succeed."""
_RESERVE = 64 << 20

_OnBytes = Callable[[int, int | None], None]


class _RetryError(Exception):
    """This attempt failed, but the next may succeed."""


def download(
    url: str,
    target: Path,
    *,
    checksum: str | None = None,
    size: int | None = None,
    on_bytes: _OnBytes = lambda _done, _total: None,
    timeout: float = 30.0,
    wait: Callable[[float], None] = time.sleep,
) -> Path:
    """Download `url` (http or https) to `target`, resuming an interrupted earlier call.

    Bytes are collected in `target.part`; if the server ignores ranges, or its file has changed, the download restarts.
    The file gets its name only when it is complete and has the `checksum`. An existing `target` with the checksum (or
    if none is given) is kept.

    Args:
        checksum: `sha256:HEX` or `md5:HEX`, as published.
        on_bytes: called with the number of bytes downloaded and in all, None if the server does not say.

    Raises:
        DownloadError: the address is refused or does not respond, the response is a web page or of another size than
            published, the disk is too small, or the content has another checksum.
    """
    if not url.startswith(("http://", "https://")):
        raise DownloadError(f"{url}: only http and https addresses can be fetched")
    if target.exists():
        check_file(target, checksum=checksum, size=size)
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    if part.exists() and checksum is None and _validator(part) is None:
        _discard(part)  # nothing would show whether the rest belongs to it
    resumed = part.exists()
    while True:
        _fetch(url, part, size, on_bytes, timeout, wait)
        try:
            check_file(part, checksum=checksum, size=size, name=url)
            break
        except DownloadError:
            _discard(part)
            if not resumed:
                raise
        # The bytes of the earlier call may have been the beginning of another file.
        logger.warning("%s: the resumed file is not the published one; downloading it from the beginning", url)
        resumed = False
    files.move(part, target)
    _note(part).unlink(missing_ok=True)
    return target


def check_file(path: Path, *, checksum: str | None, size: int | None, name: object = None) -> None:
    """Raise DownloadError unless the file has the published checksum and size (None: not published)."""
    name = name or path
    try:
        length = files.regular(path).stat().st_size
    except OSError as error:
        raise DownloadError(f"{name}: cannot be read ({error.strerror}); remove it and fetch it again") from error
    if size is not None and length != size:
        raise DownloadError(f"{name}: has {length} bytes, the published file {size}; remove it and fetch it again")
    if checksum is None:
        return
    algorithm, _, expected = checksum.partition(":")
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
    if digest.hexdigest() != expected.lower():
        raise DownloadError(
            f"{name}: has the {algorithm} {digest.hexdigest()}, the published file {expected}; it is damaged or "
            "another file: remove it and fetch it again"
        )


def _fetch(
    url: str, part: Path, size: int | None, on_bytes: _OnBytes, timeout: float, wait: Callable[[float], None]
) -> None:
    """Complete `part`, with any number of attempts as long as they bring something."""
    failures, longest = 0, _length(part)
    while True:
        try:
            return _attempt(url, part, size, on_bytes, timeout)
        except _RetryError as error:
            length = _length(part)
            brought = length >= longest + _PROGRESS
            failures = 1 if brought else failures + 1
            longest = length if brought else longest
            if failures >= ATTEMPTS:
                kept = f"; {length} bytes are kept in {part}, to resume later" if length else ""
                raise DownloadError(f"{url}: gave up after {failures} attempts ({error}){kept}") from error
            logger.info("%s: %s; trying again", url, error)
            wait(min(2.0 ** (failures - 1), 30.0))


def _attempt(url: str, part: Path, size: int | None, on_bytes: _OnBytes, timeout: float) -> None:
    have = _length(part)
    headers = {"User-Agent": "maple-clip", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if validator := _validator(part):
            headers["If-Range"] = validator
    sockets: list[socket.socket] = []
    try:
        with (
            _ending_slow(sockets, part, 2 * timeout),
            web_opener(sockets).open(Request(url, headers=headers), timeout=timeout) as response,
        ):
            start, total = _offered_range(url, response, have, size)
            if start == 0:
                # The version of the file, to resume the same one. A weak entity tag does not identify it.
                tag = response.headers.get("ETag") or ""
                validator = tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified")
                files.write_json(_note(part), {"validator": validator})
            free = shutil.disk_usage(part.parent).free
            if total is not None and total - start + _RESERVE > free:
                raise DownloadError(
                    f"{part.parent}: the disk has {free >> 20} MiB left, the download needs {(total - start) >> 20} "
                    "more; make room, or choose another data root"
                )
            _copy(response, part, start, total, on_bytes)
    except HTTPError as error:
        error.close()
        if error.code == 416 and have:
            if (error.headers.get("Content-Range") or "").rpartition("/")[2] == str(have):
                return
            _discard(part)
            raise _RetryError("the server has another file now") from error
        text = f"the server responds {error.code} {_one_line(error.reason)}"
        if 400 <= error.code < 500 and error.code not in _TEMPORARY:
            raise DownloadError(f"{url}: {text}") from error
        raise _RetryError(text) from error
    except (http.client.HTTPException, OSError) as error:
        reason = str(getattr(error, "reason", "")) or str(error) or type(error).__name__
        raise _RetryError(_one_line(reason)) from error


@contextmanager
def _ending_slow(sockets: list[socket.socket], part: Path, seconds: float) -> Iterator[None]:
    """Shut connections down on which too little arrives: the time-out of a socket is one for each silence only.

    Raises:
        _RetryError: one was shut down.
    """
    ended, slow = threading.Event(), threading.Event()

    def watch() -> None:
        length = _length(part)
        while not ended.wait(seconds):
            before, length = length, _length(part)
            if length < before + _SLOWEST * seconds:
                slow.set()
                for connection in sockets:
                    with suppress(OSError):
                        connection.shutdown(socket.SHUT_RDWR)

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield
    except (_RetryError, http.client.HTTPException, OSError) as error:
        if slow.is_set():
            raise _RetryError(f"less than {_SLOWEST} bytes arrived per second") from error
        raise
    finally:
        ended.set()
        watching.join()
    if slow.is_set():  # the end of what it sent looks like the end of a file of unknown length
        raise _RetryError(f"less than {_SLOWEST} bytes arrived per second")


def _one_line(text: object) -> str:
    """The text of a server on one line, without control characters."""
    return visible(str(text), " ")[:200].strip()


def _offered_range(url: str, response: Any, have: int, size: int | None) -> tuple[int, int | None]:
    """The position in the file at which the response starts, and the length of the whole file if known."""
    if response.headers.get_content_type() in ("text/html", "application/xhtml+xml"):
        raise DownloadError(
            f"{url}: responds with a web page instead of the file (a login, a quota, or a page that the file has moved)"
        )
    length = response.headers.get("Content-Length")
    rest = int(length) if length is not None and length.isdecimal() else None
    start, total = 0, rest
    if response.status == 206:
        span, _, whole = (response.headers.get("Content-Range") or "").removeprefix("bytes ").partition("/")
        if span.partition("-")[0] != str(have):
            raise _RetryError(f"the server sent bytes {span or 'of nowhere'} instead of those from {have}")
        start = have
        total = int(whole) if whole.isdecimal() else None if rest is None else have + rest
    if size is not None and total is not None and total != size:
        raise DownloadError(f"{url}: offers {total} bytes, but the published file has {size}; it is another file")
    return start, total if total is not None else size


def _copy(response: Any, part: Path, start: int, total: int | None, on_bytes: _OnBytes) -> None:
    try:
        file = (files.regular(part) if part.exists() else part).open("ab" if start else "wb")
    except OSError as error:
        raise DownloadError(f"{part}: cannot be written ({error.strerror}); choose another data root") from error
    with file:
        done = start
        on_bytes(done, total)
        while block := response.read1(CHUNK):
            try:
                file.write(block)
            except OSError as error:
                raise DownloadError(f"{part}: cannot be written ({error.strerror}); make room and repeat") from error
            done += len(block)
            on_bytes(done, total)
            if total is not None and done > total:
                raise DownloadError(f"{response.url}: sends more than the {total} bytes it should; it is another file")
    if total is not None and done < total:
        raise _RetryError(f"the connection broke after {done} of {total} bytes")


def _length(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _note(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _validator(part: Path) -> str | None:
    """The version of the file that `part` belongs to, as its server identified it."""
    try:
        note: dict[str, Any] = files.read_json(_note(part), error=DownloadError)
    except DownloadError:
        return None
    validator = note.get("validator")
    return validator if isinstance(validator, str) else None


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _note(part).unlink(missing_ok=True)
