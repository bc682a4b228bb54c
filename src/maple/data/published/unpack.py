"""Safely extract untrusted archives: no path traversal, no links, no special files, bounded size."""

import gzip
import io
import lzma
import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Generator
from contextlib import closing
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

from maple.errors import DownloadError

MAX_FILES = 2_000_000
"""ImageNet, the largest data set, has 1.3 million files."""
MAX_RATIO = 8
"""How much larger than its archive the content may be: images hardly compress. Small archives may grow to 1 GiB."""
_SMALL = 1 << 30
_CHUNK = 1 << 20
_LONGEST = 4096

_DAMAGED = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, gzip.BadGzipFile, EOFError, KeyError)


def is_archive(path: Path) -> bool:
    """Return whether the name is that of an archive that `unpack` reads."""
    return path.name.lower().endswith((".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz"))


def unpack(
    archive: Path,
    folder: Path,
    *,
    max_bytes: int | None = None,
    max_files: int = MAX_FILES,
    on_bytes: Callable[[int], None] = lambda _count: None,
) -> int:
    """Unpack a zip or tar archive into `folder`, which should be empty, and return the number of files.

    Permissions and owners of the archive are ignored, and links are never created: a symbolic link that points inside
    is skipped, a hard link becomes a copy. Files unpacked before an error are left: use a folder that can be deleted.

    Args:
        max_bytes: the largest total size of the content; by default 8 times the archive, at least 1 GiB.
        on_bytes: called with the number of bytes after each block that was written.

    Raises:
        DownloadError: the archive is damaged or encrypted, or a member leaves the folder, links out of it, is a device,
            appears twice, or exceeds a limit.
    """
    limit = max(_SMALL, MAX_RATIO * archive.stat().st_size) if max_bytes is None else max_bytes
    written = count = 0
    try:
        with closing(_members(archive, folder)) as members:
            for name, open_member in members:
                count += open_member is not None
                if count > max_files:
                    raise _refused(archive, f"holds more than {max_files} files")
                target = _create(archive, folder, name, is_folder=open_member is None)
                if target is None or open_member is None:
                    continue
                # None: a hard link to a folder.
                with target, open_member() or io.BytesIO() as source:
                    while block := source.read(_CHUNK):
                        # Counted as they come: the sizes that an archive declares may be wrong.
                        written += len(block)
                        if written > limit:
                            raise _refused(archive, f"unpacks to more than {limit} bytes (at {name!r})")
                        target.write(block)
                        on_bytes(len(block))
    except _DAMAGED as error:
        raise DownloadError(f"{archive}: is damaged or not an archive ({error}); fetch it again") from error
    except (NotImplementedError, RuntimeError) as error:
        raise DownloadError(f"{archive}: cannot be unpacked ({error}); unpack it by hand") from error
    except OSError as error:
        raise DownloadError(f"{archive}: cannot be unpacked in {folder} ({error}); make room, and repeat") from error
    return count


def _members(archive: Path, folder: Path) -> Generator[tuple[str, Callable[[], IO[bytes] | None] | None], None, None]:
    """Yield the name of each folder and file, and how to open a file; raise at what does not belong in an archive."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            for info in opened.infolist():
                kind = stat.S_IFMT(info.external_attr >> 16)
                if kind == stat.S_IFLNK and not info.is_dir():
                    with opened.open(info) as file:
                        link = file.read(_LONGEST).decode("utf-8", "replace")
                    _safe_path(archive, info.filename, info.filename)
                    _safe_path(archive, info.filename, os.path.normpath(os.path.join(info.filename, "..", link)))
                elif kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                    raise _refused(archive, f"member {info.filename!r} is a device or pipe")
                else:
                    yield info.filename, None if info.is_dir() else partial(opened.open, info)
        return
    with tarfile.open(archive, "r:*") as tar:
        for member in tar:
            try:
                tarfile.data_filter(member, str(folder))
            except tarfile.SpecialFileError as error:
                raise _refused(archive, f"member {member.name!r} is a device or pipe") from error
            except tarfile.FilterError as error:
                raise _refused(archive, f"member {member.name!r} leaves its folder") from error
            if not member.issym():
                yield member.name, None if member.isdir() else partial(tar.extractfile, member)


def _create(archive: Path, folder: Path, name: str, *, is_folder: bool) -> IO[bytes] | None:
    """Create the folder of this name, or a new file in its folder."""
    path = folder.joinpath(_safe_path(archive, name, name))
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
    if path.is_absolute() or ".." in path.parts or "\0" in text or (path.parts and path.parts[0].endswith(":")):
        raise _refused(archive, f"member {name!r} leaves its folder ({text!r})")
    if len(text) > _LONGEST or any(len(part.encode("utf-8", "surrogateescape")) > 255 for part in path.parts):
        raise _refused(archive, f"member {name[:60]!r}... has too long a name")
    return path


def _refused(archive: Path, problem: str) -> DownloadError:
    return DownloadError(f"{archive}: {problem}; it is not what was published")
