"""A picture behind an address: fetched within limits of size and time."""

import time
from http.client import HTTPException, HTTPResponse
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlsplit, urlunsplit
from urllib.request import Request

from maple.errors import ImageError
from maple.web import web_opener

MAX_BYTES = 64 * 1024**2
"""The largest encoded image that is fetched, in bytes."""
TIMEOUT = 30.0
"""How long fetching one picture may take, in seconds."""

_PIECE = 64 * 1024
_ANY_CONTENT = ("application/octet-stream", "binary/octet-stream", "application/force-download", "application/download")


def fetch_bytes(url: str, *, max_bytes: int = MAX_BYTES, timeout: float = TIMEOUT) -> bytes:
    """Return what lies behind an http or https address, following redirections to such addresses.

    Proxies are taken from the environment, as usual.

    Args:
        timeout: seconds for the body as a whole, and for each silence of the server before it.

    Raises:
        ImageError: another scheme, a server that cannot be reached, refuses, says that it sends no image, sends more
            than `max_bytes` or less than it announced, or takes too long. The message begins with the address.
    """
    began = time.monotonic()
    try:
        request = Request(_plain(url), headers={"User-Agent": "maple-clip", "Accept": "image/*"})
        with web_opener().open(request, timeout=timeout) as response:
            _check_type(url, response)
            announced = _announced(response)
            if announced is not None and announced > max_bytes:
                raise ImageError(f"{url}: has {announced:,} bytes, more than the allowed {max_bytes:,}; scale it down")
            content = _read(url, response, max_bytes, began + timeout, timeout)
    except HTTPError as error:
        with error:
            raise ImageError(f"{url}: the server answers {error.code} {error.reason}; check the address") from error
    except TimeoutError as error:
        raise ImageError(_too_slow(url, timeout)) from error
    except URLError as error:
        if isinstance(error.reason, TimeoutError):
            raise ImageError(_too_slow(url, timeout)) from error
        raise ImageError(f"{url}: cannot be fetched ({error.reason}); check the address and the network") from error
    except (OSError, HTTPException, ValueError) as error:
        reason = str(error) or type(error).__name__
        raise ImageError(f"{url}: cannot be fetched ({reason}); check the address and the network") from error
    if announced is not None and len(content) < announced:
        raise ImageError(f"{url}: was cut short, {len(content):,} of {announced:,} bytes came; try again")
    return content


def is_address(source: str) -> bool:
    """Whether a source is meant as an address: it begins with SCHEME://."""
    scheme, separator, _ = source.partition("://")
    return bool(separator) and scheme.isascii() and scheme.replace("+", "").isalnum()


def _plain(url: str) -> str:
    """The address in ASCII, as HTTP wants it; what is escaped already stays as it is.

    Raises:
        ImageError: not http or https, or no host.
    """
    parts = urlsplit(url)
    secret, at, host = parts.netloc.rpartition("@")
    if at:
        raise ImageError(
            f"{url.replace(secret + at, '', 1)}: a user name and password in an address are not sent; download the "
            "picture first"
        )
    if parts.scheme.lower() not in ("http", "https"):
        raise ImageError(f"{url}: only http:// and https:// addresses can be fetched")
    if not parts.hostname:
        raise ImageError(f"{url}: names no host; write it as http://host/path/of/image.jpg")
    host = host if host.isascii() else host.encode("idna").decode("ascii")
    keep = "/%:=&?~#+!$,;'@()*[]"
    return urlunsplit((parts.scheme, host, quote(parts.path, safe=keep), quote(parts.query, safe=keep), ""))


def _check_type(url: str, response: HTTPResponse) -> None:
    kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if kind and not kind.startswith("image/") and kind not in _ANY_CONTENT:
        hint = "; that is a page: give the address of the picture itself" if kind.endswith("html") else ""
        raise ImageError(f"{url}: the server sends {kind}, not an image{hint}")


def _announced(response: HTTPResponse) -> int | None:
    length = response.headers.get("Content-Length", "").strip()
    return int(length) if length.isdecimal() else None


def _read(url: str, response: HTTPResponse, max_bytes: int, deadline: float, timeout: float) -> bytes:
    content = bytearray()
    # One piece as it comes, not a full one: a server that drips must not hold us beyond the deadline.
    while piece := response.read1(_PIECE):
        content += piece
        if len(content) > max_bytes:
            raise ImageError(f"{url}: sends more than the allowed {max_bytes:,} bytes; scale the picture down")
        if time.monotonic() > deadline:
            raise ImageError(_too_slow(url, timeout))
    return bytes(content)


def _too_slow(url: str, timeout: float) -> str:
    return f"{url}: took longer than {timeout:g} seconds; try again, or download it first"
