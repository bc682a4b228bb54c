"""Safely extract untrusted archives: no path traversal, no links, no special files, bounded size and memory."""

import bz2
import gzip
import io
import lzma
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any, cast

from maple.errors import DownloadError, pointer_in, shortened_list
from maple.files import ZipBytes, regular

UNPUBLISHED = "it is not what was published"
"""Ends the error for an archive that is refused; of a published one, nothing in it should be."""
MAX_FILES = 300_000
"""Files, folders and links. SUN397 has the most, 109,000 images, twice that with the files that macOS adds."""
_FEW = 10_000
_LEAST = 1024
"""Bytes of the archive for each of its files, if they are more than `_FEW`."""
MAX_RATIO = 8
"""How much larger than its archive the content may be: images hardly compress. Small archives may grow to 1 GiB."""
_SMALL = 1 << 30
_CHUNK = 1 << 20
_LONGEST = 4096
_DEEPEST = 32
_HEADERS = 1 << 20
"""The most bytes of headers (long names, extended attributes) before one member of a tar archive."""
_DIRECTORY = 32 << 20
"""The most bytes of the table of contents of a zip archive."""
_DICTIONARY = 128 << 20
"""The most memory to decompress xz with; `xz -9` needs half of it."""

DAMAGED = (
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, gzip.BadGzipFile, struct.error, EOFError),
    # What tarfile and zipfile raise at fields that are not numbers or text, or too many headers in sequence.
    *(ValueError, OverflowError, LookupError, TypeError, RecursionError),
)

_Member = tuple[str, Callable[[], IO[bytes]] | None]
"""The name of a file and how to open it; None for a folder, and `_LINK` for a symbolic link."""
_LINK: Callable[[], IO[bytes]] = partial(io.BytesIO)


def is_archive(path: Path) -> bool:
    """Return whether the name is that of an archive that `unpack` reads."""
    return path.name.lower().endswith((".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz"))


def zip_names(members: Sequence[zipfile.ZipInfo]) -> tuple[list[str], str]:
    """Return the names of the members of a zip archive, and what is unknown about their encoding; "" for nothing.

    Archive Utility of macOS, among others, writes UTF-8 without the flag for it, and zipfile then decodes the bytes as
    code page 437. Names without the flag are read as UTF-8 if all of them are, and else in that code page.
    """
    names = [info.filename for info in members]
    # Python 3.12 replaces a name by that of an extra field, which is UTF-8.
    unflagged = [
        number
        for number, info in enumerate(members)
        if not info.flag_bits & 0x800 and not info.filename.isascii() and info.filename == info.orig_filename
    ]
    try:
        decoded = [names[number].encode("cp437").decode("utf-8") for number in unflagged]
    except UnicodeError:
        return names, (
            f"the encoding of {len(unflagged):,} file names is unknown, they are read as code page 437 "
            f"({shortened_list(names[number] for number in unflagged)}); if that is wrong, make the archive again with "
            "names in UTF-8"
        )
    for number, name in zip(unflagged, decoded, strict=True):
        names[number] = name
    return names, ""


