"""Zip and tar archives of class folders."""

import logging
import os
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from operator import itemgetter
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from maple.data.folders.listing import is_ignored, list_folder
from maple.data.images.formats import (
    HEAD_BYTES,
    format_of,
    has_image_name,
    is_image_file,
    is_read,
    probable_format,
    why_unread,
)
from maple.data.published.unpack import DAMAGED, UNPUBLISHED, is_archive, unpack, zip_names
from maple.data.sources.rows import MAX_IMAGE_BYTES, Columns, Row, Source, file_state
from maple.errors import DataError, DownloadError, ImageError, pointer_in, shortened_list

logger = logging.getLogger(__name__)

_MOST_FILES = 2_000_000
_MOST_RATIO = 100
_LEAST_LIMIT = 1 << 30


class ArchiveSource(Source):
    """An archive that holds what a folder of images would.

    Example:
        >>> [row.name for row in ArchiveSource("pets.zip", Path("pets.zip")).rows(Columns(), labelled=False)]
        ['pets.zip#cat/1.jpg', 'pets.zip#dog/1.jpg']
    """

    def __init__(self, text: str, path: Path, note: str = "") -> None:
        self.text, self.path, self.note = text, path, note

    def identity(self) -> Mapping[str, Any]:
        # Names of zip archives were once read in another encoding: what was unpacked then is not used.
        names = {"names": "UTF-8"} if self._is_zip else {}
        return {"archive": [str(self.path.resolve()), *file_state(self.path)], **names}

    @cached_property
    def _is_zip(self) -> bool:
        with self.path.open("rb") as file:
            return file.read(4) in (b"PK\3\4", b"PK\5\6")

    def findings(self) -> list[tuple[str, str, str]]:
        """Return the kind, the level and the text of what is unusual about an archive that was unpacked."""
        if not self._is_zip:
            return []
        with zipfile.ZipFile(self.path) as archive:
            _, problem = zip_names(archive.infolist())
        advice = ", or give the names of classes with --class-names"
        return [("unknown encoding", "warning", problem + advice)] if problem else []

    def unpack_into(self, folder: Path) -> Path:
        """Unpack into a new folder, and return the folder in it that holds the class folders, or a table.

        Raises:
            DataError: the archive is damaged, encrypted or unsafe, or holds only other archives, or no images.
        """
        size = self.path.stat().st_size
        try:
            unpack(self.path, folder, max_bytes=max(_LEAST_LIMIT, _MOST_RATIO * size), max_files=_MOST_FILES)
        except DownloadError as error:
            # A user's own archive was not published.
            raise DataError(
                str(error).replace(UNPUBLISHED, "it is not unpacked; make it again without that")
            ) from error
        # An archive of a folder holds that folder, perhaps in another one of the same name.
        while True:
            children = list_folder(folder)
            inner = [child for child in children if child.is_dir()]
            if len(inner) != 1 or any(is_image_file(child) for child in children if not child.is_dir()):
                break
            if not any(child.is_dir() for child in list_folder(inner[0])) and not _tables(inner[0]):
                break
            folder = inner[0]
        if not any(child.is_dir() for child in children) and not _tables(folder):
            names = sorted(child.name for child in children)
            if archives := [name for name in names if is_archive(Path(name))]:
                raise DataError(
                    f"{self.text}: holds no images but archives ({shortened_list(archives)}); unpack it, and give one "
                    "of these, or a folder of class folders"
                )
            held = f"{len(names)} files ({shortened_list(names)})" if names else "nothing"
            raise DataError(
                f"{self.text}: holds {held} but no class folders; put the images of each class into their own folder: "
                "CLASS/image.jpg"
            )
        return folder

    def rows(self, columns: Columns, *, labelled: bool) -> Iterator[Row]:
        del columns
        try:
            for name, size, open_member in _zip_members(self.path) if self._is_zip else _tar_members(self.path):
                path = PurePosixPath(name.replace("\\", "/")).as_posix()  # without "./", as `tar -C FOLDER .` writes it
                if any(map(is_ignored, path.split("/"))):
                    continue
                where = f"{self.text}#{path}"
                kind = probable_format(path, b"")
                content: bytes | DataError
                try:
                    with open_member() as file:
                        head = file.read(HEAD_BYTES)
                        content_kind = format_of(head)
                        kind = kind or content_kind
                        if not kind:
                            continue
                        if not has_image_name(path) and not is_read(content_kind):
                            raise ImageError(f"{where}: {why_unread(head, format_of(head, short=True), path)}")
                        if size > MAX_IMAGE_BYTES:
                            raise ImageError(f"{where}: has {size:,} bytes, too many for an image; remove it")
                        content = head + file.read()
                except DataError as error:
                    content = error
                except (*DAMAGED, NotImplementedError, RuntimeError) as error:
                    if not self._is_zip:  # nothing after a damaged member of a tar archive can be found
                        raise
                    if not kind:
                        continue
                    content = DataError(f"{where}: cannot be read, it is damaged or encrypted ({error})")
                yield Row(where, "", os.path.basename(os.path.dirname(path)) or None if labelled else None, content)
        except (*DAMAGED, NotImplementedError, RuntimeError, OSError) as error:
            if problem := pointer_in(self.path):
                raise DataError(f"{self.path}: is {problem}") from error
            raise DataError(
                f"{self.path}: cannot be read, it is damaged or encrypted ({error}); make it again"
            ) from error


def _tables(folder: Path) -> list[Path]:
    return [child for child in list_folder(folder) if child.suffix.lower() in (".csv", ".tsv", ".jsonl", ".parquet")]


def _zip_members(path: Path) -> Iterator[tuple[str, int, Callable[[], IO[bytes]]]]:
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        names, problem = zip_names(members)
        if problem:
            logger.warning("%s: %s", path, problem)
        for name, info in sorted(zip(names, members, strict=True), key=itemgetter(0)):
            if not info.is_dir():
                yield name, info.file_size, partial(archive.open, info)


def _tar_members(path: Path) -> Iterator[tuple[str, int, Callable[[], IO[bytes]]]]:
    with tarfile.open(path, "r|*") as archive:
        for member in archive:
            archive.members = []  # type: ignore[attr-defined]  # which tarfile would keep
            if member.isreg():
                yield member.name, member.size, cast(Callable[[], IO[bytes]], partial(archive.extractfile, member))
