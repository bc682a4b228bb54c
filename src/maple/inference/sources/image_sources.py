"""Images of files, folders, tables, archives, http(s) addresses and standard input, each read when its turn comes."""

import glob
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NoReturn
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlsplit, urlunsplit
from urllib.request import Request

from PIL import Image

from maple.data.folders.listing import expand_pattern, walk_files
from maple.data.images.formats import has_image_name, is_image_file, unread_format
from maple.data.images.prefetch import in_background
from maple.data.images.reading import read_image
from maple.errors import ConfigError, DataError, ImageError
from maple.files import on_disk, web_opener

if TYPE_CHECKING:
    from maple.data.sources.rows import Source

STDIN = "-"
MAX_BYTES = 64 * 1024**2
"""The largest encoded image that is downloaded or read from standard input, in bytes."""
TIMEOUT = 30.0
"""The time limit of a download, in seconds."""

Read = Callable[..., Image.Image]
"""Reads an image, as `read_image` does."""

_STDIN_NAME = "<stdin>"
_ONE_COLUMN = "leave out the others"
_CHUNK = 64 * 1024
_GENERIC_TYPES = tuple(f"{kind}/octet-stream" for kind in ("application", "binary"))
_GENERIC_TYPES += ("application/force-download", "application/download")


@dataclass(frozen=True)
class ImageSource:
    """An image that has not been read yet: its name, and a function that reads it (RGB, upright).

    `read` raises a DataError (usually an ImageError) where the image cannot be read. `content_id` returns a text that
    is equal for images of equal content, or None.

    Example:
        >>> source = ImageSource("red", lambda: Image.new("RGB", (64, 64), "red"))
        >>> next(predictor.stream([source])).source
        'red'
    """

    name: str
    read: Callable[[], Image.Image]
    content_id: Callable[[], str | None] = lambda: None


def find_images(
    sources: Sequence[str], *, recursive: bool = False, stdin: BinaryIO | None = None, least_side: int | None = None
) -> Iterator[ImageSource]:
    """Iterate over the images of files, folders, http(s) addresses and `-` (one encoded image from `stdin`).

    Parquet and Arrow files, zip and tar archives, shards and `hf:OWNER/NAME` are streamed, and not unpacked.

    Sources come in their order, the images of a folder in that of their names on every file system. An image is read
    only when its `read` is called, and no list of a folder tree is kept. Other files of a folder are skipped; anything
    else that cannot be read becomes an image whose `read` raises the reason. `least_side` is that of `read_image`.

    Raises:
        ConfigError: no source, an empty one, or `-` twice (at the call).

    Example:
        >>> for image in find_images(["photos", "cat.jpg"], recursive=True):
        ...     print(image.name, image.read().size)
    """
    if not sources or not all(sources):
        raise ConfigError(
            "an image is needed: an image file, a folder, an archive, a Parquet file, an http(s) address, or - for "
            "standard input"
        )
    if list(sources).count(STDIN) > 1:
        raise ConfigError("standard input (-) holds one image; name it once")

    read = partial(read_image, least_side=least_side)

    def images() -> Iterator[ImageSource]:
        for source in sources:
            if source == STDIN:
                yield ImageSource(_STDIN_NAME, partial(_decode, read, _STDIN_NAME, partial(_read_stdin, stdin)))
            elif is_address(source):
                yield ImageSource(source, partial(_decode, read, source, partial(download_image, source)))
            else:
                paths = [source]
                if _is_pattern(source) and not _names_shards(source):
                    paths = expand_pattern(os.path.expanduser(source), recursive=True) or paths
                for path in paths:
                    try:
                        rows = _find_rows(path)
                    except DataError as error:
                        yield ImageSource(path, partial(_fail, error))
                        continue
                    if rows is not None:
                        yield from _row_images(rows, read)
                    elif _is_folder(path):
                        yield from _folder_images(path, recursive, read)
                    else:
                        yield ImageSource(path, partial(read, Path(path).expanduser()))

    return images()


def is_collection(source: str) -> bool:
    """Whether a path may name more than one image: a folder, a pattern, or a source of `find_source`."""
    if _is_image(source):
        return False
    if _is_pattern(source):
        return True
    from maple.data.sources.hub import PREFIX

    return source.startswith(PREFIX) or _is_folder(source) or _find_rows(source) is not None