def unpack(
    archive: Path,
    folder: Path,
    *,
    max_bytes: int | None = None,
    max_files: int | None = None,
    on_bytes: Callable[[int], None] = lambda _count: None,
) -> int:
    """Unpack a zip or tar archive into `folder`, which should be empty, and return the number of files.

    Permissions and owners of the archive are ignored, and links are never created: a symbolic link that points inside
    is skipped, a hard link becomes a copy. Files unpacked before an error are left: use a folder that can be deleted.

    Args:
        max_bytes: the largest total size of the content; by default 8 times the archive, at least 1 GiB.
        max_files: the largest number of files, folders and links; by default one per KiB of the archive, at least
            10,000 and at most 300,000.
        on_bytes: called with the number of bytes after each block that was written.

    Raises:
        DownloadError: the archive is damaged or encrypted, or a member leaves the folder, links out of it, is a device,
            appears twice, or exceeds a limit.
    """
    size = archive.stat().st_size
    limit = max(_SMALL, MAX_RATIO * size) if max_bytes is None else max_bytes
    most = min(MAX_FILES, max(_FEW, size // _LEAST)) if max_files is None else max_files
    written = count = entries = 0
    folders: set[PurePosixPath] = set()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with regular(archive).open("rb") as file:
            is_zip = file.read(4) in (b"PK\3\4", b"PK\5\6")
        with closing((_zip_members if is_zip else _tar_members)(archive, folder, limit)) as members:
            for entries, (name, open_member) in enumerate(members, 1):
                path = _safe_path(archive, name, name)
                folders.update(path.parents)
                if entries + len(folders) > most + 1:
                    raise _refused(archive, f"holds more than {most} files and folders")
                if open_member is _LINK:
                    continue
                target = _create(archive, folder / path, name, is_folder=open_member is None)
                if target is None or open_member is None:
                    continue
                count += 1
                with target, open_member() as source:
                    while block := source.read(_CHUNK):
                        # Counted as they come: the sizes that an archive declares may be wrong.
                        written += len(block)
                        if written > limit:
                            raise _too_large(archive, limit, name)
                        target.write(block)
                        on_bytes(len(block))
    except DAMAGED as error:
        raise _damaged(archive, error) from error
    except (NotImplementedError, RuntimeError) as error:
        raise DownloadError(f"{archive}: cannot be unpacked ({error}); unpack it by hand") from error
    except OSError as error:
        if error.errno is None:  # of bz2 and gzip, not of the system
            raise _damaged(archive, error) from error
        raise DownloadError(f"{archive}: cannot be unpacked in {folder} ({error}); make room, and repeat") from error
    return count


def _zip_members(archive: Path, folder: Path, limit: int) -> Generator[_Member, None, None]:
    """Yield the members of a zip archive; raise at what does not belong in one."""
    del folder
    with ZipBytes(archive, records=MAX_FILES, largest=_DIRECTORY) as file, zipfile.ZipFile(file) as opened:
        members = opened.infolist()
        names, _ = zip_names(members)
        packed = declared = 0
        for name, info in zip(names, members, strict=True):
            packed, declared = packed + info.compress_size, declared + info.file_size
            if declared > limit:
                raise _too_large(archive, limit, name)
            if packed > archive.stat().st_size:
                raise _refused(archive, "holds members that overlap")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                # zipfile decompresses the other kinds without a limit.
                raise NotImplementedError(f"member {name!r} is compressed in an unusual way")
        for name, info in zip(names, members, strict=True):
            kind = stat.S_IFMT(info.external_attr >> 16)
            if kind == stat.S_IFLNK and not info.is_dir():
                with opened.open(info) as content:
                    target = content.read(_LONGEST).decode("utf-8", "replace")
                yield name, _link(archive, name, target)
            elif kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise _refused(archive, f"member {name!r} is a device or pipe")
            else:
                yield name, None if info.is_dir() else partial(opened.open, info)


def _tar_members(archive: Path, folder: Path, limit: int) -> Generator[_Member, None, None]:
    """Yield the members of a tar archive, compressed or not; raise at what does not belong in one."""
    with archive.open("rb") as file:
        content = _TarContent(file, 2 * limit)
        with tarfile.TarFile(fileobj=cast(IO[bytes], content)) as tar:
            while member := tar.next():
                # Kept by tarfile for each member, and of use for archives that are not read in their order.
                tar.members, tar.pax_headers = [], {}  # type: ignore[attr-defined]
                if member.isdev():
                    raise _refused(archive, f"member {member.name!r} is a device or pipe")
                content.allowance = limit
                if member.islnk():
                    linked = folder / _safe_path(archive, member.name, member.linkname)
                    if not linked.exists():
                        raise _refused(archive, f"member {member.name!r} links to a file that is not before it")
                    yield member.name, io.BytesIO if linked.is_dir() else partial(io.FileIO, linked)
                elif member.issym():
                    yield member.name, _link(archive, member.name, member.linkname)
                elif member.isdir():
                    yield member.name, None
                elif member.size > limit:
                    raise _too_large(archive, limit, member.name)
                else:
                    yield member.name, cast(Callable[[], IO[bytes]], partial(tar.extractfile, member))
                content.allowance = _HEADERS
            if content.last.strip(b"\0"):  # tarfile takes a damaged header for the end
                raise tarfile.ReadError("bad header")


class _TarContent:
    """The content of a tar archive: decompressed, and read forwards within limits.

    tarfile reads extended headers into memory, whatever size they declare, and any number before one member.
    """

    def __init__(self, file: IO[bytes], limit: int) -> None:
        start = file.read(6)
        file.seek(0)
        self._blocks: Iterator[bytes] = iter(partial(file.read, _CHUNK), b"")
        if start.startswith(b"\x1f\x8b"):
            self._blocks = iter(partial(gzip.GzipFile(fileobj=file).read, _CHUNK), b"")
        elif start.startswith(b"BZh"):
            self._blocks = _decompressed(self._blocks, bz2.BZ2Decompressor)
        elif start == b"\xfd7zXZ\0":
            # lzma.LZMAFile would take up to 4 GiB, as the file demands.
            self._blocks = _decompressed(self._blocks, lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, _DICTIONARY))
        self._block = io.BytesIO()
        self._position, self._limit = 0, limit
        self.allowance = _HEADERS
        self.last = b""

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> None:
        if position < self._position:
            raise tarfile.ReadError("a size below zero")
        self.read(position - self._position)

    def read(self, size: int) -> bytes:
        self.allowance -= size
        if self.allowance < 0:
            raise tarfile.ReadError(f"headers of more than {_HEADERS} bytes")
        parts = []
        while size > 0:
            if part := self._block.read(size):
                parts.append(part)
                size -= len(part)
            elif (block := next(self._blocks, None)) is None:
                break
            else:
                self._block = io.BytesIO(block)
        self.last = b"".join(parts)
        self._position += len(self.last)
        if self._position > self._limit:
            raise tarfile.ReadError(f"it has more than {self._limit} bytes")
        return self.last


def _decompressed(blocks: Iterator[bytes], decompressor: Callable[[], Any]) -> Iterator[bytes]:
    """Decompress the streams of bz2 or xz, which may come one after the other, block by block."""
    data = next(blocks, b"")
    while data:
        stream = decompressor()
        while not stream.eof:
            if stream.needs_input and not data and not (data := next(blocks, b"")):
                raise EOFError("it ends early")
            block, data = stream.decompress(data, _CHUNK), b""
            yield block
        data = (stream.unused_data or next(blocks, b"")).lstrip(b"\0")


def _create(archive: Path, path: Path, name: str, *, is_folder: bool) -> IO[bytes] | None:
    """Create the folder of this name, or a new file in its folder."""
    try:
        (path if is_folder else path.parent).mkdir(parents=True, exist_ok=True)
        return None if is_folder else path.open("xb")
    except (FileExistsError, NotADirectoryError) as error:
        problem = "comes twice" if path.is_file() else "is a file and a folder"
        raise _refused(archive, f"member {name!r} {problem}") from error


def _safe_path(archive: Path, name: str, text: str) -> PurePosixPath:
    """The path of a member, or of the target of its link, if it stays inside; the same rule on every system."""
    text = text.replace("\\", "/")
    path = PurePosixPath(text)
    if path.is_absolute() or ".." in path.parts or "\0" in text or PureWindowsPath(text).drive:
        raise _refused(archive, f"member {name!r} leaves its folder ({text!r})")
    too_long = len(text) > _LONGEST or len(path.parts) > _DEEPEST
    if too_long or any(len(part.encode("utf-8", "surrogateescape")) > 255 for part in path.parts):
        raise _refused(archive, f"member {name[:60]!r}... has too long a name")
    return path


def _link(archive: Path, name: str, target: str) -> Callable[[], IO[bytes]]:
    _safe_path(archive, name, os.path.normpath(os.path.join(name, "..", target)))
    return _LINK


def _refused(archive: Path, problem: str) -> DownloadError:
    return DownloadError(f"{archive}: {problem}; {UNPUBLISHED}")


def _too_large(archive: Path, limit: int, name: str) -> DownloadError:
    return _refused(archive, f"unpacks to more than {limit} bytes (at {name!r})")


def _damaged(archive: Path, error: Exception) -> DownloadError:
    if problem := pointer_in(archive):
        return DownloadError(f"{archive}: is {problem}")
    return DownloadError(f"{archive}: is damaged or not an archive ({error}); fetch it again")
