"""Files: written atomically (a reader sees the old content or the new, never a part), read with clear errors."""

import errno
import hashlib
import io
import json
import math
import os
import re
import shutil
import stat
import sys
import tempfile
import time
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from maple.errors import CheckpointError, MapleError, first_line, output_error, shortened, shortened_list

if TYPE_CHECKING:
    import socket
    from urllib.request import OpenerDirector

    import numpy as np

if sys.platform != "win32":
    import fcntl

_TEMPORARY = re.compile(r"\.maple-[a-z0-9_]{8}\.tmp")
_Content = TypeVar("_Content")

FAILURE = "failure.json"
"""The file in the folder of a failed run of a sweep that says why; written by sweeps, read by reports."""


@contextmanager
def output_errors(path: str | os.PathLike[str], problem: str = "cannot be written") -> Iterator[None]:
    """Turn an OSError of the body into ConfigError "`path` `problem` (reason); choose another output"."""
    try:
        yield
    except OSError as error:
        raise output_error(f"{path} {problem} ({error.strerror})") from error


@contextmanager
def replacing(path: str | os.PathLike[str], *, flush: bool = True) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; move it over `path` if the body succeeds, else remove it.

    After a crash at any moment `path` holds either its previous content or the whole new one. An OSError names `path`.
    Without `flush`, which waits for the disk, that is not so after a crash of the system, or a loss of power.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary_path(target.parent) as temporary:
            yield temporary
            make_public(temporary)
            (move if flush else os.replace)(temporary, target)
    except OSError as error:
        name = None if error.filename is None else Path(os.fsdecode(error.filename)).name
        if error.errno is not None and (name is None or _TEMPORARY.fullmatch(name)):
            error.filename = str(target)
        raise


def make_public(path: Path) -> None:
    """Give a temporary file or folder, which is private, the permissions of a new one, where there are permissions."""
    os.umask(umask := os.umask(0))
    with suppress(OSError):  # a mounted bucket, say
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


@contextmanager
def temporary_path(parent: Path, *, folder: bool = False) -> Iterator[Path]:
    """Yield a new file, or folder, with a temporary name in `parent`; what has that name in the end is removed.

    A process that is killed leaves it. The next one that comes here removes it: its lock (flock) went with the process.
    """
    remove_stale(parent)
    while True:
        if folder:
            name = tempfile.mkdtemp(dir=parent, prefix=".maple-", suffix=".tmp")
            handle = -1 if sys.platform == "win32" else os.open(name, os.O_RDONLY)
        else:
            handle, name = tempfile.mkstemp(dir=parent, prefix=".maple-", suffix=".tmp")
        if sys.platform == "win32":
            if not folder:
                os.close(handle)  # no open file can be renamed there
            break
        with suppress(OSError):  # a file system without locks: nothing is removed there
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.path.lexists(name):
            break
        os.close(handle)  # another process has removed it before the lock was there
    try:
        yield Path(name)
    finally:
        _remove(name)
        if sys.platform != "win32":
            os.close(handle)


def remove_stale(parent: Path) -> None:
    """Remove the temporary files and folders of processes that have ended."""
    if sys.platform == "win32" or not os.access(parent, os.R_OK):
        return
    for name in filter(_TEMPORARY.fullmatch, os.listdir(parent)):
        with suppress(OSError):  # of another user, or in use
            path = os.path.join(parent, name)
            handle = os.open(path, os.O_RDONLY if os.path.isdir(path) else os.O_RDWR)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(path)
            finally:
                os.close(handle)


