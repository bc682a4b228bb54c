"""Unpacking the archives of strangers: nothing leaves the folder, only files and folders are made, nothing explodes."""

import gzip
import lzma
import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from maple.errors import DownloadError

MAX_FILES = 2_000_000
"""ImageNet, the largest set, has 1.3 million files."""
MAX_RATIO = 8
"""How much larger than its archive the content may be: images hardly compress. Small archives may grow to 1 GiB."""
_SMALL = 1 << 30
_CHUNK = 1 << 20
_LONGEST = 4096

_DAMAGED = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, gzip.BadGzipFile, EOFError, KeyError)


@dataclass(frozen=True)
class _Member:
    name: str
    kind: str
    """file, folder, link or special."""
    link: str = ""
    open: Callable[[], IO[bytes] | None] = lambda: None


def is_archive(path: Path) -> bool:
    """Whether the name is that of an archive that `unpack` reads."""
    return path.name.lower().endswith((".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz"))


def unpack(
    archive: Path,
    folder: Path,
    *,
    max_bytes: int | None = None,
    max_files: int = MAX_FILES,
    on_bytes: Callable[[int], None] = lambda _count: None,
) -> int:
    """Unpack a zip or tar archive into `folder`, which should be empty; return the number of files.

    Permissions and owners of the archive are ignored. Links are never made: a symbolic one that points inside is left
    out, as no image is lost with it, a hard one becomes a copy. What was unpacked before an error stays: unpack into
    a folder that can be thrown away.

    Args:
        max_bytes: how large the content may become; by default 8 times the archive, at least 1 GiB.
        on_bytes: called with the number of bytes after each piece that was written.

    Raises:
        DownloadError: the archive is damaged or encrypted, or a member leaves the folder, links out of it, is a device,
            stands in the place of another, or exceeds a limit.
    """
    limit = max(_SMALL, MAX_RATIO * archive.stat().st_size) if max_bytes is None else max_bytes
    written = count = 0
    try:
        with _members(archive) as members:
            for member in members:
                path = _place(archive, folder, member)
                if path is None:
                    continue
                count += 1
                if count > max_files:
                    raise DownloadError(f"{archive}: holds more than {max_files} files; it is not what was published")
                source = member.open()
                if source is None:
                    raise DownloadError(f"{archive}: member {member.name!r} cannot be read; fetch the archive again")
                with source, path.open("xb") as target:
                    while block := source.read(_CHUNK):
                        written += len(block)
                        if written > limit:
                            raise DownloadError(
                                f"{archive}: unpacks to more than {limit} bytes (at {member.name!r}); it is not what "
                                "was published"
                            )
                        target.write(block)
                        on_bytes(len(block))
    except _DAMAGED as error:
        raise DownloadError(f"{archive}: is damaged or no archive ({error}); fetch it again") from error
    except (NotImplementedError, RuntimeError) as error:
        raise DownloadError(f"{archive}: cannot be unpacked ({error}); unpack it by hand") from error
    except OSError as error:
        raise DownloadError(f"{archive}: cannot be unpacked in {folder} ({error}); make room, and repeat") from error
    return count


def _place(archive: Path, folder: Path, member: _Member) -> Path | None:
    """Where a file goes, its folder made; None for what is no file. Refuses what has no business in an archive."""
    relative = _inside(archive, member.name, member.name)
    path = folder.joinpath(*relative.parts)
    if member.kind == "special":
        raise DownloadError(f"{archive}: member {member.name!r} is a device or pipe; it is not what was published")
    _inside(archive, member.name, member.link)
    if member.kind == "link":
        return None
    try:
        if member.kind == "folder":
            path.mkdir(parents=True, exist_ok=True)
            return None
        if not relative.parts:
            raise DownloadError(f"{archive}: member {member.name!r} has no name; it is not what was published")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            raise DownloadError(f"{archive}: member {member.name!r} comes twice; it is not what was published")
    except (FileExistsError, NotADirectoryError) as error:
        raise DownloadError(
            f"{archive}: member {member.name!r} is a file and a folder; it is not what was published"
        ) from error
    return path


def _inside(archive: Path, name: str, text: str) -> PurePosixPath:
    """A member's path, or a link's target seen from the top, if it stays inside."""
    text = text.replace("\\", "/")
    path = PurePosixPath(text)
    if path.is_absolute() or ".." in path.parts or "\0" in text or (path.parts and path.parts[0].endswith(":")):
        raise DownloadError(f"{archive}: member {name!r} leaves its folder ({text!r}); it is not what was published")
    if len(text) > _LONGEST or any(len(part.encode("utf-8", "surrogateescape")) > 255 for part in path.parts):
        raise DownloadError(f"{archive}: member {name[:60]!r}... has too long a name; it is not what was published")
    return path


@contextmanager
def _members(archive: Path) -> Iterator[Iterator[_Member]]:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            yield (_zip_member(opened, info) for info in opened.infolist())
    else:
        with tarfile.open(archive, "r:*") as tar:
            yield (_tar_member(tar, info) for info in tar)


def _zip_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> _Member:
    mode = stat.S_IFMT(info.external_attr >> 16)
    if info.is_dir():
        return _Member(info.filename, "folder")
    if mode == stat.S_IFLNK:
        with archive.open(info) as file:
            link = file.read(_LONGEST).decode("utf-8", "replace")
        return _Member(info.filename, "link", _seen_from_top(info.filename, link))
    if mode not in (0, stat.S_IFREG):
        return _Member(info.filename, "special")
    return _Member(info.filename, "file", open=lambda: archive.open(info))


def _tar_member(archive: tarfile.TarFile, info: tarfile.TarInfo) -> _Member:
    if info.isdir():
        return _Member(info.name, "folder")
    if info.issym():
        return _Member(info.name, "link", _seen_from_top(info.name, info.linkname))
    if not info.isreg() and not info.islnk():
        return _Member(info.name, "special")
    # Of a hard link, the content of the member that it names.
    return _Member(info.name, "file", info.linkname, open=lambda: archive.extractfile(info))


def _seen_from_top(name: str, link: str) -> str:
    """The target of a symbolic link, which is written as seen from the link's own folder."""
    return os.path.normpath(os.path.join(os.path.dirname(name), link))