def cache_downloads(images: Iterator[ImageSource]) -> Iterator[ImageSource]:
    """Yield the same images; those from the network or standard input are read once and then kept, errors included."""

    def cached(read: Callable[[], Image.Image]) -> Callable[[], Image.Image]:
        results: list[Image.Image | DataError] = []

        def read_once() -> Image.Image:
            if not results:
                try:
                    results.append(read())
                except DataError as error:
                    results.append(error)
            if isinstance(results[0], DataError):
                raise results[0]
            return results[0]

        return read_once

    for image in images:
        slow = is_address(image.name) or image.name == _STDIN_NAME
        yield ImageSource(image.name, cached(image.read)) if slow else image


def _names_shards(source: str) -> bool:
    from maple.data.sources.shards import is_pattern

    return is_pattern(source)


def _is_pattern(source: str) -> bool:
    """Whether a source is a pattern that no shell has expanded; a file may have this very name."""
    return glob.has_magic(source) and not os.path.exists(os.path.expanduser(source))


def _is_image(path: str) -> bool:
    return has_image_name(path) and os.path.isfile(os.path.expanduser(path))


def _is_folder(path: str) -> bool:
    # Path.is_dir raises an error for names that are too long, such as data: addresses.
    return os.path.isdir(on_disk(Path(path).expanduser()))


def _find_rows(path: str) -> "Source | None":
    """`find_source`, whose readers are imported only for what is not named as an image."""
    if _is_image(path):
        return None
    from maple.data.sources.opening import find_source

    return find_source(path)


def _row_images(source: "Source", read: Read) -> Iterator[ImageSource]:
    """The images of a table, an archive or shards, streamed; what ends the stream early becomes its last image."""
    from maple.data.sources.rows import Columns

    try:
        empty = True
        for row in source.rows(Columns(advice=_ONE_COLUMN), labelled=False):
            empty = False
            if row.content is None:
                problem = ImageError(f"{row.name}: has no image; give its bytes or its path")
                yield ImageSource(row.name, partial(_fail, problem))
            elif isinstance(row.content, DataError):
                yield ImageSource(row.name, partial(_fail, row.content))
            elif isinstance(row.content, Path):
                yield ImageSource(row.name, partial(read, row.content))
            else:
                yield ImageSource(row.name, partial(_decode, read, row.name, partial(bytes, row.content)))
        if empty:
            yield ImageSource(source.text, partial(_fail, DataError(f"{source.text}: holds no images")))
    except DataError as error:
        yield ImageSource(source.text, partial(_fail, error))


def _fail(error: DataError) -> NoReturn:
    raise error


def _folder_images(source: str, recursive: bool, read: Read) -> Iterator[ImageSource]:
    folder = on_disk(Path(source).expanduser())
    unreadable: list[DataError] = []
    empty = True
    for file in walk_files(folder, recursive=recursive, on_unreadable=unreadable.append):
        while unreadable:
            yield ImageSource(str(folder), partial(_fail, unreadable.pop(0)))
        # A broken link or a pipe with the name of an image, and other formats, are reported when they are read.
        is_broken = not (os.path.isfile(file) if has_image_name(file.name) else file.suffix or os.path.exists(file))
        if is_image_file(file) or unread_format(file) or is_broken:
            empty = False
            yield ImageSource(str(file), partial(read, file))
    for error in unreadable:
        yield ImageSource(str(folder), partial(_fail, error))
    if empty and not unreadable:
        hint = "" if recursive else "; recursive=True also looks into the folders below it"
        yield ImageSource(source, partial(_fail, DataError(f"{source}: holds no images{hint}")))


def _decode(read: Read, name: str, load: Callable[[], bytes]) -> Image.Image:
    """Decode bytes; an error names where they came from."""
    return read(load(), name=name)


def _read_stdin(stream: BinaryIO | None) -> bytes:
    if stream is None:
        raise ImageError("<stdin>: is closed; pipe an encoded image into the command")
    if stream.isatty():
        raise ImageError("<stdin>: is a terminal, not an image; pipe an encoded image into the command")
    content = stream.read(MAX_BYTES + 1)
    if not content:
        raise ImageError("<stdin>: is empty (0 bytes); pipe an encoded image into the command")
    if len(content) > MAX_BYTES:
        raise ImageError(f"<stdin>: more than the allowed {MAX_BYTES:,} bytes; save it and give the file")
    return content


