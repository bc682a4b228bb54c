"""Fetching one published file: resumed after an interruption, checked, and never half in its place.

On urllib, since no dependency of this package resumes a download from any server (pooch does not either).
"""

import hashlib
import http.client
import json
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError
from urllib.request import Request

from maple import files
from maple.errors import DownloadError, visible
from maple.web import web_opener

logger = logging.getLogger(__name__)

CHUNK = 1 << 20
ATTEMPTS = 5
"""Failures in a row, without a new byte in between, after which a download is given up."""
_FINAL = range(400, 500)
_PASSING = {408, 425, 429}
_RESERVE = 64 << 20

Progress = Callable[[int, int | None], None]
"""Called with the bytes that are there and the bytes in all, if the server says so."""


class _RetryError(Exception):
    """This try failed, the next may not."""


def download(
    url: str,
    target: Path,
    *,
    checksum: str | None = None,
    size: int | None = None,
    on_bytes: Progress = lambda _done, _total: None,
    timeout: float = 30.0,
    wait: Callable[[float], None] = time.sleep,
) -> Path:
    """Fetch `url` (http or https) to `target`, going on where an earlier call was interrupted.

    Bytes gather in `target.part`; a server that ignores ranges, or whose file has changed, makes it start again. The
    file gets its name only when it is complete and has the `checksum`. A `target` that is there and has the checksum
    (or none is given) is left as it is.

    Args:
        checksum: `sha256:HEX` or `md5:HEX`, as published.
        size: in bytes, as published.
        wait: called with the seconds to wait before another try.

    Raises:
        DownloadError: the address is refused or does not answer, the answer is a web page or of another size than
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
        _discard(part)  # nothing would tell whether the rest belongs to it
    resumed = part.exists()
    _fetch(url, part, size, on_bytes, timeout, wait)
    try:
        check_file(part, checksum=checksum, size=size, name=url)
    except DownloadError:
        _discard(part)
        if not resumed:
            raise
        # What lay there from an earlier call may have been another file's beginning.
        logger.warning("%s: the resumed file is not the published one; fetching it from the beginning", url)
        _fetch(url, part, size, on_bytes, timeout, wait)
        try:
            check_file(part, checksum=checksum, size=size, name=url)
        except DownloadError:
            _discard(part)
            raise
    files.move(part, target)
    _note(part).unlink(missing_ok=True)
    return target


def check_file(path: Path, *, checksum: str | None, size: int | None, name: object = None) -> None:
    """Raise DownloadError unless the file has the published checksum and size (None: not published)."""
    name = name or path
    found = path.stat().st_size
    if size is not None and found != size:
        raise DownloadError(f"{name}: has {found} bytes, the published file {size}; remove it and fetch it again")
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
    url: str, part: Path, size: int | None, on_bytes: Progress, timeout: float, wait: Callable[[float], None]
) -> None:
    """Bring `part` to its full length, in as many tries as it takes while each brings something."""
    failures, most = 0, _length(part)
    while True:
        try:
            return _try(url, part, size, on_bytes, timeout)
        except _RetryError as error:
            failures = 1 if _length(part) > most else failures + 1
            most = max(most, _length(part))
            if failures >= ATTEMPTS:
                kept = f"; {_length(part)} bytes are kept in {part}, to go on later" if _length(part) else ""
                raise DownloadError(f"{url}: gave up after {failures} tries ({error}){kept}") from error
            logger.info("%s: %s; trying again", url, error)
            wait(min(2.0 ** (failures - 1), 30.0))


def _try(url: str, part: Path, size: int | None, on_bytes: Progress, timeout: float) -> None:
    have = _length(part)
    headers = {"User-Agent": "maple-clip", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if validator := _validator(part):
            headers["If-Range"] = validator
    try:
        with web_opener().open(Request(url, headers=headers), timeout=timeout) as response:
            begin, total = _offered(url, response, have, size)
            if begin == 0:
                _remember(part, response.headers)
            _check_room(part, total, begin)
            with _opened(part, "ab" if begin else "wb") as file:
                _copy(response, file, begin, total, on_bytes)
    except HTTPError as error:
        error.close()
        if error.code == 416 and have:
            if (error.headers.get("Content-Range") or "").rpartition("/")[2] == str(have):
                return
            _discard(part)
            raise _RetryError("the server has another file now") from error
        if error.code in _FINAL and error.code not in _PASSING:
            raise DownloadError(f"{url}: the server answers {error.code} {_plain(error.reason)}") from error
        raise _RetryError(f"the server answers {error.code} {_plain(error.reason)}") from error
    except (http.client.HTTPException, OSError) as error:
        told = str(getattr(error, "reason", "")) or str(error) or type(error).__name__
        raise _RetryError(_plain(told)) from error


def _plain(text: object) -> str:
    """What a server says, on one line and without what a terminal would obey."""
    return visible(str(text), " ")[:200].strip()


def _offered(url: str, response: Any, have: int, size: int | None) -> tuple[int, int | None]:
    """Where the answer begins in the file, and the length of the whole file where the server says so."""
    if response.headers.get_content_type() in ("text/html", "application/xhtml+xml"):
        raise DownloadError(
            f"{url}: answers with a web page instead of the file (a login, a quota, or a page that the file has moved)"
        )
    length = response.headers.get("Content-Length")
    rest = int(length) if length is not None and length.isdecimal() else None
    begin = 0
    total = rest
    if response.status == 206:
        span, _, whole = (response.headers.get("Content-Range") or "").removeprefix("bytes ").partition("/")
        if span.partition("-")[0] != str(have):
            raise _RetryError(f"the server sent bytes {span or 'of nowhere'} instead of those from {have}")
        begin = have
        total = int(whole) if whole.isdecimal() else None if rest is None else have + rest
    if size is not None and total is not None and total != size:
        raise DownloadError(f"{url}: offers {total} bytes, but the published file has {size}; it is another file")
    return begin, total if total is not None else size


def _copy(response: Any, file: IO[bytes], begin: int, total: int | None, on_bytes: Progress) -> None:
    done = begin
    on_bytes(done, total)
    while block := response.read1(CHUNK):
        try:
            file.write(block)
        except OSError as error:
            raise DownloadError(f"{file.name}: cannot be written ({error.strerror}); make room and repeat") from error
        done += len(block)
        on_bytes(done, total)
        if total is not None and done > total:
            raise DownloadError(f"{response.url}: sends more than the {total} bytes it should; it is another file")
    if total is not None and done < total:
        raise _RetryError(f"the connection broke after {done} of {total} bytes")


def _opened(part: Path, mode: str) -> IO[bytes]:
    try:
        return part.open(mode)
    except OSError as error:
        raise DownloadError(f"{part}: cannot be written ({error.strerror}); choose another data root") from error


def _check_room(part: Path, total: int | None, begin: int) -> None:
    free = shutil.disk_usage(part.parent).free
    if total is not None and total - begin + _RESERVE > free:
        raise DownloadError(
            f"{part.parent}: the disk has {free >> 20} MiB left, the download needs {(total - begin) >> 20} more; "
            "make room, or choose another data root"
        )


def _length(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _note(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _remember(part: Path, headers: Any) -> None:
    """Keep what tells this version of the file from another: a weak entity tag does not."""
    tag = headers.get("ETag") or ""
    validator = tag if tag and not tag.startswith("W/") else headers.get("Last-Modified")
    files.write_json(_note(part), {"validator": validator})


def _validator(part: Path) -> str | None:
    try:
        found = json.loads(_note(part).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    validator = found.get("validator") if isinstance(found, dict) else None
    return validator if isinstance(validator, str) else None


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _note(part).unlink(missing_ok=True)