def _remove(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        Path(path).unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` (UTF-8) atomically; lone surrogates, which stand for undecodable bytes, are escaped."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON atomically; NaN and infinity are refused with a ValueError."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def regular(path: str | os.PathLike[str], *, most: float = math.inf) -> Path:
    """Return the path of a file that is about to be read; OSError if reading it might never end.

    Args:
        most: bytes that it may have at most, for what is read into memory as a whole.

    Raises:
        OSError: it cannot be reached, or is a pipe, a device, a socket, or larger.
    """
    status = os.stat(path)
    kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
    if kind := kinds.get(stat.S_IFMT(status.st_mode)):
        raise OSError(errno.EINVAL, f"it is {kind}, not a file", str(path))
    if status.st_size > most:
        raise OSError(errno.EFBIG, f"it has {status.st_size:,} bytes, more than the allowed {most:,}", str(path))
    return Path(path)


class ZipBytes(io.BufferedReader):
    """The bytes of a zip archive of at most `records` entries, of which none and no table of contents is larger.

    zipfile reads the table of contents at once, and makes an object of each entry.
    """

    def __init__(self, path: str | os.PathLike[str], *, records: int, largest: int) -> None:
        super().__init__(io.FileIO(regular(path)))
        self._records, self._largest = records, largest

    def read(self, size: int | None = -1, /) -> bytes:
        if (size or 0) > self._largest:
            raise zipfile.BadZipFile(f"its table of contents has {size} bytes")
        data = super().read(size)
        if data.count(b"PK\1\2") > self._records:
            raise zipfile.BadZipFile(f"it holds more than {self._records:,} files")
        return data


def read_arrays(path: str | os.PathLike[str], kinds: str = "biuf") -> "dict[str, np.ndarray[Any, Any]]":
    """Read the arrays of an .npz file by name, or the one of an .npy file as "".

    Nothing is allocated before it is known that the file holds as many values as it declares.

    Args:
        kinds: NumPy's letters for the kinds of values that are allowed.

    Raises:
        OSError, ValueError: missing, unreadable, damaged, larger than 2 GiB, or with values of another kind.
    """
    import numpy as np

    def read(file: IO[bytes], size: int) -> "np.ndarray[Any, Any]":
        major, minor = np.lib.format.read_magic(file)
        if (major, minor) not in ((1, 0), (2, 0)):
            raise ValueError(f"an array has format {major}.{minor}")
        header = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = header(file)
        if dtype.kind not in kinds:
            raise ValueError(f"an array holds {dtype!s:.40}")
        if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != size - file.tell():
            raise ValueError(f"an array does not have its shape {list(shape)!s:.80}")
        return np.ndarray(shape, dtype, file.read(), order="F" if fortran_order else "C")

    try:
        size = regular(path, most=_MOST_ARRAYS).stat().st_size
        with ZipBytes(path, records=_MOST_RECORDS, largest=_MOST_ARRAYS) as file:
            if file.peek(4)[:4] != b"PK\3\4":
                return {"": read(file, size)}
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
                if sum(member.file_size for member in members) > _MOST_ARRAYS:
                    raise ValueError(f"its arrays have more than the allowed {_MOST_ARRAYS:,} bytes")
                arrays = {}
                for member in members:
                    with archive.open(member) as content:
                        arrays[member.filename.removesuffix(".npy")] = read(content, member.file_size)
                return arrays
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OverflowError, MemoryError) as error:
        raise ValueError(first_line(error)) from error


_DEEPEST = 100
_LARGEST = 2**64
_MOST_JSON = 512 * 1024**2
_MOST_ARRAYS = 2 * 1024**3
_MOST_RECORDS = 1000


def parse_json(text: str | bytes, *, foreign: bool = False) -> Any:
    """Parse JSON (bytes: UTF-8, a byte order mark is ignored).

    Args:
        foreign: another program's: a repeated key, whose last value counts, and numbers of any size are accepted.

    Raises:
        ValueError: not JSON, nested too deeply, a repeated key, or a number that is not finite or beyond 64 bits.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            repeated = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
            raise ValueError(f"it names {shortened_list(map(repr, repeated))} more than once; keep one of each")
        return content

    def finite(number: str) -> float:
        if not math.isfinite(value := float(number)):
            raise ValueError(f"it holds {shortened(number, 20)}, which is not a finite number")
        return value

    text = text.decode("utf-8-sig") if isinstance(text, bytes) else text.removeprefix("\ufeff")
    try:
        if foreign:
            return check_values(json.loads(text), largest=math.inf)
        return check_values(json.loads(text, object_pairs_hook=unique, parse_float=finite, parse_constant=finite))
    except RecursionError as error:
        raise ValueError(f"it is nested more than {_DEEPEST} levels deep") from error


def check_values(content: Any, *, largest: float = _LARGEST) -> Any:
    """Return what was parsed; ValueError if it is nested too deeply to be worked with, or holds a larger integer."""
    level = [content]
    for _ in range(_DEEPEST):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict | list):
                inner += value.values() if isinstance(value, dict) else value
            elif isinstance(value, int) and not -largest < value < largest:
                raise ValueError("it holds an integer that does not fit into 64 bits")
        if not inner:
            return content
        level = inner
    raise ValueError(f"it is nested more than {_DEEPEST} levels deep")


def read_json(
    path: str | os.PathLike[str],
    kind: type[_Content] = dict,  # type: ignore[assignment]
    *,
    error: type[MapleError] = CheckpointError,
    missing: str | None = None,
    advice: str = "",
    foreign: bool = False,
) -> _Content:
    """Read a JSON file.

    Args:
        kind: what it must hold: `dict` for an object, `list` for an array, `object` for anything.
        error: the class of the error to raise.
        missing: the message if there is no such file.
        advice: what to do about a damaged file; ends the message.
        foreign: as for `parse_json`.

    Raises:
        MapleError: of class `error`: the file is missing, unreadable, not JSON, or holds another kind of value.
    """
    advice = f"; {advice}" if advice else ""
    try:
        content = parse_json(regular(path, most=_MOST_JSON).read_bytes(), foreign=foreign)
    except FileNotFoundError as reason:
        raise error(missing or f"{path} does not exist{advice}") from reason
    except (OSError, ValueError) as reason:
        raise error(f"{path} is unreadable or damaged ({reason}){advice}") from reason
    if not isinstance(content, kind):
        name = "a JSON object" if kind is dict else "a JSON array" if kind is list else kind.__name__
        raise error(f"{path} is damaged: it should hold {name}, but holds {shortened(json.dumps(content), 80)}{advice}")
    return content


def read_json_lines(
    path: str | os.PathLike[str],
    *,
    error: type[MapleError] = CheckpointError,
    advice: str = "",
    on_damage: Callable[[int, str], None] | None = None,
) -> dict[int, dict[str, Any]]:
    """Read the JSON objects of a .jsonl file, by line number from 1; empty if there is no file, empty lines skipped.

    Args:
        error, advice: as for `read_json`.
        on_damage: called with the number of each damaged line and what is wrong with it, instead of raising.

    Raises:
        MapleError: of class `error`: the file is unreadable, or a line is not a JSON object.
    """
    objects: dict[int, dict[str, Any]] = {}
    advice = f"; {advice}" if advice else ""
    try:
        text = regular(path, most=_MOST_JSON).read_text(encoding="utf-8-sig") if os.path.exists(path) else ""
    except (OSError, ValueError) as reason:
        raise error(f"{path} is unreadable or damaged ({reason}){advice}") from reason
    # Not splitlines, which also splits at characters that JSON leaves unescaped in a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            content = parse_json(line)
            problem = None if isinstance(content, dict) else "not a JSON object"
        except ValueError as reason:
            problem = f"not JSON: {reason}"
        if problem is None:
            objects[number] = content
        elif on_damage is None:
            raise error(f"{path} is damaged: line {number} is {problem}{advice}")
        else:
            on_damage(number, problem)
    return objects


def on_disk(path: Path, listings: dict[Path, dict[str, list[str]]] | None = None) -> Path:
    """Return `path`, or, if nothing has this very name, the path of what has it in another Unicode form.

    Names in NFC and NFD look the same: a Mac writes the second, editors the first. Nothing at all: `path` itself.

    Args:
        listings: keeps the names in each folder for the next call, by their normal form.
    """
    if str(path).isascii() or os.path.lexists(path):
        return path
    listings = {} if listings is None else listings

    def spelled(folder: Path, parts: Sequence[str]) -> Path | None:
        if not parts:
            return folder
        if folder not in listings:
            listings[folder] = {}
            with suppress(OSError):
                for name in sorted(os.listdir(folder)):
                    listings[folder].setdefault(unicodedata.normalize("NFC", name), []).append(name)
        others = listings[folder].get(unicodedata.normalize("NFC", parts[0]), [])
        for name in dict.fromkeys([parts[0], *others]):
            if os.path.lexists(folder / name) and (complete := spelled(folder / name, parts[1:])):
                return complete
        return None

    root = Path(path.anchor)
    return spelled(root, path.parts[1:] if path.anchor else path.parts) or path


def sha256_of(path: Path) -> str:
    """Return the SHA-256 (hex) of a file's content; OSError if it cannot be read."""
    with regular(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def move(source: Path, target: Path) -> None:
    """Rename a complete file; it is flushed to the disk first, so that the new name never refers to a part of it."""
    _flush(source)
    source.replace(target)
    _flush(target.parent)


def _flush(path: Path) -> None:
    if sys.platform == "win32" and path.is_dir():  # which cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # shared folders and older network mounts cannot flush a folder
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def web_opener(sockets: "list[socket.socket] | None" = None, end: float = math.inf) -> "OpenerDirector":
    """A URL opener for http and https only, also after a redirect: file and ftp URLs are refused.

    Args:
        sockets: receives the socket of every response, before its first byte is read. The time limit of `open` is one
            for each silence, so a server that sends byte by byte is only ended by shutting down the socket.
        end: the time of `time.monotonic` after which no further response is begun.
    """
    from http import client
    from urllib import request

    class Response(client.HTTPResponse):
        def __init__(self, sock: "socket.socket", *arguments: Any, **options: Any) -> None:
            if sockets is not None:
                sockets.append(sock)
            if time.monotonic() > end:  # afterwards: whoever shuts the sockets down at `end` may have missed this one
                raise TimeoutError
            super().__init__(sock, *arguments, **options)

        def read(self, amt: int | None = None) -> bytes:
            # urllib reads the body of a redirect, however long, only to discard it.
            return super().read(1 << 16 if amt is None else amt)

    class Http(client.HTTPConnection):
        response_class = Response

    class Https(client.HTTPSConnection):
        response_class = Response

    class HttpHandler(request.HTTPHandler):
        def http_open(self, req: request.Request) -> client.HTTPResponse:
            return self.do_open(Http, req)

    class HttpsHandler(request.HTTPSHandler):
        def https_open(self, req: request.Request) -> client.HTTPResponse:
            return self.do_open(Https, req)

    opener = request.OpenerDirector()
    for handler in (
        *(request.ProxyHandler, request.UnknownHandler, HttpHandler, HttpsHandler),
        *(request.HTTPDefaultErrorHandler, request.HTTPRedirectHandler, request.HTTPErrorProcessor),
    ):
        opener.add_handler(handler())
    return opener