def is_address(source: str) -> bool:
    """Whether a source is written as an address: it begins with SCHEME://."""
    scheme, separator, _ = source.partition("://")
    return bool(separator) and scheme.isascii() and scheme.replace("+", "").isalnum()


def download_image(url: str, *, max_bytes: int = MAX_BYTES, timeout: float = TIMEOUT) -> bytes:
    """Download an encoded image from an http or https address, following redirections to such addresses.

    Proxies are taken from the environment. `timeout`: seconds for everything together.

    Raises:
        ImageError: another scheme, a server that cannot be reached, refuses, announces a type other than an image,
            sends more than `max_bytes` or less than it announced, or is too slow. The message begins with the address.
    """
    end = time.monotonic() + timeout
    sockets: list[socket.socket] = []
    # In a thread, because nothing else bounds the look-up of a name and the attempts at its addresses.
    download = in_background(partial(_download, url, max_bytes, timeout, sockets, end), "maple-download")
    try:
        return download.result(timeout)
    except TimeoutError as error:
        raise ImageError(_too_slow(url, timeout)) from error
    finally:
        # Wakes the thread, which then ends, wherever the server keeps it waiting. Closing a socket would not.
        for connection in sockets:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def _too_slow(url: str, timeout: float) -> str:
    return f"{url}: took longer than {timeout:g} seconds; try again, or download it first"


def _download(url: str, max_bytes: int, timeout: float, sockets: list[socket.socket], end: float) -> bytes:
    too_slow = _too_slow(url, timeout)
    try:
        request = Request(_ascii_url(url), headers={"User-Agent": "maple-clip", "Accept": "image/*"})
        with web_opener(sockets, end).open(request, timeout=timeout) as response:
            announced = _check_headers(url, response, max_bytes)
            content = bytearray()
            while chunk := response.read1(_CHUNK):
                content += chunk
                if len(content) > max_bytes:
                    raise ImageError(f"{url}: sends more than the allowed {max_bytes:,} bytes; scale the image down")
    except HTTPError as error:
        with error:
            raise ImageError(f"{url}: the server answers {error.code} {error.reason}; check the address") from error
    except TimeoutError as error:
        raise ImageError(too_slow) from error
    except (OSError, HTTPException, ValueError) as error:
        # A URLError holds its reason, which may be a time-out too.
        reason = error.reason if isinstance(error, URLError) else str(error) or type(error).__name__
        if isinstance(reason, TimeoutError):
            raise ImageError(too_slow) from error
        raise ImageError(f"{url}: cannot be downloaded ({reason}); check the address and the network") from error
    if announced is not None and len(content) < announced:
        raise ImageError(f"{url}: was cut short, {len(content):,} of {announced:,} bytes arrived; try again")
    return bytes(content)


def _ascii_url(url: str) -> str:
    """Write an address in ASCII, as HTTP requires it, keeping escape sequences; refuse other schemes and passwords."""
    parts = urlsplit(url)
    secret, at, host = parts.netloc.rpartition("@")
    if at:
        raise ImageError(
            f"{url.replace(secret + at, '', 1)}: a user name and password in an address are not sent; download the "
            "image first"
        )
    if parts.scheme.lower() not in ("http", "https"):
        raise ImageError(f"{url}: only http:// and https:// addresses can be downloaded")
    if not parts.hostname:
        raise ImageError(f"{url}: names no host; write it as http://host/path/of/image.jpg")
    host = host if host.isascii() else host.encode("idna").decode("ascii")
    keep = "/%:=&?~#+!$,;'@()*[]"
    return urlunsplit((parts.scheme, host, quote(parts.path, safe=keep), quote(parts.query, safe=keep), ""))


def _check_headers(url: str, response: HTTPResponse, max_bytes: int) -> int | None:
    """Refuse what is announced as another type or as too large; return the announced size in bytes."""
    kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if kind and not kind.startswith("image/") and kind not in _GENERIC_TYPES:
        hint = "; that is a page: give the address of the image itself" if kind.endswith("html") else ""
        raise ImageError(f"{url}: the server sends {kind}, not an image{hint}")
    length = response.headers.get("Content-Length", "").strip()
    if not length.isdecimal():
        return None
    if int(length) > max_bytes:
        raise ImageError(f"{url}: has {int(length):,} bytes, more than the allowed {max_bytes:,}; scale it down")
    return int(length)
